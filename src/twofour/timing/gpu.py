"""The one way this project times GPU work.

A candidate's calls are captured into a CUDA graph that walks through operand sets larger than three times the L2 together, so operands
come from memory as they do in a network. Candidates are interleaved in every round. Two figures are taken: `burst`, the GPU cool and at
full clock, and `sustained`, back to back once the power limit has settled the clock; both are medians with their spread, and beside them
stand clock and power as NVML saw them. A spread above the limit is refused, never averaged away. Energy is counted over windows of at
least five seconds.

Needs cuda.bindings and nvidia-ml-py; no torch.
"""

import logging
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from twofour.errors import MissingExtraError, UnsupportedError
from twofour.jit.driver import bindings, bus_id, check, use_device

logger = logging.getLogger(__name__)

# Rows taken by a protocol that is not comparable are measured again. 3 heats the GPU first; what came out stable without stands.
PROTOCOL, COMPARABLE = 3, (2, 3)
HEAT_S = 2.0  # of back-to-back work before the first sustained figure
SETTLE_S = 0.35  # least back-to-back work before a sustained figure
MOST_SETTLE_S = 2.5
WINDOW_S = 0.2  # whose medians are compared while settling
SETTLED = 0.006  # largest relative step between two windows
SAMPLE_S = 0.25  # of settled work that is sampled
GRAPH_S = 0.0015  # aimed length of one graph
ENERGY_WINDOW_S = 5.0  # shorter windows read more than the power limit
POWER_TOLERANCE = 1.02  # mean power over the limit by more than this means a bad reading
SPREAD_LIMIT = 0.05


@dataclass(frozen=True)
class Candidate:
    """Something to time: `enqueue(i, stream)` puts call i on a stream, using operand set i modulo the number of sets."""

    name: str
    enqueue: Callable[[int, int], None]
    sets: int = 1


@dataclass(frozen=True)
class Figure:
    """Microseconds a call. `spread` is the interquartile range over the median; `n` graphs were timed."""

    median_us: float
    spread: float
    n: int
    clock_mhz: float = 0.0
    power_w: float = 0.0

    def __str__(self) -> str:
        return f"{self.median_us:.1f} us ± {100 * self.spread:.1f} % (n={self.n}, {self.clock_mhz:.0f} MHz, {self.power_w:.0f} W)"

    @property
    def is_stable(self) -> bool:
        """Whether the spread is within the limit."""
        return self.spread <= SPREAD_LIMIT


@dataclass(frozen=True)
class Energy:
    """Joules a call and the mean power over a window of `seconds`; `us` a call in that window."""

    joules: float
    power_w: float
    seconds: float
    us: float


