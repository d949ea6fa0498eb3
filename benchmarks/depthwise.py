"""Times the depthwise convolutions of MobileNetV2, EfficientNet-B0 and ConvNeXt-B, ours beside cuDNN's and torch's, on one Hopper GPU.

Every distinct layer at 224 x 224, fp16, with its bias and activation: each candidate of our two kernels, cuDNN's plans with the epilogue
fused and apart (tried in processes of their own first), all interleaved; and torch's channels-last convolution alone, without bias and
activation. Our results are checked against float64 before they are timed. Times are burst medians by `timing/gpu.py` (CUDA graph, operands
rotated over 3 x L2). Prints a line a layer and the sums by count; `--json FILE` adds the rows to those of the file (conv_rows.py).

    python benchmarks/depthwise.py [--nets MobileNetV2 …] [--batches 256 1] [--plans 3] [--wide] [--no-peer] [--json FILE]

`--wide` times many more configs of ours instead of the candidates: what the model of the contract is set by.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import conv_rows
import torch
from conv_rows import Row, say, total_line
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

CLOCK_MHZ = 1750
ACTIVATION = {"MobileNetV2": "relu6", "EfficientNet-B0": "silu", "ConvNeXt-B": "none"}

# channels, kernel, stride, pixels of a side, count
LAYERS = {
    "MobileNetV2": [
        *((32, 3, 1, 112, 1), (96, 3, 2, 112, 1), (144, 3, 1, 56, 1), (144, 3, 2, 56, 1), (192, 3, 1, 28, 2), (192, 3, 2, 28, 1)),
        *((384, 3, 1, 14, 4), (576, 3, 1, 14, 2), (576, 3, 2, 14, 1), (960, 3, 1, 7, 3)),
    ],
    "EfficientNet-B0": [
        *((32, 3, 1, 112, 1), (96, 3, 2, 112, 1), (144, 3, 1, 56, 1), (144, 5, 2, 56, 1), (240, 5, 1, 28, 1), (240, 3, 2, 28, 1)),
        *((480, 3, 1, 14, 2), (480, 5, 1, 14, 1), (672, 5, 1, 14, 2), (672, 5, 2, 14, 1), (1152, 5, 1, 7, 3), (1152, 3, 1, 7, 1)),
    ],
    "ConvNeXt-B": [(128, 7, 1, 56, 3), (256, 7, 1, 28, 3), (512, 7, 1, 14, 27), (1024, 7, 1, 7, 3)],
}


@dataclasses.dataclass
class Layer:
    """A layer at one batch size, the configs of ours to time, and what came of trying cuDNN's plans."""

    net: str
    count: int
    problem: conv.Problem
    configs: Sequence[depthwise.Config]
    outcomes: list[tuple[int, Outcome]] = dataclasses.field(default_factory=list)


def layers(nets: Sequence[str], batches: Sequence[int], wide: bool) -> list[Layer]:
    """Return what to time."""
    found = []
    for batch in batches:
        for net in nets:
            epilogue = conv.Epilogue(ACTIVATION[net], bias=True)
            for channels, kernel, stride, side, count in LAYERS[net]:
                pads, square, strides = (kernel // 2,) * 4, (kernel, kernel), (stride, stride)
                p = conv.Problem(batch, side, side, channels, channels, square, strides, pads, groups=channels, epilogue=epilogue)
                found.append(Layer(net, count, p, many(p) if wide else depthwise.candidates(p)))
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


def time_layer(layer: Layer, bench: Bench, peer: bool, rounds: int) -> tuple[Row, int]:
    """Check and time every way of a layer; return its row, and how many of our configs were wrong, which are not timed."""
    p, left_out = layer.problem, {}
    ways = []
    for config in layer.configs:
        ways.append(Way("depthwise", OURS, p, config))
        worst = check(p, config)
        if worst > 1:
            left_out[str(ways.pop())] = f"WRONG: {worst:.1f} times the bound"
    wrong = len(left_out)
    for form, outcome in layer.outcomes:
        if outcome.reason is not None:
            left_out[f"cudnn{', epilogue apart' * bool(form)}"] = outcome.reason
        ways += [Way("conv", "cudnn", p, None, form + plan) for plan in outcome.best(2)]
    torch.cuda.empty_cache()
    timed = bench.time(ways)
    us = None
    if peer:
        try:
            us = round(torch_us(p, bench.watch, rounds), 2)
        except (RuntimeError, TwofourError) as e:
            left_out["torch"] = str(e).splitlines()[0]
    return conv_rows.row_of(layer.net, layer.count, "depthwise", p, timed, left_out, us), wrong


def short(config: depthwise.Config) -> str:
    """Return a config in a few letters."""
    return f"{config.kernel[0]}{config.channels}x{config.columns}x{config.rows}" + (f"x{config.images}" if config.images > 1 else "")


def show(row: Row, layer: Layer) -> None:
    """Print a layer's line; of our configs the time, and the modelled one in parentheses."""
    p, times = layer.problem, row["times_us"]
    name = f"{layer.net} {p.inputs} {p.kernel[0]}x{p.kernel[1]}/{p.strides[0]} at {p.height}, batch {p.batch}"
    by_config = [(times[way], c) for c in layer.configs if (way := str(Way("depthwise", OURS, p, c))) in times]
    ranked = sorted(by_config, key=lambda item: item[0])
    text = ", ".join(f"{short(c)} {us:.1f} ({modelled_clocks(p, c) / CLOCK_MHZ:.0f})" for us, c in ranked[:8])
    limit, ours, theirs, peer = (row[column] or float("nan") for column in ("limit_us", "ours_dense_us", "cudnn_us", "torch_us"))
    beside = f"cudnn {theirs:7.1f} | torch {peer:7.1f}"
    say(f"{name:46s} limit {limit:6.1f} | ours {ours:6.1f} = {ours / limit:5.2f} x | {beside} | {text}")
    for way, reason in row["left_out"].items():
        say(f"    left out {way}: {reason[:150]}")


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
    bench, run, wrong = Bench(Stopwatch()), conv_rows.head(), 0
    where = conv_rows.machine(bench.watch)
    rows: list[Row] = []
    for layer in found:
        row, errors = time_layer(layer, bench, not options.no_peer, options.rounds)
        show(row, layer)
        rows.append(row)
        wrong += errors
        torch.cuda.empty_cache()
        if options.json:
            conv_rows.add(options.json, where, run, [row])
    for batch in options.batches:
        for net in options.nets:
            say(total_line([row for row in rows if (row["net"], row["batch"]) == (net, batch)]))
    say(f"{len(rows)} layers in {time.perf_counter() - begin:.0f} s, {wrong} wrong")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
