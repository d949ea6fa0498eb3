"""The oracle's ONNX operators against ONNX Runtime: each operator alone in its forms, and random graphs of many."""

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from graphs import text_model
from hypothesis import given, settings
from hypothesis import strategies as st

from twofour.builder.evaluate import evaluate
from twofour.errors import InputError, UnsupportedError
from twofour.oracle.operators import FUSED, has_operator, run_operator

RNG = np.random.default_rng(0)
W = RNG.standard_normal((6, 4, 3, 3)).astype(np.float32)
V4 = RNG.uniform(0.5, 1.5, 4).astype(np.float32)
I64 = np.int64


def i(*values: int) -> Any:
    return np.array(values, I64)


# name: (inputs, body, constants). Attributes are chosen off their defaults, so that ignoring one shows.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "conv": (
        "float[2,4,9,8] x",
        "y = Conv <strides=[2,1], pads=[1,0,2,1], dilations=[1,2]> (x, w, b)",
        {"w": W, "b": V4[[0, 1, 2, 3, 0, 1]]},
    ),
    "conv grouped": ("float[2,4,7,7] x", "y = Conv <group=2, kernel_shape=[3,3]> (x, w)", {"w": W[:, :2]}),
    "conv same": ("float[1,4,7,6] x", 'y = Conv <auto_pad="SAME_LOWER", strides=[2,2]> (x, w)', {"w": W}),
    "conv 1-d": ("float[2,4,9] x", "y = Conv <strides=[2], pads=[1,0]> (x, w)", {"w": W[..., 0]}),
    "max pool": ("float[2,3,8,7] x", "y = MaxPool <kernel_shape=[3,2], strides=[2,2], pads=[1,0,1,1], ceil_mode=1> (x)", {}),
    "average pool": ("float[2,3,8,7] x", "y = AveragePool <kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]> (x)", {}),
    "average pool counting": (
        "float[2,3,8,7] x",
        "y = AveragePool <kernel_shape=[3,2], strides=[2,2], pads=[1,1,1,0], count_include_pad=1> (x)",
        {},
    ),
    "average pool up": ("float[1,2,8,7] x", "y = AveragePool <kernel_shape=[2,2], strides=[2,2], ceil_mode=1> (x)", {}),
    "global": ("float[2,3,5,4] x", "a = GlobalAveragePool(x) b = GlobalMaxPool(x) y = Add(a, b)", {}),
    "batch norm": ("float[2,4,3,3] x", "y = BatchNormalization <epsilon=0.1> (x, s, s, s, s)", {"s": V4}),
    "instance norm": ("float[2,4,3,3] x", "y = InstanceNormalization <epsilon=0.1> (x, s, s)", {"s": V4}),
    "group norm": ("float[2,4,3,3] x", "y = GroupNormalization <num_groups=2> (x, s, s)", {"s": V4[:2]}),
    "layer norm": ("float[2,3,4] x", "y = LayerNormalization <epsilon=0.1> (x, s, s)", {"s": V4}),
    "lp norm": ("float[2,3,4] x", "y = LpNormalization <axis=1, p=1> (x)", {}),
    "lrn": ("float[2,5,3,3] x", "y = LRN <size=3, alpha=0.5, beta=0.6, bias=2.0> (x)", {}),
    "gemm": ("float[3,4] x", "y = Gemm <alpha=0.5, beta=2.0, transA=1> (x, w, c)", {"w": W[:3, :, 0, 0], "c": V4}),
    "matmul": ("float[2,3,4] x", "y = MatMul(x, w)", {"w": W[:4, :, 0, 0]}),
    "einsum": ("float[2,3,4] x", 'y = Einsum <equation="bij,bkj->bik"> (x, x)', {}),
    "softmax": ("float[2,3,4] x", "y = Softmax <axis=1> (x)", {}),
    "log softmax": ("float[2,3,4] x", "y = LogSoftmax(x)", {}),
    "reduce": ("float[2,3,4] x", "a = ReduceMean <keepdims=0> (x, ax) b = ReduceL2 <keepdims=0> (x, ax) y = Sub(a, b)", {"ax": i(0, -1)}),
    "reduce more": ("float[2,3,4] x", "a = ReduceMax(x, ax) b = ReduceSumSquare(x, ax) c = ReduceL1(x, ax) y = Sum(a, b, c)", {"ax": i(1)}),
    "logsumexp": ("float[2,3,4] x", "y = ReduceLogSumExp <keepdims=0> (x, ax)", {"ax": i(1)}),
    "arg": ("float[2,3,4] x", "y = ArgMax <axis=1, keepdims=0> (x)", {}),
    "top-k": ("float[2,6] x", "y, z = TopK <axis=1, largest=0> (x, k)", {"k": i(3)}),
    "cumsum": ("float[2,6] x", "y = CumSum <exclusive=1, reverse=1> (x, a)", {"a": np.array(1, I64)}),
    "resize linear": (
        "float[1,2,5,4] x",
        'y = Resize <mode="linear", coordinate_transformation_mode="half_pixel"> (x, , , s)',
        {"s": i(1, 2, 8, 3)},
    ),
    "resize corners": (
        "float[1,2,5,4] x",
        'y = Resize <mode="linear", coordinate_transformation_mode="align_corners"> (x, , , s)',
        {"s": i(1, 2, 9, 7)},
    ),
    "resize scales": (
        "float[1,2,5,4] x",
        'y = Resize <mode="nearest", nearest_mode="floor", coordinate_transformation_mode="asymmetric"> (x, , f)',
        {"f": np.array([1, 1, 1.5, 2.5], np.float32)},
    ),
    "resize cubic": ("float[1,2,5,4] x", 'y = Resize <mode="cubic", cubic_coeff_a=-0.5> (x, , , s)', {"s": i(1, 2, 8, 9)}),
    "depth": ("float[1,8,3,2] x", 'a = DepthToSpace <blocksize=2, mode="CRD"> (x) y = SpaceToDepth <blocksize=2> (a)', {}),
    "reshape": ("float[2,3,4] x", "y = Reshape(x, s)", {"s": i(0, -1, 2)}),
    "flatten": ("float[2,3,4] x", "y = Flatten <axis=2> (x)", {}),
    "squeeze": ("float[2,1,4] x", "a = Squeeze(x, ax) y = Unsqueeze(a, bx)", {"ax": i(1), "bx": i(0, -1)}),
    "slice": ("float[5,6,7] x", "y = Slice(x, s, e, a, t)", {"s": i(4, -5), "e": i(-9, 9), "a": i(0, 2), "t": i(-2, 3)}),
    "split": ("float[2,7] x", "y, z = Split <axis=1> (x, s)", {"s": i(3, 4)}),
    "concat": ("float[2,3] x", "y = Concat <axis=-1> (x, x)", {}),
    "expand": ("float[3,1] x", "y = Expand(x, s)", {"s": i(2, 1, 4)}),
    "gather": ("float[3,4,2] x", "y = Gather <axis=1> (x, k)", {"k": np.array([[0, -1], [2, 2]], I64)}),
    "gather elements": ("float[2,3] x", "y = GatherElements <axis=1> (x, k)", {"k": np.array([[0, 2], [1, 1]], I64)}),
    "gather nd": ("float[3,4,2] x", "y = GatherND(x, k)", {"k": np.array([[0, 1], [2, 3]], I64)}),
    "scatter nd": ("float[3,2] x", "y = ScatterND(x, k, u)", {"k": np.array([[2], [0]], I64), "u": V4.reshape(2, 2)}),
    "pad": ("float[2,3] x", "y = Pad(x, p, v)", {"p": i(1, 0, 2, 1), "v": np.float32(2.5)}),
    "pad cut": ("float[4,5] x", 'y = Pad <mode="reflect"> (x, p)', {"p": i(1, 2, -1, 1)}),
    "tile": ("float[2,3] x", "y = Tile(x, r)", {"r": i(2, 3)}),
    "trilu": ("float[4,4] x", "y = Trilu <upper=0> (x, k)", {"k": np.array(-1, I64)}),
    "where": (
        "float[2,3] x",
        "a = Greater(x, z) b = LessOrEqual(x, z) c = Not(b) d = And(a, c) y = Where(d, x, z)",
        {"z": np.float32(0.2)},
    ),
    "clip": ("float[2,3] x", "a = Clip(x, lo) b = Clip(x, , lo) y = Sub(a, b)", {"lo": np.float32(0.1)}),
    "activations": (
        "float[4,5] x",
        "a = HardSigmoid <alpha=0.3, beta=0.4> (x) b = LeakyRelu <alpha=0.2> (x) c = Elu <alpha=0.5> (x) d = Selu(x) "
        "e = Celu <alpha=2.0> (x) "
        'f = Gelu <approximate="tanh"> (x) g = Gelu(x) h = HardSwish(x) k = Mish(x) l = Softplus(x) m = Softsign(x) '
        "y = Sum(a,b,c,d,e,f,g,h,k,l,m)",
        {},
    ),
    "unary": (
        "float[4,5] x",
        "p = Abs(x) a = Sqrt(p) b = Exp(x) c = Erf(x) d = Tanh(x) e = Neg(x) f = Floor(x) g = Ceil(x) h = Round(x) k = Sign(x) "
        "l = Sin(x) m = Cos(x) "
        "n = Sigmoid(x) o = Reciprocal(b) q = Log(b) y = Sum(a,b,c,d,e,f,g,h,k,l,m,n,o,q)",
        {},
    ),
    "binary": (
        "float[4,5] x",
        "a = Abs(x) b = Pow(a, z) c = Min(x, z) d = Max(x, b) e = Div(c, z) f = PRelu(x, z) y = Sum(b,d,e,f)",
        {"z": np.float32(1.3)},
    ),
    "integers": (
        "float[4,5] x",
        "a = Cast <to=7> (x) b = Mod(a, z) c = Div(a, z) d = Add(b, c) y = Cast <to=1> (d)",
        {"z": np.array(3, I64)},
    ),
    "shapes": ("float[4,5] x", "a = Shape <start=1> (x) b = Size(x) c = ConstantOfShape(a) d = Cast <to=1> (b) y = Add(c, d)", {}),
}


