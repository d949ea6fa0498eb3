"""What the stages of a run have finished, on disk, so that a run that was stopped goes on behind them."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from twofour.compress.folder import ARGUMENTS, STATE
from twofour.errors import InputError
from twofour.files import write_text, written_aside
from twofour.pruning import Pruning
from twofour.training import Checkpoint

SCHEMA = 1
KEY = "twofour.pruned"


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"file {str(path)!r} cannot be read: {error.strerror}; check its permissions and the disk") from error


@dataclass(frozen=True)
class Pruned:
    """A network right after pruning: its weights (batch-norm re-estimated where that helps), its record, and its metric then."""

    state: dict[str, Tensor]
    pruning: Pruning
    one_shot: float
    reestimated: float | None

    def save(self, path: Path) -> None:
        """Write it; the masks too, because a kept weight may be zero by itself."""
        from safetensors.torch import save_file

        about = {"pruning": self.pruning.to_json(), "one_shot": self.one_shot, "reestimated": self.reestimated}
        tensors = {f"model/{name}": value for name, value in self.state.items()}
        tensors |= {f"mask/{name}": mask.contiguous() for name, mask in self.pruning.masks.items()}
        with written_aside(path) as aside:
            save_file(tensors, aside, {KEY: json.dumps(about)})

    @classmethod
    def load(cls, path: Path) -> "Pruned":
        """Return what `save` wrote.

        Raises:
            InputError: the file is damaged.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})[KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a safetensors file is no mapping
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise InputError(f"record {str(path)!r} is damaged ({error}); give --overwrite to start anew") from error
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "mask": {}}
        for name, value in tensors.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = value
        record = Pruning.from_json(about["pruning"])
        # The record's order of layers is the masks' order, in which the weights are held.
        masks = {layer.name: parts["mask"][layer.name] for layer in record.pruned}
        return cls(parts["model"], replace(record, masks=masks), about["one_shot"], about["reestimated"])


class Records:
    """The finished records of one run, in a folder of their own inside its output folder; gone once the report stands."""

    def __init__(self, out: Path) -> None:
        self.out, self.folder = out, out / STATE

    def begin(self, arguments: Mapping[str, Any]) -> None:
        """Say whose records these are.

        Raises:
            InputError: the folder cannot be written.
        """
        write_text(self.out / ARGUMENTS, json.dumps({"schema": SCHEMA, "arguments": arguments}, indent=1) + "\n")
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(f"output folder {str(self.out)!r} cannot be written: {error.strerror}; name another --out") from error

    def path(self, name: str) -> Path:
        """Return the path of a record."""
        return self.folder / name

    def checkpoint(self, name: str, make: Callable[[Path], Checkpoint], restored: Callable[[Checkpoint], None]) -> Checkpoint:
        """Return the checkpoint of a finished training, or that of `make`, which is given the file for the state of a training."""
        path, state = self.path(f"{name}.safetensors"), self.path(f"{name}.training")
        if path.exists():
            made = Checkpoint.load(path)
            restored(made)
        else:
            made = make(state)
            made.save(path)
        state.unlink(missing_ok=True)
        return made

    def pruned(self, name: str, make: Callable[[], Pruned]) -> Pruned:
        """Return a finished pruning, or that of `make`."""
        path = self.path(f"{name}.safetensors")
        if path.exists():
            return Pruned.load(path)
        made = make()
        made.save(path)
        return made

    def read(self, name: str) -> Any:
        """Return the JSON value of a record, None where it is not finished or the files that it names have changed.

        Raises:
            InputError: the record is damaged.
        """
        path = self.path(f"{name}.json")
        if not path.exists():
            return None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            files, value = record["files"], record["value"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"record {str(path)!r} is damaged ({error}); give --overwrite to start anew") from error
        whole = all((self.out / file).is_file() and digest(self.out / file) == sha for file, sha in files.items())
        return value if whole else None

    def write(self, name: str, value: Any, *files: Path) -> None:
        """Finish a record: a JSON value and the files that belong to it."""
        digests = {str(file.relative_to(self.out)): digest(file) for file in files}
        write_text(self.path(f"{name}.json"), json.dumps({"value": value, "files": digests}) + "\n")

    def seal(self, names: Sequence[str]) -> None:
        """Write the digests of a run's files into its `run.json`, for `verify`."""
        path = self.out / ARGUMENTS
        stored = json.loads(path.read_text(encoding="utf-8"))
        write_text(path, json.dumps({**stored, "outputs": {name: digest(self.out / name) for name in names}}, indent=1) + "\n")

    def verify(self) -> None:
        """Do nothing if every file of a finished run is there as it was written.

        Raises:
            InputError: one is missing or another; its name is said.
        """
        path = self.out / ARGUMENTS
        for name, sha in json.loads(path.read_text(encoding="utf-8")).get("outputs", {}).items():
            file = self.out / name
            if not file.is_file() or digest(file) != sha:
                what = "is missing" if not file.is_file() else "is not what the run wrote"
                raise InputError(f"compress: file {str(file)!r} of the finished run {what}; give --overwrite to run anew")

    @property
    def hold_progress(self) -> bool:
        """Whether there is anything to go on from: an epoch or a stage that was finished."""
        return self.folder.is_dir() and any(file.name != "seconds.json" for file in self.folder.iterdir())

    def drop(self) -> None:
        """Remove the records; the run is whole without them."""
        shutil.rmtree(self.folder, ignore_errors=True)
