"""Small GPU plans without a network: y = mean over pixels of relu(2 x + bias), NCHW fp32 in, fp32 out, activations in fp16 NHWC."""

import numpy as np

from twofour.kernels import pointwise, reduce
from twofour.kernels.launchable import sources_digests
from twofour.plan import Plan, Program, Step, Value, ValueSpec
from twofour.plan.program import contiguous

CHANNELS, SIDE = 8, 4


def step(name: str, family: str, problem: object, config: object, **operands: str) -> Step:
    return Step(name, family, "twofour", problem, config, None, operands, {})


def program(batch: int, *, copy_out: bool = True) -> Program:
    """Turn to NHWC (from the input), scale and add (in the arena), reduce; with `copy_out` a last step writes the output."""
    c, pixels = CHANNELS, SIDE * SIDE
    elems = batch * c * pixels
    shape = (batch, pixels, c)
    turn = pointwise.copy(shape, (c * pixels, 1, pixels), "fp32", contiguous(shape), "fp16")
    f16 = pointwise.Operand("fp16", contiguous(shape))
    work = (("mul", ("in", 0), ("c", 2.0)), ("add", ("t", 0), ("in", 1)), ("relu", ("t", 1)))
    scale = pointwise.Problem(shape, (f16, pointwise.Operand("fp32", (0, 0, 1))), "fp16", contiguous(shape), work)
    mean = reduce.Problem(batch, pixels, "mean", dtype="fp16", out_dtype="fp32", inner=c)
    last = pointwise.copy((batch, c), (c, 1), "fp32", (c, 1))
    end = -(-2 * 2 * elems // 256) * 256
    values = {
        "x": Value("fp32", (batch, c, SIDE, SIDE), contiguous((batch, c, SIDE, SIDE)), "input", index=0),
        "nhwc": Value("fp16", shape, contiguous(shape), "arena", 0),
        "active": Value("fp16", shape, contiguous(shape), "arena", 2 * elems),
        "bias": Value("fp32", (c,), (1,), "weights", tensor="bias"),
        "y": Value("fp32", (batch, c), (c, 1), "output", index=0),
    }
    steps = [
        step("turn", "pointwise", turn, pointwise.default(turn), in0="x", d="nhwc"),
        step("scale", "pointwise", scale, pointwise.default(scale), in0="nhwc", in1="bias", d="active"),
    ]
    if copy_out:
        values["pooled"] = Value("fp32", (batch, c), (c, 1), "arena", end)
        end = -(-(end + 4 * batch * c) // 256) * 256
        steps.append(step("mean", "reduce", mean, reduce.default(mean), x="active", d="pooled"))
        steps.append(step("out", "pointwise", last, pointwise.default(last), in0="pooled", d="y"))
    else:
        # The output is written in the middle: it needs a buffer of its own inside the graph.
        steps.append(step("mean", "reduce", mean, reduce.default(mean), x="active", d="y"))
        steps.append(step("again", "pointwise", scale, pointwise.default(scale), in0="nhwc", in1="bias", d="active"))
    return Program(batch, end, 0, values, tuple(steps))


def plan(batches: tuple[int, ...] = (1, 4), *, copy_out: bool = True) -> Plan:
    bias = np.arange(CHANNELS, dtype=np.float32) - 3
    digests = {name: digest for name, digest in sources_digests().items() if name in ("pointwise", "reduce")}
    return Plan(
        "cuda",
        "cuda",
        "fp16",
        "auto",
        (ValueSpec("x", "float32", (None, CHANNELS, SIDE, SIDE)),),
        (ValueSpec("y", "float32", (None, CHANNELS)),),
        {"bias": bias},
        batches,
        {},
        tuple(program(batch, copy_out=copy_out) for batch in batches),
        digests,
        {},
    )


def expected(x: np.ndarray) -> np.ndarray:
    """What the plans compute, in float64 with the roundings of fp16 between."""
    half = x.astype(np.float16).astype(np.float64)
    bias = (np.arange(CHANNELS) - 3)[None, :, None, None]
    return np.maximum(2 * half + bias, 0).astype(np.float16).astype(np.float64).mean((2, 3))
