"""`build`: choose a backend for the device and make the plan."""

from collections.abc import Callable, Sequence
from pathlib import Path

from twofour.builder.batches import batch_sizes
from twofour.builder.cpu import build_cpu
from twofour.builder.gpu import TACTICS, build_gpu
from twofour.errors import InputError, nearest
from twofour.plan import Plan
from twofour.plan.record import DEVICES, PRECISIONS, SPARSITY


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


def build(
    path: str | Path,
    *,
    batch: int | Sequence[int] | None = None,
    precision: str | None = None,
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
        batch: batch size or sizes to tune for; by default the one that the file was exported for, else any on the CPU, 1 on a GPU.
        device: `cpu`, `cuda`, or `cuda:N` for GPU N.
        precision: `fp32` on the CPU, `fp16` or `bf16` on a GPU; by default the first.
        sparsity: `auto` uses sparse kernels where they are faster, `off` never, `force` prunes weights that are not 2:4, to see the speed.
        tactics: on a GPU, `all`, or `ours` for a plan that needs nothing but the driver.
        timing_cache: a file of earlier choices on a GPU, extended.
        fallback: run operators that the GPU engine lacks with ONNX Runtime; the records say what that costs.
        progress: called with layers timed, layers, and the layer's name.

    Raises:
        InputError: no such file, no ONNX model, an unknown value. UnsupportedError: valid, but not on this device.
    """
    path = Path(path)
    kind, number = device_of(device)
    precision = ("fp16" if kind == "cuda" else "fp32") if precision is None else checked_choice("precision", precision, PRECISIONS)
    checked_choice("sparsity", sparsity, SPARSITY)
    checked_choice("tactics", tactics, TACTICS)
    sizes = batch_sizes(batch, "build", least=0)
    if kind == "cuda":
        cache = None if timing_cache is None else Path(timing_cache)
        return build_gpu(
            path,
            batches=sizes,
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
    return build_cpu(path, batches=sizes, precision=precision, sparsity=sparsity)
