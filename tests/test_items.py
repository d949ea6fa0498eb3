"""Networks that compute an item of a batch from the others: found when built, and never filled up or run in parts."""

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import network, text_model
from test_runtime_cuda import backend, images

from twofour.builder.items import why_whole
from twofour.builder.specs import refuse_other_shapes, spec_of
from twofour.errors import InputError
from twofour.exchange.inspect import parse_onnx_file
from twofour.plan import Plan, ValueSpec

MIXED = "the network computes an item of a batch from the others too, or from their number"
WEIGHT = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)


def reason(model: onnx.ModelProto, path: Path) -> str:
    onnx.save(model, path)
    read = parse_onnx_file(path)
    inputs, outputs = (tuple(spec_of(v, "value") for v in values) for values in (read.graph.inputs, read.graph.outputs))
    return why_whole(path, inputs, outputs)


def written(body: str, *, batch: str = "N", out: str = "float[N,4] y") -> onnx.ModelProto:
    axis, turned, back = np.array([0]), np.array([1, -1]), np.array([-1, 4])
    model = text_model(f"float[{batch},4] x", f"a = MatMul(x, w) {body}", w=WEIGHT, axis=axis, turned=turned, back=back)
    model.graph.output[0].CopyFrom(onnx.parser.parse_graph(f"g () => ({out}) {{ }}").output[0])
    return model


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y = Relu(a)", ""),
        ("b = ReduceMean(a) y = Relu(b)", MIXED),  # of all: fewer items than there were
        ("m = ReduceMean(a, axis) y = Sub(a, m)", MIXED),
        ("y = Softmax<axis = 0>(a)", MIXED),
        ("n = Shape<end = 1>(x) f = Cast<to = 1>(n) y = Mul(a, f)", MIXED),  # the same in every batch of one size
        ("b = Reshape(a, turned) c = Softmax<axis = 1>(b) y = Reshape(c, back)", MIXED),
        ("b = Reshape(a, turned) c = Relu(b) y = Reshape(c, back)", ""),
        ("z = Constant<value_int = 0>() y = CumSum(a, z)", MIXED),
        ("z = Constant<value_int = 0>() y = CumSum<reverse = 1>(a, z)", MIXED),
    ],
)
def test_an_item_that_depends_on_others_is_found(body: str, expected: str, tmp_path: Path) -> None:
    assert reason(written(body), tmp_path / "net.onnx") == expected


@pytest.mark.parametrize("name", ["resnet", "vit", "swin", "mlp_mixer"])
def test_networks_of_images_compute_each_by_itself(name: str, tmp_path: Path) -> None:
    assert reason(network(name), tmp_path / "net.onnx") == ""


def test_a_fixed_batch_has_no_parts_and_what_cannot_be_told_is_said(tmp_path: Path) -> None:
    assert reason(written("y = Softmax<axis = 0>(a)", batch="2", out="float[2,4] y"), tmp_path / "net.onnx") == ""
    model = written("y = Relu(a)")
    model.graph.node[1].op_type = "Abacus"
    told = reason(model, tmp_path / "net.onnx")
    assert told.startswith("ONNX Runtime could not tell whether the network computes each item of a batch by itself (")
    assert "Abacus" in told


def test_a_batch_whose_items_depend_on_each_other_is_not_filled_up(tmp_path: Path) -> None:
    source = backend().plan
    dataclasses.replace(source, whole=MIXED).save(tmp_path / "net.plan")
    read = Plan.load(tmp_path / "net.plan")
    assert read.whole == MIXED
    engine = backend(read)
    for items in (3, 5, 8):
        with pytest.raises(
            InputError, match=rf"batch {items} was given, and {MIXED}, expected one of \[1, 4\]; build the plan for that size"
        ):
            engine.call([images(items)])
    assert engine.call([images(4)]).shape[0] == 4


def test_outputs_of_another_shape_than_declared_are_refused() -> None:
    specs = (ValueSpec("y", "float32", (None, 16)),)
    refuse_other_shapes(specs, [(4, 16)], 4)
    for shape in ((4, 8), (1, 16), (64, 16), (16, 4)):
        with pytest.raises(InputError, match=r"declares the output y float32\[batch, 16\] and computes \[.*\] of a batch of 4; correct"):
            refuse_other_shapes(specs, [shape], 4)
