"""`build` for an NVIDIA GPU: import, fuse, choose by time, assemble."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from twofour.builder.assemble import Assembler, forced
from twofour.builder.batches import BATCHES, batch_sizes
from twofour.builder.estimate import refuse_nothing_ours
from twofour.builder.gpus import GPUS, Gpu
from twofour.builder.graph import Array
from twofour.builder.items import why_whole
from twofour.builder.lower import Front, Lowered
from twofour.builder.memory import MemoryPlan, plan_memory
from twofour.builder.record import BuildRecord, Timed, build_record
from twofour.builder.specs import in_fp32, refuse_other_shapes, spec_of
from twofour.builder.tactics.bench import Bench, upload
from twofour.builder.tactics.chosen import Chosen, choose_all
from twofour.builder.tactics.hosted import time_fallbacks
from twofour.builder.tactics.ways import weight_for
from twofour.errors import InputError, MissingExtraError, UnsupportedError
from twofour.exchange.inspect import parse_onnx_file
from twofour.jit.driver import bindings, capability, check, num_sms
from twofour.kernels.launchable import Launchable, sources_digests
from twofour.plan import Plan
from twofour.version import __version__

TACTICS = ("all", "ours")
PRECISIONS = ("fp16", "bf16")
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Prepared:
    """A network lowered for each batch size, with the memory plan of each."""

    lowered: tuple[Lowered, ...] = field(repr=False)
    memory: tuple[MemoryPlan, ...]


def prepare(path: Path, batch: Sequence[int], precision: str, fallback: bool, otherwise: tuple[int, ...] = (1,)) -> Prepared:
    """Return everything about an engine that needs no GPU; without a batch size, for the file's own, else for `otherwise`.

    Raises:
        InputError, UnsupportedError: as import and the passes do.
    """
    if precision not in PRECISIONS:
        raise InputError(f"build: precision {precision!r} is not one of the GPU engine's, expected one of {list(PRECISIONS)}")
    front = Front(path, fallback=fallback)
    lowered = tuple(front.lower(size, precision) for size in sorted(set(batch or front.default_batches(otherwise))))
    return Prepared(lowered, tuple(plan_memory(one.buffers()) for one in lowered))


def require_gpu(device: int = 0) -> tuple[int, int]:
    """Return the compute capability of the GPU on which tactics will be timed.

    Raises:
        UnsupportedError: there is none; estimates need none.
    """
    try:
        return capability(device)
    except (UnsupportedError, MissingExtraError) as error:
        raise UnsupportedError(
            f"build: device 'cuda' times every tactic on the GPU, and none can be used here ({error}); "
            "build on the machine with the GPU, or predict with twofour estimate"
        ) from error


def build_gpu(
    path: Path,
    *,
    batches: Sequence[int],
    precision: str,
    sparsity: str,
    tactics: str,
    timing_cache: Path | None,
    fallback: bool,
    device: int = 0,
    progress: Progress | None = None,
) -> Plan:
    """Return the plan that runs the ONNX file on GPU `device`; see `build`.

    Raises:
        InputError, UnsupportedError, MissingExtraError: as `build`.
    """
    from twofour.timing.gpu import Stopwatch

    ready = prepare(path, batches, precision, fallback)
    require_gpu(device)
    model = parse_onnx_file(path)
    file_inputs = tuple(spec_of(value, "input") for value in model.graph.inputs if value.name not in model.graph.initializers)
    file_outputs = tuple(spec_of(value, "output") for value in model.graph.outputs)
    inputs, outputs = (tuple(in_fp32(spec) for spec in specs) for specs in (file_inputs, file_outputs))
    for lowered in ready.lowered:
        refuse_other_shapes(outputs, [lowered.places[name].shape for name in lowered.output_values], lowered.batch)
    bench = Bench(Stopwatch(device), device)
    machine = bench.watch.meter.machine()
    assembler = Assembler(inputs, outputs, num_sms(device))
    programs, records = [], []
    needs: dict[str, str] = {}
    for lowered, memory in zip(ready.lowered, ready.memory, strict=True):
        if sparsity == "force":
            lowered = replace(lowered, calls=tuple(forced(call) for call in lowered.calls))
        hosted = time_fallbacks(lowered, bench, progress)
        chosen = choose_all(
            lowered.calls, sparsity=sparsity, tactics=tactics, cache=timing_cache, device=device, progress=progress, bench=bench
        )
        prepared = [bench.prepare(choice.way) for choice in chosen]
        programs.append(assembler.program(lowered, memory, chosen, prepared, _made_on_gpu(lowered, chosen, prepared)))
        records.append(record_of(path.name, lowered, memory, chosen, _gpu_of(machine["gpu"]), hosted))
        needs |= {choice.way.library: _version(choice.way.library, launch) for choice, launch in zip(chosen, prepared, strict=True)}
        if hosted:
            needs["onnxruntime"] = _version("onnxruntime", None)
    about: dict[str, Any] = {
        "twofour": __version__,
        "model_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "machine": machine,
        "tactics": tactics,
        "sparse_kernels": any(layer.sparse for record in records for layer in record.layers),
        "why_no_sparse_kernels": "no layer was faster with its zeros left out; the build report says so layer by layer",
        "builds": [record.to_json() for record in records],
    }
    if sparsity == "force":
        about["note"] = "weights were pruned by magnitude to see what 2:4 buys: the accuracy of this engine is gone"
    needs.pop("twofour", None)
    return Plan(
        "cuda",
        "cuda",
        precision,
        sparsity,
        inputs,
        outputs,
        assembler.payload.tensors,
        tuple(p.batch for p in programs),
        about,
        tuple(programs),
        sources_digests(),
        needs,
        why_whole(path, file_inputs, file_outputs),
    )


def measure_gain(
    path: Path,
    *,
    batches: int | Sequence[int] | None = None,
    precision: str,
    timing_cache: Path | None = None,
    fallback: bool = False,
    device: int = 0,
    progress: Progress | None = None,
) -> list[tuple[BuildRecord, BuildRecord]]:
    """Return what 2:4 would buy the ONNX file at `path` on GPU `device`, measured: a pair of build reports a batch size.

    The first is the network as it is without 2:4 kernels; the second a copy pruned by magnitude wherever a 2:4 kernel could compute a
    layer, each layer in its fastest way. Layers are timed one by one; no engine is made, and the copy's accuracy is gone.

    Args:
        batches: batch size or sizes; by default the one that the file was exported for, else 1 and 32.

    Raises:
        InputError, UnsupportedError, MissingExtraError: as `build` for a GPU.
    """
    from twofour.timing.gpu import Stopwatch

    ready = prepare(path, batch_sizes(batches, "estimate"), precision, fallback, BATCHES)
    refuse_nothing_ours(ready.lowered[0].calls, str(path))
    require_gpu(device)
    bench = Bench(Stopwatch(device), device)
    gpu = _gpu_of(bench.watch.meter.machine()["gpu"])
    found = []
    for lowered, memory in zip(ready.lowered, ready.memory, strict=True):
        pruned = replace(lowered, calls=tuple(forced(call) for call in lowered.calls))
        hosted = time_fallbacks(lowered, bench, progress)
        pair = []
        for network, sparsity in ((lowered, "off"), (pruned, "auto")):
            chosen = choose_all(network.calls, sparsity=sparsity, cache=timing_cache, device=device, progress=progress, bench=bench)
            pair.append(record_of(path.name, network, memory, chosen, gpu, hosted))
        found.append((pair[0], pair[1]))
    return found


def _made_on_gpu(lowered: Lowered, chosen: Sequence[Chosen], prepared: Sequence[Launchable]) -> list[Array | None]:
    """What cuSPARSELt makes of its weights, copied back; None for the ways whose weights are made on the host."""
    calls = [call for call in lowered.calls if call.family != "fallback"]
    found: list[Array | None] = []
    for call, choice, launch in zip(calls, chosen, prepared, strict=True):
        if choice.way.library != "cusparselt":
            found.append(None)
            continue
        library = launch.call  # type: ignore[attr-defined]
        dense = upload(weight_for(call, choice.way))
        compressed = library.compress(dense.pointer)
        host = np.empty(library.compressed_bytes, np.uint8)
        check(bindings().cuMemcpyDtoH(host.ctypes.data, compressed.pointer, host.nbytes), "copying from the GPU")
        found.append(host)
    return found


def record_of(
    name: str, lowered: Lowered, memory: MemoryPlan, chosen: Sequence[Chosen], gpu: Gpu, hosted: Sequence[Timed] = ()
) -> BuildRecord:
    """Return the build report of one batch size; `chosen` holds the layers that the GPU computes, `hosted` the others."""
    made, others = iter(chosen), iter(hosted)
    timed: list[Timed | None] = []
    for call in lowered.calls:
        if call.family == "fallback":
            timed.append(next(others))
            continue
        choice = next(made)
        timed.append(Timed(str(choice.way), choice.times_us, choice.left_out, choice.way.is_sparse))
    return build_record(name, lowered, memory, timed, gpu)


def _gpu_of(name: str) -> Gpu:
    """The table's row whose name stands in the driver's name for a GPU; for one that it lacks the H100's, whose name then says so."""
    found = [gpu for gpu in GPUS.values() if gpu.name.removeprefix("RTX ") in name]
    return max(found, key=lambda gpu: len(gpu.name)) if found else replace(GPUS["H100"], name=f"{name} (peak rates of an H100)")


def _version(library: str, launch: Any) -> str:
    """The version that a plan names for a library."""
    if library == "cudnn":
        from twofour.kernels.cudnn import version

        return version()
    if library == "onnxruntime":
        from importlib.metadata import version as installed

        return installed("onnxruntime")
    return str(getattr(getattr(launch, "call", None), "version", ""))
