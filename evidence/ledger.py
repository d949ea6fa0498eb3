"""Results of accuracy experiments: rows written as soon as they are there, shards of a run, one process a GPU, and their union.

Processes may share a file: each reads it again before it writes, under a lock, so that no row of another is lost.

    python evidence/ledger.py results/GPU/accuracy-cifar.json PART…

adds the rows of the parts to the file.
"""

import argparse
import datetime
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import torch
from accuracy_oneshot import sources_digest
from filelock import FileLock
from torch import nn

import twofour
from twofour.errors import VerificationError
from twofour.files import write_text
from twofour.pattern import count_groups

Row = dict[str, Any]
Key = TypeVar("Key", bound=Hashable)
KEY = ("experiment", "net", "data", "variant", "seed", "recipe")


def key_of(row: Row) -> str:
    """Return what tells a row from others."""
    return json.dumps([row.get(name) for name in KEY], sort_keys=True)


def rows_of(path: Path) -> list[Row]:
    """Return the rows of a file, none if there is no file."""
    return list(json.loads(path.read_text(encoding="utf-8"))["rows"]) if path.exists() else []


def union(*lists: Sequence[Row]) -> list[Row]:
    """Return all rows, of two with one key the first."""
    found: dict[str, Row] = {}
    for row in (row for rows in lists for row in rows):
        found.setdefault(key_of(row), row)
    return list(found.values())


def with_commands(path: Path) -> list[Row]:
    """Return the rows of a file, each with the command it came from; in a row that names none it was the file's."""
    if not path.exists():
        return []
    value = json.loads(path.read_text(encoding="utf-8"))
    return [{"command": value["command"], **row} for row in value["rows"]]


def lock_of(out: Path) -> FileLock:
    """Return the lock of a file of results, kept beside those of other files and not beside the results."""
    name = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]
    return FileLock(Path(tempfile.gettempdir()) / f"twofour-results-{name}.lock")


def write(path: Path, rows: Sequence[Row], command: str) -> None:
    """Write the file aside and rename it."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    head = {
        "schema": 1,
        "kind": "accuracy",
        "machine": {"gpu": gpu, "torch": torch.__version__, "cuda": torch.version.cuda, "twofour": twofour.__version__},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "sources_digest": sources_digest(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({**head, "rows": list(rows)}, indent=1) + "\n")


def pattern_of(model: nn.Module, names: Iterable[str]) -> dict[str, Any]:
    """Return what a row says of the weights named, counted group by group in the network as it is.

    Raises:
        VerificationError: a weight is not 2:4.
    """
    weights, total = dict(model.named_parameters()), 0
    found = {name: count_groups((weights[name].detach() != 0).cpu().numpy()) for name in names}
    for name, count in found.items():
        if not count.is_24:
            raise VerificationError(f"weight {name!r} has {count.obeying} of {count.total} groups 2:4 after training, expected all")
        total += count.total
    return {"pattern": "2:4", "layers_24": len(found), "groups_24": total}


@dataclass
class Record:
    """The rows of one process: those of the file, and its own, which it writes to a file of its own if it is a shard."""

    out: Path
    command: str
    shard: tuple[int, int] = (0, 1)
    earlier: list[Row] = field(default_factory=list)
    own: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.earlier, self.own = rows_of(self.out), []
        if self.path != self.out:
            self.own = rows_of(self.path)

    @property
    def path(self) -> Path:
        """Where this process writes."""
        i, n = self.shard
        return self.out if n == 1 else part(self.out, i, n)

    def find(self, row: Row) -> Row | None:
        """Return the row of that key, if it is there."""
        key = key_of(row)
        return next((r for r in (*self.earlier, *self.own) if key_of(r) == key), None)

    def has(self, row: Row) -> bool:
        """Whether such a row is there."""
        return self.find(row) is not None

    def add(self, *rows: Row) -> None:
        """Write further rows at once."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.own += [{**row, "date": now, "command": self.command} for row in rows if not self.has(row)]
        with lock_of(self.out):
            if self.path == self.out:
                self.earlier = with_commands(self.out)
            write(self.path, union(self.earlier, self.own) if self.path == self.out else self.own, self.command)


