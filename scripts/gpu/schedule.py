"""Which part begins when, on which cores and GPUs: rules without a clock, so that a run and its prediction follow the same ones.

1. A core belongs to one part at a time. A part takes the GPUs that the fewest parts use.
2. A quiet part has its GPUs to itself, and no other kind of work is on any GPU meanwhile; work that uses no GPU goes on, on its own cores.
3. Parts begin in their order. One that waits for a GPU lets others of its kind pass, and those without a GPU; one that uses a GPU and waits
   for cores lets none pass, or small ones would keep it waiting.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from parts import Part


@dataclass(frozen=True)
class Place:
    """Where a part runs."""

    cores: tuple[int, ...]
    gpus: tuple[int, ...]


@dataclass
class Schedule:
    """Parts that wait and parts that run.

    Attributes:
        cores, gpus: of the machine, as they may be used.
    """

    waiting: list[Part]
    cores: Sequence[int]
    gpus: Sequence[int]
    running: dict[Part, Place] = field(default_factory=dict)

    def next(self, left_s: float) -> tuple[Part, Place] | None:
        """Return the part that begins now and where, counted as running; None where one has to end first or none fits what is left."""
        kinds: set[bool] = set()
        fitting = [part for part in self.waiting if self.why_never(part) is None and part.needed_s <= left_s]
        for part in fitting:
            if any(other.name in part.after for other in (*fitting, *self.running)):
                continue
            if part.gpus and (not part.quiet) in kinds:
                continue
            gpus = self._gpus_for(part)
            if gpus is None:
                kinds.add(part.quiet)
                continue
            cores = self._cores_for(part)
            if cores is None:
                if part.gpus:
                    return None
                continue
            self.waiting.remove(part)
            self.running[part] = Place(cores, gpus)
            return part, self.running[part]
        return None

    def why_never(self, part: Part) -> str | None:
        """Return why this machine cannot run a part."""
        return f"it needs {part.gpus} GPUs" if part.gpus > len(self.gpus) else None

    def ended(self, part: Part) -> None:
        """Take back what a part had."""
        del self.running[part]

    def _gpus_for(self, part: Part) -> tuple[int, ...] | None:
        others = [other for other in self.running if other.gpus]
        if part.gpus and any(other.quiet != part.quiet for other in others):
            return None
        use = {gpu: sum(gpu in place.gpus for place in self.running.values()) for gpu in self.gpus}
        if part.quiet:
            use = {gpu: count for gpu, count in use.items() if not count}
        best = sorted(use, key=lambda gpu: use[gpu])[: part.gpus]
        return tuple(sorted(best)) if len(best) == part.gpus else None

    def _cores_for(self, part: Part) -> tuple[int, ...] | None:
        taken = {core for place in self.running.values() for core in place.cores}
        free = [core for core in self.cores if core not in taken]
        wanted = min(part.cores, len(self.cores))
        return tuple(free[:wanted]) if len(free) >= wanted else None


def predicted(parts: Sequence[Part], cores: int, gpus: int, seconds: float) -> list[tuple[float, float, Part, Place]]:
    """Return (begin, end, part, place) of each part that begins, in s, if each takes what is expected of it."""
    schedule, now = Schedule(list(parts), range(cores), range(gpus)), 0.0
    found: list[tuple[float, float, Part, Place]] = []
    ends: dict[Part, float] = {}
    while True:
        while (begun := schedule.next(seconds - now)) is not None:
            part, place = begun
            ends[part] = min(now + part.seconds, seconds)
            found.append((now, ends[part], part, place))
        if not ends:
            return found
        first = min(ends, key=lambda part: ends[part])
        now = ends.pop(first)
        schedule.ended(first)
