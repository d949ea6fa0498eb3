"""Builds, checks and times the layers an engine is made of, on one Hopper GPU, in one process.

Every family (pointwise, pool, resize, reduce, product, batched product, convolution, attention) runs shapes of the networks the engine is
for, each by every library that takes it and every config or plan worth trying. A result is checked before it is timed: our kernels and
small shapes against the float64 oracle, large ones against torch in fp32. The convolutions of ResNet-50 and ResNeXt-101_32x8d stand
beside torch's fused call (`torch.cudnn_convolution_relu`, benchmark mode). cuDNN's plans beyond the first are tried in child processes,
because one was seen to end the CUDA context.

Times are burst medians by `timing/gpu.py` (CUDA graph, operands rotated over 3 x L2). Prints a line a layer; `--json FILE` writes all.

    python benchmarks/engine_layers.py [--only conv,pointwise] [--batch 64] [--plans 12] [--json FILE]
"""

import argparse
import dataclasses
import functools
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from twofour.builder.tactics.untrusted import Outcome, Trial, try_plans
from twofour.errors import TwofourError
from twofour.kernels import attention, conv, families, gemm, matmul, pointwise, pool, reduce
from twofour.kernels.conv.cudnn import UNFUSED
from twofour.kernels.cudnn import Handle, version
from twofour.kernels.families import OURS, footprints
from twofour.kernels.gemm.contract import FLAG_BYTES, candidates
from twofour.kernels.launchable import Launchable, launchable
from twofour.kernels.operands import DTYPE_BYTES
from twofour.kernels.records import to_plain
from twofour.pattern.pack_sm90 import pack
from twofour.timing.gpu import Candidate, Stopwatch, sets_for

TORCH = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "int64": torch.int64, "uint8": torch.uint8}
PEAK_BYTES_A_US = 4.27e6  # device-to-device copy of one H200, read and write
WORKSPACE = 256 << 20

# net, in, out, kernel, stride, groups, pixels of a side, count; batch 64.
CONVOLUTIONS = [
    ("R50", 8, 64, 7, 2, 1, 224, 1), ("R50", 64, 64, 1, 1, 1, 56, 1), ("R50", 64, 64, 3, 1, 1, 56, 3), ("R50", 64, 256, 1, 1, 1, 56, 4),
    ("R50", 256, 64, 1, 1, 1, 56, 2), ("R50", 256, 128, 1, 1, 1, 56, 1), ("R50", 128, 128, 3, 2, 1, 56, 1),
    ("R50", 128, 512, 1, 1, 1, 28, 4),
    ("R50", 256, 512, 1, 2, 1, 56, 1), ("R50", 512, 128, 1, 1, 1, 28, 3), ("R50", 128, 128, 3, 1, 1, 28, 3),
    ("R50", 512, 256, 1, 1, 1, 28, 1),
    ("R50", 256, 256, 3, 2, 1, 28, 1), ("R50", 256, 1024, 1, 1, 1, 14, 6), ("R50", 512, 1024, 1, 2, 1, 28, 1),
    ("R50", 1024, 256, 1, 1, 1, 14, 5), ("R50", 256, 256, 3, 1, 1, 14, 5), ("R50", 1024, 512, 1, 1, 1, 14, 1),
    ("R50", 512, 512, 3, 2, 1, 14, 1),
    ("R50", 512, 2048, 1, 1, 1, 7, 3), ("R50", 1024, 2048, 1, 2, 1, 14, 1), ("R50", 2048, 512, 1, 1, 1, 7, 2),
    ("R50", 512, 512, 3, 1, 1, 7, 2),
    ("X101", 256, 256, 3, 1, 32, 56, 3), ("X101", 256, 256, 1, 1, 1, 56, 5), ("X101", 256, 512, 1, 1, 1, 56, 1),
    ("X101", 512, 512, 3, 2, 32, 56, 1), ("X101", 512, 512, 1, 1, 1, 28, 7), ("X101", 512, 512, 3, 1, 32, 28, 3),
    ("X101", 512, 1024, 1, 1, 1, 28, 1), ("X101", 1024, 1024, 3, 2, 32, 28, 1), ("X101", 1024, 1024, 1, 1, 1, 14, 45),
    ("X101", 1024, 1024, 3, 1, 32, 14, 22), ("X101", 1024, 2048, 1, 1, 1, 14, 1), ("X101", 2048, 2048, 3, 2, 32, 14, 1),
    ("X101", 2048, 2048, 1, 1, 1, 7, 5), ("X101", 2048, 2048, 3, 1, 32, 7, 2), ("MBV2", 96, 96, 3, 2, 96, 112, 1),
    ("EFF", 240, 240, 5, 2, 240, 28, 1),
    ("CNX", 128, 128, 7, 1, 128, 56, 3),
]  # fmt: skip


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