def best(arms: Mapping[Key, Sequence[float]], controls: Mapping[Key, Sequence[float]]) -> Key:
    """Return the key whose 2:4 networks or whose control, whichever is worse, reach most on average; of equal ones that of the better 2:4.

    A recipe under which the dense network itself falls makes no fair control, whatever its 2:4 network reaches.
    """
    return max(arms, key=lambda key: (min(fmean(arms[key]), fmean(controls.get(key, arms[key]))), fmean(arms[key])))


def part(out: Path, i: int, n: int) -> Path:
    """Return the file of a shard."""
    return out.with_name(f"{out.name}.part{i}of{n}")


def merge(out: Path, parts: Sequence[Path] | None = None) -> None:
    """Add the rows of the parts, of all that lie there where none are named, to the file and remove the parts."""
    with lock_of(out):
        present = [path for path in (sorted(out.parent.glob(f"{out.name}.part*of*")) if parts is None else parts) if path.exists()]
        if not present:
            return
        command = json.loads(present[0].read_text(encoding="utf-8"))["command"]
        write(out, union(with_commands(out), *map(with_commands, present)), command)
        for path in present:
            path.unlink()


def add_arguments(parser: argparse.ArgumentParser, *, seeds: int) -> None:
    """Add what every experiment takes."""
    parser.add_argument("folder", type=Path, help="the data")
    parser.add_argument("out", type=Path, help="the file of results; what is in it already is not trained again")
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--gpus", type=int, default=1, help="processes, one a GPU, which share the seeds")
    parser.add_argument("--per-gpu", type=int, default=1, help="processes that share a GPU, where one leaves it waiting")
    parser.add_argument("--shard", type=_shard, default=(0, 1), metavar="I/N", help="only the seeds I, I + N, …; to a file of its own")
    parser.add_argument("--minutes", type=float, default=1e6, help="no epoch begins after this; the unfinished is kept and gone on with")
    parser.add_argument("--kept", type=Path, default=Path("runs/evidence"), help="where dense networks and unfinished trainings lie")
    parser.add_argument("--images", type=int, help="only the first of the training data, for a trial of the script")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every training of a fleet takes besides its recipe."""
    parser.add_argument("--fleet", type=int, default=10, help="networks trained at once")
    parser.add_argument("--compile", choices=["blocks", "whole", "off"], default="blocks", help="what is compiled at once, on a GPU")
    parser.add_argument("--dense-epochs", type=int, help="of the dense networks trained here, where not the usual")


def _shard(text: str) -> tuple[int, int]:
    i, n = map(int, text.split("/"))
    if not 0 <= i < n:
        raise argparse.ArgumentTypeError(f"{text!r} is no shard, expected I/N with I from 0 to N - 1")
    return i, n


def command_of(script: str, a: argparse.Namespace, shown: Sequence[str]) -> str:
    """Return the command to run it again: the arguments named, whatever was split over processes."""
    words = [f"python evidence/{script} FOLDER {a.out}"]
    for name in shown:
        value = getattr(a, name)
        if value is True:
            words.append(f"--{name.replace('_', '-')}")
        elif value not in (None, False, []):
            words.append(f"--{name.replace('_', '-')} {' '.join(map(str, value)) if isinstance(value, list) else value}")
    return " ".join(words)


def shared_over_gpus(a: argparse.Namespace) -> bool:
    """If several processes are asked for, run this command once in each, unite their rows and return True.

    What processes of an earlier run left in files of their own is united first, however many they were.
    """
    num = a.gpus * a.per_gpu
    if a.shard != (0, 1):
        return False
    merge(a.out)
    if num == 1:
        return False
    processes = []
    for i in range(num):
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(i % a.gpus)}
        processes.append(subprocess.Popen([sys.executable, *sys.argv, "--shard", f"{i}/{num}"], env=environment))
    codes = [process.wait() for process in processes]
    merge(a.out, [part(a.out, i, num) for i in range(num)])
    if any(codes):
        raise SystemExit(f"the processes ended with {codes}, expected zeros; what they finished is in {a.out}, run it again for the rest")
    return True


STARTED = time.monotonic()


def deadline(a: argparse.Namespace) -> float:
    """Return the `time.monotonic()` at which `--minutes` are over, counted from the start of the process."""
    return STARTED + 60.0 * float(a.minutes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("parts", type=Path, nargs="+")
    a = parser.parse_args()
    merge(a.out, a.parts)


if __name__ == "__main__":
    main()
