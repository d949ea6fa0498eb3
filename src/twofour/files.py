"""Files are written aside and renamed, so that no reader ever sees half of one and a failure loses nothing."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from twofour.errors import InputError


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """Give the body a path beside `path` to write to; after it, that file takes the place of `path` in one step.

    If the body raises, `path` stays as it was and nothing is left over. Safe with many processes: the last to finish wins.

    Raises:
        InputError: the folder does not exist, is not writable, or the disk is full.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    if not path.absolute().parent.is_dir():
        raise InputError(f"file {str(path)!r} cannot be written: its folder does not exist; make it first")
    try:
        yield aside
        aside.chmod(0o666 & ~_umask())
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(f"file {str(path)!r} cannot be written: {reason}") from error
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file.

    Raises:
        InputError: as `written_aside`.
    """
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")
