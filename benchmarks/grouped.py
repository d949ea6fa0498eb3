"""Times the grouped convolutions of ResNeXt-101_32x8d: the candidates of our kernels and cuDNN's tried plans, in one process.

Times are burst medians by `timing/gpu.py` (CUDA graph, operands rotated over 3 x L2). cuDNN's plans are tried in child processes first;
those that ran are timed here. Prints a line a layer and the sums by count; `--json FILE` adds the rows to those of the file (conv_rows.py).

    python benchmarks/grouped.py [--batches 64,256] [--dtype fp16] [--configs N] [--no-cudnn] [--json results/nvidia-h200/conv.json]

`--configs N` times the modelled best N of all configs instead of the candidates: what the model of the contract is set by.
"""

import argparse
import time
from pathlib import Path

import conv_rows
from conv_rows import Row, say, total_line

from twofour.builder.tactics.bench import Bench
from twofour.builder.tactics.untrusted import Outcome, Trial, try_plans
from twofour.builder.tactics.ways import Way, tried_ways
from twofour.jit.cache import fill_cache
from twofour.jit.driver import num_sms
from twofour.kernels import grouped
from twofour.kernels.conv.contract import Epilogue, Problem
from twofour.kernels.conv.cudnn import BY_GROUP
from twofour.kernels.families import OURS
from twofour.kernels.launchable import kernel_source
from twofour.timing.gpu import Stopwatch

NET = "ResNeXt-101_32x8d"
# channels, pixels of a side, stride, layers of the network
LAYERS = [(256, 56, 1, 3), (512, 56, 2, 1), (512, 28, 1, 3), (1024, 28, 2, 1), (1024, 14, 1, 22), (2048, 14, 2, 1), (2048, 7, 1, 2)]
GROUPS = 32


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


def show(row: Row) -> None:
    """Print a layer's line, and our configs from the fastest on."""
    limit, ours, cudnn = row["limit_us"], row["ours_dense_us"] or float("nan"), row["cudnn_us"] or float("nan")
    (height, width), stride = row["pixels"], row["stride"][0]
    say(
        f"{row['batch']:4d} x {height:2d}x{width:2d} x {row['in']:4d} stride {stride} (x{row['count']}): limit {limit:6.1f} | "
        f"ours {ours:6.1f} = {ours / limit:.2f} limits ({row['config']}) | {row['cudnn_plan']} {cudnn:6.1f} = {cudnn / ours:.2f} ours"
    )
    ranked = sorted((us, name) for name, us in row["times_us"].items() if name.startswith(OURS))
    say("      " + ", ".join(f"[{name.removeprefix(f'{OURS} grouped ')}] {us:.1f}" for us, name in ranked))
    for way, reason in row["left_out"].items():
        say(f"      left out {way}: {reason[:160]}")


def main() -> None:
    """Time every layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="64,256")
    parser.add_argument("--dtype", default="fp16")
    parser.add_argument("--configs", type=int, help="the modelled best of all configs, so many a layer, instead of the candidates")
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
    configs = {p: grouped.every(p, sms)[: options.configs] if options.configs else grouped.candidates(p, sms) for p, _ in asked}
    ways = {p: [Way("grouped", OURS, p, c) for c in listed] for p, listed in configs.items()}
    made = fill_cache(kernel_source("grouped", p, way.config, sms) for p, listed in ways.items() for way in listed)
    say(f"{made} kernels compiled after {time.perf_counter() - begin:.0f} s")
    rows = []
    for p, count in asked:
        left: dict[str, str] = {}
        listed = ways[p]
        for trial, outcome in outcomes:
            if trial.problem == p:
                listed += tried_ways(trial, outcome, left)
        rows.append(conv_rows.row_of(NET, count, "grouped", p, bench.time(listed), left))
        show(rows[-1])
    for batch in batches:
        say(total_line([row for row in rows if row["batch"] == batch]))
    if options.json:
        conv_rows.add(options.json, conv_rows.machine(bench.watch), conv_rows.head(), rows)
    say(f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
