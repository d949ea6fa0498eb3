"""The fastest way for every layer of an engine, timed on this GPU and remembered."""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from twofour.builder.lower import LayerCall
from twofour.builder.tactics.bench import Bench, Timed
from twofour.builder.tactics.untrusted import Outcome, Trial, try_plans
from twofour.builder.tactics.versions import installed
from twofour.builder.tactics.ways import LIBRARIES, Way, trials_of, tried_ways, ways_of, weight_for
from twofour.errors import InputError, TwofourError, UnsupportedError
from twofour.files import write_text
from twofour.jit.cache import fill_cache
from twofour.jit.driver import num_sms
from twofour.kernels import families
from twofour.kernels.launchable import kernel_source, sources_digests
from twofour.kernels.records import to_plain

log = logging.getLogger(__name__)
CACHE_SCHEMA = 2
PACKAGES = ("nvmath-python", "nvidia-cublas", "nvidia-cusparselt-cu13", "nvidia-cudnn-frontend", "nvidia-cudnn-cu13")
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Chosen:
    """How a layer is computed: the fastest way, every timed way's median microseconds, and why others were left out.

    Attributes:
        spread: of the fastest, interquartile range over median.
    """

    way: Way
    times_us: dict[str, float]
    left_out: dict[str, str] = field(default_factory=dict)
    spread: float = 0.0

    @property
    def us(self) -> float:
        """Microseconds of the chosen way."""
        return self.times_us[str(self.way)]


def _plain(way: Way) -> dict[str, Any]:
    return {
        "after": None if way.after is None else _plain(way.after),
        "family": way.family,
        "library": way.library,
        "problem": to_plain(way.problem),
        "config": to_plain(way.config),
        "algorithm": way.algorithm,
    }


def _read_way(data: Any) -> Way:
    problem = families.read_problem(data["family"], data["problem"], "timing cache")
    config = families.read_config(data["family"], data["config"], "timing cache")
    reason = families.why_not(data["family"], data["library"], problem, config)
    if reason is not None:
        raise InputError(reason)
    after = None if data["after"] is None else _read_way(data["after"])
    return Way(data["family"], data["library"], problem, config, None if data["algorithm"] is None else int(data["algorithm"]), after)


def _read_outcome(data: Any) -> Outcome:
    times = {int(plan): float(us) for plan, us in data["times_us"].items()}
    left_out = {int(plan): str(why) for plan, why in data["left_out"].items()}
    return Outcome(times, left_out, None if data["reason"] is None else str(data["reason"]))


