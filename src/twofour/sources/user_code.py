"""Code that the user brought (a model, a metric, a loss, a data set): whatever it raises becomes one sentence."""

import signal
import sysconfig
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from twofour.errors import TwofourError, UserCodeError

PACKAGE = str(Path(__file__).parents[1])
LIBRARIES = ("site-packages", "dist-packages")
STANDARD_LIBRARY = sysconfig.get_path("stdlib")


def place_of(error: BaseException) -> str:
    """Return `line N of FILE, in FUNCTION` of the user's innermost frame in a traceback; empty where no frame is the user's."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        inside = (PACKAGE, STANDARD_LIBRARY, "<frozen")
        is_library = any(part in LIBRARIES for part in Path(frame.filename).parts) or frame.filename.startswith(inside)
        if not is_library and Path(frame.filename).is_file():
            return f"line {frame.lineno} of {frame.filename!r}, in {frame.name}"
    return ""


def raised_text(error: BaseException) -> str:
    """Return what was raised and where, for a sentence: `ValueError: text (line 3 of 'net.py', in forward)`."""
    first_line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    place = place_of(error)
    return type(error).__name__ + (f": {first_line}" if first_line else "") + (f" ({place})" if place else "")


@contextmanager
def user_code(what: str) -> Iterator[None]:
    """Run the body, which calls the user's code; `what` names it in the error.

    Our own errors, Ctrl-C and a lack of memory pass as they are.

    Raises:
        UserCodeError: the body raised anything else, an exit included.
    """
    try:
        yield
    except (TwofourError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        raise UserCodeError(f"{what} raised {raised_text(error)}; mend it, --debug shows the traceback") from error


@contextmanager
def interrupts_noted() -> Iterator[list[int]]:
    """Give a list that holds a signal once Ctrl-C was pressed, so that code that raises KeyboardInterrupt by itself can be told from it."""
    noted: list[int] = []
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield noted
        return

    def note(number: int, frame: FrameType | None) -> Any:
        noted.append(number)
        return handler(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        if signal.getsignal(signal.SIGINT) is note:
            signal.signal(signal.SIGINT, handler)
