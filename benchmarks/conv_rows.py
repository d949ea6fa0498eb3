"""The rows of results/GPU/conv.json: convolutions of networks, ours beside cuDNN's; how new ones join them and which are stale.

A row is one layer at one batch size with its bias and activation, timed by `timing/gpu.py` in bursts (CUDA graph, operands rotated over
3 x L2). `pixels` is the input's height and width; `count`, how often the network has the layer. `ours_dense_us` and `cudnn_us` are medians
of the fastest of `times_us`, which `config` and `cudnn_plan` name; `ours_sparse_us` is null where 2:4 cannot be used. `torch_us` is torch's
channels-last convolution without bias and activation. `limit_us` is what input, weight and output take, each once, at the rate of a
device-to-device copy. Nothing in this file needs a GPU or torch but `machine`.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from twofour.builder.tactics.bench import Timed
from twofour.errors import InputError, TwofourError
from twofour.files import write_text
from twofour.kernels.conv.contract import Epilogue, Problem
from twofour.kernels.families import OURS
from twofour.kernels.launchable import sources_digests
from twofour.timing.gpu import Stopwatch

SCHEMA, KIND = 1, "conv"
PEAK_BYTES_A_US = 4.27e6  # device-to-device copy of one H200, read and write
NETS = ("ResNeXt-101_32x8d", "MobileNetV2", "EfficientNet-B0", "ConvNeXt-B")
KEY = ("net", "in", "out", "kernel", "stride", "groups", "pixels", "batch", "precision")  # what tells rows apart
Row = dict[str, Any]


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def machine(watch: Stopwatch) -> dict[str, Any]:
    """Return GPU, driver, power limit and the versions of what is timed beside our kernels."""
    import torch

    from twofour.kernels.cudnn import version

    found = watch.meter.machine() | {"cuda": torch.version.cuda, "torch": torch.__version__}
    try:
        return found | {"cudnn": version()}
    except TwofourError:
        return found | {"cudnn": None}


def head() -> dict[str, Any]:
    """Return what all rows of a run carry beside the machine: the date and the command."""
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "command": f"python {' '.join(sys.argv)}"}


def row_of(
    net: str, count: int, family: str, p: Problem, timed: Sequence[Timed], left_out: Mapping[str, str], torch_us: float | None = None
) -> Row:
    """Return a layer's row, but for where and when.

    Args:
        family: whose kernels are ours. timed: these and cuDNN's. left_out: of cuDNN's and torch's, why.
    """
    figures = {str(t.way): t.figure for t in timed if t.figure is not None}
    ours = min((name for name in figures if name.startswith(OURS)), key=lambda name: figures[name].median_us, default=None)
    theirs = min((name for name in figures if not name.startswith(OURS)), key=lambda name: figures[name].median_us, default=None)
    best = {"ours": ours, "cudnn": theirs}
    us = {name: None if way is None else round(figures[way].median_us, 2) for name, way in best.items()}
    return {
        **{"net": net, "in": p.inputs, "out": p.outputs, "kernel": list(p.kernel), "stride": list(p.strides), "groups": p.groups},
        **{"pixels": [p.height, p.width], "pads": list(p.pads), "batch": p.batch, "precision": p.dtype},
        **{"activation": p.epilogue.activation, "count": count},
        **{"family": family, "sources_digest": sources_digests()[family], "limit_us": round(p.num_bytes / PEAK_BYTES_A_US, 2)},
        **{"ours_sparse_us": None, "ours_dense_us": us["ours"], "cudnn_us": us["cudnn"], "torch_us": torch_us},
        "spread": {name: None if way is None else round(figures[way].spread, 4) for name, way in best.items()},
        "n": {name: None if way is None else figures[way].n for name, way in best.items()},
        **{"config": ours, "cudnn_plan": theirs, "times_us": {name: round(f.median_us, 2) for name, f in figures.items()}},
        "left_out": {**left_out, **{str(t.way): t.reason for t in timed if t.figure is None}},
    }


def problem_of(row: Row) -> Problem:
    """Return a row's problem."""
    pads: tuple[int, int, int, int] = tuple(row["pads"])
    kernel, strides = ((row[name][0], row[name][1]) for name in ("kernel", "stride"))
    height, width = row["pixels"]
    epilogue = Epilogue(row["activation"], bias=True)
    p = Problem(row["batch"], height, width, row["in"], row["out"], kernel, strides, pads, groups=row["groups"], epilogue=epilogue)
    return replace(p, dtype=row["precision"])


def read(path: Path) -> dict[str, Any]:
    """Return a results file, an empty one where there is none.

    Raises:
        InputError: it holds something else.
    """
    if not path.is_file():
        return {"schema": SCHEMA, "kind": KIND, "rows": []}
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if value["schema"] == SCHEMA and value["kind"] == KIND:
            return value
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{str(path)!r} is no results file ({error!r}), expected what this command wrote; move it away") from error
    what = f"{value['kind']!r} results of schema {value['schema']}"
    raise InputError(f"{str(path)!r} holds {what}, expected {KIND!r} of {SCHEMA}; move it away")


def key(row: Row) -> str:
    """Return what tells a row apart."""
    return json.dumps([row[name] for name in KEY])


def merged(rows: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Return all rows, a new one in the place of an old one of the same layer; in the order of networks and batch sizes."""
    kept = {key(row): row for row in [*rows, *new]}
    known = {net: number for number, net in enumerate(NETS)}
    return sorted(kept.values(), key=lambda row: (known.get(row["net"], len(NETS)), row["net"], row["precision"], -row["batch"]))


def add(path: Path, where: Mapping[str, Any], run: Mapping[str, Any], new: Sequence[Row]) -> None:
    """Write new rows into the file at once, aside and renamed; several processes may do so.

    Args:
        where: `machine`. run: `head`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        rows = merged(read(path)["rows"], [{**row, "machine": dict(where), **run} for row in new])
        value = {"schema": SCHEMA, "kind": KIND, "machine": dict(where), **run, "rows": rows}
        write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def is_stale(row: Row, sources: Mapping[str, str]) -> bool:
    """Return whether the device sources of a row's kernels have changed since; `sources`: `sources_digests`."""
    return bool(row["sources_digest"] != sources.get(row["family"]))


def sums(rows: Sequence[Row], *names: str) -> list[float | None]:
    """Return the microseconds of a network's layers by count, a column each; None where a layer has none."""
    columns = [[None if row[name] is None else row["count"] * row[name] for row in rows] for name in names]
    return [None if None in column or not column else sum(us for us in column if us is not None) for column in columns]


def total_line(rows: Sequence[Row]) -> str:
    """Return the times of all layers of one network and batch size, as a benchmark prints them."""
    names = ("limit_us", "ours_dense_us", "cudnn_us", "torch_us")
    found = dict(zip(("limit", "ours", "cuDNN", "torch"), sums(rows, *names), strict=True))
    text = ", ".join(f"{name} {us:.0f}" for name, us in found.items() if us is not None)
    return f"{rows[0]['net']} batch {rows[0]['batch']}, us of all layers by count: {text}"
