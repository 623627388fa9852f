"""The command line in a process that kills itself at its n-th commit: `python crash_at.py N WHEN ARGUMENTS...`.

WHEN is `before` or `after` the COMMIT. Both databases' clients are hooked from outside; the product has no failpoints.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine

from sweep.cli import main

at, when = int(sys.argv[1]), sys.argv[2]
commits = itertools.count(1)


def count(connection: Any) -> None:
    """Dies at the n-th transaction's end; the event comes before the COMMIT is sent."""
    if next(commits) == at:
        if when == "after":
            connection.connection.dbapi_connection.commit()
        os.kill(os.getpid(), signal.SIGKILL)


event.listen(Engine, "commit", count)
sys.argv = ["sweep", *sys.argv[3:]]
main()
