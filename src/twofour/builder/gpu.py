"""`build` for an NVIDIA GPU: import, fuse, choose by time, assemble."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from twofour.builder.assemble import Assembler, forced
from twofour.builder.graph import Array
from twofour.builder.lower import Front, Lowered
from twofour.builder.specs import spec_of
from twofour.builder.tactics.bench import Bench, upload
from twofour.builder.tactics.choose import Chosen, choose_all
from twofour.builder.tactics.ways import weight_for
from twofour.exchange.inspect import parse_onnx_file
from twofour.jit.driver import bindings, check, num_sms
from twofour.kernels.launchable import Launchable, sources_digests
from twofour.plan import Plan
from twofour.version import __version__

Progress = Callable[[int, int, str], None]


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

    model = parse_onnx_file(path)
    inputs = tuple(spec_of(value, "input") for value in model.graph.inputs if value.name not in model.graph.initializers)
    outputs = tuple(spec_of(value, "output") for value in model.graph.outputs)
    front = Front(path, fallback=fallback)
    bench = Bench(Stopwatch(device), device)
    assembler = Assembler(inputs, outputs, num_sms(device))
    programs, layers = [], {}
    needs: dict[str, str] = {}
    for batch in sorted(set(batches)):
        lowered = front.lower(batch, precision)
        if sparsity == "force":
            lowered = replace(lowered, calls=tuple(forced(call) for call in lowered.calls))
        chosen = choose_all(
            lowered.calls, sparsity=sparsity, tactics=tactics, cache=timing_cache, device=device, progress=progress, bench=bench
        )
        prepared = [bench.prepare(choice.way) for choice in chosen]
        programs.append(assembler.program(lowered, chosen, prepared, _made_on_gpu(lowered, chosen, prepared)))
        layers[str(batch)] = layer_rows(lowered, chosen)
        needs |= {choice.way.library: _version(choice.way.library, launch) for choice, launch in zip(chosen, prepared, strict=True)}
        if any(call.family == "fallback" for call in lowered.calls):
            needs["onnxruntime"] = _version("onnxruntime", None)
    memory = {str(b): {"peak_bytes": m.peak_bytes, "bound_bytes": m.bound_bytes} for b, m in assembler.memory.items()}
    about: dict[str, Any] = {
        "twofour": __version__,
        "model_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "machine": bench.watch.meter.machine(),
        "tactics": tactics,
        "sparse_kernels": any(row["sparse"] for rows in layers.values() for row in rows),
        "layers": layers,
        "memory": memory,
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
    )


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


def layer_rows(lowered: Lowered, chosen: Sequence[Chosen]) -> list[dict[str, Any]]:
    """Return one row a layer, in the order in which they run: what it is, what was timed, what won, and why it is not sparse."""
    made = iter(chosen)
    total = sum(choice.us for choice in chosen) or 1.0
    rows = []
    for call in lowered.calls:
        row: dict[str, Any] = {"name": call.name, "kind": call.kind, "flops": call.flops, "bytes": call.num_bytes}
        row |= {"eligible": call.eligible, "is_24": call.is_24, "why_not_24": call.why_not_24}
        if call.family == "fallback":
            rows.append(row | {"chosen": "onnxruntime", "sparse": False, "times_us": {}, "left_out": {}, "share": None})
            continue
        choice = next(made)
        row |= {"chosen": str(choice.way), "sparse": choice.way.is_sparse, "us": choice.us, "share": choice.us / total}
        rows.append(row | {"times_us": choice.times_us, "left_out": choice.left_out})
    return rows


def _version(library: str, launch: Any) -> str:
    """The version that a plan names for a library."""
    if library == "cudnn":
        from twofour.kernels.cudnn import version

        return version()
    if library == "onnxruntime":
        from importlib.metadata import version as installed

        return installed("onnxruntime")
    return str(getattr(getattr(launch, "call", None), "version", ""))
