"""`prune_files`: a checkpoint of any size pruned on disk, a few mebibytes of it in memory at a time."""

import hashlib
import json
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from twofour.errors import InputError
from twofour.pattern import Pattern, select
from twofour.pattern.mask import COMPILED_FROM, compiled_loops
from twofour.pruning.names import examine_names
from twofour.pruning.record import LayerRecord, Pruning
from twofour.pruning.shards import FLOAT_BYTES, Entry, Shard, find_shards, pieces, require_size, sha256_of, write_all, write_aside
from twofour.version import __version__

Array = npt.NDArray[Any]

JOURNAL = "twofour.pruning.json"
SCHEMA = 1
PIECE_BYTES = 1 << 20
PIECES_IN_FLIGHT = 3
# Weights in other formats would be dense copies beside the pruned ones.
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".ot", ".bin.index.json")

# (name of the shard, bytes done, bytes in all), over the whole set.
Progress = Callable[[str, int, int], None]


def prune_files(
    source: str | Path,
    out: str | Path,
    *,
    pattern: str | Pattern = "2:4",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    progress: Progress | None = None,
) -> Pruning:
    """Prune the safetensors files of `source` by magnitude into the folder `out` and return the record.

    Names, dtypes, metadata, the order of tensors and the index stay byte for byte; pruned values become +0. Other files are copied,
    weights in other formats are not. A run that was stopped goes on: a shard is done when its SHA-256 is the one in `out`'s
    `twofour.pruning.json` and its source is unchanged. Every file is written aside and renamed. One process at a time may write `out`.

    Args:
        source: a folder, with an index or without, or one file.
        include: globs of tensors to prune although their name says embedding, norm, classifier or router.
        exclude: globs of tensors to leave dense.
        progress: called after each piece with the shard's name, bytes done and bytes in all.

    Raises:
        InputError: shards missing or damaged, a tensor with NaN or infinity, a glob that matches nothing, nothing to prune, an `out`
            that holds something else, or a disk that fills. `source` is never written.
            What a refused call made is removed, unless the disk was full.
    """
    source, out, pattern = Path(source), Path(out), Pattern.parse(pattern)
    shards = find_shards(source)
    records = examine_names([entry for shard in shards for entry in shard.entries], pattern, include, exclude)
    if not any(record.eligible for record in records.values()):
        raise InputError(f"checkpoint {str(source)!r} has no tensor that can be {pattern}; {_first_reasons(records)}")
    journal = Journal(out, {"pattern": str(pattern), "include": sorted(include), "exclude": sorted(exclude)}, source)
    total = sum(shard.size for shard in shards)
    done = 0
    if total > COMPILED_FROM:
        compiled_loops()  # pieces are too small to load them by themselves

    def advance(name: str, count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(name, done, total)

    before = {path.name for path in out.iterdir()} if out.is_dir() else None
    try:
        out.mkdir(parents=True, exist_ok=True)
        notes = _copy_others(source, out)
        for shard in shards:
            if journal.has(shard):
                advance(shard.path.name, shard.size)
            else:
                journal.add(shard, *_prune_shard(shard, out / shard.path.name, pattern, records, advance))
        journal.finish()
    except InputError:
        # Not a set that a second call could finish: what this call made would be half a checkpoint that looks like one.
        journal.forget(_remove_new(out, before))
        raise
    except OSError as error:
        raise InputError(
            f"prune_files cannot write {str(out)!r}: {error.strerror or error}; what is finished stays and the same call goes on from there"
        ) from error
    kept = journal.kept_magnitudes()
    layers = tuple(replace(r, kept_magnitude=kept[name]) if r.eligible else r for name, r in records.items())
    return Pruning("magnitude", layers, notes=tuple(notes), pattern=str(pattern))


def _remove_new(out: Path, before: set[str] | None) -> set[str]:
    """Remove what is not in `before`, and the folder if there was none; return the names of the files removed."""
    removed = {path.name for path in out.iterdir() if path.name not in (before or ())}
    for name in removed:
        (out / name).unlink()
    if before is None:
        out.rmdir()
    return removed


def _first_reasons(records: dict[str, LayerRecord]) -> str:
    return "; ".join(f"{r.name}: {r.reason}" for r in list(records.values())[:3]) or "it holds no tensor of two axes"


class Journal:
    """`twofour.pruning.json` of the output folder: the options, and for each finished shard its source, digest and kept magnitudes."""

    def __init__(self, out: Path, options: dict[str, Any], source: Path) -> None:
        self.path = out / JOURNAL
        self.value: dict[str, Any] = {"schema": SCHEMA, "twofour": __version__, "complete": False, "options": options, "shards": {}}
        folder = source if source.is_dir() else source.parent
        if out.exists() and not out.is_dir():
            raise InputError(f"prune_files: out {str(out)!r} is a file, expected a folder")
        if out.resolve() == folder.resolve():
            raise InputError(f"prune_files: out {str(out)!r} is the source itself, expected another folder")
        if not self.path.is_file():
            foreign = next((p.name for p in out.glob("*.safetensors")), None) if out.is_dir() else None
            if foreign:
                raise InputError(f"prune_files: out {str(out)!r} already holds {foreign!r}, expected an empty folder or one begun here")
            return
        try:
            value = json.loads(self.path.read_bytes())
            begun, shards = value["options"], dict(value["shards"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"journal {str(self.path)!r} is damaged ({error}); delete the folder and start again") from error
        if value.get("schema") != SCHEMA or begun != options:
            raise InputError(f"prune_files: out {str(out)!r} was begun with options {begun}, not {options}; choose another folder")
        self.value["shards"] = shards

    def has(self, shard: Shard) -> bool:
        """Whether the shard is finished: unchanged source, and the file on disk has the recorded digest."""
        entry = self.value["shards"].get(shard.path.name)
        target = self.path.with_name(shard.path.name)
        return (
            entry is not None
            and entry["source"] == shard.identity
            and target.is_file()
            and target.stat().st_size == shard.size
            and sha256_of(target) == entry["sha256"]
        )

    def add(self, shard: Shard, sha256: str, kept: dict[str, float]) -> None:
        """Record a finished shard."""
        self.value["shards"][shard.path.name] = {"source": shard.identity, "sha256": sha256, "kept_magnitude": kept}
        write_aside(self.path, json.dumps(self.value, indent=1).encode())

    def forget(self, removed: set[str]) -> None:
        """Drop the record of shards that were removed, if the journal itself was not."""
        if self.path.is_file():
            self.value["shards"] = {name: entry for name, entry in self.value["shards"].items() if name not in removed}
            write_aside(self.path, json.dumps(self.value, indent=1).encode())

    def finish(self) -> None:
        """Record that every shard is there."""
        self.value["complete"] = True
        write_aside(self.path, json.dumps(self.value, indent=1).encode())

    def kept_magnitudes(self) -> dict[str, float]:
        """Return Σ|w kept| / Σ|w| of every pruned tensor."""
        return {name: share for entry in self.value["shards"].values() for name, share in entry["kept_magnitude"].items()}


def _copy_others(source: Path, out: Path) -> list[str]:
    """Copy what is neither safetensors nor weights in another format; return notes on what was not copied."""
    if source.is_file():
        return []
    left = []
    for path in sorted(source.iterdir()):
        if path.suffix == ".safetensors" or path.name == JOURNAL or path.name.startswith("."):
            continue
        if path.is_dir() or path.name.endswith(OTHER_WEIGHTS):
            left.append(path.name)
        else:
            aside = out / f".{path.name}.part"
            try:
                shutil.copyfile(path, aside)
                require_size(aside, path.stat().st_size, out / path.name)
                os.replace(aside, out / path.name)
            finally:
                aside.unlink(missing_ok=True)
    return [f"not copied: {', '.join(left)} (folders, and weights in other formats, which are still dense)"] if left else []


def _prune_shard(
    shard: Shard, target: Path, pattern: Pattern, records: dict[str, LayerRecord], advance: Callable[[str, int], None]
) -> tuple[str, dict[str, float]]:
    """Write the pruned shard aside and rename it; return its SHA-256 and the kept magnitude of each pruned tensor."""
    aside = target.with_name(f".{target.name}.part")
    sha = hashlib.sha256()
    sums: dict[str, list[float]] = {}
    try:
        with shard.path.open("rb", buffering=0) as file, aside.open("wb", buffering=0) as sink:
            with ThreadPoolExecutor(2) as pool:
                for entry, future in _in_order(pool, _jobs(file, shard, pattern, records)):
                    content, kept, total = future.result()
                    sha.update(content)
                    write_all(sink, content)
                    if entry is not None:
                        both = sums.setdefault(entry.name, [0.0, 0.0])
                        both[0] += kept
                        both[1] += total
                    advance(shard.path.name, len(content))
            os.fsync(sink.fileno())
        require_size(aside, shard.size, target)
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)
    return sha.hexdigest(), {name: kept / total if total else 1.0 for name, (kept, total) in sums.items()}


Done = tuple[bytearray, float, float]
Job = tuple[Entry | None, Callable[[], Done]]


def _in_order(pool: ThreadPoolExecutor, jobs: Iterator[Job]) -> Iterator[tuple[Entry | None, "Future[Done]"]]:
    """Run the jobs a few at a time and yield them in their own order."""
    waiting: deque[tuple[Entry | None, Future[Done]]] = deque()
    for entry, job in jobs:
        waiting.append((entry, pool.submit(job)))
        if len(waiting) >= PIECES_IN_FLIGHT:
            yield waiting.popleft()
    yield from waiting


def _jobs(file: BinaryIO, shard: Shard, pattern: Pattern, records: dict[str, LayerRecord]) -> Iterator[Job]:
    """Yield, from the beginning of the file to its end, pieces to be copied (entry None) or pruned."""
    position = 0
    pruned = [e for e in shard.entries if e.name in records and records[e.name].eligible]
    for entry in pruned:
        yield from _copies(file, position, entry.start)
        row_bytes = (entry.stop - entry.start) // entry.shape[0]
        rows = max(1, PIECE_BYTES // row_bytes)
        rows = -(-rows // 4) * 4 if pattern.transposable else rows
        for row, count in pieces(entry, rows):
            content = _read(file, entry.start + row * row_bytes, count * row_bytes)
            yield entry, lambda content=content, entry=entry: pruned_piece(content, entry, pattern)  # type: ignore[misc]
        position = entry.stop
    yield from _copies(file, position, shard.size)


def _copies(file: BinaryIO, start: int, stop: int) -> Iterator[Job]:
    for position in range(start, stop, PIECE_BYTES):
        content = _read(file, position, min(PIECE_BYTES, stop - position))
        yield None, lambda content=content: (content, 0.0, 0.0)  # type: ignore[misc]


def _read(file: BinaryIO, start: int, count: int) -> bytearray:
    content, filled = bytearray(count), 0
    file.seek(start)
    while filled < count:
        got = file.readinto(memoryview(content)[filled:])  # type: ignore[attr-defined]
        if not got:
            raise InputError(f"shard {file.name!r} ends before byte {start + count}, expected a whole file; it changed while being read")
        filled += got
    return content


def pruned_piece(content: bytearray, entry: Entry, pattern: Pattern) -> Done:
    """Prune whole rows of a tensor in place and return them with Σ|w kept| and Σ|w|.

    Raises:
        InputError: a value is NaN or infinite.
    """
    size = FLOAT_BYTES[entry.dtype]
    bits = np.frombuffer(content, np.dtype(f"<u{size}")).reshape(-1, *entry.shape[1:])
    magnitude_bits = bits & bits.dtype.type((1 << (8 * size - 1)) - 1)
    if int(magnitude_bits.max()) >= FIRST_NOT_FINITE[entry.dtype]:
        raise InputError(f"tensor {entry.name!r} holds NaN or infinity, expected finite values; load a sound checkpoint")
    magnitude = values_of(magnitude_bits, entry.dtype)
    kept = pattern.mask(magnitude) if pattern.transposable else select(bits, 1, pattern.n, pattern.m)
    total = sum_of(magnitude)
    np.multiply(bits, kept.view(np.uint8), out=bits, casting="unsafe")
    np.multiply(magnitude, kept, out=magnitude)
    return content, sum_of(magnitude), total


def sum_of(magnitude: Array) -> float:
    """Return the sum in the format of `magnitude`, which is fast, or in float64 where that would overflow."""
    with np.errstate(over="ignore"):
        total = float(magnitude.sum())
    return total if math.isfinite(total) else float(magnitude.sum(dtype=np.float64))


FIRST_NOT_FINITE = {"F64": 0x7FF << 52, "F32": 0xFF << 23, "F16": 0x1F << 10, "BF16": 0xFF << 7, "F8_E4M3": 0x7F, "F8_E5M2": 0x1F << 2}


def fp8_magnitudes(exponent_bits: int, mantissa_bits: int, bias: int) -> npt.NDArray[np.float32]:
    """Return the 128 magnitudes of an fp8 format by their bits: (e ? 2^(e − bias) · (1 + f) : 2^(1 − bias) · f), f = mantissa / 2^bits."""
    bits = np.arange(128)
    exponent, fraction = bits >> mantissa_bits, (bits & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    values = np.where(exponent > 0, np.exp2(exponent - bias) * (1 + fraction), np.exp2(1 - bias) * fraction)
    table: npt.NDArray[np.float32] = values.astype(np.float32)
    return table


FP8 = {"F8_E4M3": fp8_magnitudes(4, 3, 7), "F8_E5M2": fp8_magnitudes(5, 2, 15)}


def values_of(magnitude_bits: Array, dtype: str) -> Array:
    """Return the numbers that the bits stand for, float32, or float64 for F64; exact."""
    if dtype in FP8:
        return FP8[dtype][magnitude_bits]
    if dtype == "BF16":
        return (magnitude_bits.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F16":
        return magnitude_bits.view(np.float16).astype(np.float32)
    return magnitude_bits.view(np.float64 if dtype == "F64" else np.float32)
