"""What a run tells while it runs; the command line shows it, a test or a notebook may listen too."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from twofour.training import Epoch, Step


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


@dataclass(frozen=True)
class EpochsRestored:
    """A training was found done, or done up to this epoch, by the run that is resumed."""

    variant: str
    seed: int
    done: int
    epochs: int


@dataclass(frozen=True)
class StepsDone:
    """Where a training is within an epoch."""

    variant: str
    seed: int
    step: Step
    epochs: int


Event = StageStarted | StageFinished | EpochFinished | EpochsRestored | StepsDone
Listener = Callable[[Event], None]
NAMES: dict[type[Any], str] = {
    StageStarted: "stage_started",
    StageFinished: "stage_finished",
    EpochFinished: "epoch_finished",
    EpochsRestored: "epochs_restored",
    StepsDone: "steps_done",
}


def to_json(event: Event) -> dict[str, Any]:
    """Return an event as plain JSON values, its kind under `event`."""
    return {"event": NAMES[type(event)], **asdict(event)}
