"""Times ways to compute one layer, launched as the engine launches them, on operands that come from memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from twofour.builder.graph import Array
from twofour.builder.tactics.ways import Way, in_dtype
from twofour.errors import InputError, MissingExtraError, UnsupportedError
from twofour.jit.driver import Buffer, bindings, check
from twofour.kernels import families
from twofour.kernels.cudnn import Handle
from twofour.kernels.launchable import Launchable, launchable
from twofour.timing.gpu import Candidate, Figure, Stopwatch, sets_for

BLOCK_ELEMS = 1 << 22  # random values are drawn once and repeated
MOST_SETS = 6
ROUNDS = 7


def upload(values: Array) -> Buffer:
    """Return a copy of host values on the GPU."""
    flat = np.ascontiguousarray(values)
    made = Buffer(flat.nbytes)
    check(bindings().cuMemcpyHtoD(made.pointer, flat.ctypes.data, flat.nbytes), "copying to the GPU")
    return made


class Scratch:
    """Device memory of random values: normal ones for floating types, small ones for integers."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self._normal = rng.standard_normal(BLOCK_ELEMS).astype(np.float32)
        self._blocks: dict[str, Array] = {}

    def fill(self, made: Buffer, num_bytes: int, dtype: str) -> None:
        """Fill memory with the block of `dtype`, again and again."""
        block = self._block(dtype)
        d, done = bindings(), min(num_bytes, block.nbytes)
        check(d.cuMemcpyHtoD(made.pointer, block.ctypes.data, done), "copying to the GPU")
        while done < num_bytes:
            more = min(done, num_bytes - done)
            check(d.cuMemcpyDtoD(made.pointer + done, made.pointer, more), "copying on the GPU")
            done += more

    def _block(self, dtype: str) -> Array:
        if dtype not in self._blocks:
            if dtype in ("fp16", "bf16", "fp32"):
                self._blocks[dtype] = in_dtype(self._normal, dtype)
            else:
                self._blocks[dtype] = (self._normal > 0).astype({"bool": np.uint8}.get(dtype, dtype))
        return self._blocks[dtype]


@dataclass(frozen=True)
class Timed:
    """What became of a way: its figure, or why it has none."""

    way: Way
    figure: Figure | None
    reason: str = ""


class Bench:
    """Times the ways of one layer against each other."""

    def __init__(self, watch: Stopwatch, device: int = 0) -> None:
        self.watch, self.device = watch, device
        self._scratch = Scratch()
        self._handle: Handle | None = None

    def handle(self) -> Handle:
        """Return the cuDNN handle that all ways share."""
        if self._handle is None:
            self._handle = Handle(self.device)
        return self._handle

    def prepare(self, way: Way) -> Launchable:
        """Return a way made callable, without what follows it.

        Raises:
            InputError, MissingExtraError, UnsupportedError: it cannot run here.
        """
        handle = self.handle() if way.library == "cudnn" else None
        return launchable(way.family, way.library, way.problem, way.config, way.algorithm, device=self.device, handle=handle)

    def copies(self, to_host: Sequence[int], to_gpu: Sequence[int]) -> Callable[[], None]:
        """Return what copies values of so many bytes each to the host and to the GPU, as an engine does around a step on the CPU.

        One value after the other, each waited for, what comes from the GPU into memory that the host has just allocated.
        """
        d, stream = bindings(), self.watch.stream
        sources, targets = ([Buffer(size) for size in sizes] for sizes in (to_host, to_gpu))
        results = [np.ones(size, np.uint8) for size in to_gpu]

        def copy() -> None:
            for source, size in zip(sources, to_host, strict=True):
                host = np.empty(size, np.uint8)
                check(d.cuMemcpyDtoHAsync(host.ctypes.data, source.pointer, size, stream), "copying from the GPU")
                self.watch.synchronize()
            for target, host in zip(targets, results, strict=True):
                check(d.cuMemcpyHtoDAsync(target.pointer, host.ctypes.data, host.nbytes, stream), "copying to the GPU")
                self.watch.synchronize()

        return copy

    def time(self, ways: Sequence[Way], weight_of: Callable[[Way], Array] | None = None) -> list[Timed]:
        """Return every way's figure, the ways interleaved; a way that cannot run says why.

        Args:
            weight_of: the weight as a way reads it, on the host; None: random values.
        """
        ready: list[tuple[int, Launchable]] = []
        found: list[Timed] = []
        for way in ways:
            found.append(Timed(way, None))
            try:
                ready.append((len(found) - 1, self.prepare(way)))
            except (InputError, MissingExtraError, UnsupportedError) as e:
                found[-1] = Timed(way, None, str(e))
        if not ready:
            return found
        operands = _Operands(self, [ways[i] for i, _ in ready], [call for _, call in ready], weight_of)
        behind = {i: self.prepare(after) for i, _ in ready if (after := ways[i].after) is not None}
        graphs, indices = [], []
        for number, (i, call) in enumerate(ready):
            try:
                graphs.append(self.watch.graph(operands.candidate(number, call, behind.get(i))))
                indices.append(i)
            except (InputError, UnsupportedError) as e:
                found[i] = Timed(found[i].way, None, str(e))
        if graphs:
            for i, figure in zip(indices, self.watch.burst(graphs, ROUNDS), strict=True):
                found[i] = Timed(found[i].way, figure)
        for graph in graphs:
            graph.close()
        return found


