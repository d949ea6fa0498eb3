"""What a run tells while it runs; the command line shows it, a test or a notebook may listen too."""

from collections.abc import Callable
from dataclasses import dataclass

from twofour.training import Epoch


@dataclass(frozen=True)
class StageStarted:
    """A stage begins; `steps` of it will be reported (epochs of all trainings, say), 0 when it has no steps."""

    stage: str
    steps: int = 0


@dataclass(frozen=True)
class StageFinished:
    """A stage is done; `summary` is the record it made, on one line."""

    stage: str
    seconds: float
    summary: str


@dataclass(frozen=True)
class EpochFinished:
    """One epoch of one training of one seed is done."""

    variant: str
    seed: int
    epoch: Epoch
    epochs: int


Event = StageStarted | StageFinished | EpochFinished
Listener = Callable[[Event], None]