def compared(model: onnx.ModelProto, scale: float = 3.0) -> None:
    """The oracle's outputs equal ONNX Runtime's within fp32 rounding: eps for each of up to 256 terms, relative to the largest value."""
    import onnx_ir as ir

    rng = np.random.default_rng(1)
    feeds = {}
    for value in model.graph.input:
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        feeds[value.name] = (scale * rng.standard_normal(shape)).astype(np.float32)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    wanted = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, feeds)
    got = evaluate(ir.from_proto(model), feeds)
    for array, name in zip(wanted, [o.name for o in model.graph.output], strict=True):
        assert got[name].shape == array.shape
        tolerance = 256 * np.finfo(np.float32).eps * max(1.0, float(np.abs(array).max()))
        np.testing.assert_allclose(got[name].astype(np.float64), array.astype(np.float64), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_an_operator_equals_onnx_runtime(name: str) -> None:
    inputs, body, constants = CASES[name]
    kind = "int64" if name == "arg" else "float"
    compared(text_model(inputs, body, f"{kind}[] y", **constants))


def test_attention_of_opset_23() -> None:
    rng = np.random.default_rng(2)
    q, k = rng.standard_normal((2, 3, 8)), rng.standard_normal((2, 3, 8))
    three = run_operator("", "Attention", [q, k, k], {"q_num_heads": 2, "kv_num_heads": 2, "is_causal": 1})[0]
    four = run_operator("", "Attention", [x.reshape(2, 3, 2, 4).swapaxes(1, 2) for x in (q, k, k)], {"is_causal": 1})[0]
    np.testing.assert_allclose(three, four.swapaxes(1, 2).reshape(2, 3, 8))
    # The first token sees itself alone.
    np.testing.assert_allclose(three[:, 0], k[:, 0])


@st.composite
def random_graphs(draw: st.DrawFn) -> onnx.ModelProto:
    """Up to eight operators on images, each fed by any earlier value."""
    values, body = ["x"], []
    steps = ["{} = Relu({})", "{} = Sigmoid({})", "{} = Add({}, {})", "{} = Mul({}, {})", "{} = Sub({}, c)", "{} = Mul({}, c)"]
    steps += ["{} = Conv <pads=[1,1,1,1]> ({}, w)", "{} = Conv <pads=[1,1,1,1], group=4> ({}, d)", "{} = Softmax <axis=1> ({})"]
    steps += ["{} = MaxPool <kernel_shape=[3,3], pads=[1,1,1,1]> ({})", "{} = AveragePool <kernel_shape=[3,3], pads=[1,1,1,1]> ({})"]
    steps += ["{} = BatchNormalization({}, v, v, v, v)", "{} = HardSwish({})", "{} = Gelu({})"]
    for index in range(draw(st.integers(1, 8))):
        step = draw(st.sampled_from(steps))
        args = [draw(st.sampled_from(values)) for _ in range(step.count("{}") - 1)]
        body.append(step.format(f"v{index}", *args))
        values.append(f"v{index}")
    body.append(f"y = Identity({values[-1]})")
    constants = {"w": W[:4] / 6, "d": W[:4, :1] / 3, "c": V4.reshape(4, 1, 1), "v": V4}
    used = {name: array for name, array in constants.items() if any(f"{name})" in line or f" {name}," in line for line in body)}
    return text_model("float[2,4,5,6] x", " ".join(body), **used)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(model=random_graphs())
def test_random_graphs_equal_onnx_runtime(model: onnx.ModelProto) -> None:
    compared(model, scale=1.0)


def test_an_operator_the_oracle_lacks_is_named() -> None:
    assert not has_operator("", "NonZero")
    with pytest.raises(UnsupportedError, match="operator NonZero has no float64 version"):
        run_operator("", "NonZero", [np.zeros(3)], {})


def test_forms_the_oracle_lacks_are_named() -> None:
    x = np.zeros((1, 1, 2, 2))
    with pytest.raises(InputError, match="Resize with antialias"):
        run_operator("", "Resize", [x, None, None, np.array([1, 1, 4, 4])], {"antialias": 1})
    with pytest.raises(InputError, match="coordinate mode 'tf_crop_and_resize'"):
        run_operator("", "Resize", [x, None, None, np.array([1, 1, 4, 4])], {"coordinate_transformation_mode": "tf_crop_and_resize"})
    with pytest.raises(InputError, match="reaches element 4 of a value that has 4"):
        FUSED["View"]([x], {"shape": [2], "strides": [1], "offset": 3}, 1)


def test_axes_that_are_reduced_may_lie_apart() -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 5))
    (mean,) = FUSED["Reduce"]([x], {"kind": "mean", "axes": [1, 3], "eps": 0.0}, 1)
    np.testing.assert_allclose(mean, x.mean((1, 3), keepdims=True), rtol=1e-12)
    (along,) = FUSED["Reduce"]([x], {"kind": "softmax", "axes": [1, 3], "eps": 0.0}, 1)
    np.testing.assert_allclose(along, np.exp(x) / np.exp(x).sum((1, 3), keepdims=True), rtol=1e-12)