class _Operands:
    """Operand sets of several ways: activations are shared, each way has weights and biases in its own form."""

    def __init__(self, bench: Bench, ways: Sequence[Way], calls: Sequence[Launchable], weight_of: Callable[[Way], Array] | None) -> None:
        self.ways = list(ways)
        touched = [families.footprints(way.family, way.library, way.problem) for way in ways]
        shared: dict[str, tuple[int, str]] = {}
        for prints in touched:
            for name, one in prints.items():
                if name not in ("weight", "bias"):
                    shared[name] = max(shared.get(name, (0, one.dtype)), (one.num_bytes, one.dtype))
        weights = max((prints["weight"].num_bytes for prints in touched if "weight" in prints), default=0)
        self.sets = sets_for(sum(size for size, _ in shared.values()) + weights, bench.watch.l2_bytes, MOST_SETS)
        self._shared = [{name: Buffer(size) for name, (size, _) in shared.items()} for _ in range(self.sets)]
        for one_set in self._shared:
            for name, (size, dtype) in shared.items():
                bench._scratch.fill(one_set[name], size, dtype)
        self._own: list[list[dict[str, Buffer]]] = []
        for way, call, prints in zip(ways, calls, touched, strict=True):
            weight = weight_of(way) if weight_of is not None and "weight" in prints else None
            self._own.append([self._own_set(bench, way, call, prints, weight) for _ in range(self.sets)])
        most = max(call.workspace_bytes for call in calls)
        self._workspace = Buffer(most, zeroed=True)

    def _rows(self, number: int) -> list[dict[str, int]]:
        """The addresses of way `number`'s operands in each set."""
        way = self.ways[number]
        names = families.footprints(way.family, way.library, way.problem)
        return [
            {name: (own[name] if name in own else shared[name]).pointer for name in names}
            for shared, own in zip(self._shared, self._own[number], strict=True)
        ]

    def _own_set(self, bench: Bench, way: Way, call: Launchable, prints: Any, weight: Array | None) -> dict[str, Buffer]:
        made: dict[str, Buffer] = {}
        for name in ("weight", "bias"):
            if name not in prints:
                continue
            if name == "weight" and weight is not None:
                made[name] = upload(weight)
                if way.library == "cusparselt":
                    made[name] = call.call.compress(made[name].pointer)  # type: ignore[attr-defined]
            else:
                made[name] = Buffer(prints[name].num_bytes)
                bench._scratch.fill(made[name], prints[name].num_bytes, prints[name].dtype)
        return made

    def candidate(self, number: int, call: Launchable, after: Launchable | None) -> Candidate:
        """Return a timing candidate of way `number`, with what follows it, that walks through the sets."""
        rows = self._rows(number)
        workspace = self._workspace.pointer if call.workspace_bytes else 0

        def enqueue(i: int, stream: int, _alive: Any = self) -> None:
            call(rows[i], workspace, stream)
            if after is not None:
                after({"in0": rows[i]["d"], "d": rows[i]["d"]}, 0, stream)

        return Candidate(str(self.ways[number]), enqueue, self.sets)
