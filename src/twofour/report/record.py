"""The report as data: `report.json`. The page and the tables are made from it and from nothing else.

All times are milliseconds, all sizes bytes, all shares in 0…1; metrics are in the unit the metric has.
"""

from pathlib import Path
from statistics import fmean, stdev
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from twofour.errors import InputError

SCHEMA = 1


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AccuracyRow(_Row):
    """One variant's metric, a value a seed."""

    variant: Literal["dense", "2:4 one-shot", "2:4", "dense + same training"]
    values: list[float]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return fmean(self.values)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds; 0 for one seed."""
        return stdev(self.values) if len(self.values) > 1 else 0.0


class EpochRow(_Row):
    """One epoch of a training."""

    number: int
    loss: float
    metric: float
    lr: float
    seconds: float


class TrainingRow(_Row):
    """One training's curve."""

    variant: Literal["dense", "2:4", "dense + same training"]
    seed: int
    epochs: list[EpochRow]


class LayerRow(_Row):
    """One weight: what was decided and why."""

    name: str
    kind: str
    shape: list[int]
    parameters: int
    flops: int | None
    eligible: bool
    reason: str
    kept_magnitude: float | None
    permuted: str


class Check(_Row):
    """Something that was verified before anything was called sparse."""

    name: str
    passed: bool
    detail: str


class SpeedRow(_Row):
    """Latency of one engine at one batch size: `n` interleaved samples, spread = (p90 − p10) / median."""

    variant: Literal["dense", "2:4"]
    backend: str
    batch: int
    n: int
    median_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    spread: float
    items_per_s: float


class SizeRow(_Row):
    """A file of the output folder."""

    file: str
    variant: Literal["dense", "2:4"]
    bytes: int


class MemoryRow(_Row):
    """Peak resident memory a process gains by loading an engine and running it, at one batch size."""

    variant: Literal["dense", "2:4"]
    batch: int
    peak_bytes: int


class ProfileRow(_Row):
    """Where an engine's time goes, by operation."""

    variant: Literal["dense", "2:4"]
    node: str
    operation: str
    share: float
    microseconds: float


class Agreement(_Row):
    """The engine against the torch module on the validation set."""

    variant: Literal["dense", "2:4"]
    engine_metric: float
    torch_metric: float
    differing_predictions: int
    items: int
    largest_error: float


class Environment(_Row):
    """Where the numbers were taken."""

    python: str
    platform: str
    cpu: str
    cores: int
    memory_bytes: int
    gpu: str | None
    libraries: dict[str, str]


class Report(_Row):
    """Everything one `compress` found."""

    schema_version: int = SCHEMA
    twofour: str
    created: str
    command: str
    model: str
    data: str
    metric: str
    metric_direction: Literal["higher", "lower"]
    metric_unit: str = ""
    seeds: list[int]
    recipe: dict[str, object]
    method: str
    backend: str
    sparse_kernels: bool
    statement: str
    environment: Environment
    accuracy: list[AccuracyRow]
    training: list[TrainingRow]
    layers: list[LayerRow]
    checks: list[Check]
    speed: list[SpeedRow]
    memory: list[MemoryRow]
    sizes: list[SizeRow]
    profile: list[ProfileRow]
    agreement: list[Agreement]
    notes: list[str]
    stage_seconds: dict[str, float]

    def accuracy_of(self, variant: str) -> AccuracyRow:
        """Return the row of `variant`."""
        return next(row for row in self.accuracy if row.variant == variant)

    @classmethod
    def load(cls, path: str | Path) -> "Report":
        """Return the report in a `report.json`.

        Raises:
            InputError: missing, not JSON, of another schema, or a field is wrong.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"report {str(path)!r} does not exist")
        try:
            report = cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise InputError(f"report {str(path)!r} is damaged or of another version: {where}: {first['msg'].lower()}") from error
        if report.schema_version != SCHEMA:
            raise InputError(f"report {str(path)!r} has schema {report.schema_version}, this version reads {SCHEMA}; run compress again")
        return report
