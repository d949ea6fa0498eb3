"""Arrays in files, for `twofour run`."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from twofour.errors import InputError
from twofour.files import written_aside


def read_inputs(path: Path, names: list[str]) -> list[npt.NDArray[Any]]:
    """Return one array a name from a .npy (one input only) or .npz file; object arrays are refused.

    Raises:
        InputError: missing, damaged, or a name is not there.
    """
    if not path.is_file():
        raise InputError(f"run: input file {str(path)!r} does not exist")
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            if len(names) != 1:
                raise InputError(f"run: {str(path)!r} holds one array, the plan takes {len(names)}: {names}; give a .npz")
            return [loaded]
        with loaded:
            missing = [name for name in names if name not in loaded]
            if missing:
                raise InputError(f"run: {str(path)!r} holds {sorted(loaded)}, the plan also needs {missing}")
            return [loaded[name] for name in names]
    except InputError:
        raise
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"run: {str(path)!r} is no .npy or .npz of plain arrays: {error}") from error


def write_outputs(path: Path, arrays: dict[str, npt.NDArray[Any]]) -> None:
    """Write arrays as .npz, aside and renamed.

    Raises:
        InputError: the folder does not exist or cannot be written.
    """
    with written_aside(path) as aside, aside.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
