"""Arrays in files, for `twofour run`."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from twofour.errors import InputError
from twofour.files import existing_file, written_aside


def read_inputs(path: Path, names: list[str]) -> list[npt.NDArray[Any]]:
    """Return one array a name from a .npy (one input only) or .npz file; object arrays are refused.

    Raises:
        InputError: missing, damaged, or a name is not there.
    """
    path = existing_file(path, "run: input file")
    try:
        # Mapped, not read: a header that claims more than the file holds is refused before anything is allocated.
        loaded = np.load(path, allow_pickle=False, mmap_mode="r")
        if isinstance(loaded, np.ndarray):
            if len(names) != 1:
                raise InputError(f"run: {str(path)!r} holds one array, the plan takes {len(names)}: {names}; give a .npz")
            return [np.array(loaded)]
        with loaded:
            missing = [name for name in names if name not in loaded]
            if missing:
                raise InputError(f"run: {str(path)!r} holds {sorted(loaded)}, the plan also needs {missing}")
            return [loaded[name] for name in names]
    except InputError:
        raise
    except (ValueError, OSError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        raise InputError(f"run: {str(path)!r} is no .npy or .npz of plain arrays: {error}") from error


def write_outputs(path: Path, arrays: dict[str, npt.NDArray[Any]]) -> None:
    """Write arrays as .npz, aside and renamed.

    Raises:
        InputError: the folder does not exist or cannot be written.
    """
    with written_aside(path) as aside, zipfile.ZipFile(aside, "w") as archive:
        # Written member by member, because numpy.savez takes the names as keywords, and `file` is its own.
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
