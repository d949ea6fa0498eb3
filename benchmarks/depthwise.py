"""Times the depthwise convolutions of MobileNetV2, EfficientNet-B0 and ConvNeXt-B, ours beside cuDNN's and torch's, on one Hopper GPU.

Every distinct layer at 224 x 224, fp16, with its bias and activation: each candidate of our two kernels, cuDNN's plans with the epilogue
fused and apart (tried in processes of their own first), all interleaved; and torch's channels-last convolution alone, without bias and
activation. Our results are checked against float64 before they are timed. Times are burst medians by `timing/gpu.py` (CUDA graph, operands
rotated over 3 x L2); the limit is what X and Y take at the copy rate of one H200.

    python benchmarks/depthwise.py [--nets MBV2 EFF CNX] [--batches 256 1] [--plans 3] [--wide] [--no-peer] [--json FILE]

`--wide` times many more configs of ours instead of the candidates: what the model of the contract is set by.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from twofour.builder.tactics.bench import Bench
from twofour.builder.tactics.untrusted import Outcome, Trial, try_plans
from twofour.builder.tactics.ways import Way
from twofour.errors import TwofourError
from twofour.jit.cache import fill_cache
from twofour.kernels import conv, depthwise
from twofour.kernels.conv.cudnn import UNFUSED
from twofour.kernels.cudnn import version
from twofour.kernels.depthwise.contract import bands, footprints, modelled_clocks, walks
from twofour.kernels.families import OURS
from twofour.kernels.launchable import kernel_source, launchable
from twofour.timing.gpu import Candidate, Stopwatch, sets_for

PEAK_BYTES_A_US = 4.27e6  # device-to-device copy of one H200, read and write
CLOCK_MHZ = 1750
ACTIVATION = {"MBV2": "relu6", "EFF": "silu", "CNX": "none"}

# net, channels, kernel, stride, pixels of a side, count
LAYERS = [
    ("MBV2", 32, 3, 1, 112, 1), ("MBV2", 96, 3, 2, 112, 1), ("MBV2", 144, 3, 1, 56, 1), ("MBV2", 144, 3, 2, 56, 1),
    ("MBV2", 192, 3, 1, 28, 2), ("MBV2", 192, 3, 2, 28, 1), ("MBV2", 384, 3, 1, 14, 4), ("MBV2", 576, 3, 1, 14, 2),
    ("MBV2", 576, 3, 2, 14, 1), ("MBV2", 960, 3, 1, 7, 3),
    ("EFF", 32, 3, 1, 112, 1), ("EFF", 96, 3, 2, 112, 1), ("EFF", 144, 3, 1, 56, 1), ("EFF", 144, 5, 2, 56, 1), ("EFF", 240, 5, 1, 28, 1),
    ("EFF", 240, 3, 2, 28, 1), ("EFF", 480, 3, 1, 14, 2), ("EFF", 480, 5, 1, 14, 1), ("EFF", 672, 5, 1, 14, 2), ("EFF", 672, 5, 2, 14, 1),
    ("EFF", 1152, 5, 1, 7, 3), ("EFF", 1152, 3, 1, 7, 1),
    ("CNX", 128, 7, 1, 56, 3), ("CNX", 256, 7, 1, 28, 3), ("CNX", 512, 7, 1, 14, 27), ("CNX", 1024, 7, 1, 7, 3),
]  # fmt: skip


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


@dataclasses.dataclass
class Layer:
    """A layer at one batch size, the configs of ours to time, and what came of trying cuDNN's plans."""

    name: str
    net: str
    count: int
    problem: conv.Problem
    configs: Sequence[depthwise.Config]
    outcomes: list[tuple[int, Outcome]] = dataclasses.field(default_factory=list)


