"""An execution context: the memory and graphs of one thread. Programs and prepared steps are shared by all contexts of an engine."""

import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from twofour.errors import InputError
from twofour.kernels.gemm.contract import FLAG_BYTES
from twofour.kernels.launchable import Launchable
from twofour.plan.program import FALLBACK, Program, Step, step_footprints


@dataclass(frozen=True)
class Segments:
    """How a program's steps are run: those before `graph_begin` and from `graph_end` on by one launch each, those between as one graph.

    The first and last steps touch the caller's memory, whose address changes from call to call; launched apart, they take it as it is.
    `static_inputs`, `static_outputs`: numbers of inputs and outputs that a step inside the graph touches, which therefore get a buffer
    of their own.
    """

    graph_begin: int
    graph_end: int
    static_inputs: frozenset[int]
    static_outputs: frozenset[int]


def segments(program: Program) -> Segments:
    """Return how the steps of `program` are run; a program with a fallback has no graph."""
    steps = program.steps
    if any(step.family == FALLBACK for step in steps):
        return Segments(len(steps), len(steps), frozenset(), frozenset())

    def touched(step: Step, where: str) -> set[int]:
        values = (program.values[name] for name in step.operands.values())
        return {v.index for v in values if v.where == where and v.index is not None}

    begin = 0
    while begin < len(steps) and touched(steps[begin], "input"):
        begin += 1
    end = len(steps)
    while end > begin and touched(steps[end - 1], "output"):
        end -= 1
    inside = steps[begin:end]
    inputs = frozenset(i for step in inside for i in touched(step, "input"))
    outputs = frozenset(i for step in inside for i in touched(step, "output"))
    return Segments(begin, end, inputs, outputs)


def input_aligns(program: Program) -> dict[int, int]:
    """Return what the address of each input must be a multiple of, in bytes."""
    found: dict[int, int] = {}
    for step in program.steps:
        for name, footprint in step_footprints(step, program.values).items():
            value = program.values[step.operands[name]]
            if value.where == "input" and value.index is not None:
                found[value.index] = max(found.get(value.index, 1), footprint.align)
    return found


@dataclass(frozen=True)
class Prepared:
    """A program with its steps made callable."""

    program: Program
    launchables: Sequence[Launchable]
    segments: Segments
    input_aligns: Mapping[int, int]


class Memory:
    """Device memory of a context, freed with it."""

    def __init__(self, gpu: Any, size: int) -> None:
        self._gpu, self.size = gpu, size
        self.address: int = gpu.alloc(size)

    def __del__(self) -> None:
        if hasattr(self, "address") and not sys.is_finalizing():
            self._gpu.free(self.address)


DEFAULT_STREAMS = (0, 1, 2)  # the driver's two, one of them under two addresses


