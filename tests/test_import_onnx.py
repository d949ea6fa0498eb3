"""Import: what opset and shapes are taken, what the sentences say, and the fallback for operators the engine lacks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from graphs import imported, kinds, small, text_model
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from lowered_run import run_lowered

import twofour
from twofour.builder import passes
from twofour.builder.evaluate import evaluate, largest_difference, random_inputs
from twofour.builder.lower import Front, lower
from twofour.builder.passes.fallback import Fallbacks
from twofour.errors import InputError, TwofourError, UnsupportedError, VerificationError
from twofour.exchange.importer import import_graph

ESCAPE = "\x1b[2J"  # clears a screen


@pytest.mark.parametrize("opset", [13, 18, 24])
def test_opsets_13_to_24_are_taken(opset: int) -> None:
    body = "y = ReduceMean <axes=[1]> (x)" if opset < 18 else "y = ReduceMean(x, a)"
    arrays = {} if opset < 18 else {"a": np.array([1], np.int64)}
    model = small("float[N,3] x", body, opset=opset, **arrays)
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(evaluate(model, {"x": x})["y"], [[1], [4]])


@pytest.mark.parametrize("opset", [12, 25])
def test_another_opset_is_one_sentence(opset: int) -> None:
    with pytest.raises(UnsupportedError, match=f"'test' uses ONNX opset {opset}, expected 13 to 24; export it with one of these"):
        small("float[2,3] x", "y = Relu(x)", opset=opset)


def test_every_shape_is_static_for_the_batch() -> None:
    body = "s = Shape <end=1> (x) b = Concat <axis=0> (s, m) a = Reshape(x, b) y = Softmax(a)"
    model = imported(text_model("float[N,2,3] x", body, m=np.array([6], np.int64)), batch=5)
    assert kinds(model) == ["Reshape", "Softmax"]
    assert [list(value.shape) for node in model.graph for value in node.outputs] == [[5, 6], [5, 6]]


def test_every_floating_type_becomes_fp32() -> None:
    text = "z = Cast <to=10> (w) a = Cast <to=1> (x) b = Cast <to=1> (z) y = Add(a, b)"
    model = small("float16[2,3] x", text, w=np.ones(3, np.float64))
    passes.DeadCode()(model)
    assert kinds(model) == ["Add"]
    assert {str(value.dtype) for value in (*model.graph.inputs, *model.graph.initializers.values())} == {"FLOAT"}


def test_a_fixed_batch_and_dynamic_axes_are_refused() -> None:
    with pytest.raises(InputError, match="exported for batches of 4, batch 3 was asked for; ask for 4, or export it with a dynamic batch"):
        imported(text_model("float[4,3] x", "y = Relu(x)"), batch=3)
    with pytest.raises(
        UnsupportedError, match=r"input 'x' of 'test' has the dynamic axis 1 \(M\); only the batch \(axis 0\) may be dynamic"
    ):
        imported(text_model("float[N,M] x", "y = Relu(x)"))
    with pytest.raises(InputError, match=r"input 'x' of 'test' is empty, its shape is \[2, 0\]; export the model with real sizes"):
        imported(text_model("float[N,0] x", "y = Relu(x)"))
    with pytest.raises(InputError, match="batch is 0, expected 1 to 2147483647"):
        imported(text_model("float[N,3] x", "y = Relu(x)"), batch=0)


def test_all_operators_we_lack_are_listed_with_their_nodes() -> None:
    body = "a = Softsign(x) k, z = TopK(a, n) d = MaxPool <kernel_shape=[1], storage_order=1> (x3) c = Softsign(k) y = Add(c, s)"
    body = body.replace("d = MaxPool <kernel_shape=[1], storage_order=1> (x3) ", "")
    with pytest.raises(UnsupportedError) as caught:
        small("float[2,3] x", body, n=np.array([3], np.int64), s=np.float32(1))
    message = (
        "'test' has 3 nodes with operators that the engine lacks: Softsign (Softsign_0, Softsign_2); TopK (TopK_1); build with fallback"
    )
    assert message in str(caught.value)


def test_a_form_we_lack_says_which() -> None:
    with pytest.raises(UnsupportedError, match="'test' has 1 node with operators that the engine lacks: Softsign"):
        small("float[2,3] x", "y = Softsign(x)")
    with pytest.raises(UnsupportedError, match=r"Resize with mode cubic \(Resize_0\)"):
        small("float[1,2,4,4] x", 'y = Resize <mode="cubic"> (x, , , s)', s=np.array([1, 2, 8, 8], np.int64))
    with pytest.raises(UnsupportedError, match=r"Conv with its weight is computed at run time \(Conv_0\)"):
        small("float[1,2,4,4] x, float[2,2,1,1] w", "y = Conv(x, w)")
    with pytest.raises(UnsupportedError, match=r"Gather with indices that are not evenly spaced \(Gather_0\)"):
        small("float[40000,2] x", "y = Gather(x, k)", k=np.arange(200) ** 2)
    vector = np.ones(2, np.float32)
    with pytest.raises(UnsupportedError, match=r"BatchNormalization with statistics of the batch \(training_mode\) \(BatchN.*_0\)"):
        small("float[4,2,3,3] x", "y, m, v = BatchNormalization <training_mode = 1> (x, k, k, k, k)", k=vector)
    with pytest.raises(UnsupportedError, match=r"Dropout with values dropped at random \(training_mode\) \(Dropout_0\)"):
        small("float[4,2] x", "y = Dropout(x, r, t)", r=np.float32(0.5), t=np.array(True))
    assert kinds(small("float[4,2] x", "y = Dropout(x, r, t)", r=np.float32(0.5), t=np.array(False))) == ["Dropout"]


@pytest.mark.parametrize("index", [5, -6])
def test_an_index_outside_its_axis_is_refused(index: int) -> None:
    with pytest.raises(UnsupportedError, match=r"Gather with indices outside its axis of 5 \(Gather_0\)"):
        small("float[2,5] x", "y = Gather <axis=1> (x, k)", k=np.array([1, index]))


def bins(size: int, count: int) -> np.ndarray:
    """Pixels of each bin of torch's adaptive pooling; short bins repeat the last pixel."""
    longest = max(-(-(i + 1) * size // count) - i * size // count for i in range(count))
    return np.minimum(np.arange(count)[:, None] * size // count + np.arange(longest), size - 1)


@pytest.mark.parametrize(("size", "count", "gathers"), [((8, 7), (7, 6), 2), ((16, 9), (7, 4), 5), ((1, 1), (7, 7), 2)])
def test_bins_of_an_adaptive_pool_are_views(size: tuple[int, int], count: tuple[int, int], gathers: int) -> None:
    rows, columns = (bins(*pair) for pair in zip(size, count, strict=True))
    index = np.stack(np.broadcast_arrays(rows[:, :, None, None], columns), -1)
    proto = text_model(f"float[2,{size[0]},{size[1]},3] x", "t = Transpose <perm=[1,2,0,3]> (x) y = GatherND(t, k)", k=index)
    model = imported(proto)
    assert kinds(model).count("Gather") == gathers
    x = np.random.default_rng(0).standard_normal((2, *size, 3)).astype(np.float32)
    wanted = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"x": x})[0]
    np.testing.assert_array_equal(evaluate(model, {"x": x})["y"], wanted)
    lowered = lower(passes.prepare(model, "fp16"), 2, "fp16")
    np.testing.assert_array_equal(run_lowered(lowered, {"x": x})["y"], wanted)


@settings(max_examples=30, deadline=None)
@given(arrays(np.int64, st.tuples(st.integers(1, 3), st.integers(1, 4)), elements=st.integers(-6, 5)), st.integers(0, 1))
def test_uneven_indices_are_gathered_in_even_parts(indices: np.ndarray, axis: int) -> None:
    proto = text_model("float[6,6] x", f"y = Gather <axis={axis}> (x, k)", k=indices)
    x = np.arange(36, dtype=np.float32).reshape(6, 6)
    np.testing.assert_array_equal(evaluate(imported(proto, 6), {"x": x})["y"], x.take(indices, axis))


@pytest.mark.parametrize("mode", ["reflect", "edge", "wrap"])
def test_padding_by_the_images_own_pixels_gathers_them(mode: str) -> None:
    proto = text_model("float[2,3,4,5] x", f'y = Pad <mode="{mode}"> (x, p, , a)', p=np.array([1, 2, 3, 0]), a=np.array([2, -1]))
    model = imported(proto)
    assert set(kinds(model)) == {"Gather", "Concat"}
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)
    wanted = np.pad(x, ((0, 0), (0, 0), (1, 3), (2, 0)), mode=mode)  # type: ignore[call-overload]
    np.testing.assert_array_equal(evaluate(model, {"x": x})["y"], wanted)
    lowered = lower(passes.prepare(model, "fp16"), 2, "fp16")
    np.testing.assert_array_equal(run_lowered(lowered, {"x": x})["y"], wanted)


