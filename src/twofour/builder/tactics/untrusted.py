"""What libraries offer without vouching for it, tried and roughly timed in processes of their own: cuDNN's plans, cuSPARSELt's search.

Either was seen to end the CUDA context with an illegal instruction. A plan or search that ends its process, hangs or fails is left out,
and the others go on in a fresh process. What comes back is safe to build here.

Several processes share the trials, since making a plan takes a core up to a second; a lock on a file lets one at a time use the GPU for
timing. One that waits for the lock says so: it is not the one that hangs.
"""

import fcntl
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import IO, Any

from twofour.errors import TwofourError
from twofour.jit.child import python
from twofour.kernels.families import read_problem
from twofour.kernels.records import to_plain

logger = logging.getLogger(__name__)
# Without a word from the process: before its first, for which it loads libraries while others do on a busy machine, and from then on.
START_PATIENCE_S, PATIENCE_S = 300.0, 60.0
WAIT_S, POLL_S = 5.0, 0.002  # for the lock: from word to word, from try to try
BROKEN = 70  # exit code of a process whose CUDA context an error ended
SAMPLES = 5
GRAPH_US, MOST_LAUNCHES = 400.0, 20  # aimed length of what is timed, and the launches in it
MOST_PLANS = 12
MOST_PROCESSES = 12  # each holds a CUDA context and one layer's operands
LEAST_TRIALS = 4  # for which a process is worth its start of some seconds
DEFAULT, SEARCH = 0, 1  # what is tried of cuSPARSELt
CHILD = "from twofour.builder.tactics.untrusted import main; main()"


@dataclass(frozen=True)
class Trial:
    """A problem whose plans by a library are to be tried: the first `most` of them; `form` as in `kernels/conv/cudnn.py`.

    Of cuSPARSELt, its default algorithm and the one that its search finds are tried. `after`, what follows in an engine, is not tried.
    """

    family: str
    problem: Any
    form: int = 0
    most: int = MOST_PLANS
    library: str = "cudnn"
    after: Any = None


@dataclass
class Outcome:
    """What came of a trial.

    Attributes:
        times_us: algorithm -> microseconds a launch, rough and with warm caches; of cuSPARSELt -1 is its default.
        left_out: number of the plan -> why it is left out. reason: why there is no plan at all.
    """

    times_us: dict[int, float] = field(default_factory=dict)
    left_out: dict[int, str] = field(default_factory=dict)
    reason: str | None = None

    def best(self, most: int) -> list[int]:
        """Return the numbers of the `most` fastest plans, the fastest first."""
        return sorted(self.times_us, key=lambda plan: self.times_us[plan])[:most]


