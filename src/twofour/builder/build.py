"""`build`: choose a backend for the device and make the plan."""

import hashlib
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from twofour.builder.gpu import TACTICS, build_gpu
from twofour.errors import InputError, UnsupportedError, nearest
from twofour.exchange.inspect import inspect_model, parse_onnx_file
from twofour.plan import Plan, ValueSpec
from twofour.plan.record import DEVICES, PRECISIONS, SPARSITY
from twofour.version import __version__


def checked_choice(name: str, value: str, known: Sequence[str]) -> str:
    """Return `value` if it is one of `known`.

    Raises:
        InputError: it is not.
    """
    if value not in known:
        raise InputError(f"build: {name} {value!r} is unknown, expected one of {list(known)}{nearest(value, known)}")
    return value


def spec_of(value: ir.Value, where: str) -> ValueSpec:
    """Return the spec of a graph input or output: a symbolic first axis is the batch."""
    if value.dtype is None or value.shape is None:
        raise InputError(f"build: {where} {value.name!r} has no type or shape; run ONNX shape inference on the model first")
    shape: list[int | None] = []
    for axis, size in enumerate(value.shape):
        if isinstance(size, int):
            shape.append(size)
        elif axis == 0:
            shape.append(None)
        else:
            raise UnsupportedError(
                f"build: {where} {value.name!r} has the dynamic axis {axis} ({size}); only the batch (axis 0) may be dynamic"
            )
    return ValueSpec(str(value.name), str(value.dtype.numpy()), tuple(shape))


def refuse_unrunnable(data: bytes, path: Path) -> None:
    """Do nothing if ONNX Runtime takes the model.

    Raises:
        UnsupportedError: it does not; the message holds its first line.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        # ONNX Runtime raises its own kinds for a bad model; they share no public base.
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnsupportedError(f"build: ONNX Runtime refuses {str(path)!r}: {first_line}") from error


def build(
    path: str | Path,
    *,
    batch: Sequence[int] = (),
    precision: str = "fp32",
    sparsity: str = "auto",
    device: str = "cpu",
    tactics: str = "all",
    timing_cache: str | Path | None = None,
    fallback: bool = False,
) -> Plan:
    """Return the plan that runs the ONNX file at `path` on `device`.

    On the CPU the backend is ONNX Runtime in fp32; it has no sparse kernel, and the plan's `about` says so.

    Args:
        batch: batch sizes to tune for; empty means any.
        sparsity: `auto` uses sparse kernels where they are faster, `off` never, `force` prunes a copy by magnitude (accuracy is gone).
        tactics: on a GPU, `all` times the libraries too, `ours` only our kernels, so that the plan needs nothing but the driver.
        timing_cache: on a GPU, the folder in which timings are kept. fallback: on a GPU, run operators that the engine lacks on the CPU.

    Raises:
        InputError: no such file, no ONNX model, an unknown value. UnsupportedError: valid, but not on this device.
    """
    path = Path(path)
    checked_choice("precision", precision, PRECISIONS)
    checked_choice("sparsity", sparsity, SPARSITY)
    checked_choice("device", device, DEVICES)
    checked_choice("tactics", tactics, TACTICS)
    if any(b < 1 for b in batch):
        raise InputError(f"build: batch {list(batch)} holds a size below 1, expected positive sizes")
    if device == "cuda":
        return build_gpu(path, batch or (1,), precision, sparsity, tactics, None if timing_cache is None else Path(timing_cache), fallback)
    for name, given in (("tactics", tactics != "all"), ("timing_cache", timing_cache is not None), ("fallback", fallback)):
        if given:
            raise InputError(f"build: {name} is for device 'cuda', the device is {device!r}; leave it out")
    if precision != "fp32":
        raise UnsupportedError(f"build: precision {precision!r} is not available on the CPU backend; use fp32")
    if sparsity == "force":
        raise UnsupportedError("build: sparsity 'force' needs a GPU with Sparse Tensor Cores; use auto or off on the CPU")
    model = parse_onnx_file(path)
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
    return Plan(
        "onnxruntime",
        device,
        precision,
        sparsity,
        inputs,
        outputs,
        {"onnx": np.frombuffer(data, np.uint8)},
        tuple(batch),
        about,
    )