def key_of(call: LayerCall, sparsity: str, libraries: Sequence[str]) -> str:
    """Return what decides a choice on one machine, as a digest."""
    sparse = call.is_24 and sparsity != "off"
    text = json.dumps([call.family, to_plain(call.problem), sparse, sorted(libraries)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Remembered:
    """Choices kept in a JSON file; those of another GPU, driver, library version or kernel source do not count."""

    def __init__(self, path: Path | None, machine: dict[str, Any]) -> None:
        """Read the file, if there is one.

        Raises:
            InputError: it is no timing cache.
        """
        self.path, self.entries = path, {}
        self.trials: dict[str, Outcome] = {}
        self.head: dict[str, Any] = {"schema": CACHE_SCHEMA, "kind": "timing cache", "machine": machine}
        if path is None or not path.exists():
            return
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored.pop("kind") != "timing cache":
                raise ValueError("its kind is another")
            entries, trials = stored.pop("entries"), stored.pop("trials")
            if stored == {k: v for k, v in json.loads(json.dumps(self.head)).items() if k != "kind"}:
                self.entries = dict(entries)
                self.trials = {str(key): _read_outcome(data) for key, data in trials.items()}
            else:
                log.warning("timing cache %s was made on another machine or by other versions and is measured anew", path)
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
            raise InputError(f"timing cache {str(path)!r} cannot be read ({e}), expected one that twofour build wrote; move it away") from e

    def get(self, key: str) -> Chosen | None:
        """Return a remembered choice; a damaged one counts as none."""
        entry = self.entries.get(key)
        if entry is None:
            return None
        try:
            way = _read_way(entry["way"])
            times = {str(name): float(us) for name, us in entry["times_us"].items()}
            return Chosen(way, times, dict(entry["left_out"]), float(entry["spread"])) if str(way) in times else None
        except (InputError, KeyError, TypeError, ValueError, AttributeError) as e:
            log.warning("a choice in the timing cache is damaged (%s) and is measured anew", e)
            return None

    def put(self, key: str, chosen: Chosen) -> None:
        """Remember a choice."""
        made = {"way": _plain(chosen.way), "times_us": chosen.times_us, "left_out": chosen.left_out, "spread": chosen.spread}
        self.entries[key] = made

    def save(self) -> None:
        """Write the file aside and rename it, with what other processes have put there meanwhile."""
        if self.path is not None:
            theirs = Remembered(self.path, self.head["machine"])
            self.entries, self.trials = theirs.entries | self.entries, theirs.trials | self.trials
            trials = {key: asdict(outcome) for key, outcome in self.trials.items()}
            write_text(self.path, json.dumps({**self.head, "entries": self.entries, "trials": trials}, indent=1) + "\n")


def versions() -> dict[str, str]:
    """Return the versions of the libraries whose choices are remembered."""
    return installed(PACKAGES)


def choose_all(
    calls: Sequence[LayerCall],
    *,
    sparsity: str = "auto",
    tactics: str = "all",
    cache: Path | None = None,
    device: int = 0,
    progress: Progress | None = None,
    bench: Bench | None = None,
) -> list[Chosen]:
    """Return the fastest way for every call; calls that ask for the same are timed once.

    Args:
        sparsity: `off` leaves 2:4 ways out. tactics: `all`, or `ours` for our kernels only.
        cache: a file of earlier choices, extended. progress: called with layers done, layers, and the layer's name.

    Raises:
        UnsupportedError: a layer cannot be computed here; all such layers are named. InputError: the cache is no timing cache.
    """
    from twofour.timing.gpu import Stopwatch

    bench = bench or Bench(Stopwatch(device), device)
    libraries = LIBRARIES[tactics]
    machine = bench.watch.meter.machine() | {"versions": versions(), "sources": sources_digests()}
    remembered = Remembered(cache, machine)
    wanted: dict[str, LayerCall] = {}
    for call in calls:
        if call.family != "fallback":
            wanted.setdefault(key_of(call, sparsity, libraries), call)
    known = {key: found for key in wanted if (found := remembered.get(key)) is not None}
    todo = {key: call for key, call in wanted.items() if key not in known}
    sms = num_sms(device)
    listed = {key: ways_of(call, sparsity=sparsity, libraries=libraries, sms=sms) for key, call in todo.items()}
    each = [step for ways, _ in listed.values() for way in ways for step in (way, way.after) if step is not None]
    with _phase("compiling kernels"):
        fill_cache(kernel_source(step.family, step.problem, step.config, sms) for step in each if step.library == families.OURS)
    with _phase("trying the libraries' plans"):
        tried = _tried(todo, sparsity, libraries, device, remembered)
    remembered.save()
    refused: dict[str, str] = {}
    with _phase(f"timing {len(todo)} layers"):
        for number, (key, call) in enumerate(todo.items()):
            if progress is not None:
                progress(number, len(todo), call.name)
            ways, left = listed[key]
            for trial, outcome in tried[key][0]:
                ways += tried_ways(trial, outcome, left)
            left |= tried[key][1]
            found = _fastest(bench, call, ways, left)
            if found is None:
                refused[call.name] = _why_none(left)
                continue
            known[key] = found
            remembered.put(key, found)
            remembered.save()
    if refused:
        raise UnsupportedError(
            f"build: {len(refused)} layer{'s' if len(refused) != 1 else ''} cannot be computed with tactics {tactics!r}: "
            + ", ".join(f"{name} ({why})" for name, why in list(refused.items())[:5])
        )
    return [known[key_of(call, sparsity, libraries)] for call in calls if call.family != "fallback"]


def _why_none(left: dict[str, str]) -> str:
    """Return why a layer has no way: a reason a library, whose plans often fail alike."""
    reasons: dict[str, str] = {}
    for name, reason in left.items():
        if name != "2:4":
            reasons.setdefault(name.split()[0], reason)
    return "; ".join(dict.fromkeys(reasons.values())) or "no tactic covers it"


@contextmanager
def _phase(name: str) -> Iterator[None]:
    log.info("build: %s …", name)
    start = time.perf_counter()
    yield
    log.info("build: %s took %.1f s", name, time.perf_counter() - start)


def _tried(
    todo: dict[str, LayerCall], sparsity: str, libraries: Sequence[str], device: int, remembered: Remembered
) -> dict[str, tuple[list[tuple[Trial, Outcome]], dict[str, str]]]:
    """What came of trying what libraries offer in processes of their own, by the calls' keys, and why libraries are left out.

    Calls that differ in their weights share a trial.
    """
    asked = {key: trials_of(call, sparsity=sparsity, libraries=libraries) for key, call in todo.items()}
    new = {name: t for trials, _ in asked.values() for t in trials if (name := _trial_key(t)) not in remembered.trials}
    failed = Outcome()
    try:
        remembered.trials |= dict(zip(new, try_plans(list(new.values()), device) if new else [], strict=True))
    except TwofourError as e:
        failed = Outcome(reason=str(e))
    return {key: ([(t, remembered.trials.get(_trial_key(t)) or failed) for t in trials], left) for key, (trials, left) in asked.items()}


def _trial_key(trial: Trial) -> str:
    text = json.dumps([trial.library, trial.family, to_plain(trial.problem), trial.form, trial.most], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _fastest(bench: Bench, call: LayerCall, ways: Sequence[Way], left: dict[str, str]) -> Chosen | None:
    """The fastest stable way; without a stable one the fastest."""
    timed = bench.time(ways, (lambda way: weight_for(call, way)) if call.weight is not None else None)
    ran: list[Timed] = [t for t in timed if t.figure is not None]
    left |= {str(t.way): t.reason for t in timed if t.figure is None}
    if not ran:
        return None
    stable = [t for t in ran if t.figure is not None and t.figure.is_stable] or ran
    best = min(stable, key=lambda t: t.figure.median_us if t.figure is not None else 0.0)
    assert best.figure is not None
    times = {str(t.way): t.figure.median_us for t in ran if t.figure is not None}
    return Chosen(best.way, times, left, best.figure.spread)
