"""The plan on a GPU: weights uploaded once, steps prepared once, one context a thread, outputs in the kind of the inputs."""

import logging
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from twofour.errors import InputError, PlanFormatError
from twofour.kernels.launchable import Launchable, launchable, sources_digests
from twofour.plan import Plan, ValueSpec
from twofour.plan.program import ALIGN, FALLBACK, Program, Step
from twofour.runtime.backends.cuda.batches import Chunk, chunks
from twofour.runtime.backends.cuda.context import Context, Memory, Prepared, input_aligns, segments
from twofour.runtime.backends.cuda.dlpack import DeviceArray
from twofour.runtime.backends.cuda.fallback import Fallback
from twofour.runtime.backends.cuda.inputs import Given, given, is_torch, stream_of

logger = logging.getLogger(__name__)
Array = npt.NDArray[Any]
OUTPUT_ALIGN = 16  # bytes; an output that lies elsewhere goes through a buffer


class Passes:
    """Whole passes of one batch size, each on the next of several sets of inputs and outputs."""

    def __init__(
        self, context: Context, prepared: Prepared, inputs: Sequence[list[int]], outputs: Sequence[list[int]], alive: Sequence[Memory]
    ) -> None:
        self._context, self._prepared, self._inputs, self._outputs, self._alive = context, prepared, inputs, outputs, alive
        self._next = 0

    def __call__(self, stream: int) -> None:
        """Put one pass on `stream`."""
        with self._context.gpu.use():
            self._context.order(stream)
            self._context.run(self._prepared, self._inputs[self._next], self._outputs[self._next], stream)
            self._context.mark(stream)
        self._next = (self._next + 1) % len(self._inputs)


