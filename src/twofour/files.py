"""Files are written aside and renamed, so that no reader ever sees half of one and a failure loses nothing."""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from twofour.errors import InputError


def require_writable(path: str | Path) -> None:
    """Do nothing if a file can be made at `path`; for long work to ask before it begins.

    Raises:
        InputError: it is a folder, or its folder does not exist or is not writable.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise InputError(f"file {str(path)!r} cannot be written: it is a folder; name a file")
        folder = path.absolute().parent
        if not folder.is_dir():
            raise InputError(f"file {str(path)!r} cannot be written: its folder does not exist; make it first")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise InputError(f"file {str(path)!r} cannot be written: its folder is not writable; choose another")
    except OSError as error:
        raise InputError(f"file {str(path)!r} cannot be written: {error.strerror}") from error


@contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """Give the body a path beside `path` to write to; after it, that file takes the place of `path` in one step.

    If the body raises, `path` stays as it was and nothing is left over. Safe with many processes and threads: the last to finish wins.

    Raises:
        InputError: the folder does not exist, is not writable, or the disk is full.
    """
    path = Path(path)
    require_writable(path)
    aside = path.with_name(f".{secrets.randbelow(10**12)}.{path.name}")
    try:
        os.close(os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        # As the system makes it for everyone; what the body puts in its place may be for its owner alone.
        mode = aside.stat().st_mode & 0o777
        yield aside
        aside.chmod(mode)
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        # safetensors tells of the system's error in words of its own.
        if (full := os.strerror(errno.ENOSPC)) in reason:
            reason = f"{full}; free some and try again"
        raise InputError(f"file {str(path)!r} cannot be written: {reason}") from error
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file.

    Raises:
        InputError: as `written_aside`.
    """
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def existing_file(path: str | Path, what: str) -> Path:
    """Return `path` if it is a file that this process may look at; `what` names it in the error.

    Raises:
        InputError: it is missing, no file (a folder, a device), or out of reach (permissions, a name too long).
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise InputError(f"{what} {str(path)!r} is a folder, expected a file")
        if not path.is_file():
            state = "is a device or a pipe, expected a file" if path.exists() else "does not exist"
            raise InputError(f"{what} {str(path)!r} {state}")
    except OSError as error:
        raise InputError(f"{what} {str(path)!r} cannot be read: {error.strerror}") from error
    return path


def refuse_same(out: str | Path, *inputs: str | Path | None) -> None:
    """Do nothing unless `out` is one of `inputs`.

    Raises:
        InputError: writing `out` would destroy an input.
    """
    for path in inputs:
        if path is not None and Path(out).exists() and Path(path).exists() and os.path.samefile(out, path):
            raise InputError(f"output {str(out)!r} is the input, expected another name; nothing is overwritten")


def require_suffix(path: str | Path, suffix: str, option: str) -> None:
    """Do nothing if `path` ends with `suffix`.

    Raises:
        InputError: it does not, so other commands would not know what it holds.
    """
    if Path(path).suffix != suffix:
        raise InputError(f"{option} {str(path)!r} does not end with {suffix}; name it {str(Path(path).with_suffix(suffix))!r}")
