"""Safetensors files read and written in pieces: the header as it is, then bounded stretches of the data, never a whole tensor.

The library validates a file when it is opened; it offers no writing that does not hold all tensors, so the bytes are streamed here.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from twofour.errors import InputError

# Bytes of an element of the floating formats that can be pruned.
FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
INDEX_SUFFIX = ".safetensors.index.json"


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; `start` and `stop` are bytes from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its tensors in the order of their data, which lies without gaps behind `header_bytes`."""

    path: Path
    header_bytes: int
    entries: tuple[Entry, ...]
    size: int

    @property
    def identity(self) -> str:
        """Size, time of last change and a digest of the header: another file, or the same one rewritten, differs."""
        with self.path.open("rb") as file:
            header = file.read(self.header_bytes)
        return f"{self.size} {self.path.stat().st_mtime_ns} {hashlib.sha256(header).hexdigest()}"


def read_shard(path: Path) -> Shard:
    """Return the layout of the file at `path`, validated by the safetensors library; no tensor is read.

    Raises:
        InputError: missing, not a safetensors file, cut short or otherwise damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InputError(f"shard {str(path)!r} is missing, expected every file of the set; copy or download it again")
    try:
        with safe_open(path, "np"):
            pass
        with path.open("rb") as file:
            header_bytes = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_bytes - 8))
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"shard {str(path)!r} is damaged, expected a whole safetensors file: {error}; copy or download it again"
        ) from error
    header.pop("__metadata__", None)
    entries = [
        Entry(name, about["dtype"], tuple(about["shape"]), *(header_bytes + offset for offset in about["data_offsets"]))
        for name, about in header.items()
    ]
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    return Shard(path, header_bytes, tuple(entries), path.stat().st_size)


def find_shards(source: Path) -> list[Shard]:
    """Return the files of a checkpoint: those its index names, else every `*.safetensors` of the folder, or the file itself.

    Raises:
        InputError: none there, one missing or damaged, a tensor in two of them, or an index that disagrees with the files.
    """
    if source.is_file():
        return [read_shard(source)]
    if not source.is_dir():
        raise InputError(f"checkpoint {str(source)!r} does not exist, expected a folder with safetensors files or one such file")
    indices = sorted(source.glob(f"*{INDEX_SUFFIX}"))
    if not indices:
        paths = sorted(source.glob("*.safetensors"))
        if not paths:
            raise InputError(f"checkpoint {str(source)!r} holds no *.safetensors file; convert it to safetensors first")
        return _without_duplicates([read_shard(path) for path in paths])
    shards: dict[str, Shard] = {}
    for index in indices:
        try:
            file_of = dict(json.loads(index.read_bytes())["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"index {str(index)!r} is damaged, expected a JSON object with a weight_map ({error})") from error
        for name in sorted(set(file_of.values())):
            if Path(name).name != name:
                raise InputError(f"index {str(index)!r} names the shard {name!r}, expected a file of the same folder")
            shards[name] = read_shard(source / name)
            held = {entry.name for entry in shards[name].entries}
            absent = sorted(tensor for tensor, file in file_of.items() if file == name and tensor not in held)
            if absent:
                raise InputError(f"shard {name!r} lacks {absent[0]!r} that the index {index.name!r} places there; copy the set again")
    return _without_duplicates(list(shards.values()))


def _without_duplicates(shards: list[Shard]) -> list[Shard]:
    file_of: dict[str, str] = {}
    for shard in shards:
        for entry in shard.entries:
            first = file_of.setdefault(entry.name, shard.path.name)
            if first != shard.path.name:
                raise InputError(
                    f"tensor {entry.name!r} is in {first!r} and in {shard.path.name!r}, expected it once; give one of the files alone"
                )
    return shards


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pieces(entry: Entry, rows_at_once: int) -> Iterator[tuple[int, int]]:
    """Yield (first row, number of rows) over axis 0 of the tensor."""
    for row in range(0, entry.shape[0], rows_at_once):
        yield row, min(rows_at_once, entry.shape[0] - row)


def write_all(sink: BinaryIO, content: bytes | bytearray) -> None:
    """Write every byte of `content`; an unbuffered file may take only a part of it at a time.

    Raises:
        InputError: the file takes nothing more.
        OSError: the disk is full or the file may not grow.
    """
    left = memoryview(content)
    while left:
        taken = sink.write(left)
        if not taken:
            raise InputError(f"file {sink.name!r} takes no more bytes with {len(left)} left, expected room for all; free some space")
        left = left[taken:]


def require_size(path: Path, size: int, target: Path) -> None:
    """Raise InputError unless the file at `path`, about to become `target`, has `size` bytes."""
    written = path.stat().st_size
    if written != size:
        raise InputError(f"file {str(target)!r} got {written} bytes, expected {size}; it is discarded, free some space and call again")


def write_aside(path: Path, content: bytes) -> None:
    """Write a small file beside `path` and rename it into place."""
    aside = path.with_name(f".{path.name}.part")
    try:
        aside.write_bytes(content)
        require_size(aside, len(content), path)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