class CudaBackend:
    """Runs a plan of the backend `cuda`. Calls are safe from several threads; each thread has its own context, made on demand."""

    def __init__(
        self,
        plan: Plan,
        device: int = 0,
        *,
        rebuild: bool = False,
        gpu: Any = None,
        make: Callable[..., Launchable] = launchable,
    ) -> None:
        """Upload the weights.

        Args:
            rebuild: ignore kernels and library plans embedded in the plan; compile ours from the installed sources and ask the libraries.
            gpu: the GPU as an object, in place of GPU `device`. make: makes a step callable, as `kernels.launchable.launchable`.

        Raises:
            PlanFormatError: the plan's kernels are of other sources than the installed package's. MissingExtraError: a library is missing.
            UnsupportedError: there is no such GPU, or not enough memory.
        """
        if gpu is None:
            from twofour.runtime.backends.cuda.gpu import Gpu

            gpu = Gpu(device)
        self.plan, self.gpu, self._rebuild, self._make = plan, gpu, rebuild, make
        self._programs = {program.batch: program for program in plan.programs}
        if not rebuild:
            self._refuse_other_sources()
        self._lock = threading.Lock()
        self._prepared: dict[int, Prepared] = {}
        self._cudnn: Any = None
        self._threads = threading.local()
        self._contexts: weakref.WeakSet[Context] = weakref.WeakSet()
        with gpu.use():
            self._weights = self._upload()

    def _refuse_other_sources(self) -> None:
        installed = sources_digests()
        for family, digest in self.plan.kernels.items():
            if installed.get(family) != digest:
                raise PlanFormatError(
                    f"plan: its {family} kernels are of sources {digest}, the installed package has {installed.get(family)}; "
                    "build it again, or load it with rebuild=True"
                )

    def _upload(self) -> dict[str, int]:
        names = sorted({v.tensor for p in self.plan.programs for v in p.values.values() if v.where == "weights" and v.tensor is not None})
        offsets, end = {}, 0
        for name in names:
            offsets[name] = end
            end += -(-self.plan.payload[name].nbytes // ALIGN) * ALIGN
        self._weight_memory = Memory(self.gpu, end)
        stream = self.gpu.stream()
        for name in names:
            array = np.ascontiguousarray(self.plan.payload[name])
            self.gpu.upload(self._weight_memory.address + offsets[name], array.ctypes.data, array.nbytes, stream)
            self.gpu.synchronize(stream)
        self.gpu.free_stream(stream)
        return {name: self._weight_memory.address + offset for name, offset in offsets.items()}

    def _handle(self) -> Any:
        if self._cudnn is None:
            from twofour.kernels.cudnn import Handle

            self._cudnn = Handle(self.gpu.device)
        return self._cudnn

    def _part(self, step: Step, part: str) -> bytes | None:
        if part not in step.parts or (self._rebuild and step.family != FALLBACK):
            return None
        return self.plan.payload[step.parts[part]].tobytes()

    def _launchable(self, program: Program, step: Step) -> Launchable:
        if step.family == FALLBACK:
            return Fallback(step, program.values, self._part(step, "model") or b"", self.gpu)
        made = self._make(
            step.family,
            step.library,
            step.problem,
            step.config,
            step.algorithm,
            device=self.gpu.device,
            cubin=self._part(step, "cubin"),
            graph=self._part(step, "graph"),
            handle=self._handle() if step.library == "cudnn" else None,
        )
        if step.library == "cusparselt":
            self._refuse_other_cusparselt(step, made)
        if made.workspace_bytes > program.workspace_bytes:
            raise PlanFormatError(
                f"plan: step {step.name!r} needs {made.workspace_bytes} bytes of workspace here, batch {program.batch} has "
                f"{program.workspace_bytes}; build the plan again on this machine"
            )
        return made

    def _refuse_other_cusparselt(self, step: Step, made: Launchable) -> None:
        # NOTE: a compressed weight is in a form of the library's own; another version may read it otherwise without an error.
        installed, built = str(getattr(getattr(made, "call", None), "version", "")), self.plan.needs.get("cusparselt", "")
        if installed and built and installed != built:
            raise PlanFormatError(
                f"plan: the weight of step {step.name!r} was compressed by cuSPARSELt {built}, installed is {installed}; "
                f"build the plan again, or install {built}"
            )

    def prepared(self, batch: int) -> Prepared:
        """Return the program of a batch size with its steps made callable, on first use."""
        with self._lock, self.gpu.use():
            found = self._prepared.get(batch)
            if found is None:
                program = self._programs[batch]
                calls = [self._launchable(program, step) for step in program.steps]
                found = self._prepared[batch] = Prepared(program, calls, segments(program), input_aligns(program))
            return found

    def context(self) -> Context:
        """Return this thread's execution context."""
        found: Context | None = getattr(self._threads, "context", None)
        if found is None:
            arena = max(p.arena_bytes for p in self.plan.programs)
            workspace = max(p.workspace_bytes for p in self.plan.programs)
            found = self._threads.context = Context(self.gpu, self._weights, self._weight_memory, arena, workspace)
            with self._lock:
                self._contexts.add(found)
        return found

    @property
    def num_bytes(self) -> int:
        """Device memory held: weights and the contexts of all threads."""
        with self._lock:
            return int(self._weight_memory.size) + sum(context.num_bytes for context in self._contexts)

    def call(self, inputs: Sequence[Any], stream: Any = None) -> Any:
        """Return the outputs of `inputs` in their kind: torch tensors, NumPy arrays, else `DeviceArray`; one alone, several as a tuple.

        Args:
            stream: what the work is put on; None: torch's current stream for torch tensors, else the context's own.

        Raises:
            InputError: wrong number, dtype, shape or device of the inputs.
        """
        specs = self.plan.inputs
        if len(inputs) != len(specs):
            number = f"{len(inputs)} input{'s' if len(inputs) != 1 else ''}"
            raise InputError(f"engine: {number} given, expected {len(specs)}: {', '.join(map(str, specs))}")
        with self.gpu.use():
            finished = self._on_gpu(inputs, stream)
        return finished[0] if len(finished) == 1 else tuple(finished)

    def _on_gpu(self, inputs: Sequence[Any], stream: Any) -> list[Any]:
        """As `call`, every output, on the GPU that is current."""
        specs, context = self.plan.inputs, self.context()
        theirs = self._torch_stream(inputs)
        where = stream_of(stream) if stream is not None else context.stream if theirs is None else int(theirs.cuda_stream)
        other = None if theirs is None or int(theirs.cuda_stream) == where else self._as_torch(where)
        # Torch copies inputs and finds memory for outputs in the order of the stream that is current.
        with nullcontext() if other is None else sys.modules["torch"].cuda.stream(other):
            given_inputs = [given(value, spec, self.gpu.device, where) for value, spec in zip(inputs, specs, strict=True)]
            items = self._items(given_inputs)
            self._refuse_parts(items)
            results = self._results(inputs[0], items, given_inputs[0].address is None)
            context.order(where)
            try:
                for chunk in chunks(items, sorted(self._programs)):
                    self._run_chunk(context, chunk, given_inputs, results, where)
            finally:
                # Of a call that fails on its way, the next one on another stream waits for what was put.
                context.mark(where)
        if other is not None:
            # The allocator must not reuse inputs before the engine's stream has read or copied them, nor outputs before the caller's has.
            for tensors, reader in ((inputs, other), (results, theirs)):
                for tensor in tensors:
                    if is_torch(tensor) and tensor.is_cuda:
                        tensor.record_stream(reader)
        return self._finish(inputs[0], given_inputs, results, where)

    def run(self, inputs: list[Array]) -> list[Array]:
        """Return the outputs of NumPy arrays as NumPy arrays."""
        found = self.call(inputs)
        return list(found) if isinstance(found, tuple) else [found]

    def profile(self, inputs: list[Array], num_runs: int) -> list[tuple[str, str, float]]:
        """Return (node, family and library, median microseconds of single launches), slowest first; the batch must be one of the plan's."""
        with self.gpu.use():
            return self._profile(inputs, num_runs)

    def _profile(self, inputs: list[Array], num_runs: int) -> list[tuple[str, str, float]]:
        """As `profile`, on the GPU that is current."""
        found = [given(value, spec, self.gpu.device, 0) for value, spec in zip(inputs, self.plan.inputs, strict=True)]
        items = self._items(found)
        if items not in self._programs:
            raise InputError(f"engine: batch {items} was asked for, the plan was built for {sorted(self._programs)}")
        context, prepared = self.context(), self.prepared(items)
        context.order(context.stream)
        chunk = Chunk(0, items, items)
        addresses = [self._input(context, prepared, chunk, i, g, context.stream) for i, g in enumerate(found)]
        outputs = [context.buffer(items, "output", i, self._bytes(spec, items)) for i, spec in enumerate(self.plan.outputs)]
        taken = context.times_us(prepared, addresses, outputs, num_runs)
        rows = [
            (step.name, f"{step.family} by {step.library}", float(median(t))) for step, t in zip(prepared.program.steps, taken, strict=True)
        ]
        return sorted(rows, key=lambda row: -row[2])

    def passes(self, batch: int, sets: int = 2, seed: int = 0) -> Passes:
        """Return something that puts whole passes of a batch size on a stream, from random inputs into memory of its own; for timing.

        Raises:
            InputError: the plan has no such batch size.
        """
        if batch not in self._programs:
            raise InputError(f"engine: batch {batch} was asked for, the plan was built for {sorted(self._programs)}")
        with self.gpu.use():
            return self._passes(batch, sets, seed)

    def _passes(self, batch: int, sets: int, seed: int) -> Passes:
        """As `passes`, on the GPU that is current."""
        rng = np.random.default_rng(seed)
        context, prepared = self.context(), self.prepared(batch)
        context.order(context.stream)
        inputs: list[list[int]] = []
        outputs: list[list[int]] = []
        alive: list[Memory] = []
        for _ in range(sets):
            for specs, addresses in ((self.plan.inputs, inputs), (self.plan.outputs, outputs)):
                made = [Memory(self.gpu, self._bytes(spec, batch)) for spec in specs]
                alive += made
                addresses.append([memory.address for memory in made])
            for spec, address in zip(self.plan.inputs, inputs[-1], strict=True):
                shape = self._shape(spec, batch)
                kind = np.dtype(spec.dtype)
                drawn = rng.standard_normal(shape).astype(kind) if kind.kind == "f" else rng.integers(0, 2, shape).astype(kind)
                self.gpu.upload(address, drawn.ctypes.data, drawn.nbytes, context.stream)
                self.gpu.synchronize(context.stream)
        return Passes(context, prepared, inputs, outputs, alive)

    def _torch_stream(self, inputs: Sequence[Any]) -> Any:
        """Torch's current stream where an input is a torch tensor on a GPU, which may still be made there; else None."""
        if not any(is_torch(value) and value.is_cuda for value in inputs):
            return None
        return sys.modules["torch"].cuda.current_stream(self.gpu.device)

    def _as_torch(self, stream: int) -> Any:
        """A stream as torch's object. NOTE: of address 0 torch makes a new stream instead of the default one, whose other address is 1."""
        cuda = sys.modules["torch"].cuda
        return cuda.ExternalStream(stream, device=self.gpu.device) if stream > 1 else cuda.default_stream(self.gpu.device)

    def _items(self, inputs: Sequence[Given]) -> int:
        found: set[int] = {g.shape[0] for g, spec in zip(inputs, self.plan.inputs, strict=True) if spec.shape and spec.shape[0] is None}
        if len(found) > 1:
            raise InputError(f"engine: the inputs disagree about the batch: {sorted(found)}; give all the same")
        if 0 in found:
            raise InputError("engine: the batch is empty, expected at least one item")
        return int(found.pop() if found else next(iter(self._programs)))

    def _refuse_parts(self, items: int) -> None:
        """Do nothing if the items run as one whole batch, or each is computed by itself and has a part of every output.

        Raises:
            InputError: neither parts of a batch nor padding give the outputs.
        """
        whole = [f"output {spec.name!r} is of the whole batch" for spec in self.plan.outputs if not spec.shape or spec.shape[0] is not None]
        whole += [self.plan.whole] if self.plan.whole else []
        batched = any(spec.shape and spec.shape[0] is None for spec in self.plan.inputs)
        if whole and batched and items not in self._programs:
            raise InputError(
                f"engine: batch {items} was given, and {whole[0]}, expected one of {sorted(self._programs)}; build the plan for that size"
            )

    @staticmethod
    def _shape(spec: ValueSpec, items: int) -> tuple[int, ...]:
        return tuple(items if size is None else size for size in spec.shape)

    def _bytes(self, spec: ValueSpec, items: int) -> int:
        return int(np.prod(self._shape(spec, items), dtype=np.int64)) * np.dtype(spec.dtype).itemsize

    def _results(self, first: Any, items: int, on_host: bool) -> list[Any]:
        """What the outputs are written to: torch tensors, NumPy arrays or device memory."""
        made: list[Any] = []
        for spec in self.plan.outputs:
            shape = self._shape(spec, items)
            if on_host:
                made.append(np.empty(shape, spec.dtype))
            elif is_torch(first):
                torch = sys.modules["torch"]
                made.append(torch.empty(shape, dtype=getattr(torch, spec.dtype), device=first.device))
            else:
                made.append(DeviceArray(self.gpu, Memory(self.gpu, self._bytes(spec, items)), spec.dtype, shape))
        return made

    def _input(self, context: Context, prepared: Prepared, chunk: Chunk, index: int, found: Given, stream: int) -> int:
        """Address of an input for one chunk: the caller's own where it is whole and aligned, else a filled buffer of the context."""
        spec = self.plan.inputs[index]
        batched = bool(spec.shape) and spec.shape[0] is None
        item = self._bytes(spec, 1)
        first, count = (chunk.first, chunk.count) if batched else (0, 1)
        whole = not batched or chunk.count == chunk.batch
        if found.address is not None:
            address = found.address + first * item
            if whole and address % prepared.input_aligns.get(index, 1) == 0 and index not in prepared.segments.static_inputs:
                return address
        buffer = context.buffer(chunk.batch, "input", index, self._bytes(spec, chunk.batch))
        if found.address is not None:
            self.gpu.copy(buffer, found.address + first * item, count * item, stream)
        else:
            assert found.host is not None
            self.gpu.upload(buffer, found.host.ctypes.data + first * item, count * item, stream)
        return buffer

    def _run_chunk(self, context: Context, chunk: Chunk, found: Sequence[Given], results: Sequence[Any], stream: int) -> None:
        prepared, gpu = self.prepared(chunk.batch), self.gpu
        inputs = [self._input(context, prepared, chunk, i, g, stream) for i, g in enumerate(found)]
        targets, moves = [], []
        for index, (spec, result) in enumerate(zip(self.plan.outputs, results, strict=True)):
            batched = bool(spec.shape) and spec.shape[0] is None
            item = self._bytes(spec, 1)
            on_host = isinstance(result, np.ndarray)
            target = address_of(result) + (chunk.first * item if batched else 0)
            if on_host or (batched and chunk.count < chunk.batch) or target % OUTPUT_ALIGN:
                buffer = context.buffer(chunk.batch, "output", index, self._bytes(spec, chunk.batch))
                moves.append((gpu.download if on_host else gpu.copy, target, buffer, (chunk.count if batched else 1) * item))
                target = buffer
            targets.append(target)
        context.run(prepared, inputs, targets, stream)
        for move, target, buffer, size in moves:
            move(target, buffer, size, stream)

    def _finish(self, first: Any, found: Sequence[Given], results: list[Any], stream: int) -> list[Any]:
        if not all(is_torch(g.alive) for g in found):
            # What was borrowed goes back, and host memory is read, only once the GPU is done.
            self.gpu.synchronize(stream)
        on_host = found[0].address is None and is_torch(first)
        return [sys.modules["torch"].from_numpy(result) for result in results] if on_host else results


def address_of(result: Any) -> int:
    """Return where a result lies: a NumPy array, a torch tensor or a `DeviceArray`."""
    if isinstance(result, np.ndarray):
        return int(result.ctypes.data)
    return int(result.data_ptr()) if is_torch(result) else int(result.address)