def test_coordinates_that_follow_each_other_are_not_taken_apart() -> None:
    with pytest.raises(UnsupportedError, match=r"GatherND \(GatherND_0\)"):
        small("float[2,2] x", "y = GatherND(x, k)", k=np.array([[0, 1], [1, 0]]))


def test_fallback_keeps_what_we_lack_as_its_own_model(tmp_path: Path) -> None:
    body = "a = Softsign(x) b = MatMul(a, w) k, z = TopK(b, n) y = Relu(k)"
    rng = np.random.default_rng(0)
    proto = text_model("float[N,8] x", body, w=rng.standard_normal((8, 8)).astype(np.float32), n=np.array([3], np.int64))
    path = tmp_path / "net.onnx"
    onnx.save(proto, path)
    front = Front(path, fallback=True)
    model = front.graph(2)
    assert kinds(model) == ["Fallback", "MatMul", "Fallback", "Relu"]
    feeds = random_inputs(model)
    wanted = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, feeds)[0]
    np.testing.assert_allclose(evaluate(model, feeds)["y"], wanted, rtol=1e-5, atol=1e-6)
    passes.prepare(model, "fp16")
    np.testing.assert_allclose(evaluate(model, feeds)["y"], wanted, rtol=1e-5, atol=1e-6)
    lowered = lower(model, 2, "fp16")
    assert [call.family for call in lowered.calls].count("fallback") == 2
    assert lowered.calls[0].problem.inputs == ("x",)
    assert not Fallbacks()(model).modified


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"nothing")
    with pytest.raises(InputError, match="is not a readable ONNX file"):
        import_graph(tmp_path / "x.onnx", 1)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("a = Relu(x) y = Add(a, nowhere)", "is not a readable ONNX file: Add 'Add_1' reads 'nowhere', which nothing gives"),
        ("a = Add(x, b) b = Relu(a) y = Relu(b)", "is not a readable ONNX file: Graph contains a cycle"),
        ("y = Relu(x) y = Neg(x)", "is not a readable ONNX file"),
    ],
)
def test_a_graph_that_is_none_is_refused(body: str, message: str, tmp_path: Path) -> None:
    onnx.save(text_model("float[N,4] x", body), tmp_path / "x.onnx")
    with pytest.raises(InputError, match=message):
        Front(tmp_path / "x.onnx")


