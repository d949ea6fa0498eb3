"""The output folder: made once, never mixed with another run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from twofour.errors import InputError

MARK, LOCK = "log.txt", ".lock"
OUTPUTS = ("dense.safetensors", "sparse.safetensors", "dense.onnx", "sparse.onnx", "model.plan", "report.json", "report.html")


def prepare(path: Path, overwrite: bool) -> Path:
    """Return the folder at `path`, made if it is missing. An earlier run's outputs are removed, so that none outlives its log.

    Raises:
        InputError: it holds a run and `overwrite` is off, or what it holds is not a run, or it cannot be made.
    """
    try:
        if path.exists() and not path.is_dir():
            raise InputError(f"output {str(path)!r} is a file, expected a folder; name another --out")
        held = sorted(p.name for p in path.iterdir()) if path.is_dir() else []
        foreign = [name for name in held if name not in (*OUTPUTS, MARK, LOCK)]
        if foreign:
            raise InputError(f"output folder {str(path)!r} holds files that no run of twofour wrote ({foreign[0]} …); name another --out")
        # A log alone is a run that ended early: nothing is lost by a new one.
        if set(held) - {MARK, LOCK} and not overwrite:
            raise InputError(f"output folder {str(path)!r} holds a run ({', '.join(held[:3])} …); name another --out or give --overwrite")
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output folder {str(path)!r} cannot be used: {error.strerror}; name another --out") from error
    return path


@contextmanager
def only_run_in(path: Path) -> Iterator[None]:
    """Keep other runs out of the folder while the body runs; remove an earlier run's outputs first.

    Raises:
        InputError: another run is writing there, or the folder is not writable.
    """
    try:
        with FileLock(path / LOCK, timeout=0):
            for name in OUTPUTS:
                (path / name).unlink(missing_ok=True)
            try:
                yield
            finally:
                (path / LOCK).unlink(missing_ok=True)
    except Timeout as error:
        raise InputError(f"output folder {str(path)!r} is being written by another run; wait for it or name another --out") from error
    except PermissionError as error:
        raise InputError(f"output folder {str(path)!r} cannot be written: {error.strerror}; name another --out") from error