class Context:
    """Arena, workspace, buffers for inputs and outputs, graphs, and a stream. Used by one thread; calls on two streams are put in order."""

    def __init__(self, gpu: Any, weights: Mapping[str, int], weight_memory: Memory, arena_bytes: int, workspace_bytes: int) -> None:
        """Allocate `arena_bytes` of activations and the workspace; `weights` gives the address of each payload tensor in its memory."""
        self.gpu, self._weights, self._weight_memory = gpu, weights, weight_memory
        self.stream: int = gpu.stream()
        self.done = gpu.event()
        self._last_stream: int | None = None
        self._is_captured = False
        self._arena = Memory(gpu, arena_bytes)
        self._workspace = Memory(gpu, max(workspace_bytes, FLAG_BYTES))
        gpu.zero(self._arena.address, arena_bytes, self.stream)
        gpu.zero(self._workspace.address, self._workspace.size, self.stream)
        # What comes next is put on the caller's stream, which does not wait for this one.
        gpu.synchronize(self.stream)
        self._graphs: dict[int, Any] = {}
        self._buffers: dict[tuple[int, str, int], Memory] = {}

    def __del__(self) -> None:
        if sys.is_finalizing() or not hasattr(self, "_buffers"):
            return
        with self.gpu.use():
            # An engine may go while its last pass still runs.
            self.gpu.wait_for(self.done)
            for graph in self._graphs.values():
                self.gpu.free_graph(graph)
            self.gpu.free_event(self.done)
            self.gpu.free_stream(self.stream)

    @property
    def num_bytes(self) -> int:
        """Device memory held."""
        return self._arena.size + self._workspace.size + sum(m.size for m in self._buffers.values())

    def buffer(self, batch: int, kind: str, index: int, size: int) -> int:
        """Return the context's own memory for an input or output of a batch size, zero at first."""
        key = (batch, kind, index)
        if key not in self._buffers:
            self._buffers[key] = Memory(self.gpu, size)
            self.gpu.zero(self._buffers[key].address, size, self.stream)
            self.gpu.synchronize(self.stream)
        return self._buffers[key].address

    def _addresses(self, prepared: Prepared, step: Step, inputs: Sequence[int], outputs: Sequence[int]) -> dict[str, int]:
        found = {}
        for name, value_name in step.operands.items():
            value = prepared.program.values[value_name]
            if value.where == "arena":
                found[name] = self._arena.address + value.offset
            elif value.where == "weights":
                found[name] = self._weights[str(value.tensor)] + value.offset
            else:
                assert value.index is not None
                found[name] = (inputs if value.where == "input" else outputs)[value.index]
        return found

    def _launch(self, prepared: Prepared, begin: int, end: int, inputs: Sequence[int], outputs: Sequence[int], stream: int) -> None:
        for number in range(begin, end):
            step = prepared.program.steps[number]
            prepared.launchables[number](self._addresses(prepared, step, inputs, outputs), self._workspace.address, stream)

    def order(self, stream: int) -> None:
        """Let `stream` wait for this context's last call, if that was on another one.

        A caller's stream may have been destroyed and made anew at the same address: only the default ones and the context's own last.

        NOTE: a stream whose work its owner captures must not wait for work outside the capture; the owner puts the replays in order.
        """
        self._is_captured = self.gpu.is_capturing(stream)
        is_same = stream == self._last_stream and stream in (*DEFAULT_STREAMS, self.stream)
        if not is_same and not self._is_captured:
            self.gpu.wait(stream, self.done)
            self._last_stream = stream

    def mark(self, stream: int) -> None:
        """Remember the end of a call, for `order`."""
        if not self._is_captured:
            self.gpu.record(self.done, stream)

    def run(self, prepared: Prepared, inputs: Sequence[int], outputs: Sequence[int], stream: int) -> None:
        """Put one pass on `stream`; addresses are the caller's or those of `buffer`.

        The first pass of a batch size runs every step once, so that libraries load what they load lazily, and captures the graph. On a
        stream that its owner captures the steps are put one by one: a graph may not be launched there.

        Raises:
            InputError: the stream is captured and this thread has not run the batch size before.
        """
        s, batch = prepared.segments, prepared.program.batch
        if self._is_captured:
            if s.graph_begin < s.graph_end and batch not in self._graphs:
                raise InputError(f"engine: batch {batch} is recorded before its first run; run it once in this thread, then record")
            self._launch(prepared, 0, len(prepared.program.steps), inputs, outputs, stream)
            return
        inner_inputs, inner_outputs = list(inputs), list(outputs)
        for i in s.static_inputs:
            size = _bytes(prepared, "input", i)
            inner_inputs[i] = self.buffer(batch, "input", i, size)
            if inner_inputs[i] != inputs[i]:
                self.gpu.copy(inner_inputs[i], inputs[i], size, stream)
        for i in s.static_outputs:
            inner_outputs[i] = self.buffer(batch, "output", i, _bytes(prepared, "output", i))
        if s.graph_begin < s.graph_end and batch not in self._graphs:
            self.gpu.synchronize(stream)
            self._capture(prepared, inner_inputs, inner_outputs)
        self._launch(prepared, 0, s.graph_begin, inputs, outputs, stream)
        if s.graph_begin < s.graph_end:
            self.gpu.launch_graph(self._graphs[batch], stream)
        for i in s.static_outputs:
            if inner_outputs[i] != outputs[i]:
                self.gpu.copy(outputs[i], inner_outputs[i], _bytes(prepared, "output", i), stream)
        self._launch(prepared, s.graph_end, len(prepared.program.steps), inputs, outputs, stream)

    def _capture(self, prepared: Prepared, inputs: Sequence[int], outputs: Sequence[int]) -> None:
        """Run the graph's steps once on whatever the arena holds, before the caller's pass begins, then record them."""
        s, gpu = prepared.segments, self.gpu
        self._launch(prepared, s.graph_begin, s.graph_end, inputs, outputs, self.stream)
        gpu.synchronize(self.stream)
        with _capturing:
            gpu.begin_capture(self.stream)
            try:
                self._launch(prepared, s.graph_begin, s.graph_end, inputs, outputs, self.stream)
            except BaseException:
                gpu.abandon_capture(self.stream)
                raise
            self._graphs[prepared.program.batch] = gpu.end_capture(self.stream)

    def times_us(self, prepared: Prepared, inputs: Sequence[int], outputs: Sequence[int], num_runs: int) -> list[list[float]]:
        """Return microseconds of each step in `num_runs` passes of single launches."""
        gpu, steps = self.gpu, len(prepared.program.steps)
        events = [gpu.event() for _ in range(steps + 1)]
        taken: list[list[float]] = [[] for _ in range(steps)]
        for run in range(num_runs + 1):
            gpu.record(events[0], self.stream)
            for number in range(steps):
                self._launch(prepared, number, number + 1, inputs, outputs, self.stream)
                gpu.record(events[number + 1], self.stream)
            gpu.synchronize(self.stream)
            if run:
                for number in range(steps):
                    taken[number].append(gpu.elapsed_us(events[number], events[number + 1]))
        for event in events:
            gpu.free_event(event)
        return taken


# NOTE: captures of two threads at once are kept apart, because libraries may allocate in one while the other captures.
_capturing = threading.Lock()


def _bytes(prepared: Prepared, where: str, index: int) -> int:
    return next(v.num_bytes for v in prepared.program.values.values() if v.where == where and v.index == index)
