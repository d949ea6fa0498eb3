"""How far `twofour estimate` is from grouped and depthwise layers that were measured, and which constants would be closest to them.

    python evidence/estimate_layers.py results/nvidia-h200/conv.json [--batches 256 64]

Needs neither GPU nor torch. A layer's measured time is the faster of ours and cuDNN's, which an engine takes. Layers count as often as
their network has them. A constant is shown as it is and with the value whose mean |log(predicted / measured)| is least.
`estimate_networks.py --layers` prints the same.
"""

import argparse
import importlib
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import conv_rows

from twofour.builder.gpus import GPUS, Gpu
from twofour.builder.lower import LayerCall
from twofour.kernels.conv.contract import Problem

estimate: Any = importlib.import_module("twofour.builder.estimate")  # the package's name of it is the function's
Row = dict[str, Any]
SHARES = [0.005 * 1.02**i for i in range(190)]  # of the dense peak
CHANNELS = [float(n) for n in range(8, 257)]


@contextmanager
def constant(name: str, value: float) -> Iterator[None]:
    """Let a constant of the estimate have another value."""
    kept = getattr(estimate, name)
    setattr(estimate, name, value)
    try:
        yield
    finally:
        setattr(estimate, name, kept)


def predicted_us(p: Problem, gpu: Gpu) -> float:
    """Return what `estimate` predicts for a layer."""
    call = LayerCall("", "Conv", "conv", p, {}, flops=p.flops, num_bytes=p.num_bytes)
    return float(estimate.estimate_layer(call, gpu).dense_us)


# family: what is fitted to it, among which values.
FITS = {"grouped": ("LEAST_GROUP", CHANNELS), "depthwise": ("DEPTHWISE_SHARE", SHARES)}


def measured_us(row: Row) -> float:
    """Return the faster of ours and cuDNN's."""
    return min(float(us) for us in (row["ours_dense_us"], row["cudnn_us"]) if us is not None)


def off(rows: Sequence[Row], gpu: Gpu) -> float:
    """Return the mean of |log(predicted / measured)|, layers by their count."""
    logs = [row["count"] * abs(math.log(predicted_us(conv_rows.problem_of(row), gpu) / measured_us(row))) for row in rows]
    return float(sum(logs) / sum(row["count"] for row in rows))


def fitted(rows: Sequence[Row], gpu: Gpu, name: str, values: Sequence[float]) -> tuple[float, float]:
    """Return the value of a constant that comes closest to rows, and how far it is off."""

    def at(value: float) -> float:
        with constant(name, value):
            return off(rows, gpu)

    best = min(values, key=at)
    return best, at(best)


def report(path: Path, batches: Sequence[int]) -> Iterator[str]:
    """Give a line a layer and a line a constant."""
    rows = [row for row in conv_rows.read(path)["rows"] if row["batch"] in batches]
    for family, (name, values) in FITS.items():
        chosen = [row for row in rows if row["family"] == family]
        if not chosen:
            continue
        gpu = next(gpu for name, gpu in GPUS.items() if name in chosen[0]["machine"]["gpu"].split())
        for row in chosen:
            p, us = conv_rows.problem_of(row), measured_us(row)
            shape = f"{p.kernel[0]}x{p.kernel[1]}/{p.strides[0]}, {p.inputs} in {p.groups} groups at {p.height}, batch {p.batch}"
            yield f"{row['net']} {shape}: measured {us:.1f} us, predicted over measured {predicted_us(p, gpu) / us:.2f}"
        best, error = fitted(chosen, gpu, name, values)
        now = off(chosen, gpu)
        yield f"{family}: {name} = {getattr(estimate, name):g} is off by {now:.3f}, {best:.4g} by {error:.3f} (mean |log|)"


def main() -> None:
    """Print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path)
    parser.add_argument("--batches", nargs="+", type=int, default=[256, 64])
    a = parser.parse_args()
    for text in report(a.measured, a.batches):
        sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
