"""What libraries offer without vouching for it, tried and roughly timed in processes of their own: cuDNN's plans, cuSPARSELt's search.

Either was seen to end the CUDA context with an illegal instruction. A plan or search that ends its process, hangs or fails is left out,
and the others go on in a fresh process. What comes back is safe to build here.

Several processes share the trials, since making a plan takes a core up to a second; a lock on a file lets one at a time use the GPU for
timing.
"""

import fcntl
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from twofour.errors import TwofourError
from twofour.jit.child import python
from twofour.kernels.families import read_problem
from twofour.kernels.records import to_plain

logger = logging.getLogger(__name__)
PATIENCE_S = 120.0  # without a word from the process
LAUNCHES, SAMPLES = 5, 5
MOST_PLANS = 12
MOST_PROCESSES = 12  # each holds a CUDA context and one layer's operands
DEFAULT, SEARCH = 0, 1  # what is tried of cuSPARSELt
CHILD = "from twofour.builder.tactics.untrusted import main; main()"


@dataclass(frozen=True)
class Trial:
    """A problem whose plans by a library are to be tried: the first `most` of them; `fused` as in `kernels/conv/cudnn.py`.

    Of cuSPARSELt, its default algorithm and the one that its search finds are tried. `after`, what follows in an engine, is not tried.
    """

    family: str
    problem: Any
    fused: bool = True
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
    processes = min(len(trials), MOST_PROCESSES, os.cpu_count() or 1)
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
            {"family": t.family, "problem": to_plain(t.problem), "fused": t.fused, "most": t.most, "library": t.library} for t in trials
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
        for line in _patient(process):
            answer = json.loads(line)
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
        last = (said or ["no output"])[-1].strip()
        raise TwofourError(f"trying the libraries' plans failed before or between plans (exit code {code}): {last}")
    return (*current, f"exit code {code}")


def _patient(process: "subprocess.Popen[str]") -> Iterator[str]:
    """Lines of a process, which is ended when it says nothing for `PATIENCE_S`."""
    assert process.stdout is not None
    while True:
        timer = threading.Timer(PATIENCE_S, process.kill)
        timer.start()
        line = process.stdout.readline()
        timer.cancel()
        if not line:
            return
        yield line


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
                tryer.cudnn(number, trial["family"], problem, trial["fused"], begin, trial["most"])
            else:
                tryer.cusparselt(number, problem, begin, trial["most"])
    _say({"done": True})


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


class _Tryer:
    """Tries the plans of one problem after the other on a GPU."""

    def __init__(self, device: int, lock: Path) -> None:
        from twofour.jit.driver import use_device

        use_device(device)
        self._device, self._lock = device, lock
        self._handle: Any = None

    def cudnn(self, number: int, family: str, problem: Any, fused: bool, begin: int, most: int) -> None:
        """Try the plans from `begin` on."""
        from twofour.kernels.conv.cudnn import UNFUSED
        from twofour.kernels.cudnn import Handle
        from twofour.kernels.launchable import launchable

        try:
            self._handle = self._handle or Handle(self._device)
            count = _num_plans(family, problem, fused, self._handle)
        except TwofourError as error:
            _say({"trial": number, "reason": str(error)})
            return
        addresses, alive = _operands(family, "cudnn", problem)
        for plan in range(begin, min(count, most)):
            algorithm = plan | (0 if fused else UNFUSED)
            with _told(number, plan) as answer:
                call = launchable(family, "cudnn", problem, None, algorithm, device=self._device, handle=self._handle)
                answer["us"] = self._rough_us(call, addresses)
        del alive

    def cusparselt(self, number: int, problem: Any, begin: int, most: int) -> None:
        """Try the default algorithm, then the one that the search finds, on a weight of zeros; `most` 1: the default alone."""
        from twofour.jit.driver import Buffer
        from twofour.kernels.launchable import launchable

        addresses, alive = _operands("gemm", "cusparselt", problem)
        extra = {name: addresses[name] for name in ("bias", "residual") if name in addresses}
        zeros = Buffer(2 * problem.weight_rows * problem.inputs, zeroed=True)
        for plan in (DEFAULT, SEARCH)[begin:most]:
            with _told(number, plan) as answer:
                made: Any = launchable("gemm", "cusparselt", problem)
                weight = made.call.compress(zeros.pointer)
                answer["plan"] = -1
                if plan == SEARCH:
                    with _alone(self._lock):
                        answer["plan"] = made.call.search(addresses["x"], weight.pointer, addresses["d"], **extra)
                answer["us"] = self._rough_us(made, addresses | {"weight": weight.pointer})
        del alive

    def _rough_us(self, call: Any, addresses: dict[str, int]) -> float:
        from twofour.jit.driver import Buffer

        space = Buffer(call.workspace_bytes, zeroed=True)
        with _alone(self._lock):
            return _rough_us(lambda: call(addresses, space.pointer, 0))


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
        answer |= {"plan": plan, "error": str(error)}
    _say(answer)


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Let no other process of these trials use the GPU; a process that ends lets go."""
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def _num_plans(family: str, problem: Any, fused: bool, handle: Any) -> int:
    from twofour.kernels.attention import cudnn as attention
    from twofour.kernels.conv import cudnn as conv

    return conv.num_plans(problem, handle, fused=fused) if family == "conv" else attention.num_plans(problem, handle)


def _rough_us(call: Any) -> float:
    from twofour.jit.driver import bindings, check

    d = bindings()
    events = [check(d.cuEventCreate(0), "making an event") for _ in range(2)]
    call()
    check(d.cuStreamSynchronize(0), "waiting for the GPU")
    taken = []
    for _ in range(SAMPLES):
        check(d.cuEventRecord(events[0], 0), "recording an event")
        for _ in range(LAUNCHES):
            call()
        check(d.cuEventRecord(events[1], 0), "recording an event")
        check(d.cuEventSynchronize(events[1]), "waiting for the GPU")
        taken.append(float(check(d.cuEventElapsedTime(*events), "reading events")) * 1000 / LAUNCHES)
    return median(taken)
