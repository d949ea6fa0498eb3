"""`FILE.py:FUNCTION` on the command line → what the user's own function returns."""

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twofour.errors import InputError, nearest


def is_function_spec(spec: str) -> bool:
    """Whether `spec` looks like FILE.py:FUNCTION."""
    return ".py:" in spec


def load_function(spec: str) -> Callable[..., Any]:
    """Return the function that `spec` names; the file is run as a module, its folder importable.

    Raises:
        InputError: the file is missing, fails when it is run, or has no such function.
    """
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise InputError(f"file {file!r} of {spec!r} does not exist")
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.path.insert(0, str(path.absolute().parent))
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        # The user's file may raise anything; its own line is the useful part.
        raise InputError(f"file {file!r} cannot be run: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    function = getattr(module, name, None)
    if not callable(function):
        known = [n for n, value in vars(module).items() if inspect.isfunction(value)]
        raise InputError(f"file {file!r} has no function {name!r}, it has {known}{nearest(name, known)}")
    return function  # type: ignore[no-any-return]


def call_function(spec: str, **offered: Any) -> Any:
    """Call the function of `spec` with those of `offered` that it takes by name.

    Raises:
        InputError: as `load_function`, or the function itself fails.
    """
    function = load_function(spec)
    try:
        takes = inspect.signature(function).parameters
        return function(**{name: value for name, value in offered.items() if name in takes})
    except Exception as error:
        raise InputError(f"function {spec!r} failed: {type(error).__name__}: {error}") from error