def sets_for(bytes_a_set: int, l2_bytes: int, most: int = 64) -> int:
    """Return how many operand sets of `bytes_a_set` make at least 3 x the L2 together."""
    return max(2, min(most, -(-3 * l2_bytes // max(1, bytes_a_set))))


def figure(samples_us: Sequence[float], clock_mhz: float = 0.0, power_w: float = 0.0) -> Figure:
    """Return median and spread (interquartile range over median) of samples."""
    ordered = sorted(samples_us)
    n = len(ordered)
    median = statistics.median(ordered)
    return Figure(median, (ordered[3 * n // 4] - ordered[n // 4]) / median, n, clock_mhz, power_w)


def is_settled(windows_us: Sequence[float], elapsed_s: float) -> bool:
    """Whether the medians of the last three windows lie within `SETTLED` of each other, or the longest settling time has passed."""
    if elapsed_s >= MOST_SETTLE_S:
        return True
    if elapsed_s < SETTLE_S or len(windows_us) < 3:
        return False
    last = windows_us[-3:]
    return max(last) - min(last) <= SETTLED * min(last)


class Meter:
    """NVML readings of one GPU: power, SM clock, energy, limit. `sample` runs in a thread while a block of code runs."""

    def __init__(self, device: int = 0) -> None:
        """Open NVML.

        Raises:
            MissingExtraError: nvidia-ml-py is not installed. UnsupportedError: NVML cannot read the GPU.
        """
        try:
            import pynvml
        except ImportError as e:
            raise MissingExtraError("timing on a GPU records clock and power, which needs nvidia-ml-py; pip install 'twofour[cuda]'") from e
        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
            # By its address on the bus: NVML numbers all GPUs, the driver those that CUDA_VISIBLE_DEVICES names.
            self._handle = pynvml.nvmlDeviceGetHandleByPciBusId(bus_id(device))
            self.limit_w = pynvml.nvmlDeviceGetPowerManagementLimit(self._handle) / 1000
        except pynvml.NVMLError as e:
            raise UnsupportedError(f"NVML cannot read GPU {device} ({e}), expected clock and power; check nvidia-smi") from e
        self._clocks: list[float] = []
        self._powers: list[float] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def joules(self) -> float:
        """Return the GPU's energy counter."""
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000

    def machine(self) -> dict[str, Any]:
        """Return GPU name, driver and power limit."""
        name = self._nvml.nvmlDeviceGetName(self._handle)
        driver = self._nvml.nvmlSystemGetDriverVersion()
        return {"gpu": name if isinstance(name, str) else name.decode(), "driver": str(driver), "power_limit_w": self.limit_w}

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self._clocks.append(float(self._nvml.nvmlDeviceGetClockInfo(self._handle, self._nvml.NVML_CLOCK_SM)))
            self._powers.append(float(self._nvml.nvmlDeviceGetPowerUsage(self._handle)) / 1000)

    def __enter__(self) -> "Meter":
        self._clocks, self._powers = [], []
        self._stop.clear()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    @property
    def clock_mhz(self) -> float:
        """Median SM clock of the last block."""
        return statistics.median(self._clocks) if self._clocks else 0.0

    @property
    def power_w(self) -> float:
        """Median power of the last block."""
        return statistics.median(self._powers) if self._powers else 0.0


class Graph:
    """`calls` calls of a candidate as one CUDA graph on a stream of its own."""

    def __init__(self, candidate: Candidate, calls: int, stream: Any) -> None:
        d = bindings()
        self._stream = stream
        # NOTE: the graph holds bare addresses; the candidate owns the memory behind them.
        self._candidate = candidate
        self.calls = calls
        check(d.cuStreamBeginCapture(stream, d.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED), f"capturing {candidate.name}")
        try:
            for i in range(calls):
                candidate.enqueue(i % candidate.sets, int(stream))
        finally:
            graph = check(d.cuStreamEndCapture(stream), f"capturing {candidate.name}")
        self._exec = check(d.cuGraphInstantiate(graph, 0), f"instantiating {candidate.name}")
        check(d.cuGraphDestroy(graph), "freeing a graph")

    def launch(self) -> None:
        """Put the graph on its stream."""
        check(bindings().cuGraphLaunch(self._exec, self._stream), "launching a graph")

    def close(self) -> None:
        """Free the graph."""
        check(bindings().cuGraphExecDestroy(self._exec), "freeing a graph")


class Stopwatch:
    """Times candidates on one GPU by the protocol of this file."""

    def __init__(self, device: int = 0) -> None:
        """Open the GPU and NVML."""
        use_device(device)
        d = bindings()
        self.meter = Meter(device)
        self.stream = check(d.cuStreamCreate(1), "making a stream")
        attribute = d.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE
        self.l2_bytes = int(check(d.cuDeviceGetAttribute(attribute, check(d.cuDeviceGet(device), "finding the GPU")), "asking for the L2"))
        self._events = [check(d.cuEventCreate(0), "making an event") for _ in range(2)]

    def _us(self, graph: Graph, launches: int = 1) -> float:
        """Microseconds a call over `launches` back-to-back launches of a graph."""
        d = bindings()
        begin, end = self._events
        check(d.cuEventRecord(begin, self.stream), "recording an event")
        for _ in range(launches):
            graph.launch()
        check(d.cuEventRecord(end, self.stream), "recording an event")
        check(d.cuEventSynchronize(end), "waiting for the GPU")
        return float(check(d.cuEventElapsedTime(begin, end), "reading events")) * 1000 / (launches * graph.calls)

    def synchronize(self) -> None:
        """Wait for what is on the stopwatch's stream."""
        check(bindings().cuStreamSynchronize(self.stream), "waiting for the GPU")

    def graph(self, candidate: Candidate) -> Graph:
        """Return a warmed-up graph of about `GRAPH_S`, with a whole number of rounds through the operand sets."""
        for i in range(candidate.sets):
            candidate.enqueue(i, int(self.stream))
        check(bindings().cuStreamSynchronize(self.stream), f"running {candidate.name}")
        probe = Graph(candidate, candidate.sets, self.stream)
        self._us(probe)
        rounds = max(1, round(GRAPH_S * 1e6 / (self._us(probe) * candidate.sets)))
        if rounds == 1:
            return probe
        probe.close()
        return Graph(candidate, rounds * candidate.sets, self.stream)

    def burst(self, graphs: Sequence[Graph], rounds: int = 11, pause_s: float = 0.004) -> list[Figure]:
        """Return a figure each, graphs interleaved, with pauses that keep the GPU cool; the first round is dropped."""
        samples: list[list[float]] = [[] for _ in graphs]
        with self.meter:
            for turn in range(rounds + 1):
                for graph, out in zip(graphs, samples, strict=True):
                    us = self._us(graph)
                    if turn:
                        out.append(us)
                    time.sleep(pause_s)
        return [figure(s, self.meter.clock_mhz, self.meter.power_w) for s in samples]

    def sustained(self, graphs: Sequence[Graph], rounds: int = 2) -> list[Figure]:
        """Return a figure each: the graphs take turns, forwards then backwards; each runs back to back until settled, then is sampled.

        NOTE: the last graph heats the GPU first. After a pause the power controller takes seconds to settle, longer than `settle` can tell
        from one graph's times; whatever came first had up to ten times the spread of the others.
        """
        samples: list[list[float]] = [[] for _ in graphs]
        clocks: list[list[float]] = [[] for _ in graphs]
        powers: list[list[float]] = [[] for _ in graphs]
        order = list(range(len(graphs)))
        self.keep_busy(graphs[-1], HEAT_S)
        for turn in range(rounds):
            for i in order if turn % 2 == 0 else reversed(order):
                self.settle(graphs[i])
                with self.meter:
                    samples[i] += self.keep_busy(graphs[i], SAMPLE_S)
                clocks[i].append(self.meter.clock_mhz)
                powers[i].append(self.meter.power_w)
        return [figure(s, statistics.median(c), statistics.median(p)) for s, c, p in zip(samples, clocks, powers, strict=True)]

    def settle(self, graph: Graph) -> None:
        """Run a graph back to back until its time has settled.

        NOTE: after a change of work the power controller swings for a second: figures taken after a fixed 0.35 s differed by up to 4 % from
        windows of five seconds, in favour of what ran after lighter work.
        """
        windows: list[float] = []
        begin = time.perf_counter()
        while not is_settled(windows, time.perf_counter() - begin):
            windows.append(statistics.median(self.keep_busy(graph, WINDOW_S)))

    def keep_busy(self, graph: Graph, seconds: float) -> list[float]:
        """Run a graph back to back for `seconds`, four launches queued at a time; microseconds a call of each four."""
        out = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            out.append(self._us(graph, 4))
        return out

    def energy(self, graph: Graph, window_s: float = ENERGY_WINDOW_S) -> Energy:
        """Return joules a call over a window of at least `window_s` after settling.

        Raises:
            UnsupportedError: the mean power exceeds the limit by more than 2 %, so the counter cannot be trusted.
        """
        self.settle(graph)
        begin_j, begin = self.meter.joules(), time.perf_counter()
        calls = 0
        while time.perf_counter() - begin < window_s:
            self._us(graph, 8)
            calls += 8 * graph.calls
        seconds, joules = time.perf_counter() - begin, self.meter.joules() - begin_j
        power = joules / seconds
        if power > POWER_TOLERANCE * self.meter.limit_w:
            raise UnsupportedError(
                f"mean power read {power:.0f} W over {seconds:.1f} s, expected at most {self.meter.limit_w:.0f} W; measure again"
            )
        return Energy(joules / calls, power, seconds, seconds * 1e6 / calls)


def refuse_unstable(name: str, measured: Figure) -> Figure:
    """Return `measured`.

    Raises:
        UnsupportedError: its spread is above the limit.
    """
    if not measured.is_stable:
        raise UnsupportedError(
            f"{name} was unstable: spread {100 * measured.spread:.1f} % over {measured.n} samples, "
            f"expected at most {100 * SPREAD_LIMIT:.0f} %; measure again on a quiet GPU"
        )
    return measured