def layers(nets: Sequence[str], batches: Sequence[int], wide: bool) -> list[Layer]:
    """Return what to time."""
    found = []
    for batch in batches:
        for net, channels, kernel, stride, side, count in LAYERS:
            if net in nets:
                epilogue = conv.Epilogue(ACTIVATION[net], bias=True)
                pads, square, strides = (kernel // 2,) * 4, (kernel, kernel), (stride, stride)
                p = conv.Problem(batch, side, side, channels, channels, square, strides, pads, groups=channels, epilogue=epilogue)
                configs = many(p) if wide else depthwise.candidates(p)
                found.append(Layer(f"{net} {channels} {kernel}x{kernel}/{stride} at {side}, batch {batch}", net, count, p, configs))
    return found


def many(p: conv.Problem) -> list[depthwise.Config]:
    """Return of each width of either kernel the three rows that the model thinks best, and all rows of an image."""
    found: list[depthwise.Config] = []
    for group in (*walks(p), *bands(p)):
        legal = [c for c in group if depthwise.why_not(p, c) is None]
        ranked = sorted(legal, key=lambda c: modelled_clocks(p, c))
        if group and group[0].kernel == "band":
            found += ranked[:3]
        else:
            found += [*ranked[:3], *(c for c in legal if c.rows == 0)]
    return list(dict.fromkeys(found))


def check(p: conv.Problem, config: depthwise.Config) -> float:
    """Return the largest error of the first and the last image in units of the bound, at most 1 where the kernel is right."""
    g = torch.Generator("cuda").manual_seed(0)
    sizes = footprints(p)
    x, weight = (torch.randn(sizes[n].elements, device="cuda", generator=g).half() for n in ("x", "weight"))
    weight /= p.kernel[0]
    bias = torch.randn(p.outputs, device="cuda", generator=g)
    d = torch.full((sizes["d"].elements,), float("nan"), device="cuda", dtype=torch.float16)
    addresses = {"x": x.data_ptr(), "weight": weight.data_ptr(), "bias": bias.data_ptr(), "d": d.data_ptr()}
    torch.cuda.synchronize()
    launchable("depthwise", OURS, p, config)(addresses, 0, torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    images = x.view(p.batch, p.height, p.width, p.inputs)[[0, -1]].permute(0, 3, 1, 2).double()
    w = weight.view(*p.kernel, p.inputs).permute(2, 0, 1)[:, None].double()
    y = F.conv2d(images, w, bias.double(), p.strides, p.pads[:2], 1, p.groups)
    size = F.conv2d(images.abs(), w.abs(), bias.double().abs(), p.strides, p.pads[:2], 1, p.groups)
    exact = {"none": lambda t: t, "relu6": F.relu6, "silu": F.silu}[p.epilogue.activation](y)
    found = d.view(p.batch, p.out_height, p.out_width, p.outputs)[[0, -1]].permute(0, 3, 1, 2).double()
    bound = 2.0**-11 * exact.abs() + 2.0**-24 + 5 * p.kernel[0] * p.kernel[1] * 2.0**-24 * size + 1e-5 * (1 + exact.abs())
    worst = float(((found - exact).abs() / bound).max())
    return worst if worst == worst else float("inf")


def torch_us(p: conv.Problem, watch: Stopwatch, rounds: int) -> float:
    """Return the microseconds of torch's channels-last convolution, without bias and activation."""
    sets = sets_for(p.num_bytes, watch.l2_bytes, 6)
    xs = [torch.randn(p.batch, p.inputs, p.height, p.width, device="cuda", dtype=torch.float16) for _ in range(sets)]
    xs = [x.contiguous(memory_format=torch.channels_last) for x in xs]
    weight = torch.randn(p.outputs, 1, *p.kernel, device="cuda", dtype=torch.float16).contiguous(memory_format=torch.channels_last)

    def convolve(i: int) -> torch.Tensor:
        return F.conv2d(xs[i], weight, None, p.strides, p.pads[:2], 1, p.groups)

    for i in range(sets):
        convolve(i)
    torch.cuda.synchronize()

    def enqueue(i: int, stream: int) -> None:
        with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
            convolve(i)

    graph = watch.graph(Candidate("torch", enqueue, sets))
    us = watch.burst([graph], rounds=rounds)[0].median_us
    graph.close()
    return us


def short(config: depthwise.Config) -> str:
    """Return a config in a few letters."""
    return f"{config.kernel[0]}{config.channels}x{config.columns}x{config.rows}" + (f"x{config.images}" if config.images > 1 else "")


def time_layer(layer: Layer, bench: Bench, peer: bool, rounds: int) -> dict[str, Any]:
    """Check and time every way of a layer."""
    p, left_out, names = layer.problem, {}, {}
    ways = []
    for config in layer.configs:
        worst = check(p, config)
        if worst > 1:
            left_out[short(config)] = f"WRONG: {worst:.1f} times the bound"
            continue
        ways.append(Way("depthwise", OURS, p, config))
        names[str(ways[-1])] = short(config)
    for form, outcome in layer.outcomes:
        if outcome.reason is not None:
            left_out[f"cudnn form {form}"] = outcome.reason
        for plan in outcome.best(2):
            ways.append(Way("conv", "cudnn", p, None, form + plan))
            names[str(ways[-1])] = f"cudnn{plan}{'+' if form else ''}"
    torch.cuda.empty_cache()
    times: dict[str, float] = {}
    for timed in bench.time(ways):
        name = names[str(timed.way)]
        if timed.figure is None:
            left_out[name] = timed.reason
        else:
            times[name] = round(timed.figure.median_us, 2)
    if peer:
        try:
            times["torch"] = round(torch_us(p, bench.watch, rounds), 2)
        except (RuntimeError, TwofourError) as e:
            left_out["torch"] = str(e).splitlines()[0]
    modelled = {short(c): round(modelled_clocks(p, c) / CLOCK_MHZ, 2) for c in layer.configs}
    limit = 2 * p.inputs * p.batch * (p.height * p.width + p.out_height * p.out_width) / PEAK_BYTES_A_US
    row = {"name": layer.name, "net": layer.net, "batch": p.batch, "count": layer.count, "limit_us": round(limit, 2)}
    return row | {"times_us": times, "modelled_us": modelled, "left_out": left_out}


def best_of(row: dict[str, Any], *prefixes: str) -> float:
    """Return the fastest of the ways whose name starts so."""
    return min((us for name, us in row["times_us"].items() if name.startswith(prefixes)), default=float("nan"))


def show(row: dict[str, Any]) -> None:
    """Print a layer's line."""
    ours, theirs = best_of(row, "w", "b"), best_of(row, "cudnn")
    ranked = sorted((item for item in row["times_us"].items() if item[0][0] in "wb"), key=lambda item: item[1])
    text = ", ".join(f"{name} {us:.1f} ({row['modelled_us'][name]:.0f})" for name, us in ranked[:8])
    beside = f"cudnn {theirs:7.1f} | torch {best_of(row, 'torch'):7.1f}"
    say(f"{row['name']:34s} limit {row['limit_us']:6.1f} | ours {ours:6.1f} = {ours / row['limit_us']:5.2f} x | {beside} | {text}")
    for name, reason in row["left_out"].items():
        say(f"    left out {name}: {reason[:150]}")


def main() -> None:
    """Run everything asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=list(ACTIVATION), choices=list(ACTIVATION))
    parser.add_argument("--batches", nargs="+", type=int, default=[256, 1])
    parser.add_argument("--plans", type=int, default=3, help="cuDNN plans tried a layer and form; 0 leaves cuDNN out")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--wide", action="store_true")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    begin = time.perf_counter()
    found = layers(options.nets, options.batches, options.wide)
    count = fill_cache(kernel_source("depthwise", layer.problem, c, 132) for layer in found for c in layer.configs)
    say(f"[{time.perf_counter() - begin:4.0f} s] {count} kernels compiled, torch {torch.__version__}")
    if options.plans:
        try:
            trials = [Trial("conv", layer.problem, form, options.plans) for layer in found for form in (0, UNFUSED)]
            outcomes = try_plans(trials)
            for i, layer in enumerate(found):
                layer.outcomes = [(0, outcomes[2 * i]), (UNFUSED, outcomes[2 * i + 1])]
            say(f"[{time.perf_counter() - begin:4.0f} s] cuDNN {version()}: {sum(len(o.times_us) for o in outcomes)} plans ran")
        except TwofourError as e:
            say(f"no cuDNN: {e}")
    bench, rows, wrong = Bench(Stopwatch()), [], 0
    for layer in found:
        rows.append(time_layer(layer, bench, not options.no_peer, options.rounds))
        show(rows[-1])
        wrong += sum(reason.startswith("WRONG") for reason in rows[-1]["left_out"].values())
        torch.cuda.empty_cache()
        if options.json:
            options.json.write_text(json.dumps({"schema": 1, "kind": "depthwise", "rows": rows}, indent=1))
    for batch in options.batches:
        for net in options.nets:
            chosen = [row for row in rows if (row["net"], row["batch"]) == (net, batch)]
            columns = {
                "limit": lambda row: row["limit_us"],
                "ours": lambda row: best_of(row, "w", "b"),
                "cudnn": lambda row: best_of(row, "cudnn"),
                "torch": lambda row: best_of(row, "torch"),
            }
            sums = {name: sum(row["count"] * value(row) for row in chosen) for name, value in columns.items()}
            say(f"{net} batch {batch}, us of all layers by count: " + ", ".join(f"{name} {us:.0f}" for name, us in sums.items()))
    say(f"{len(rows)} layers in {time.perf_counter() - begin:.0f} s, {wrong} wrong")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