def test_nodes_may_come_in_any_order(tmp_path: Path) -> None:
    onnx.save(text_model("float[N,4] x", "y = Relu(a) a = Neg(x)"), tmp_path / "x.onnx")
    assert kinds(Front(tmp_path / "x.onnx").graph(2)) == ["Neg", "Relu"]


def shaped(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(
    ("body", "arrays", "message"),
    [
        ("y = Conv(x, w)", {"w": shaped(8, 5, 3, 3)}, r"Conv \(Conv_0\): its weight is for 1 groups of 5 channels, its input has 4"),
        ("y = Conv <group=2> (x, w)", {"w": shaped(7, 2, 3, 3)}, "its 7 outputs are no multiple of its 2 groups"),
        ("y = Conv(x, w, b)", {"w": shaped(8, 4, 3, 3), "b": shaped(7)}, r"its bias has \[7\] values, expected 8"),
        ("y = Conv <kernel_shape=[5,5]> (x, w)", {"w": shaped(8, 4, 3, 3)}, r"kernel_shape is \[5, 5\], its weight's \[3, 3\]"),
        ("f = Flatten(x) y = Gemm(f, w, b)", {"w": shaped(256, 3), "b": shaped(5)}, r"its bias of shape \[5\] cannot be added to \[2, 3\]"),
        ("y = PRelu(x, w)", {"w": shaped(3, 1, 1)}, r"its slope of shape \[3, 1, 1\] does not fit \[2, 4, 8, 8\]"),
        ("y = LayerNormalization(x, w)", {"w": shaped(5)}, r"its scale or bias of shape \[5\] does not fit \[8\]"),
        ("y = InstanceNormalization(x, w, w)", {"w": shaped(5)}, r"its vectors have \[5\] values, its input 4 channels"),
        ("y = Reshape(x, s)", {"s": np.array([0, 3])}, r"\[2, 4, 8, 8\] cannot become \[2, 3\]"),
    ],
)
def test_operands_that_do_not_fit_are_refused(body: str, arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InputError, match=f"import: 'test' cannot be computed: .*{message}; export the model again"):
        small("float[2,4,8,8] x", body, **arrays)


def test_outputs_that_nothing_computes_and_inputs_of_text_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="output 'x' of 'test' is an input or a constant itself; leave it out"):
        small("float[2,4] x", "y = Relu(x)", "float[] y, float[2,4] x")
    with pytest.raises(UnsupportedError, match="'test' lists the output 'y' twice; leave one out"):
        small("float[2,4] x", "y = Relu(x)", "float[] y, float[] y")
    with pytest.raises(UnsupportedError, match="input 'x' of 'test' is string, expected one of bfloat16, bool"):
        small("string[2,4] x", "y = Identity(x)", "string[] y")


