"""Every pass: the smallest graph that fires, the smallest that must not, the same outputs before and after, by the oracle."""

from dataclasses import replace
from math import sqrt
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from graphs import kinds, small
from lowered_run import check_footprints, run_lowered

from twofour.builder import passes
from twofour.builder.evaluate import evaluate, largest_difference, random_inputs
from twofour.builder.graph import attribute, constant_of
from twofour.builder.lower import Lowered, lower
from twofour.builder.passes.infra import Rewrite
from twofour.builder.passes.programs import program_of
from twofour.errors import InputError, UnsupportedError, VerificationError
from twofour.pattern import count_groups, select

EXACT = 1e-12  # float64 arithmetic in another order
FOLDED = 16 * float(np.finfo(np.float32).eps)  # constants that were rounded to fp32 once more, sums of up to 16 terms
RNG = np.random.default_rng(0)


def normal(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


V4 = RNG.uniform(0.5, 1.5, 4).astype(np.float32)
W33, W11, M48 = normal(4, 4, 3, 3), normal(4, 4, 1, 1), normal(4, 8)
IMAGE, ROWS, TOKENS = "float[2,4,5,6] x", "float[3,4] x", "float[2,3,4] x"


def i(*values: int) -> Any:
    return np.array(values, np.int64)


def f(value: float) -> Any:
    return np.array(value, np.float32)


def pass_of(kind: type[Rewrite]) -> Rewrite:
    """A pass as the pipeline for fp16 has it."""
    return next(step for step in passes.pipeline("fp16") if type(step) is kind)


def before(step: type[Rewrite], model: ir.Model) -> ir.Model:
    """The model after every pass that runs in front of `step`."""
    for earlier in passes.pipeline("fp16"):
        if type(earlier) is step:
            break
        earlier(model)
    return model


def applied(step: Rewrite, model: ir.Model, tolerance: float = FOLDED) -> bool:
    """Run a pass; its outputs are those before it. Return whether it says it changed something."""
    feeds = random_inputs(model)
    wanted = evaluate(model, feeds)
    modified = bool(step(model).modified)
    difference = largest_difference(wanted, evaluate(model, feeds))
    assert difference <= tolerance, f"{step.name} changed the outputs by {difference}"
    return modified


Case = tuple[str, str, dict[str, Any]]
# pass: (graph that fires, the operators it then has), (graph that must not)
CASES: dict[str, tuple[type[Rewrite], Case, list[str], Case]] = {
    "constant folding": (
        passes.FoldConstants,
        ("float[2,3] x", "y = Add(x, y0)", {"y0": f(1)}),
        ["Add"],
        ("float[2,3] x", "y = Add(x, x)", {}),
    ),
    "dead code: identity": (passes.DeadCode, (ROWS, "a = Identity(x) y = Relu(a)", {}), ["Relu"], (ROWS, "y = Relu(x)", {})),
    "dead code: dropout in front of an output": (
        passes.DeadCode,
        (ROWS, "y = Dropout(x)", {}),
        ["Identity"],
        (ROWS, "y = Identity(x)", {}),
    ),
    "dead code: a view of the same shape": (
        passes.DeadCode,
        (ROWS, "a = Reshape(x, s) b = Transpose <perm=[0,1]> (a) y = Relu(b)", {"s": i(3, 4)}),
        ["Relu"],
        (ROWS, "a = Reshape(x, s) y = Relu(a)", {"s": i(4, 3)}),
    ),
    "dead code: a slice backwards moves values": (
        passes.DeadCode,
        (ROWS, "a = Slice(x, s, e) y = Relu(a)", {"s": i(0), "e": i(9)}),
        ["Relu"],
        (ROWS, "y = Transpose(x)", {}),
    ),
    "gelu": (
        passes.Activations,
        (ROWS, "a = Div(x, r) b = Erf(a) c = Add(b, o) d = Mul(x, c) y = Mul(d, h)", {"r": f(sqrt(2)), "o": f(1), "h": f(0.5)}),
        ["Pointwise"],
        (ROWS, "a = Div(x, r) b = Erf(a) c = Add(b, o) d = Mul(x, c) y = Mul(d, h)", {"r": f(sqrt(2)), "o": f(1), "h": f(0.6)}),
    ),
    "gelu, tanh form": (
        passes.Activations,
        (
            ROWS,
            "a = Pow(x, p) b = Mul(a, k) c = Add(x, b) d = Mul(c, r) e = Tanh(d) g = Add(e, o) m = Mul(h, x) y = Mul(m, g)",
            {"p": f(3), "k": f(0.044715), "r": f(sqrt(2 / np.pi)), "o": f(1), "h": f(0.5)},
        ),
        ["Pointwise"],
        (
            ROWS,
            "a = Pow(x, p) b = Mul(a, k) c = Add(x, b) d = Mul(c, r) e = Tanh(d) g = Add(e, o) m = Mul(h, x) y = Mul(m, g)",
            {"p": f(2), "k": f(0.044715), "r": f(sqrt(2 / np.pi)), "o": f(1), "h": f(0.5)},
        ),
    ),
    "silu": (passes.Activations, (ROWS, "a = Sigmoid(x) y = Mul(x, a)", {}), ["Pointwise"], (ROWS, "a = Sigmoid(x) y = Mul(a, a)", {})),
    "hardswish": (
        passes.Activations,
        (ROWS, "a = Add(x, t) b = Clip(a, z, s) c = Mul(x, b) y = Div(c, s)", {"t": f(3), "z": f(0), "s": f(6)}),
        ["Pointwise"],
        (ROWS, "a = Add(x, t) b = Clip(a, z, s) c = Mul(x, b) y = Div(c, s)", {"t": f(2), "z": f(0), "s": f(6)}),
    ),
    "layer norm, spelled out": (
        passes.Norms,
        (
            TOKENS,
            "m = ReduceMean(x, a) c = Sub(x, m) q = Mul(c, c) v = ReduceMean(q, a) e = Add(v, k) r = Sqrt(e) n = Div(c, r) "
            "p = Mul(n, s) y = Add(p, s)",
            {"a": i(-1), "k": f(1e-5), "s": V4},
        ),
        ["Reduce"],
        (
            TOKENS,
            "m = ReduceMean(x, a) c = Sub(x, m) q = Mul(c, c) v = ReduceMean(q, a) e = Add(v, k) r = Sqrt(e) y = Div(c, r)",
            {"a": i(1), "k": f(1e-5)},
        ),
    ),
    "rms norm, spelled out": (
        passes.Norms,
        (
            TOKENS,
            "q = Pow(x, t) v = ReduceMean(q, a) e = Add(v, k) r = Sqrt(e) n = Div(x, r) y = Mul(n, s)",
            {"t": f(2), "a": i(2), "k": f(1e-6), "s": V4},
        ),
        ["Reduce"],
        (
            TOKENS,
            "q = Pow(x, t) v = ReduceMean(q, a) e = Add(v, k) r = Sqrt(e) n = Div(s, r) y = Mul(n, x)",
            {"t": f(2), "a": i(2), "k": f(1e-6), "s": V4},
        ),
    ),
    "group norm": (
        passes.Norms,
        (IMAGE, "y = GroupNormalization <num_groups=2> (x, s, s)", {"s": V4[:2]}),
        ["Reshape", "Reduce", "Reshape", "Mul", "Add"],
        (IMAGE, "y = Relu(x)", {}),
    ),
    "batch norm behind a convolution": (
        passes.BatchNorms,
        (IMAGE, "a = Conv(x, w) y = BatchNormalization(a, s, s, s, s)", {"w": W33, "s": V4}),
        ["Conv"],
        (IMAGE, "y = Conv(x, w)", {"w": W33}),
    ),
    "scales behind a layer": (
        passes.FoldScales,
        (IMAGE, "a = Conv(x, w) b = Mul(a, s) y = Add(b, s)", {"w": W33, "s": V4.reshape(4, 1, 1)}),
        ["Conv"],
        (IMAGE, "a = Conv(x, w) y = Mul(a, s)", {"w": W33, "s": normal(3, 4)}),
    ),
    "pads in front of a convolution": (
        passes.FoldPads,
        (IMAGE, "a = Pad(x, p) y = Conv(a, w)", {"p": i(0, 0, 1, 0, 0, 0, 2, 1), "w": W33}),
        ["Conv"],
        (IMAGE, "a = Pad(x, p, v) y = Conv(a, w)", {"p": i(0, 0, 1, 0, 0, 0, 2, 1), "v": f(1), "w": W33}),
    ),
    "pads in front of a pool": (
        passes.FoldPads,
        (IMAGE, "a = Pad(x, p) y = AveragePool <kernel_shape=[3,3]> (a)", {"p": i(0, 0, 1, 1, 0, 0, 1, 1)}),
        ["AveragePool"],
        (IMAGE, "a = Pad(x, p) y = MaxPool <kernel_shape=[3,3]> (a)", {"p": i(0, 0, 1, 1, 0, 0, 1, 1)}),
    ),
    "attention": (
        passes.Attentions,
        (
            "float[2,3,4,8] q, float[2,3,5,8] k, float[2,3,5,8] v",
            "t = Transpose <perm=[0,1,3,2]> (k) a = Mul(q, s) b = Mul(t, s) c = MatMul(a, b) d = Softmax(c) y = MatMul(d, v)",
            {"s": f(0.6)},
        ),
        ["Transpose", "Transpose", "Transpose", "Transpose", "Transpose", "Attention", "Transpose"],
        (
            "float[2,3,4,8] q, float[2,3,5,8] k, float[2,3,5,8] v",
            "t = Transpose <perm=[0,1,3,2]> (k) c = MatMul(q, t) m = Add(c, u) d = Softmax(m) y = MatMul(d, v)",
            {"u": normal(4, 5)},
        ),
    ),
    "linear from MatMul": (
        passes.Linears,
        (TOKENS, "y = MatMul(x, w)", {"w": M48}),
        ["Linear"],
        ("float[2,3,4] x, float[4,8] w", "y = MatMul(x, w)", {}),
    ),
    "linear from Gemm": (
        passes.Linears,
        (ROWS, "y = Gemm <alpha=0.5, beta=2.0, transB=1> (x, w, c)", {"w": W33[:, :, 0, 0], "c": V4}),
        ["Linear"],
        (ROWS, "y = MatMul(x, x2)", {"x2": normal(2, 4, 3)}),
    ),
    "linear from the left": (
        passes.Linears,
        (TOKENS, "y = MatMul(w, x)", {"w": normal(5, 3)}),
        ["Transpose", "Linear", "Transpose"],
        (TOKENS, "t = Transpose <perm=[0,2,1]> (x) y = MatMul(x, t)", {}),
    ),
    "linear from Einsum": (
        passes.Linears,
        ("float[2,3,4] x, float[2,5,4] z", 'y = Einsum <equation="bij,bkj->bik"> (x, z)', {}),
        ["Transpose", "MatMul"],
        (TOKENS, "y = Relu(x)", {}),
    ),
    "linear between reshapes": (
        passes.Linears,
        (TOKENS, "a = Reshape(x, s) y = Gemm(a, w)", {"s": i(6, 4), "w": M48}),
        ["Linear", "Reshape"],
        (TOKENS, "a = Reshape(x, s) t = Transpose(a) y = Relu(t)", {"s": i(6, 4)}),
    ),
    "squeeze-excite": (
        passes.SqueezeExcite,
        (IMAGE, "a = GlobalAveragePool(x) b = Conv(a, w) c = Sigmoid(b) y = Mul(x, c)", {"w": W11}),
        ["GlobalAveragePool", "Reshape", "Linear", "Reshape", "Sigmoid", "Mul"],
        (IMAGE, "y = Conv(x, w)", {"w": W11}),
    ),
    "layout": (
        passes.Layout,
        (IMAGE, "y = Conv <pads=[1,1,1,1]> (x, w)", {"w": W33}),
        ["Transpose", "Conv", "Transpose"],
        (IMAGE, "y = Relu(x)", {}),
    ),
    "layout of a line": (
        passes.Layout,
        ("float[2,4,9] x", "y = Conv <strides=[2], pads=[1,1]> (x, w)", {"w": W33[..., 0]}),
        ["Reshape", "Transpose", "Conv", "Transpose", "Reshape"],
        (IMAGE, "y = Relu(x)", {}),
    ),
    "softmax along another axis": (
        passes.Layout,
        (TOKENS, "y = Softmax <axis=1> (x)", {}),
        ["Transpose", "Reduce", "Transpose"],
        (TOKENS, "y = Relu(x)", {}),
    ),
    "element-wise": (passes.Elementwise, (ROWS, "y = Mul(x, c)", {"c": f(3)}), ["Pointwise"], (ROWS, "y = Transpose(x)", {})),
    "transposes that meet": (
        passes.SinkTransposes,
        (TOKENS, "a = Transpose <perm=[0,2,1]> (x) b = Relu(a) y = Transpose <perm=[0,2,1]> (b)", {}),
        ["Pointwise"],
        (TOKENS, "y = Relu(x)", {}),
    ),
    "a transpose that stays": (
        passes.SinkTransposes,
        (TOKENS, "a = Transpose <perm=[0,2,1]> (x) b = Relu(a) y = Softmax(b)", {}),
        ["Pointwise", "View", "Copy", "Reduce"],
        (TOKENS, "y = Softmax(x)", {}),
    ),
    "epilogue: activation": (
        passes.Epilogues,
        (ROWS, "a = MatMul(x, w) y = Relu(a)", {"w": M48}),
        ["Linear"],
        (ROWS, "a = MatMul(x, w) y = Erf(a)", {"w": M48}),
    ),
    "epilogue: residual": (
        passes.Epilogues,
        ("float[3,4] x, float[3,8] r", "a = MatMul(x, w) b = Add(a, r) y = Relu(b)", {"w": M48}),
        ["Linear"],
        ("float[3,4] x, float[1,8] r", "a = MatMul(x, w) y = Add(a, r)", {"w": M48}),
    ),
    "epilogue: residual that is repeated": (
        passes.Epilogues,
        ("float[3,4] x, float[3,8] r", "a = MatMul(x, w) y = Add(a, r)", {"w": M48}),
        ["Linear"],
        ("float[3,4] x, float[1,8] r", "e = Expand(r, s) a = MatMul(x, w) y = Add(a, e)", {"w": M48, "s": i(3, 8)}),
    ),
    "epilogue: a scale behind a transpose": (
        passes.Epilogues,
        (TOKENS, "a = MatMul(x, w) t = Transpose <perm=[0,2,1]> (a) y = Mul(t, s)", {"w": M48, "s": normal(8, 1)}),
        ["Linear", "View", "Copy"],
        (TOKENS, "a = MatMul(x, w) t = Transpose <perm=[0,2,1]> (a) y = Mul(t, s)", {"w": M48, "s": normal(1, 3)}),
    ),
    "pointwise chains": (
        passes.FusePointwise,
        (ROWS, "a = Exp(x) b = Add(a, x) y = Tanh(b)", {}),
        ["Pointwise"],
        (ROWS, "a = Exp(x) y = Softmax(a)", {}),
    ),
    "pointwise over a gate": (
        passes.FusePointwise,
        ("float[2,4,5,6] x, float[2,4] g", "a = Sigmoid(g) b = Reshape(a, s) y = Mul(x, b)", {"s": i(2, 4, 1, 1)}),
        ["View", "Pointwise"],
        ("float[2,4,5,6] x, float[2,4] g", "b = Reshape(g, s) y = Mul(x, b)", {"s": i(2, 4, 1, 1)}),
    ),
    "a shortcut that is projected": (
        passes.MergeShortcuts,
        (
            "float[2,8,5,6] x, float[2,16,9,11] z",
            "a = Conv(x, w) b = Conv <strides=[2,2]> (z, v, c) s = Add(a, b) y = Relu(s)",
            {"w": normal(16, 8, 1, 1), "v": normal(16, 16, 1, 1), "c": f(16)},
        ),
        ["View", "Copy", "View", "Copy", "View", "Concat", "Conv", "View", "Copy"],
        (
            "float[2,8,5,6] x, float[2,24,9,11] z",
            "a = Conv(x, w) b = Conv <strides=[2,2]> (z, v) s = Add(a, b) y = Relu(s)",
            {"w": normal(16, 8, 1, 1), "v": normal(16, 24, 1, 1)},
        ),
    ),
    "patches of an image": (
        passes.GatherPatches,
        ("float[2,3,9,8] x", "y = Conv <strides=[2,2], pads=[1,1,1,1]> (x, w)", {"w": normal(8, 3, 3, 3)}),
        ["View", "Patches", "Conv", "View", "Copy"],
        ("float[2,5,9,8] x", "y = Conv(x, w)", {"w": normal(8, 5, 3, 3)}),
    ),
    "patches read by two": (
        passes.GatherPatches,
        ("float[2,3,9,8] x", "a = Conv(x, w) b = Conv(x, w2) y = Add(a, b)", {"w": normal(8, 3, 3, 3), "w2": normal(8, 3, 3, 3)}),
        ["View", "Patches", "Conv", "Conv", "View", "Copy"],
        ("float[2,4,9,8] x", "y = Conv <group=2> (x, w)", {"w": normal(8, 2, 3, 3)}),
    ),
    "channels to multiples of 8": (
        passes.WidenChannels,
        (ROWS, "y = MatMul(x, w)", {"w": M48}),
        ["Pad", "Linear"],
        ("float[3,8] x", "y = MatMul(x, w)", {"w": normal(8, 16)}),
    ),
    "concat in place": (
        passes.ConcatInPlace,
        (
            IMAGE,
            "a = Conv(x, w) b = Conv(x, w) y0 = Concat <axis=1> (a, b) y = MaxPool <kernel_shape=[2,2]> (y0)",
            {"w": normal(8, 4, 1, 1)},
        ),
        ["View", "Patches", "Conv", "Conv", "Concat", "Pool", "View", "Copy"],
        (IMAGE, "y = Conv(x, w)", {"w": normal(8, 4, 1, 1)}),
    ),
    "an input as an output": (passes.Identities, (ROWS, "y = Identity(x)", {}), ["Copy"], (ROWS, "a = Identity(x) y = Relu(a)", {})),
    "precision": (
        passes.Precision,
        ("float[3,8] x", "y = MatMul(x, w)", {"w": normal(8, 16)}),
        ["Copy", "Linear"],
        ("int64[3,8] x", "y = Transpose(x)", {}),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_pass_fires_on_its_smallest_graph(name: str) -> None:
    step, (inputs, body, constants), wanted, _ = CASES[name]
    model = before(step, small(inputs, body, **constants))
    made = pass_of(step)
    if name != "constant folding":
        assert applied(made, model)
    assert kinds(model) == wanted
    assert not applied(made, model), "a second run finds nothing left to do"


@pytest.mark.parametrize("name", CASES)
def test_a_pass_leaves_alone_what_is_not_its_own(name: str) -> None:
    step, _, _, (inputs, body, constants) = CASES[name]
    outputs = "int64[] y" if inputs.startswith("int64") else "float[] y"
    model = before(step, small(inputs, body, outputs, **constants))
    was = kinds(model)
    assert not applied(pass_of(step), model, EXACT)
    assert kinds(model) == was


def test_outputs_that_show_another_value_are_written() -> None:
    body = "t = Transpose <perm=[0,2,3,1]> (x) a = Relu(t) b = Identity(a) c = Dropout(x) d = Reshape(x, s)"
    model = small(IMAGE, body, "float[] a, float[] b, float[] c, float[] d", s=i(0, -1))
    feeds = random_inputs(model)
    wanted = evaluate(model, feeds)
    lowered = lower(passes.prepare(model, "fp16"), 2, "fp16")
    for name, found in run_lowered(lowered, feeds).items():
        np.testing.assert_array_equal(found.reshape(wanted[name].shape), wanted[name])


@pytest.mark.parametrize("body", ["y = Conv(x, w)", "t = Transpose <perm=[0,2,3,1]> (x) y = MatMul(t, m)"])
def test_a_weight_that_fp16_cannot_hold_is_refused(body: str) -> None:
    constants = {"w": W11 * np.float32(1e6), "m": M48 * np.float32(1e6)}
    with pytest.raises(
        UnsupportedError, match=r"build: the weight of '\w+' holds [\d.e+]+, fp16 ends at 65504; build with another precision"
    ):
        lower(passes.prepare(small(IMAGE, body, **constants), "fp16"), 2, "fp16")
    assert lower(passes.prepare(small(IMAGE, body, **constants), "bf16"), 2, "bf16").calls


def test_constants_fold_through_shapes() -> None:
    model = small("float[N,4] x", "s = Shape(x) a = Slice(s, z, o) b = Concat <axis=0> (a, m) y = Reshape(x, b)", z=i(0), o=i(1), m=i(2, 2))
    assert kinds(model) == ["Reshape"]
    assert list(model.graph.outputs[0].shape) == [2, 2, 2]


@pytest.mark.parametrize("body", ["b = ConstantOfShape(s)", "b = Range(zero, most, one)", "b = Tile(zeros, s)"])
def test_a_constant_of_terabytes_is_not_made(body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr("twofour.builder.passes.constants.run_operator", lambda domain, kind, *_: made.append(kind))
    sizes = {"s": i(2**22, 2**18), "zero": np.array(0), "most": np.array(2**40), "one": np.array(1), "zeros": np.zeros((1, 1), np.float32)}
    with pytest.raises(UnsupportedError, match="operators that the engine lacks"):
        small("float[2,4] x", f"{body} y = NonZero(b) z = Add(x, x)", "int64[] y, float[] z", **sizes)
    assert made == []


def test_a_repeat_over_the_batch_is_not_folded_where_reading_it_costs_nothing() -> None:
    body = "s = Shape <end=1> (x) b = Concat <axis=0> (s, o, o) c = Expand(t, b) {}"
    model = small("float[N,2,4] x", body.format("y = Concat <axis=1> (c, x)"), o=i(1), t=normal(1, 1, 4))
    assert kinds(model) == ["Expand", "Concat"]
    assert kinds(small("float[N,2,4] x", body.format("d = Exp(c) y = Concat <axis=1> (d, x)"), o=i(1), t=normal(1, 1, 4))) == ["Concat"]


def test_a_reshape_may_cut_across_axes_that_follow_each_other() -> None:
    model = before(passes.SinkTransposes, small("float[2,8,7] x", "a = Relu(x) b = Reshape(a, s) y = Exp(b)", s=i(2, 7, 8)))
    assert applied(passes.SinkTransposes(), model)
    assert kinds(model) == ["Pointwise", "View", "Pointwise"]
    body = "t = Transpose <perm=[0,2,1]> (x) b = Reshape(t, s) y = Exp(b)"
    model = before(passes.SinkTransposes, small("float[2,8,6] x", body, s=i(2, 4, 12)))
    assert applied(passes.SinkTransposes(), model)
    assert kinds(model).count("Copy") == 1


def test_folding_keeps_the_zeros_of_a_pruned_weight() -> None:
    weight = normal(4, 4, 3, 3)
    weight *= select(weight, 1)
    model = small(IMAGE, "a = Conv(x, w) y = BatchNormalization(a, s, s, s, s)", w=weight, s=V4)
    passes.prepare(model, "fp16")
    conv = next(node for node in model.graph if node.op_type == "Conv")
    found = constant_of(conv.inputs[1])
    assert found is not None
    assert count_groups(found, 3).is_24
    assert np.count_nonzero(found) == np.count_nonzero(weight)


def test_a_batch_norm_with_another_reader_between_is_spelled_out() -> None:
    model = small(IMAGE, "a = Conv <pads=[1,1,1,1]> (x, w) b = BatchNormalization(a, s, s, s, s) y = Add(a, b)", w=W33, s=V4)
    assert applied(passes.BatchNorms("fp16"), model)
    assert kinds(model) == ["Conv", "Mul", "Add", "Add"]


def test_of_two_layers_the_later_takes_the_sum() -> None:
    model = before(passes.Epilogues, small(ROWS, "a = MatMul(x, w) b = MatMul(x, u) c = Add(a, b) y = Relu(c)", w=M48, u=normal(4, 8)))
    assert applied(passes.Epilogues("fp16"), model)
    last = list(model.graph)[-1]
    assert attribute(last, "activation") == "relu"
    assert last.inputs[3] is next(iter(model.graph)).outputs[0]


def test_a_dense_block_lies_in_one_value() -> None:
    body = "a = Relu(x) b = Exp(x) c = Concat <axis=2> (a, b) d = Neg(c) e = Concat <axis=2> (a, b, d) y = ReduceMax(e, k)"
    model = before(passes.ConcatInPlace, small("float[2,4,8] x", body, k=i(1)))
    assert applied(passes.ConcatInPlace(), model)
    short, long = [node for node in model.graph if node.op_type == "Concat"]
    assert attribute(short, "within") == long.outputs[0].name
    assert list(attribute(short, "in_place")) == [1, 1]
    assert list(attribute(long, "in_place")) == [1, 1, 1]


def test_a_part_that_a_matrix_product_reads_is_copied_into_the_concat() -> None:
    body = "a = Relu(x) b = MatMul(a, w) c = Concat <axis=1> (a, b) y = Relu(c)"
    model = before(passes.ConcatInPlace, small("float[3,8] x", body, w=normal(8, 8)))
    passes.ConcatInPlace()(model)
    concat = next(node for node in model.graph if node.op_type == "Concat")
    assert list(attribute(concat, "in_place")) == [0, 0]


def test_widened_outputs_reach_the_next_layer_without_a_copy() -> None:
    model = before(
        passes.WidenChannels, small("float[3,8] x", "a = MatMul(x, w) b = Relu(a) y = MatMul(b, u)", w=normal(8, 5), u=normal(5, 8))
    )
    assert applied(passes.WidenChannels(), model)
    assert kinds(model) == ["Linear", "Linear"]


def test_a_program_has_numbers_in_place_of_scalars() -> None:
    model = before(passes.SinkTransposes, small(ROWS, "y = Clip(x, lo, hi)", lo=f(0), hi=f(6)))
    assert program_of(next(iter(model.graph))) == [["clip", ["in", 0], ["c", 0.0], ["c", 6.0]]]


def test_long_sums_become_a_chain() -> None:
    model = before(
        passes.Elementwise, small(ROWS, "a = Neg(x) b = Abs(x) c = Exp(x) d = Tanh(x) e = Erf(x) g = Relu(x) y = Sum(x, a, b, c, d, e, g)")
    )
    assert applied(passes.Elementwise(), model)
    assert kinds(model).count("Pointwise") == 8


HEADS = "float[2,3,4,20] q, float[2,3,{keys},20] k, float[2,3,{keys},20] v"


@pytest.mark.parametrize(
    ("keys", "body"),
    [
        (5, "t = Transpose <perm=[0,1,3,2]> (k) a = Mul(q, s) c = MatMul(a, t) d = Softmax(c) y = MatMul(d, v)"),
        (5, "y = Attention <scale=0.6> (q, k, v)"),
        (4, "y = Attention <is_causal=1> (q, k, v)"),
    ],
)
def test_heads_that_no_library_takes_are_computed_by_parts(keys: int, body: str) -> None:
    # MobileViT has heads of 20 features, DaViT's channel attention as many as there are pixels.
    model = small(HEADS.format(keys=keys), body, opset=23, s=f(0.6))
    feeds = random_inputs(model)
    wanted = evaluate(model, feeds)
    lowered = lower(passes.prepare(model, "fp16"), 2, "fp16")
    assert {call.family for call in lowered.calls} & {"attention", "matmul"} == {"matmul"}
    assert largest_difference(wanted, run_lowered(lowered, feeds)) <= FOLDED


def test_a_reshape_of_a_view_with_gaps_stays_behind_the_program() -> None:
    # The relative positions of BoTNet: a part of padded rows, spread, added, reshaped, and added to the scores.
    body = "a = Slice(x, b, e, k) c = Relu(a) d = Reshape(c, s) y = Add(d, z)"
    model = small("float[2,4,9] x, float[2,16] z", body, b=i(2), e=i(6), k=i(2), s=i(2, 16))
    feeds = random_inputs(model)
    wanted = evaluate(model, feeds)
    lowered = lower(passes.prepare(model, "fp16"), 2, "fp16")
    assert largest_difference(wanted, run_lowered(lowered, feeds)) <= 1e-11


@pytest.mark.parametrize(("first", "pitch"), [(8, 32), (10, None), (12, 32), (14, None)])
def test_a_slice_of_channels_is_convolved_where_it_lies_if_that_is_aligned(first: int, pitch: int | None) -> None:
    # InceptionNeXt splits 40 channels into four times 10.
    body = f"e = Conv(x, v) a, b, c = Split <axis=1> (e, n) y = Conv <group={first}> (b, w)"
    model = small("float[2,8,5,6] x", body, v=normal(32, 8, 1, 1), n=i(32 - 2 * first, first, first), w=normal(first, 1, 1, 2))
    feeds = random_inputs(model)
    wanted = evaluate(model, feeds)
    lowered = lower(passes.prepare(model, "fp16"), 2, "fp16")
    check_footprints(lowered)
    assert [call.problem.x_pitch for call in lowered.calls if call.family == "conv"][-1] == pitch
    assert largest_difference(wanted, run_lowered(lowered, feeds)) <= FOLDED


def test_an_image_that_shrinks_to_nothing_is_refused() -> None:
    model = small("float[2,4,9,1] x", "y = Conv <pads=[2,2,2,2], strides=[4,4]> (x, w)", w=normal(8, 4, 7, 7))
    with pytest.raises(InputError, match="use a larger image"):
        lower(passes.prepare(model, "fp16"), 2, "fp16")


def test_leftovers_are_all_named() -> None:
    model = small(TOKENS, "a = Transpose <perm=[0,2,1]> (x) y = Relu(a)")
    next(node for node in model.graph if node.op_type == "Relu").op_type = "Softsign"
    with pytest.raises(
        UnsupportedError, match=r"the engine has no step for Softsign \(Relu_1\); build with fallback to run them on the CPU"
    ):
        passes.SinkTransposes()(model)


def test_a_pass_left_out_is_noticed() -> None:
    with pytest.raises(
        VerificationError, match="node 'BatchNormalization_0' is still BatchNormalization, expected it to be rewritten before"
    ):
        passes.BatchNorms("fp16")(small("float[2,4,3,3] x, float[4] s", "y = BatchNormalization(x, s, s, s, s)"))


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(InputError, match=r"precision 'fp8' is unknown here, expected one of \['fp16', 'bf16'\]"):
        passes.Precision("fp8")


@pytest.mark.parametrize("seed", range(24))
def test_a_convolution_over_patches_is_the_convolution(seed: int) -> None:
    rng = np.random.default_rng(seed)
    kernel, strides, dilations = ([int(n) for n in rng.integers(1, top, 2)] for top in (8, 5, 3))
    if seed % 2:
        dilations = [1, 1]
    pads = [int(n) for n in rng.integers(0, 5, 4)]
    size = [int(rng.integers(d * (k - 1) + 1, 30)) for k, d in zip(kernel, dilations, strict=True)]
    channels = int(rng.integers(1, 5))
    described = f"strides={strides}, pads={pads}, dilations={dilations}"
    inputs, weight = f"float[2,{channels},{size[0]},{size[1]}] x", normal(8, channels, *kernel)
    model = before(passes.GatherPatches, small(inputs, f"y = Conv <{described}> (x, w)", w=weight))
    assert applied(passes.GatherPatches(), model)
    assert "Patches" in kinds(model)


def test_a_shortcut_keeps_its_zeros() -> None:
    body, inputs = "a = Conv(x, w) b = Conv(z, v) s = Add(a, b) y = Relu(s)", "float[2,8,5,6] x, float[2,16,5,6] z"
    dense, other = normal(16, 8, 1, 1), normal(16, 16, 1, 1)
    kept = np.where(select(other[:, :, 0, 0]), other[:, :, 0, 0], 0)[:, :, None, None].astype(np.float32)
    for weights, merged in (({"w": dense, "v": other}, True), ({"w": dense, "v": kept}, False)):
        model = before(passes.MergeShortcuts, small(inputs, body, **weights))
        assert applied(passes.MergeShortcuts(), model) == merged


def test_a_shortcut_beside_a_grouped_convolution_stays() -> None:
    body, inputs = "g = Conv(x, d) a = Conv(g, w) b = Conv(z, v) s = Add(a, b) y = Relu(s)", "float[2,8,5,6] x, float[2,16,5,6] z"
    weights = {"w": normal(16, 8, 1, 1), "v": normal(16, 16, 1, 1)}
    for groups in (1, 2):
        made = small(inputs, body.replace("Conv(x, d)", f"Conv <group={groups}> (x, d)"), d=normal(8, 8 // groups, 1, 1), **weights)
        model = before(passes.MergeShortcuts, made)
        assert applied(passes.MergeShortcuts(), model) == (groups == 1)


W64, WIDE = normal(64, 8) * np.float32(0.02), "float[16,64] x"
COLUMN = W64.T[:, :, None, None].copy()
NORM = "BatchNormalization <epsilon=0.0> (a, s, t, z, o)"
ROUNDING = {"fp16": (np.float16, 2.0**-11), "bf16": (ml_dtypes.bfloat16, 2.0**-8)}


def rounded(lowered: Lowered) -> Lowered:
    """Layers whose weights are as a GPU reads them."""
    kind = ROUNDING[lowered.precision][0]
    calls = [replace(c, weight=None if c.weight is None else c.weight.astype(kind).astype(np.float32)) for c in lowered.calls]
    return replace(lowered, calls=tuple(calls))


@pytest.mark.parametrize("precision", ROUNDING)
@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-3, 1e-4, 1e-6, 1e-9])
@pytest.mark.parametrize(
    ("inputs", "body", "axis"),
    [
        (WIDE, "a = MatMul(x, w) y = Mul(a, s)", 1),
        (WIDE, "a = MatMul(x, w) y = Div(a, d)", 1),
        ("float[2,8,64] x", "a = MatMul(x, w) b = Transpose <perm=[0,2,1]> (a) y = Mul(b, c)", 1),
        ("float[2,64,2,4] x", f"a = Conv(x, k) y = {NORM}", 1),
    ],
    ids=["Mul", "Div", "behind a transpose", "batch norm"],
)
def test_a_scale_costs_an_output_no_more_than_rounding_the_weight(inputs: str, body: str, axis: int, size: float, precision: str) -> None:
    scale, zeros = size * V4.repeat(2), np.zeros(8, np.float32)
    constants = {"w": W64, "k": COLUMN, "s": scale, "d": 1 / scale, "c": scale[:, None], "t": zeros, "z": zeros, "o": zeros + 1}
    model = small(inputs, body, **constants)
    feeds = random_inputs(model)
    wanted = np.moveaxis(evaluate(model, feeds)["y"], axis, -1)
    lowered = lower(passes.prepare(model, precision), wanted.shape[0], precision)
    found = np.moveaxis(run_lowered(rounded(lowered), feeds)["y"], axis, -1)
    # A row v that rounding changes by d changes its output by at most |d| |x|; |d| is at most u |v| for numbers with all their digits, and
    # as much again for the others.
    x = np.linalg.norm(feeds["x"].astype(np.float64), axis=1 if "Conv" in body else -1)[..., None]
    row = np.linalg.norm(W64.astype(np.float64) * scale, axis=0)
    assert np.all(np.abs(found - wanted) <= 2 * ROUNDING[precision][1] * row * x)
    apart = [call for call in lowered.calls if call.kind == "Pointwise"]
    assert bool(apart) == (precision == "fp16" and size < 1e-2), "only what would lose digits stays apart"
    (weight,) = [call.weight for call in lowered.calls if call.weight is not None]
    sizes = np.linalg.norm(weight.reshape(8, -1), axis=1)
    assert not apart or np.all((sizes > 0.49) & (sizes < 1.01)), "what is multiplied later fits where the inputs do"


def one(value: float) -> Any:
    """A factor for one of eight channels, 1 for the others."""
    return np.array([1, 1, 1, value, 1, 1, 1, 1], np.float32)


TO_LINEAR, TO_OUTPUT = " p = MatMul(y0, m) y = Relu(p)", " y = Relu(y0)"
DEPTHWISE = " q = Conv <group=8> (y0, g) y = Relu(q)"


@pytest.mark.parametrize(
    ("inputs", "body", "scale", "folds"),
    [
        (WIDE, "a = MatMul(x, w) y0 = Mul(a, s)" + TO_OUTPUT, one(0), True),  # nothing is left to lose
        (WIDE, "a = MatMul(x, w) y0 = Mul(a, s)" + TO_OUTPUT, one(1e-6), False),
        (WIDE, "a = MatMul(x, w) y0 = Mul(a, s)" + TO_LINEAR, one(1e-6), True),  # lost beside its neighbours
        (WIDE, "a = MatMul(x, w) y0 = Mul(a, s)" + TO_LINEAR, one(1) * np.float32(1e-6), False),
        (WIDE, "a = MatMul(x, w) y0 = Mul(a, s)" + TO_LINEAR, one(1) * np.float32(1e-8), True),  # nearly zero, as the output is
        (WIDE + ", float[16,8] r", "a = MatMul(x, w) b = Mul(a, s) y0 = Add(b, r)" + TO_LINEAR, one(1) * np.float32(1e-6), False),
        (WIDE, "a = MatMul(x, v) y0 = Mul(a, s)" + TO_OUTPUT, one(2), True),  # the weight alone is too small
        (WIDE, "a = MatMul(x, v) y0 = Mul(a, s)" + TO_OUTPUT, one(1e-3), False),
        ("float[2,64,2,4] x", f"a = Conv(x, k) y0 = {NORM}" + TO_OUTPUT, one(1e-6), False),
        ("float[2,64,2,4] x", f"a = Conv(x, k) y0 = {NORM.replace(' t,', ' h,')}" + TO_OUTPUT, one(1e-6), True),  # lost beside the bias
        ("float[2,64,2,4] x", f"a = Conv(x, k) y0 = {NORM}" + DEPTHWISE, one(1e-6), False),
    ],
)
def test_a_scale_folds_where_what_it_costs_is_lost_anyway(inputs: str, body: str, scale: Any, folds: bool) -> None:
    zeros = np.zeros(8, np.float32)
    constants = {"w": W64, "v": W64 * np.float32(2.0**-10), "k": COLUMN, "s": scale, "t": zeros, "h": zeros + 2, "z": zeros, "o": zeros + 1}
    model = small(inputs, body, **constants, m=normal(8, 8), g=normal(8, 1, 1, 1))
    feeds = random_inputs(model)
    wanted = evaluate(model, feeds)
    lowered = lower(passes.prepare(model, "fp16"), len(feeds["x"]), "fp16")
    assert largest_difference(wanted, run_lowered(lowered, feeds)) <= FOLDED
    assert any(call.kind == "Pointwise" for call in lowered.calls) != folds


def test_a_large_constant_that_is_too_small_for_fp16_stays_fp32() -> None:
    for size, kept in ((1.0, "fp16"), (1e-6, "fp32")):
        model = small("float[2,5000] x", "a = Relu(x) y = Mul(a, s)", s=size * RNG.uniform(0.5, 1.5, 5000).astype(np.float32))
        lowered = lower(passes.prepare(model, "fp16"), 2, "fp16")
        (call,) = lowered.calls
        assert {operand.dtype for operand in call.problem.inputs} == {"fp32", kept}
