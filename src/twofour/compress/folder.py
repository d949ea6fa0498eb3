"""The output folder: made once, never mixed with another run, kept goable-on until the report stands."""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from twofour.errors import InputError

MARK, LOCK, ARGUMENTS, STATE = "log.txt", ".lock", "run.json", "state"
# The last is written last: a folder that holds it holds a finished run.
OUTPUTS = ("dense.safetensors", "sparse.safetensors", "dense.onnx", "sparse.onnx", "model.plan", "report.json", "report.html")
LAST_GOOD = "last-good.safetensors"
# What a killed process may have left: see `written_aside`; and what safetensors writes before it renames, whatever its name will be.
ASIDE, NAMELESS = re.compile(r"\.\d+\.(.+)"), re.compile(r"\.tmp[A-Za-z0-9]{6}")
Standing = Literal["new", "unfinished", "finished"]


def _foreign(name: str) -> bool:
    aside = ASIDE.fullmatch(name)
    return (aside[1] if aside else name) not in (*OUTPUTS, MARK, LOCK, ARGUMENTS, STATE, LAST_GOOD)


def prepare(path: Path, arguments: Mapping[str, Any], *, overwrite: bool = False, resume: bool = False) -> Standing:
    """Return what stands at `path`, made if it is missing: nothing, the unfinished run of these arguments, or the finished one.

    With `overwrite`, or where an earlier run left its log only, it counts as new.

    Raises:
        InputError: it holds a run that is neither to be overwritten nor this one, or what it holds is no run, or it cannot be made.
    """
    try:
        if path.exists() and not path.is_dir():
            raise InputError(f"output {str(path)!r} is a file, expected a folder; name another --out")
        held = sorted(p.name for p in path.iterdir()) if path.is_dir() else []
        if MARK in held:
            held = [name for name in held if not NAMELESS.fullmatch(name)]
        if foreign := [name for name in held if _foreign(name)]:
            raise InputError(f"output folder {str(path)!r} holds files that no run of twofour wrote ({foreign[0]} …); name another --out")
        standing = _standing(path, [name for name in held if name not in (MARK, LOCK)], arguments, overwrite, resume)
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        # A name that no system takes, one with a null character, is a ValueError.
        if isinstance(error, InputError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"output folder {str(path)!r} cannot be used: {reason}; name another --out") from error
    return standing


def _standing(path: Path, held: list[str], arguments: Mapping[str, Any], overwrite: bool, resume: bool) -> Standing:
    if overwrite or not held:
        return "new"
    finished = OUTPUTS[-1] in held
    if not resume:
        if finished or ARGUMENTS not in held:
            shown = ", ".join(sorted([*held, MARK])[:3])
            raise InputError(f"output folder {str(path)!r} holds a run ({shown} …); name another --out or give --overwrite")
        raise InputError(
            f"output folder {str(path)!r} holds a run that was stopped; go on with --resume, name another --out or give --overwrite"
        )
    if difference := differing(path / ARGUMENTS, arguments):
        raise InputError(f"output folder {str(path)!r} holds another run: {difference}; give the same arguments or name another --out")
    return "finished" if finished else "unfinished"


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tables as one, with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def differing(path: Path, arguments: Mapping[str, Any]) -> str:
    """Return the first difference between the arguments in a run's `run.json` and these, empty if there is none."""
    try:
        before = flat(json.loads(path.read_text(encoding="utf-8"))["arguments"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"it has no readable {ARGUMENTS}"
    now = flat(json.loads(json.dumps(arguments)))
    for name in [*now, *before]:
        if before.get(name) != now.get(name):
            return f"{name} was {before.get(name)!r}, is {now.get(name)!r} now"
    return ""


def clear(path: Path) -> None:
    """Remove an earlier run's files, the report first, so that what is left is never taken for a finished run."""
    for name in (*reversed(OUTPUTS), ARGUMENTS, LAST_GOOD):
        (path / name).unlink(missing_ok=True)
    shutil.rmtree(path / STATE, ignore_errors=True)


def clear_asides(path: Path) -> None:
    """Remove half-written files of a process that was killed."""
    for folder in (path, path / STATE):
        for file in folder.iterdir() if folder.is_dir() else ():
            if ASIDE.fullmatch(file.name) or NAMELESS.fullmatch(file.name):
                file.unlink(missing_ok=True)


@contextmanager
def only_run_in(path: Path) -> Iterator[None]:
    """Keep other runs out of the folder while the body runs.

    Raises:
        InputError: another run is writing there, or the folder is not writable.
    """
    try:
        with FileLock(path / LOCK, timeout=0):
            clear_asides(path)
            try:
                yield
            finally:
                (path / LOCK).unlink(missing_ok=True)
    except Timeout as error:
        raise InputError(f"output folder {str(path)!r} is being written by another run; wait for it or name another --out") from error
    except PermissionError as error:
        raise InputError(f"output folder {str(path)!r} cannot be written: {error.strerror}; name another --out") from error
