"""Decides: what is tried, how long, for how much. Never imports torch."""

import os

# numpy reads it once, when it is first imported. Here it works on matrices of a few hundred rows, which a thread for
# each core makes slower, most of all beside a worker that trains. What is started from here has its own choice.
_BLAS_THREADS = "OPENBLAS_NUM_THREADS"
_OURS = {_BLAS_THREADS: "1"} if _BLAS_THREADS not in os.environ else {}
os.environ.update(_OURS)


def inherited() -> dict[str, str]:
    """The environment for a process that is started from here: as it was when we were started."""
    return {name: value for name, value in os.environ.items() if name not in _OURS}
