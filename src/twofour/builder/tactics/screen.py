"""Which of cuDNN's plans may be trusted: each is run in a process of its own first.

A plan that the library lists may still end the CUDA context, and with it everything in the process. Here the process that ends is a child:
the plan it was trying is left out, and a new child goes on behind it.

    python -m twofour.builder.tactics.screen     reads one JSON request from its input, writes a JSON line before and after each plan
"""

import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from twofour.builder.tactics.ways import Way
from twofour.errors import InputError, MissingExtraError, UnsupportedError
from twofour.kernels.families import read_problem
from twofour.kernels.records import to_plain

log = logging.getLogger(__name__)
TIMEOUT_S = 300.0


def screen(groups: Sequence[Sequence[Way]], device: int = 0) -> tuple[dict[Way, float], dict[Way, str]]:
    """Return microseconds of every plan that ran, and why the others did not.

    Args:
        groups: ways of one layer each, all by cuDNN.
    """
    times: dict[Way, float] = {}
    reasons: dict[Way, str] = {}
    left = [way for group in groups for way in group]
    while left:
        tried = _run_child(left, device, times, reasons)
        left = [way for way in left if way not in times and way not in reasons]
        if tried is None and left:
            # The child could not even begin.
            reasons.update(dict.fromkeys(left, "the process that tries cuDNN's plans could not start"))
            break
        if tried is not None and tried in left:
            log.warning("cuDNN's %s of %s ended its process and is left out", tried, tried.problem)
            reasons[tried] = "it ended the process that tried it"
            left.remove(tried)
    return times, reasons


def _run_child(ways: Sequence[Way], device: int, times: dict[Way, float], reasons: dict[Way, str]) -> Way | None:
    """Try ways in one child; the last one it began, None if none."""
    request = {"device": device, "ways": [{"family": w.family, "problem": to_plain(w.problem), "algorithm": w.algorithm} for w in ways]}
    command = [sys.executable, "-m", "twofour.builder.tactics.screen"]
    begun: Way | None = None
    try:
        done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
        output = done.stdout
    except subprocess.TimeoutExpired as e:
        output = e.stdout.decode() if isinstance(e.stdout, bytes) else (e.stdout or "")
    for line in output.splitlines():
        if not line.startswith("{"):
            continue
        said = json.loads(line)
        way = ways[said["way"]]
        if "us" in said:
            times[way] = said["us"]
        elif "reason" in said:
            reasons[way] = said["reason"]
        else:
            begun = way
    return begun


def main() -> None:
    """The child: run every way of the request."""
    from twofour.builder.tactics.bench import Bench
    from twofour.timing.gpu import Stopwatch

    request = json.load(sys.stdin)
    ways = [Way(r["family"], "cudnn", read_problem(r["family"], r["problem"], "request"), None, r["algorithm"]) for r in request["ways"]]
    bench = Bench(Stopwatch(request["device"]), request["device"])
    last_problem: Any = None
    exhausted = False
    for number, way in enumerate(ways):
        if way.problem != last_problem:
            last_problem, exhausted = way.problem, False
        if exhausted:
            _say({"way": number, "reason": "cuDNN lists no further plan"})
            continue
        _say({"way": number})
        try:
            timed = bench.time([replace(way)])[0]
        except (InputError, MissingExtraError, UnsupportedError) as e:
            _say({"way": number, "reason": str(e)})
            continue
        if timed.figure is None:
            exhausted = "expected number" in timed.reason
            _say({"way": number, "reason": timed.reason})
        else:
            _say({"way": number, "us": timed.figure.median_us})


def _say(what: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
