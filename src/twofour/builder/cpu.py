"""`build` for the CPU: the ONNX model as it is, run by ONNX Runtime."""

import hashlib
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from twofour.builder.batches import default_batches
from twofour.builder.specs import spec_of
from twofour.errors import UnsupportedError
from twofour.exchange.importer import fixed_batches, refuse_other_batch
from twofour.exchange.inspect import inspect_model, parse_onnx_file
from twofour.ort import FATAL, session
from twofour.plan import Plan
from twofour.plan.record import DTYPES, printable
from twofour.version import __version__


def refuse_unrunnable(data: bytes, path: Path) -> None:
    """Do nothing if ONNX Runtime takes the model.

    Raises:
        UnsupportedError: it does not; the message holds its first line.
    """
    try:
        session(data, severity=FATAL)
    except Exception as error:
        # ONNX Runtime raises its own kinds for a bad model; they share no public base.
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnsupportedError(f"build: ONNX Runtime refuses {str(path)!r}: {printable(first_line)}") from error


def build_cpu(path: Path, *, batches: Sequence[int], precision: str, sparsity: str) -> Plan:
    """Return the plan that runs the ONNX file on the CPU; see `build`.

    Raises:
        UnsupportedError: another precision than fp32, `force`, or a model that ONNX Runtime refuses. InputError: as `parse_onnx_file`,
            or a batch that the model does not take.
    """
    if precision != "fp32":
        raise UnsupportedError(f"build: precision {precision!r} is not available on the CPU backend; use fp32")
    if sparsity == "force":
        raise UnsupportedError("build: sparsity 'force' needs a GPU with Sparse Tensor Cores; use auto or off on the CPU")
    model = parse_onnx_file(path)
    for size in batches:
        refuse_other_batch(fixed_batches(model), size, str(path))
    inspection = inspect_model(model, str(path), "onnx")
    # Weights kept in a file beside the model would be lost: the plan holds them all.
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.Tensor(value.const_value.numpy(), name=value.name)
    data = ir.to_proto(model).SerializeToString()
    refuse_unrunnable(data, path)
    about: dict[str, Any] = {
        "twofour": __version__,
        "onnxruntime": importlib.metadata.version("onnxruntime"),
        "model_sha256": hashlib.sha256(data).hexdigest(),
        "sparse_kernels": False,
        "why_no_sparse_kernels": "ONNX Runtime has no 2:4 kernel on a CPU; the zeros are multiplied like any other value",
        "eligible_weights": sum(w.eligible for w in inspection.weights),
        "weights_24": sum(w.eligible and w.is_24 for w in inspection.weights),
    }
    inputs = tuple(spec_of(value, "input") for value in model.graph.inputs if value.name not in model.graph.initializers)
    outputs = tuple(spec_of(value, "output") for value in model.graph.outputs)
    for spec in (*inputs, *outputs):
        if spec.dtype not in DTYPES:
            raise UnsupportedError(f"build: {printable(str(spec))} is of a type that a plan cannot hold, expected one of {sorted(DTYPES)}")
    return Plan(
        "onnxruntime",
        "cpu",
        precision,
        sparsity,
        inputs,
        outputs,
        {"onnx": np.frombuffer(data, np.uint8)},
        tuple(batches) or default_batches(model, ()),
        about,
    )
