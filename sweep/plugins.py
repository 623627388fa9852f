"""A user's own classes, named `module:Class` in the spec."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

from sweep.errors import SpecError


def make(name: str, key: str, **options: Any) -> Any:
    """Makes an object of the class `module:Class`, with those of the options that its constructor takes.

    Modules are looked for in the working directory too. `key` is the spec's, for the message. Raises SpecError.
    """
    module, _, member = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        made_by = getattr(importlib.import_module(module), member)
        taken = inspect.signature(made_by).parameters
        any_name = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
        return made_by(**{option: value for option, value in options.items() if any_name or option in taken})
    except Exception as error:  # whatever the user's code raises is the user's to read
        reason = (str(error).strip().splitlines() or [""])[0]
        hint = "module:Class names a class in the working directory or of an installed package"
        raise SpecError(f"{key}: {name} cannot be used: {type(error).__name__}: {reason}", hint) from error
