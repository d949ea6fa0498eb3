"""cuDNN's plans tried and roughly timed in processes of their own.

The library lists plans that it does not vouch for; one was seen to end the CUDA context with an illegal instruction. A plan that ends its
process, hangs or fails is left out, and the others go on in a fresh process. What comes back is safe to build here.

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
CHILD = "from twofour.builder.tactics.untrusted import main; main()"


@dataclass(frozen=True)
class Trial:
    """A problem whose plans are to be tried: the first `most` of them; `fused` as in `kernels/conv/cudnn.py` (convolutions only)."""

    family: str
    problem: Any
    fused: bool = True
    most: int = MOST_PLANS


@dataclass
class Outcome:
    """Plan number -> microseconds a launch, rough and with warm caches; plan number -> why it is left out; why there is no plan at all."""

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
        logger.warning("cuDNN's plan %d of %s ended its process (%s) and is left out", plan, trials[trial].problem, how)
        start = (trial, plan + 1)


def _one_process(
    trials: Sequence[Trial], outcomes: Sequence[Outcome], start: tuple[int, int], device: int, lock: Path
) -> tuple[int, int, str] | None:
    """Run trials from `start` on; None when all are done, else (trial, plan, how the process ended)."""
    request = {
        "device": device,
        "lock": str(lock),
        "start": start,
        "trials": [{"family": t.family, "problem": to_plain(t.problem), "fused": t.fused, "most": t.most} for t in trials],
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
                outcome.left_out[answer["plan"]] = answer["error"]
            else:
                outcome.times_us[answer["plan"]] = answer["us"]
        code = process.wait()
        reader.join(timeout=5)
    if code == 0:
        return None
    if current is None or current in [(t, p) for t, o in enumerate(outcomes) for p in o.times_us]:
        last = (said or ["no output"])[-1].strip()
        raise TwofourError(f"trying cuDNN's plans failed before or between plans (exit code {code}): {last}")
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
    from twofour.kernels.cudnn import Handle

    first_trial, first_plan = request["start"]
    handle, lock = Handle(request["device"]), Path(request["lock"])
    for number, trial in enumerate(request["trials"]):
        if number >= first_trial:
            problem = read_problem(trial["family"], trial["problem"], "problem")
            begin = first_plan if number == first_trial else 0
            _try(number, trial["family"], problem, trial["fused"], begin, trial["most"], handle, lock)
    _say({"done": True})


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def _try(number: int, family: str, problem: Any, fused: bool, begin: int, most: int, handle: Any, lock: Path) -> None:
    from twofour.jit.driver import Buffer
    from twofour.kernels.conv.cudnn import UNFUSED
    from twofour.kernels.families import footprints
    from twofour.kernels.launchable import launchable

    try:
        count = _num_plans(family, problem, fused, handle)
    except TwofourError as error:
        _say({"trial": number, "reason": str(error)})
        return
    held = {name: Buffer(f.num_bytes, zeroed=True) for name, f in footprints(family, "cudnn", problem).items()}
    addresses = {name: buffer.pointer for name, buffer in held.items()}
    for plan in range(begin, min(count, most)):
        _say({"trial": number, "begin": plan})
        try:
            call = launchable(family, "cudnn", problem, None, plan | (0 if fused else UNFUSED), device=handle.device, handle=handle)
            space = Buffer(call.workspace_bytes, zeroed=True)
            with _alone(lock):
                us = _rough_us(lambda call=call, space=space: call(addresses, space.pointer, 0))
            _say({"trial": number, "plan": plan, "us": us, "error": ""})
        except TwofourError as error:
            _say({"trial": number, "plan": plan, "us": 0.0, "error": str(error)})


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
