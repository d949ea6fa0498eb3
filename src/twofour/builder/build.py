"""`build`: choose a backend for the device and make the plan."""

import hashlib
import importlib.metadata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from twofour.builder.gpu import TACTICS, build_gpu
from twofour.builder.specs import spec_of
from twofour.errors import InputError, UnsupportedError, nearest
from twofour.exchange.inspect import inspect_model, parse_onnx_file
from twofour.plan import Plan
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


def device_of(device: str) -> tuple[str, int]:
    """Return (`cpu` or `cuda`, number of the GPU) of `cpu`, `cuda` or `cuda:N`.

    Raises:
        InputError: it is none of these.
    """
    kind, colon, number = device.partition(":")
    checked_choice("device", kind, DEVICES)
    if colon and (kind != "cuda" or not number.isdecimal()):
        raise InputError(f"build: device {device!r} is unknown, expected cpu, cuda or cuda:N")
    return kind, int(number or 0)


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
    progress: Callable[[int, int, str], None] | None = None,
) -> Plan:
    """Return the plan that runs the ONNX file at `path` on `device`.

    On the CPU the backend is ONNX Runtime in fp32; it has no sparse kernel, and the plan's `about` says so. On a GPU every layer is timed
    in every way that can compute it, and the fastest is taken; `about["builds"]` holds the times and the reasons, a record a batch size.

    Args:
        batch: batch sizes to tune for; empty means any on the CPU, 1 on a GPU.
        device: `cpu`, `cuda`, or `cuda:N` for GPU N.
        precision: `fp32` on the CPU, `fp16` or `bf16` on a GPU.
        sparsity: `auto` uses sparse kernels where they are faster, `off` never, `force` prunes weights that are not 2:4, to see the speed.
        tactics: on a GPU, `all`, or `ours` for a plan that needs nothing but the driver.
        timing_cache: a file of earlier choices on a GPU, extended.
        fallback: run operators that the GPU engine lacks with ONNX Runtime.
        progress: called with layers timed, layers, and the layer's name.

    Raises:
        InputError: no such file, no ONNX model, an unknown value. UnsupportedError: valid, but not on this device.
    """
    path = Path(path)
    checked_choice("precision", precision, PRECISIONS)
    checked_choice("sparsity", sparsity, SPARSITY)
    kind, number = device_of(device)
    checked_choice("tactics", tactics, TACTICS)
    if any(b < 1 for b in batch):
        raise InputError(f"build: batch {list(batch)} holds a size below 1, expected positive sizes")
    if kind == "cuda":
        cache = None if timing_cache is None else Path(timing_cache)
        return build_gpu(
            path,
            batches=batch or (1,),
            precision=precision,
            sparsity=sparsity,
            tactics=tactics,
            timing_cache=cache,
            fallback=fallback,
            device=number,
            progress=progress,
        )
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
        kind,
        precision,
        sparsity,
        inputs,
        outputs,
        {"onnx": np.frombuffer(data, np.uint8)},
        tuple(batch),
        about,
    )