@dataclasses.dataclass
class Layer:
    """A problem to run: how its result is checked, and operands that are not random."""

    name: str
    family: str
    problem: Any
    reference: Callable[[dict[str, torch.Tensor]], torch.Tensor]
    peer: Callable[[dict[str, torch.Tensor]], Callable[[], object]] | None = None
    count: int = 1
    outcomes: tuple[Outcome, ...] = ()


def strided(t: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
    return torch.as_strided(t, shape, strides)


def images(t: torch.Tensor, n: int, h: int, w: int, c: int, pitch: int | None) -> torch.Tensor:
    """NHWC memory as NCHW."""
    step = pitch or c
    return strided(t, (n, c, h, w), (h * w * step, 1, w * step, step))


def pointwise_layers(batch: int) -> Iterator[Layer]:
    """Casts and layout changes at the ends of a network, residual adds, activations, squeeze-excite, token mixing."""
    o = pointwise.Operand
    x = (224 * 224 * 3, 1, 224 * 3, 3)
    nchw = pointwise.copy((batch, 3, 224, 224), (3 * 224 * 224, 224 * 224, 224, 1), "fp32", x, "fp16")
    yield Layer(
        "NCHW fp32 to NHWC fp16", "pointwise", nchw, lambda d: d["in0"].view(batch, 3, 224, 224).permute(0, 2, 3, 1).half().flatten()
    )
    rows, c = batch * 56 * 56, 256
    pair = (o("fp16", (c, 1)), o("fp16", (c, 1)))
    add = pointwise.Problem((rows, c), pair, "fp16", (c, 1), (("add", ("in", 0), ("in", 1)), ("relu", ("t", 0))))
    yield Layer("add + relu 56x56x256", "pointwise", add, lambda d: F.relu(d["in0"].float() + d["in1"].float()).half())
    bias = (o("fp16", (c, 1)), o("fp32", (0, 1)))
    gelu = pointwise.Problem((rows, c), bias, "fp16", (c, 1), (("add", ("in", 0), ("in", 1)), ("gelu", ("t", 0))))
    yield Layer("bias + gelu", "pointwise", gelu, lambda d: F.gelu(d["in0"].float().view(-1, c) + d["in1"]).half().flatten())
    gate = (o("fp16", (56 * 56 * c, c, 1)), o("fp16", (c, 0, 1)))
    scale = (("sigmoid", ("in", 1)), ("mul", ("in", 0), ("t", 0)))
    se = pointwise.Problem((batch, 56 * 56, c), gate, "fp16", (56 * 56 * c, c, 1), scale)
    yield Layer(
        "squeeze-excite scale", "pointwise", se,
        lambda d: (d["in0"].float().view(batch, -1, c) * d["in1"].float().sigmoid().view(batch, 1, c)).half().flatten(),
    )  # fmt: skip
    mix = pointwise.copy((batch, 196, 768), (196 * 768, 1, 196), "fp16", (196 * 768, 768, 1))
    yield Layer("transpose 768x196", "pointwise", mix, lambda d: d["in0"].view(batch, 768, 196).transpose(1, 2).flatten())
    part = pointwise.copy((rows, 32), (32, 1), "fp16", (256, 1))
    yield Layer("part of a concatenation", "pointwise", part, lambda d: d["in0"])


def plain_layers(batch: int) -> Iterator[Layer]:
    """Pooling, resizing, reductions and norms of the networks in view."""
    p = pool.Problem(batch, 112, 112, 64, "max", (3, 3), (2, 2), (1, 1, 1, 1))
    yield Layer("max pool 3x3/2", "pool", p, lambda d: nhwc(F.max_pool2d(images(d["x"], batch, 112, 112, 64, None), 3, 2, 1)))
    q = pool.Problem(batch, 56, 56, 128, "average", (2, 2), (2, 2))
    yield Layer("average pool 2x2/2", "pool", q, lambda d: nhwc(F.avg_pool2d(images(d["x"], batch, 56, 56, 128, None).float(), 2).half()))
    r = pool.ResizeProblem(4, 65, 65, 256, 129, 129)
    yield Layer(
        "bilinear 65 to 129", "resize", r,
        lambda d: nhwc(F.interpolate(images(d["x"], 4, 65, 65, 256, None).float(), (129, 129), mode="bilinear").half()),
    )  # fmt: skip
    for name, pixels, c in (("global average 7x7x2048", 49, 2048), ("squeeze 56x56x96", 3136, 96)):
        s = reduce.Problem(batch, pixels, "mean", inner=c)
        yield Layer(name, "reduce", s, lambda d, pixels=pixels, c=c: d["x"].view(batch, pixels, c).float().mean(1).half().flatten())
    n = reduce.Problem(batch * 197, 768, "layernorm", 1e-6, scale=True, bias=True)
    yield Layer(
        "layernorm 768", "reduce", n,
        lambda d: F.layer_norm(d["x"].view(-1, 768).float(), (768,), d["scale"], d["bias"], 1e-6).half().flatten(),
    )  # fmt: skip
    t = reduce.Problem(batch * 12 * 197, 197, "softmax")
    yield Layer("softmax 197", "reduce", t, lambda d: d["x"].view(-1, 197).float().softmax(1).half().flatten())
    u = reduce.Problem(batch, 50257, "softmax")
    yield Layer("softmax 50257", "reduce", u, lambda d: d["x"].view(-1, 50257).float().softmax(1).half().flatten())


def nhwc(y: torch.Tensor) -> torch.Tensor:
    return y.permute(0, 2, 3, 1).contiguous().flatten()


def product_layers(batch: int) -> Iterator[Layer]:
    """Linears and 1x1 convolutions with their epilogues, the batched products of attention."""
    for name, tokens, out, inputs, e in (
        ("1x1 1024 to 1024 at 14x14", batch * 196, 1024, 1024, gemm.Epilogue("relu", bias=True)),
        ("1x1 256 to 1024 at 14x14 + residual", batch * 196, 1024, 256, gemm.Epilogue("relu", bias=True, residual=True)),
        ("ViT-B mlp 1", batch * 197, 3072, 768, gemm.Epilogue("gelu_tanh", bias=True)),
        ("ViT-B mlp 2", batch * 197, 768, 3072, gemm.Epilogue(bias=True, residual=True)),
        ("R50 classifier", batch, 1000, 2048, gemm.Epilogue(bias=True)),
    ):
        problem = gemm.Problem(tokens, out, inputs, "fp16", "fp16", True, e)
        yield Layer(name, "gemm", problem, lambda d, p=problem: product_reference(d, p))
    m = matmul.Problem(batch * 12, 197, 197, 64, scale=0.125, b_strides=(197 * 64, 1, 64))
    yield Layer(
        "scores q . k^T", "matmul", m,
        lambda d: (0.125 * d["a"].view(-1, 197, 64).float() @ d["b"].view(-1, 197, 64).float().transpose(1, 2)).half().flatten(),
    )  # fmt: skip
    line = 3 * 768
    strides = (197 * line, 64, line, 1)
    a = attention.Problem(batch, 12, 197, 197, 64, 0.125, False, "fp16", strides, strides, strides)

    def attend(d: dict[str, torch.Tensor]) -> torch.Tensor:
        q, k, v = (strided(d[n], (batch, 12, 197, 64), strides).float() for n in "qkv")
        return F.scaled_dot_product_attention(q, k, v, scale=0.125).permute(0, 2, 1, 3).half().flatten()

    yield Layer("attention ViT-B", "attention", a, attend)


def product_reference(d: dict[str, torch.Tensor], p: gemm.Problem) -> torch.Tensor:
    y = d["x"].view(p.tokens, p.inputs).float() @ d["dense"].float().T
    if p.epilogue.bias:
        y += d["bias32"]
    if p.epilogue.residual:
        y += d["residual"].view(p.tokens, p.outputs).float()
    y = {"none": lambda t: t, "relu": F.relu, "gelu_tanh": lambda t: F.gelu(t, approximate="tanh")}[p.epilogue.activation](y)
    return y.half().flatten()


def conv_layers(batch: int) -> Iterator[Layer]:
    """The convolutions of section CONVOLUTIONS, bias and ReLU fused, and one with a residual."""
    for net, inputs, outputs, k, stride, groups, side, count in CONVOLUTIONS:
        pad = (k // 2,) * 4
        e = conv.Epilogue("relu", bias=True)
        p = conv.Problem(batch, side, side, inputs, outputs, (k, k), (stride, stride), pad, groups=groups, epilogue=e)
        name = f"{net} {inputs}>{outputs} {k}/{stride}/{groups} at {side}"
        yield Layer(name, "conv", p, lambda d, p=p: conv_reference(d, p), lambda d, p=p: conv_peer(d, p), count)
    p = conv.Problem(batch, 14, 14, 256, 1024, epilogue=conv.Epilogue("relu", bias=True, residual=True))
    yield Layer("R50 256>1024 1/1/1 at 14 + residual", "conv", p, lambda d: conv_reference(d, p))


def conv_operands(d: dict[str, torch.Tensor], p: conv.Problem) -> tuple[torch.Tensor, torch.Tensor]:
    x = images(d["x"], p.batch, p.height, p.width, p.inputs, None)
    w = d["weight"].view(p.outputs, *p.kernel, p.inputs // p.groups).permute(0, 3, 1, 2)
    return x, w


def conv_reference(d: dict[str, torch.Tensor], p: conv.Problem) -> torch.Tensor:
    x, w = conv_operands(d, p)
    y = F.conv2d(x.float(), w.float(), d["bias"].float(), p.strides, p.pads[:2], p.dilations, p.groups)
    if p.epilogue.residual:
        y += images(d["residual"], p.batch, p.out_height, p.out_width, p.outputs, None).float()
    return nhwc(F.relu(y).half())


def conv_peer(d: dict[str, torch.Tensor], p: conv.Problem) -> Callable[[], object]:
    x, w = conv_operands(d, p)
    bias = d["bias"]
    return lambda: torch.cudnn_convolution_relu(x, w, bias, p.strides, p.pads[:2], p.dilations, p.groups)


def draw(family: str, library: str, problem: Any, seed: int) -> dict[str, torch.Tensor]:
    """Random operands of a launch, the output poisoned; products get their dense weight and fp32 bias beside."""
    g = torch.Generator("cuda").manual_seed(seed)
    found: dict[str, torch.Tensor] = {}
    if family == "gemm":
        weight = torch.randn(problem.outputs, problem.inputs, device="cuda", generator=g) * 0.05
        groups = weight.view(-1, 4)
        keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.abs().topk(2, dim=1).indices, True)
        found["dense"] = torch.where(keep, groups, 0).view(weight.shape).half()
    for name, f in footprints(family, library, problem).items():
        if name == "d":
            found[name] = torch.full((f.elements,), float("nan"), device="cuda", dtype=TORCH[f.dtype])
        elif not (family == "gemm" and name == "weight"):
            found[name] = torch.randn(f.elements, device="cuda", generator=g).to(TORCH[f.dtype])
    if family == "conv":
        found["weight"] *= (problem.weight_elems // problem.outputs) ** -0.5
    if family == "gemm":
        if "bias" in found:
            found["bias32"] = found["bias"].float()
        if library == OURS:
            found["weight"] = pack(found["dense"], dtype=problem.dtype, sparse=problem.sparse).data
        elif library == "cublaslt":
            found["weight"] = found["dense"]
    return found


@dataclasses.dataclass
class Way:
    """One way to run a layer."""

    name: str
    library: str
    problem: Any
    make: Callable[[], Launchable]


def ways(layer: Layer, options: argparse.Namespace, handle: Handle | None) -> tuple[list[Way], dict[str, str]]:
    """Every way worth timing, and why others are left out."""
    found, left_out = [], {}
    p = layer.problem
    if layer.family == "conv":
        assert handle is not None
        for fused, outcome in ((True, layer.outcomes[0]), (False, layer.outcomes[1])):
            prefix = "cudnn:" if fused else "cudnn:plain+"
            left_out |= {f"{prefix}{plan}": why for plan, why in outcome.left_out.items()}
            if outcome.reason:
                left_out[prefix] = outcome.reason
            for plan in outcome.best(4 if fused else 1):
                number = plan | (0 if fused else UNFUSED)
                make = functools.partial(launchable, "conv", "cudnn", p, None, number, handle=handle)
                found.append(Way(f"{prefix}{plan}", "cudnn", p, make))
        product = conv.as_gemm(dataclasses.replace(p, sparse=True))
        if product is not None:
            left_out["as product"] = "timed with the products"
        return found, left_out
    for library in families.FAMILIES[layer.family].libraries:
        if library == OURS:
            if layer.family == "gemm":
                for sparse in (True, False):
                    q = dataclasses.replace(p, sparse=sparse)
                    for c in candidates(q, limit=2):
                        name = f"ours:{'2:4' if sparse else 'dense'}:{c.tile_rows}x{c.tile_tokens}x{c.stages}{':split' if c.split else ''}"
                        found.append(Way(name, OURS, q, lambda q=q, c=c: launchable("gemm", OURS, q, c)))
                continue
            module = {"pointwise": pointwise, "pool": pool, "resize": pool, "reduce": reduce}[layer.family]
            for c in module.candidates(p):
                name = "ours:" + ":".join(str(v) for v in dataclasses.astuple(c))
                found.append(Way(name, OURS, p, lambda c=c: launchable(layer.family, OURS, p, c)))
            continue
        reason = families.why_not(layer.family, library, p, None)
        if reason is not None:
            left_out[library] = reason
            continue
        for algorithm in (0, 1, 2) if library == "cublaslt" else (0,):
            number = None if library == "cusparselt" else algorithm
            found.append(
                Way(
                    f"{library}:{algorithm}",
                    library,
                    p,
                    lambda n=number, lib=library: launchable(layer.family, lib, p, None, n, handle=handle),
                )
            )
    return found, left_out


def compress(way: Way, call: Launchable, operands: dict[str, torch.Tensor], keep: list[Any]) -> None:
    """Give cuSPARSELt its compressed weight and let it search its algorithms."""
    library = call.call  # type: ignore[attr-defined]
    held = library.compress(operands["dense"].data_ptr())
    keep.append(held)
    operands["weight"] = operands["dense"]
    bias = operands["bias"].data_ptr() if "bias" in operands else 0
    residual = operands["residual"].data_ptr() if "residual" in operands else 0
    library.search(operands["x"].data_ptr(), held.pointer, operands["d"].data_ptr(), bias=bias, residual=residual)
    operands["compressed"] = torch.tensor([held.pointer])


def addresses(layer: Layer, way: Way, operands: dict[str, torch.Tensor]) -> dict[str, int]:
    found = {name: operands[name].data_ptr() for name in footprints(layer.family, way.library, way.problem) if name in operands}
    if "compressed" in operands:
        found["weight"] = int(operands["compressed"][0])
    return found


def check(layer: Layer, way: Way, call: Launchable, operands: dict[str, torch.Tensor], space: int) -> float:
    """Return the largest error in units of the bound: at most 1."""
    call(addresses(layer, way, operands), space, torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    exact = layer.reference(operands).double()
    found = operands["d"]
    if layer.family == "pointwise":
        p = layer.problem
        found = strided(found, p.shape, p.out_strides).flatten() if found.numel() != exact.numel() else found
    error = (found.double().flatten() - exact).abs()
    # Product, sum and result may each be rounded to 16 bits, at the size of what is added up.
    bound = 4 * 2.0**-11 * (exact.abs() + exact.abs().median() + 1e-3)
    worst = float((error / bound).max())
    return worst if math.isfinite(worst) else math.inf


def time_layer(layer: Layer, options: argparse.Namespace, watch: Stopwatch, handle: Handle | None, space: torch.Tensor) -> dict[str, Any]:
    """Check and time every way of a layer."""
    found, left_out = ways(layer, options, handle)
    size = sum(f.num_bytes for f in footprints(layer.family, found[0].library, found[0].problem).values()) if found else 1
    sets = sets_for(size, watch.l2_bytes, 6)
    keep: list[Any] = []
    graphs, names, errors = [], [], {}
    for way in found:
        try:
            call = way.make()
            operands = [draw(layer.family, way.library, way.problem, seed) for seed in range(sets)]
            if way.library == "cusparselt":
                for o in operands:
                    compress(way, call, o, keep)
            errors[way.name] = check(layer, way, call, operands[0], space.data_ptr())
            if errors[way.name] > 1:
                left_out[way.name] = f"WRONG: {errors[way.name]:.1f} times the bound"
                continue
            where = [addresses(layer, way, o) for o in operands]

            def enqueue(i: int, stream: int, call: Any = call, where: Any = where, _alive: Any = (operands, keep)) -> None:
                call(where[i], space.data_ptr(), stream)

            graphs.append(watch.graph(Candidate(way.name, enqueue, sets)))
            names.append(way.name)
        except TwofourError as e:
            left_out[way.name] = str(e)
    if layer.peer is not None:
        add_peer(layer, found, sets, watch, graphs, names, left_out)
    figures = watch.burst(graphs, rounds=options.rounds) if graphs else []
    times = {name: round(f.median_us, 2) for name, f in zip(names, figures, strict=True)}
    for graph in graphs:
        graph.close()
    limit = layer.problem.num_bytes / PEAK_BYTES_A_US if hasattr(layer.problem, "num_bytes") else None
    row = {"name": layer.name, "family": layer.family, "count": layer.count, "times_us": times, "worst_error": errors}
    return row | {
        "left_out": left_out,
        "byte_limit_us": limit,
        "gflop": layer.problem.flops / 1e9,
        "problem": to_plain(layer.problem),
    }


def add_peer(
    layer: Layer, found: list[Way], sets: int, watch: Stopwatch, graphs: list[Any], names: list[str], left_out: dict[str, str]
) -> None:
    """Torch's own fused call as one more candidate."""
    assert layer.peer is not None
    try:
        calls = [layer.peer(draw(layer.family, "cudnn", layer.problem, seed)) for seed in range(sets)]

        def enqueue(i: int, stream: int) -> None:
            with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
                calls[i]()

        graphs.append(watch.graph(Candidate("torch", enqueue, sets)))
        names.append("torch")
    except (RuntimeError, TwofourError) as e:
        left_out["torch"] = str(e).splitlines()[0]


def show(row: dict[str, Any]) -> None:
    """Print a layer's line."""
    ranked = sorted(row["times_us"].items(), key=lambda item: item[1])
    limit = f"{row['byte_limit_us']:.0f}" if row["byte_limit_us"] else "-"
    say(f"{row['family']:9s} {row['name']:40s} limit {limit:>5s} us | " + ", ".join(f"{n} {us:.1f}" for n, us in ranked[:6]))
    for name, reason in row["left_out"].items():
        say(f"          left out {name}: {reason[:160]}")


def main() -> None:
    """Run everything asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="pointwise,plain,product,conv")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--plans", type=int, default=12, help="cuDNN plans tried a convolution; 1 trusts the first")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    groups = {"pointwise": pointwise_layers, "plain": plain_layers, "product": product_layers, "conv": conv_layers}
    watch, space = Stopwatch(), torch.zeros(WORKSPACE + FLAG_BYTES, dtype=torch.uint8, device="cuda")
    try:
        handle: Handle | None = Handle(0)
        say(f"cuDNN {version()}, torch {torch.__version__}, numpy {np.__version__}, element sizes {DTYPE_BYTES}")
    except TwofourError as e:
        handle = None
        say(f"no cuDNN: {e}")
    rows, failed, begin = [], 0, time.perf_counter()
    for group in options.only.split(","):
        if group == "conv" and handle is None:
            continue
        layers = list(groups[group](options.batch))
        if group == "conv":
            trials = [Trial("conv", layer.problem, fused, options.plans) for layer in layers for fused in (True, False)]
            outcomes = try_plans(trials)
            for i, layer in enumerate(layers):
                layer.outcomes = (outcomes[2 * i], outcomes[2 * i + 1])
            say(f"cuDNN's plans tried: {sum(len(o.times_us) for o in outcomes)} ran, {sum(len(o.left_out) for o in outcomes)} left out")
        for layer in layers:
            try:
                rows.append(time_layer(layer, options, watch, handle, space))
                show(rows[-1])
                failed += sum(reason.startswith("WRONG") for reason in rows[-1]["left_out"].values())
            except Exception:  # noqa: BLE001
                # A benchmark run is expensive: one layer that breaks must not take the others with it.
                failed += 1
                say(f"{layer.name} FAILED\n{traceback.format_exc()}")
            torch.cuda.empty_cache()
            if options.json:
                options.json.write_text(json.dumps({"schema": 1, "kind": "layers", "batch": options.batch, "rows": rows}, indent=1))
    for net in ("R50", "X101"):
        best = [r for r in rows if r["name"].startswith(net + " ") and "residual" not in r["name"] and r["times_us"]]
        ours = sum(r["count"] * min(us for n, us in r["times_us"].items() if n != "torch") for r in best)
        theirs = sum(r["count"] * r["times_us"].get("torch", math.nan) for r in best)
        say(f"{net}: listed convolutions by count: cudnn graph {ours:.0f} us, torch {theirs:.0f} us")
    say(f"{len(rows)} layers in {time.perf_counter() - begin:.0f} s, {failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
