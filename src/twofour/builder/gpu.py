"""`build` for a GPU: the layers of every batch size and their memory, ready for the tactics to be timed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from twofour.builder.lower import Front, Lowered
from twofour.builder.memory import MemoryPlan, plan_memory
from twofour.errors import InputError, MissingExtraError, UnsupportedError
from twofour.jit.driver import capability
from twofour.plan import Plan

TACTICS = ("all", "ours")
PRECISIONS = ("fp16", "bf16")


@dataclass(frozen=True)
class Prepared:
    """A network lowered for each batch size, with the memory plan of each."""

    lowered: tuple[Lowered, ...] = field(repr=False)
    memory: tuple[MemoryPlan, ...]


def prepare(path: Path, batch: Sequence[int], precision: str, fallback: bool) -> Prepared:
    """Return everything about an engine that needs no GPU.

    Raises:
        InputError, UnsupportedError: as import and the passes do.
    """
    if precision not in PRECISIONS:
        raise InputError(f"build: precision {precision!r} is not one of the GPU engine's, expected one of {list(PRECISIONS)}")
    front = Front(path, fallback=fallback)
    lowered = tuple(front.lower(size, precision) for size in sorted(set(batch)))
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
    path: Path, batch: Sequence[int], precision: str, sparsity: str, tactics: str, timing_cache: Path | None, fallback: bool
) -> Plan:
    """Return the plan of an engine for this machine's GPU.

    Raises:
        InputError, UnsupportedError: as `prepare`; no GPU can be used here.
    """
    prepared = prepare(path, batch, precision, fallback)
    major, minor = require_gpu()
    layers = sum(len(one.calls) for one in prepared.lowered)
    raise UnsupportedError(
        f"build: timing whole networks ({layers} layers, sparsity {sparsity!r}, tactics {tactics!r}, cache {str(timing_cache)!r}) is not "
        f"part of this version, although a GPU of compute capability {major}.{minor} is here; use device cpu"
    )
