"""The output folder: made once, never mixed with another run."""

from pathlib import Path

from twofour.errors import InputError

MARK = "log.txt"


def prepare(path: Path, overwrite: bool) -> Path:
    """Return the folder at `path`, made if it is missing.

    Raises:
        InputError: it holds files and `overwrite` is off, or what it holds is not a run, or it cannot be made.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"output {str(path)!r} is a file, expected a folder; name another --out")
    held = sorted(p.name for p in path.iterdir()) if path.is_dir() else []
    if held and not overwrite:
        raise InputError(f"output folder {str(path)!r} is not empty ({', '.join(held[:3])} …); name another --out or give --overwrite")
    if held and MARK not in held:
        raise InputError(
            f"output folder {str(path)!r} holds files that no run of twofour wrote ({', '.join(held[:3])}); name another --out"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / MARK).touch()
    except OSError as error:
        raise InputError(f"output folder {str(path)!r} cannot be written: {error.strerror}; name another --out") from error
    return path