def try_plans(trials: Sequence[Trial], device: int = 0) -> list[Outcome]:
    """Return what came of each trial.

    Raises:
        TwofourError: the process cannot even start (its last line is quoted), for example because cuDNN is not installed.
    """
    outcomes = [Outcome() for _ in trials]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = min(-(-len(trials) // LEAST_TRIALS), MOST_PROCESSES, cores)
    if not processes:
        return outcomes
    with TemporaryDirectory() as folder, ThreadPoolExecutor(processes) as pool:
        lock = Path(folder) / "gpu"
        lock.touch()
        shares = [(trials[first::processes], outcomes[first::processes]) for first in range(processes)]
        list(pool.map(lambda share: _in_turn(share[0], share[1], device, lock), shares))
    return outcomes


def _in_turn(trials: Sequence[Trial], outcomes: Sequence[Outcome], device: int, lock: Path) -> None:
    start = (0, 0)
    while start[0] < len(trials):
        stopped = _one_process(trials, outcomes, start, device, lock)
        if stopped is None:
            break
        trial, plan, how = stopped
        outcomes[trial].left_out[plan] = f"it ended its process ({how})"
        one = trials[trial]
        logger.warning("%s's plan %d of %s ended its process (%s) and is left out", one.library, plan, one.problem, how)
        start = (trial, plan + 1)


def _one_process(
    trials: Sequence[Trial], outcomes: Sequence[Outcome], start: tuple[int, int], device: int, lock: Path
) -> tuple[int, int, str] | None:
    """Run trials from `start` on; None when all are done, else (trial, plan, how the process ended)."""
    request = {
        "device": device,
        "lock": str(lock),
        "start": start,
        "trials": [
            {"family": t.family, "problem": to_plain(t.problem), "form": t.form, "most": t.most, "library": t.library} for t in trials
        ],
    }
    current: tuple[int, int] | None = None
    command, environment = python(CHILD)
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        said: list[str] = []
        reader = threading.Thread(target=lambda stream=process.stderr: said.extend(stream), daemon=True)
        reader.start()
        process.stdin.write(json.dumps(request))
        process.stdin.close()
        silence = _Silence(process)
        for line in silence.lines():
            answer = json.loads(line)
            if "waiting" in answer:
                continue
            if "done" in answer:
                current = None
                continue
            trial, outcome = answer["trial"], outcomes[answer["trial"]]
            if "reason" in answer:
                outcome.reason, current = answer["reason"], None
            elif "begin" in answer:
                current = (trial, answer["begin"])
            elif answer["error"]:
                outcome.left_out[answer["plan"]], current = answer["error"], None
            else:
                outcome.times_us[answer["plan"]], current = answer["us"], None
        code = process.wait()
        reader.join(timeout=5)
    if code == 0:
        return None
    if current is None:
        last = f"it said nothing for {silence.patience_s:.0f} s" if silence.is_over else (said or ["no output"])[-1].strip()
        raise TwofourError(f"trying the libraries' plans failed before or between plans (exit code {code}): {last}")
    return (*current, f"exit code {code}{': ' + said[-1].strip() if said else ''}")


class _Silence:
    """The lines of a process, which is ended when it says nothing for too long."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.patience_s, self.is_over = START_PATIENCE_S, False

    def lines(self) -> Iterator[str]:
        """Yield the lines as they come."""
        assert self._process.stdout is not None
        while True:
            timer = threading.Timer(self.patience_s, self._end)
            timer.start()
            line = self._process.stdout.readline()
            timer.cancel()
            if not line:
                return
            self.patience_s = PATIENCE_S
            yield line

    def _end(self) -> None:
        self.is_over = True
        self._process.kill()


def main() -> None:
    """Read a request from standard input and answer line by line: the body of the process."""
    request = json.loads(sys.stdin.read())
    first_trial, first_plan = request["start"]
    tryer = _Tryer(request["device"], Path(request["lock"]))
    for number, trial in enumerate(request["trials"]):
        if number >= first_trial:
            problem = read_problem(trial["family"], trial["problem"], "problem")
            begin = first_plan if number == first_trial else 0
            if trial["library"] == "cudnn":
                tryer.cudnn(number, trial["family"], problem, trial["form"], begin, trial["most"])
            else:
                tryer.cusparselt(number, problem, begin, trial["most"])
    _say({"done": True})


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


class _Tryer:
    """Tries the plans of one problem after the other on a GPU."""

    def __init__(self, device: int, lock: Path) -> None:
        from twofour.jit.driver import bindings, check, use_device

        use_device(device)
        self._device, self._lock = device, lock
        self._handle: Any = None
        self._stream = check(bindings().cuStreamCreate(1), "making a stream")

    def cudnn(self, number: int, family: str, problem: Any, form: int, begin: int, most: int) -> None:
        """Try the plans from `begin` on."""
        from twofour.kernels.cudnn import Handle
        from twofour.kernels.launchable import launchable

        try:
            self._handle = self._handle or Handle(self._device)
            count = _num_plans(family, problem, form, self._handle)
        except TwofourError as error:
            _say({"trial": number, "reason": str(error)})
            return
        addresses, alive = _operands(family, "cudnn", problem)
        for plan in range(begin, min(count, most)):
            with _told(number, plan) as answer:
                call = launchable(family, "cudnn", problem, None, plan | form, device=self._device, handle=self._handle)
                answer["us"] = self._rough_us(call, addresses)
        del alive

    def cusparselt(self, number: int, problem: Any, begin: int, most: int) -> None:
        """Try the default algorithm, then the one that the search finds, on a weight of zeros; `most` 1: the default alone.

        NOTE: the bare product is searched: with a bias or an activation, the search of cuSPARSELt 0.8.0 ended the CUDA context with an
        illegal instruction on every layer tried. What it finds for the bare one does so with a bias on nine layers of ten; on the tenth,
        of very many tokens, it takes up to half of the default's time.
        """
        from twofour.jit.driver import Buffer
        from twofour.kernels.gemm.contract import Epilogue
        from twofour.kernels.launchable import launchable

        addresses, alive = _operands("gemm", "cusparselt", problem)
        zeros = Buffer(2 * problem.weight_rows * problem.inputs, zeroed=True)
        for plan in (DEFAULT, SEARCH)[begin:most]:
            with _told(number, plan) as answer:
                answer["plan"], algorithm = -1, None
                if plan == SEARCH:
                    bare: Any = launchable("gemm", "cusparselt", replace(problem, epilogue=Epilogue()))
                    weight = bare.call.compress(zeros.pointer)
                    with _alone(self._lock):
                        answer["plan"] = algorithm = bare.call.search(addresses["x"], weight.pointer, addresses["d"])
                made: Any = launchable("gemm", "cusparselt", problem, None, algorithm)
                weight = made.call.compress(zeros.pointer)
                answer["us"] = self._rough_us(made, addresses | {"weight": weight.pointer})
        del alive

    def _rough_us(self, call: Any, addresses: dict[str, int]) -> float:
        from twofour.jit.driver import Buffer

        space = Buffer(call.workspace_bytes, zeroed=True)
        with _alone(self._lock):
            return _rough_us(lambda stream: call(addresses, space.pointer, stream), self._stream)


def _operands(family: str, library: str, problem: Any) -> tuple[dict[str, int], Any]:
    """Return zeroed operands: their addresses, and what keeps them alive."""
    from twofour.jit.driver import Buffer
    from twofour.kernels.families import footprints

    held = {name: Buffer(f.num_bytes, zeroed=True) for name, f in footprints(family, library, problem).items()}
    return {name: buffer.pointer for name, buffer in held.items()}, held


@contextmanager
def _told(number: int, plan: int) -> Iterator[dict[str, Any]]:
    """Say that a plan begins, and then what the body puts into the answer, or the error that it raised."""
    _say({"trial": number, "begin": plan})
    answer: dict[str, Any] = {"trial": number, "plan": plan, "us": 0.0, "error": ""}
    try:
        yield answer
    except TwofourError as error:
        if not _context_lives():
            logger.error("algorithm %d: %s", answer["plan"], error)
            os._exit(BROKEN)  # nothing else can be tried in this process, and leaving it the usual way may crash
        answer |= {"plan": plan, "error": str(error)}
    _say(answer)


def _context_lives() -> bool:
    """Return whether the CUDA context can still be used: an illegal instruction or address ends it for good."""
    from twofour.jit.driver import bindings, check

    try:
        check(bindings().cuCtxSynchronize(), "waiting for the GPU")
    except TwofourError:
        return False
    return True


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Let no other process of these trials use the GPU; a process that ends lets go."""
    with lock.open() as held:
        spoke = time.monotonic()
        while not _taken(held):
            if time.monotonic() - spoke > WAIT_S:
                _say({"waiting": True})
                spoke = time.monotonic()
            time.sleep(POLL_S)
        yield


def _taken(held: IO[str]) -> bool:
    """Take the lock if it is free."""
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _num_plans(family: str, problem: Any, form: int, handle: Any) -> int:
    from twofour.kernels.attention import cudnn as attention
    from twofour.kernels.conv import cudnn as conv

    return conv.num_plans(problem, handle, form) if family == "conv" else attention.num_plans(problem, handle)


def _rough_us(enqueue: Callable[[int], None], stream: Any) -> float:
    """Return microseconds a launch, in a CUDA graph as an engine launches it: alone, a short one takes as long as launching it does."""
    from twofour.jit.driver import bindings, check
    from twofour.timing.gpu import Candidate, Graph

    d = bindings()
    events = [check(d.cuEventCreate(0), "making an event") for _ in range(2)]

    def us(launch: Callable[[], None]) -> float:
        check(d.cuEventRecord(events[0], stream), "recording an event")
        launch()
        check(d.cuEventRecord(events[1], stream), "recording an event")
        check(d.cuEventSynchronize(events[1]), "waiting for the GPU")
        return float(check(d.cuEventElapsedTime(*events), "reading events")) * 1000

    enqueue(int(stream))  # the first launch loads the kernel
    check(d.cuStreamSynchronize(stream), "waiting for the GPU")
    launches = launches_for(us(lambda: enqueue(int(stream))))
    graph = Graph(Candidate("a library's plan", lambda _, at: enqueue(at)), launches, stream)
    us(graph.launch)
    found = median(us(graph.launch) for _ in range(SAMPLES)) / launches
    graph.close()
    return found


def launches_for(us: float) -> int:
    """Return how many launches of about `us` microseconds are timed at once."""
    return max(1, min(MOST_LAUNCHES, round(GRAPH_US / max(us, 1.0))))
