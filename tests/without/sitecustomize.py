"""Processes that tests start find neither library: transformers imports both where they are, a second each time."""

import sys

sys.modules.update(bitsandbytes=None, torchao=None)  # type: ignore[arg-type]
