"""Times the grouped convolutions of ResNeXt-101_32x8d: every config of our kernels and cuDNN's tried plans, in one process.

Times are burst medians by `timing/gpu.py` (CUDA graph, operands rotated over 3 x L2). The limit is input and output, each once, at the rate
of a device-to-device copy. cuDNN's plans are tried in child processes first; those that ran are timed here. Prints a line a layer and the
sums by count; `--json FILE` writes all.

    python benchmarks/grouped.py [--batches 64,256] [--dtype fp16] [--configs 8] [--no-cudnn] [--json FILE]
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from twofour.builder.tactics.bench import Bench, Timed
from twofour.builder.tactics.untrusted import Outcome, Trial, try_plans
from twofour.builder.tactics.ways import Way, tried_ways
from twofour.jit.cache import fill_cache
from twofour.jit.driver import num_sms
from twofour.kernels import grouped
from twofour.kernels.conv.contract import Epilogue, Problem
from twofour.kernels.conv.cudnn import BY_GROUP
from twofour.kernels.families import OURS
from twofour.kernels.grouped.source import sources_digest
from twofour.kernels.launchable import kernel_source
from twofour.kernels.records import to_plain
from twofour.timing.gpu import Stopwatch

PEAK_BYTES_A_US = 4.27e6  # device-to-device copy of one H200, read and write
# channels, pixels of a side, stride, layers of the network
LAYERS = [(256, 56, 1, 3), (512, 56, 2, 1), (512, 28, 1, 3), (1024, 28, 2, 1), (1024, 14, 1, 22), (2048, 14, 2, 1), (2048, 7, 1, 2)]
GROUPS = 32


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def layer(batch: int, dtype: str, channels: int, size: int, stride: int) -> Problem:
    """One layer with its bias and ReLU."""
    epilogue = Epilogue("relu", bias=True)
    strides = (stride, stride)
    return Problem(batch, size, size, channels, channels, (3, 3), strides, (1, 1, 1, 1), groups=GROUPS, dtype=dtype, epilogue=epilogue)


def tried(problems: list[Problem], plans: int) -> list[tuple[Trial, Outcome]]:
    """What came of cuDNN's plans of every layer, whole and, where groups are wide enough, group by group; two of each are timed."""
    trials = [Trial("conv", p, 0, plans) for p in problems]
    trials += [Trial("conv", p, BY_GROUP, 1) for p in problems if p.inputs // p.groups >= 32]
    return list(zip(trials, try_plans(trials), strict=True))


def row_of(p: Problem, count: int, timed: list[Timed], left: dict[str, str]) -> dict[str, Any]:
    """A layer's result."""
    times = {str(t.way): t.figure.median_us for t in timed if t.figure is not None}
    spreads = {str(t.way): t.figure.spread for t in timed if t.figure is not None}
    left = left | {str(t.way): t.reason for t in timed if t.figure is None}
    found = {"problem": to_plain(p), "count": count, "limit_us": p.num_bytes / PEAK_BYTES_A_US, "times_us": times, "spreads": spreads}
    return found | {"left_out": left}


def best(row: dict[str, Any], ours: bool) -> tuple[str, float]:
    """The fastest of our kernels or of cuDNN's plans."""
    found = {name: us for name, us in row["times_us"].items() if name.startswith(OURS) == ours}
    return min(found.items(), key=lambda item: item[1]) if found else ("-", float("nan"))


def show(row: dict[str, Any]) -> None:
    """Print a layer's line, and our configs from the fastest on."""
    p = row["problem"]
    (ours, us), (theirs, cudnn) = best(row, True), best(row, False)
    name = f"{p['batch']:4d} x {p['height']:2d}x{p['width']:2d} x {p['inputs']:4d} stride {p['strides'][0]} (x{row['count']})"
    limit = row["limit_us"]
    say(f"{name}: limit {limit:6.1f} | ours {us:6.1f} = {us / limit:.2f} limits ({ours}) | {theirs} {cudnn:6.1f} = {cudnn / us:.2f} ours")
    ranked = sorted((t, n) for n, t in row["times_us"].items() if n.startswith(OURS))
    say("      " + ", ".join(f"[{n.removeprefix(f'{OURS} grouped ')}] {t:.1f}" for t, n in ranked))
    for way, reason in row["left_out"].items():
        say(f"      left out {way}: {reason[:160]}")


def main() -> None:
    """Time every layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="64,256")
    parser.add_argument("--dtype", default="fp16")
    parser.add_argument("--configs", type=int, default=8, help="of our kernels a layer, the modelled best first")
    parser.add_argument("--plans", type=int, default=6, help="of cuDNN tried a layer")
    parser.add_argument("--no-cudnn", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    begin = time.perf_counter()
    batches = [int(batch) for batch in options.batches.split(",")]
    asked = [(layer(batch, options.dtype, *one[:3]), one[3]) for batch in batches for one in LAYERS]
    outcomes = [] if options.no_cudnn else tried([p for p, _ in asked], options.plans)
    say(f"cuDNN's plans tried after {time.perf_counter() - begin:.0f} s")
    bench = Bench(Stopwatch(0), 0)
    sms = num_sms(0)
    ways = {p: [Way("grouped", OURS, p, c) for c in grouped.every(p, sms)[: options.configs]] for p, _ in asked}
    made = fill_cache(kernel_source("grouped", p, way.config, sms) for p, listed in ways.items() for way in listed)
    say(f"{made} kernels compiled after {time.perf_counter() - begin:.0f} s")
    rows = []
    for p, count in asked:
        left: dict[str, str] = {}
        listed = ways[p]
        for trial, outcome in outcomes:
            if trial.problem == p:
                listed += tried_ways(trial, outcome, left)
        rows.append(row_of(p, count, bench.time(listed), left))
        show(rows[-1])
    for batch in batches:
        of_batch = [r for r in rows if r["problem"]["batch"] == batch]
        sums = [sum(r["count"] * one(r) for r in of_batch) for one in (lambda r: r["limit_us"], lambda r: best(r, True)[1])]
        cudnn = sum(r["count"] * best(r, False)[1] for r in of_batch)
        say(f"batch {batch}, by count: limit {sums[0]:.0f} us, ours {sums[1]:.0f}, cuDNN {cudnn:.0f}")
    if options.json:
        head = {"schema": 1, "kind": "grouped", "machine": bench.watch.meter.machine(), "sources_digest": sources_digest()}
        options.json.write_text(json.dumps({**head, "command": " ".join(sys.argv), "rows": rows}, indent=1) + "\n")
    say(f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
