"""`FILE.py:FUNCTION` on the command line → what the user's own function returns."""

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

from twofour.errors import InputError, MissingExtraError, UserCodeError, nearest
from twofour.sources.torchvision_compat import import_torchvision
from twofour.sources.user_code import interrupts_noted, raised_text


class _Loader(SourceFileLoader):
    """Leaves no `__pycache__` beside the user's file."""

    def set_data(self, path: str, data: Any, *, _mode: int = 0o666) -> None:
        """Write nothing."""


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
    module_spec = importlib.util.spec_from_file_location(path.stem, path, loader=_Loader(path.stem, str(path)))
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.path.insert(0, str(path.absolute().parent))
    try:
        with _one_sentence(f"file {file!r} cannot be run"):
            _mend_torchvision(path)
            module_spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    function = getattr(module, name, None)
    if not callable(function):
        known = [n for n, value in vars(module).items() if inspect.isfunction(value)]
        raise InputError(f"file {file!r} has no function {name!r}, it has {known}{nearest(name, known)}")
    return function  # type: ignore[no-any-return]


def _mend_torchvision(path: Path) -> None:
    """Import torchvision in the way that mends it, if the file names it or a package that needs it: its own import would fail."""
    text = path.read_text(encoding="utf-8", errors="ignore")
    if any(name in text for name in ("torchvision", "timm")):
        with suppress(MissingExtraError):
            import_torchvision()


@contextmanager
def _one_sentence(what: str) -> Iterator[None]:
    """Run the user's file or function; whatever it raises, an exit or an interrupt of its own included, becomes one sentence."""
    with interrupts_noted() as pressed:
        try:
            yield
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            if pressed and isinstance(error, KeyboardInterrupt):
                raise
            raise UserCodeError(f"{what}: {raised_text(error)}") from error


def call_function(spec: str, **offered: Any) -> Any:
    """Call the function of `spec` with those of `offered` that it takes by name.

    Raises:
        InputError: as `load_function`, or the function itself fails.
    """
    function = load_function(spec)
    with _one_sentence(f"function {spec!r} failed"):
        takes = inspect.signature(function).parameters
        return function(**{name: value for name, value in offered.items() if name in takes})
