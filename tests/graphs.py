"""Graphs for tests: exported networks kept without their weights, and small ones written as text."""

import gzip
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
from onnx import numpy_helper

from twofour.builder.passes import fold
from twofour.exchange.importer import prepare_model

FOLDER = Path(__file__).parent / "graphs"
KEPT_ELEMENTS = 32  # shapes, axes and bounds stay in a stripped graph; larger tensors are weights


def strip(data: bytes) -> bytes:
    """Return a model with its weights as inputs, compressed; the metadata that exporters write is dropped."""
    model = onnx.load_from_string(data)
    small = []
    for tensor in model.graph.initializer:
        if np.prod(tensor.dims, dtype=int) > KEPT_ELEMENTS and tensor.data_type == onnx.TensorProto.FLOAT:
            model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            small.append(tensor)
    del model.graph.initializer[:], model.graph.value_info[:], model.metadata_props[:], model.graph.metadata_props[:]
    model.graph.initializer.extend(small)
    for node in model.graph.node:
        del node.metadata_props[:]
        node.ClearField("doc_string")
    return gzip.compress(model.SerializeToString(), 9, mtime=0)


def weights_for(name: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Values that keep activations of order one: the same for the same name and shape."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith(("running_var", "weight", "gamma")) and len(shape) == 1:
        return rng.uniform(0.7, 1.3, shape).astype(np.float32)
    fan_in = 1 if len(shape) < 2 else shape[0] if len(shape) == 2 and name.startswith("val_") else int(np.prod(shape[1:]))
    return (rng.standard_normal(shape) * (0.1 if len(shape) < 2 else np.sqrt(1.5 / fan_in))).astype(np.float32)


def network(name: str, folder: Path = FOLDER) -> onnx.ModelProto:
    """The exported network of `folder`, with weights."""
    model = onnx.load_from_string(gzip.decompress((folder / f"{name}.onnx.gz").read_bytes()))
    for value in list(model.graph.input)[1:]:
        shape = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
        model.graph.initializer.append(numpy_helper.from_array(weights_for(value.name, shape), value.name))
        model.graph.input.remove(value)
    return model


def imported(model: onnx.ModelProto, batch: int = 2, *, fallback: bool = False) -> ir.Model:
    """The model as import leaves it."""
    return prepare_model(ir.from_proto(model), batch, "test", fold=fold, fallback=fallback)


def text_model(inputs: str, body: str, outputs: str = "float[] y", *, opset: int = 20, **arrays: Any) -> onnx.ModelProto:
    """A model written in ONNX's text form: `text_model("float[2,3] x", "y = Relu(x)")`; keyword arguments are its constants."""
    text = f'<ir_version: 10, opset_import: ["" : {opset}, "twofour" : 1]> g ({inputs}) => ({outputs}) {{ {body} }}'
    model = onnx.parser.parse_model(text)
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
    for name, array in arrays.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return model


def small(inputs: str, body: str, outputs: str = "float[] y", *, opset: int = 20, **arrays: Any) -> ir.Model:
    """The model of `text_model`, imported for the batch its first input has (2 where that is a symbol)."""
    model = text_model(inputs, body, outputs, opset=opset, **arrays)
    return imported(model, model.graph.input[0].type.tensor_type.shape.dim[0].dim_value or 2)


def kinds(model: ir.Model) -> list[str]:
    """The operators of a graph, in order."""
    return [node.op_type for node in model.graph]