def hostile(change: Callable[[onnx.ModelProto], None]) -> onnx.ModelProto:
    """A model of one operator that we lack and one that we have, with an escape sequence where `change` puts one."""
    proto = text_model("float[N,8] x", "a = Softsign(x) y = Relu(a)")
    proto.graph.output[0].type.CopyFrom(proto.graph.input[0].type)
    change(proto)
    return proto


@pytest.mark.parametrize(
    ("change", "work", "message"),
    [
        (lambda m: setattr(m.graph.node[0], "name", ESCAPE), twofour.estimate, r"Softsign (?[2J)"),
        (lambda m: setattr(m.graph.node[0], "domain", f"my{ESCAPE}"), twofour.estimate, "my?[2J.Softsign"),
        (lambda m: setattr(m.graph.node[0], "op_type", f"My{ESCAPE}"), twofour.build, "My?[2J"),
        (lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[1], "dim_param", ESCAPE), twofour.estimate, "dynamic axis 1 (?[2J)"),
        (lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[1], "dim_param", ESCAPE), twofour.build, "dynamic axis 1 (?[2J)"),
        (lambda m: m.graph.initializer.add(name=ESCAPE, data_type=99) and setattr(m.graph, "name", ESCAPE), twofour.inspect, "?[2J"),
    ],
)
def test_control_characters_of_a_file_stay_out_of_the_terminal(tmp_path: Path, change: Any, work: Any, message: str) -> None:
    onnx.save(hostile(change), tmp_path / "m.onnx")
    with pytest.raises(TwofourError) as caught:
        work(tmp_path / "m.onnx")
    assert message in str(caught.value)
    assert str(caught.value).isprintable(), "a terminal would obey it"


def test_what_not_even_fallback_runs_is_refused() -> None:
    proto = text_model("float[2,4] x", "a = NonZero(x) y = Cast <to=1> (a)")
    with pytest.raises(
        UnsupportedError,
        match=r"2 nodes that fallback cannot run either: NonZero \(NonZero_0\), whose output's size is not known before it runs; Cast",
    ):
        imported(proto, fallback=True)
    proto = text_model("float[2,4] x", "y = Relu(x)")
    proto.graph.node[0].domain = "my"
    with pytest.raises(UnsupportedError, match=r"has 1 node that fallback cannot run either: my.Relu \(Relu_0\)"):
        imported(proto, fallback=True)
    branches = "<then_branch = t () => (float[2,4] p) { p = Neg(a) }, else_branch = e () => (float[2,4] q) { q = Abs(a) }>"
    proto = text_model("float[2,4] x, bool c", f"a = Relu(x) y = If (c) {branches}", "float[2,4] y")
    with pytest.raises(UnsupportedError, match=r"cannot run either: If \(If_1\), which holds a graph of its own"):
        imported(proto, fallback=True)


def test_evaluation_refuses_what_does_not_fit() -> None:
    model = small("float[2,3] x", "y = Relu(x)")
    with pytest.raises(InputError, match=r"input 'x' is missing, got \[\]"):
        evaluate(model, {})
    with pytest.raises(VerificationError, match=r"Relu 'Relu_0' gives \[2, 4\], the graph records \[2, 3\] for 'y'"):
        evaluate(model, {"x": np.zeros((2, 4), np.float32)})
    with pytest.raises(VerificationError, match="the outputs are"):
        largest_difference({"a": np.zeros(1)}, {"b": np.zeros(1)})
    with pytest.raises(VerificationError, match=r"output 'a' is \[2\], expected \[1\]"):
        largest_difference({"a": np.zeros(1)}, {"a": np.zeros(2)})


def test_what_torch_exports_runs_from_file_to_lowered_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    block = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation="gelu", norm_first=True)
    stem = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 4, 4), torch.nn.BatchNorm2d(16), torch.nn.SiLU(), torch.nn.Flatten(2))

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block, self.head = stem, block, torch.nn.Linear(16, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.block(self.stem(x).transpose(1, 2)).mean(1))

    net, x = Net().eval(), torch.randn(2, 3, 16, 16)
    path = tmp_path / "net.onnx"
    # The layer's fused inference path has no export; with gradients the exporter takes the plain one.
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    torch.onnx.export(net, (x,), dynamo=True, dynamic_shapes=shapes, verbose=False).save(path, external_data=False)
    lowered = Front(path).lower(2, "fp16")
    got = run_lowered(lowered, {lowered.inputs[0]: x.numpy()})
    wanted = net.double()(x.double()).detach().numpy()
    assert largest_difference({"y": wanted}, {"y": next(iter(got.values()))}) <= 4 * float(np.finfo(np.float16).eps)
    assert "attention" in {call.family for call in lowered.calls}
