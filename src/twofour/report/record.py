"""The report as data: `report.json`. The page and the tables are made from it and from nothing else.

All times are milliseconds, all sizes bytes, all shares in 0…1; metrics are in the unit the metric has.
"""

import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from twofour.errors import InputError

SCHEMA = 1


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class AccuracyRow(_Row):
    """One variant's metric, a value a seed."""

    variant: Literal["dense", "2:4 one-shot", "2:4 one-shot, batch-norm re-estimated", "2:4", "dense + same training"]
    """Which network: dense, just pruned, retrained with the mask held, or the control: same training, no pruning."""
    values: list[float]
    """The metric on the validation set, one a seed, in the order of `seeds`."""

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
    """Counted from 1 within its training."""
    loss: float
    """Mean training loss."""
    metric: float
    """The metric on the validation set after the epoch."""
    lr: float
    """Learning rate at the end of the epoch."""
    seconds: float
    """Wall time."""


class TrainingRow(_Row):
    """One training's curve."""

    variant: Literal["dense", "2:4", "dense + same training"]
    """Which training."""
    seed: int
    """Its seed."""
    epochs: list[EpochRow]
    """In order."""


class LayerRow(_Row):
    """One weight: what was decided and why."""

    name: str
    """The parameter's name in the model."""
    kind: str
    """Class of the module that holds it."""
    shape: list[int]
    """`[out, in, *kernel]`."""
    parameters: int
    """Number of elements."""
    flops: int | None
    """Multiply-adds × 2 for one item; null where the model did not run the layer."""
    eligible: bool
    """Whether it was pruned to 2:4."""
    reason: str
    """Why it was left dense; empty when pruned."""
    kept_magnitude: float | None
    """Σ|w kept| / Σ|w|, in 0…1; null where nothing was pruned."""
    permuted: str
    """Whether its input channels were reordered first, or why not."""


class Check(_Row):
    """Something that was verified before anything was called sparse."""

    name: str
    """What was verified."""
    passed: bool
    """The outcome."""
    detail: str
    """The numbers it rests on."""


class SpeedRow(_Row):
    """Speed of one engine at one batch size: `n` samples, the engines in turn.

    On a CPU the samples are calls, and spread = (p90 − p10) / median. On a GPU the percentiles are of single calls; `n`, `spread`
    (interquartile range over median), `pass_ms` and `items_per_s` are of passes back to back once the power limit has settled the clock.
    """

    variant: Literal["dense", "2:4"]
    """Which engine."""
    backend: str
    """What ran it."""
    batch: int
    """Items a call."""
    n: int
    """Samples, dense and 2:4 in turn."""
    median_ms: float
    """Median latency of a call."""
    p50_ms: float
    """50th percentile."""
    p90_ms: float
    """90th percentile."""
    p99_ms: float
    """99th percentile."""
    spread: float
    """(p90 − p10) / median."""
    items_per_s: float
    """Batch / median; on a GPU batch / `pass_ms`."""
    pass_ms: float | None = None
    """GPU time of a pass from device memory to device memory, the clock settled; null on a CPU."""
    burst_ms: float | None = None
    """GPU time of a pass at full clock; null on a CPU."""
    joules_per_item: float | None = None
    """Energy over a window of at least 5 s; null on a CPU, or where the reading cannot be trusted."""
    clock_mhz: float | None = None
    """The GPU's clock during the passes; null on a CPU."""
    power_w: float | None = None
    """The GPU's power during the passes; null on a CPU."""


class SizeRow(_Row):
    """A file of the output folder."""

    file: str
    """Name within the output folder."""
    variant: Literal["dense", "2:4"]
    """Which network it holds."""
    bytes: int
    """Size on disk."""


class MemoryRow(_Row):
    """Memory of one engine at one batch size.

    Of a CPU engine the peak resident memory a process gains by loading and running it; of a GPU engine the device memory it takes.
    """

    variant: Literal["dense", "2:4"]
    """Which engine."""
    batch: int
    """Items a call."""
    peak_bytes: int
    """Peak resident memory gained, or weights, activations and workspace on the GPU."""


class ProfileRow(_Row):
    """Where an engine's time goes, by operation."""

    variant: Literal["dense", "2:4"]
    """Which engine."""
    node: str
    """The graph node."""
    operation: str
    """Its operation."""
    share: float
    """Of the engine's time, in 0…1."""
    microseconds: float
    """In one run."""


class Agreement(_Row):
    """The engine against the torch module on the validation set."""

    variant: Literal["dense", "2:4"]
    """Which engine."""
    engine_metric: float
    """The metric from the engine's outputs."""
    torch_metric: float
    """The metric from the module's outputs."""
    differing_predictions: int
    """Items whose predicted class differs."""
    items: int
    """Validation items compared."""
    largest_error: float
    """Largest absolute difference of an output."""
    precision: str = "fp32"
    """The engine's precision; torch's outputs are in float32."""
    tolerance: float | None = None
    """What `largest_error` may be: 8 × the largest error of torch's own run by autocast to the engine's precision, plus 8 ulp of the
    largest output; null for fp32 engines, whose predictions are compared instead."""


class BuildRow(_Row):
    """The build report of a GPU engine at one batch size: what was tried for every layer and why it runs as it does."""

    variant: Literal["dense", "2:4"]
    """Which engine."""
    batch: int
    """Items a call."""
    record: dict[str, object]
    """The builder's record, as `twofour build` keeps it in the plan."""


class Environment(_Row):
    """Where the numbers were taken."""

    python: str
    """Version of Python."""
    platform: str
    """Operating system and machine."""
    cpu: str
    """The processor's name."""
    cores: int
    """Cores this process may use."""
    memory_bytes: int
    """Main memory."""
    gpu: str | None
    """The GPU's name; null without one."""
    libraries: dict[str, str]
    """Name → version."""


class Report(_Row):
    """Everything one `compress` found."""

    schema_version: int = SCHEMA
    """Version of this schema."""
    twofour: str
    """Version of the package that wrote it."""
    created: str
    """ISO 8601 time."""
    command: str
    """The exact command that made the run."""
    model: str
    """As named on the command line."""
    data: str
    """As named on the command line."""
    metric: str
    """What the accuracy rows measure."""
    metric_direction: Literal["higher", "lower"]
    """Whether higher or lower is better."""
    metric_unit: str = ""
    """Unit of the metric, `%` for a percentage; empty without one."""
    seeds: list[int]
    """One run each; files come from the first."""
    recipe: dict[str, object]
    """The training recipe with every default filled in."""
    method: str
    """How the weights to prune were chosen."""
    backend: str
    """What ran the engines."""
    sparse_kernels: bool
    """Whether the 2:4 engine runs kernels that use the 2:4 pattern."""
    statement: str
    """What may be concluded from the speed, size and memory rows."""
    environment: Environment
    """Where it ran."""
    accuracy: list[AccuracyRow]
    """One row a variant."""
    training: list[TrainingRow]
    """One row a variant and seed."""
    layers: list[LayerRow]
    """One row a weight, in the model's order."""
    checks: list[Check]
    """What was verified."""
    speed: list[SpeedRow]
    """One row a variant and batch."""
    memory: list[MemoryRow]
    """One row a variant and batch."""
    sizes: list[SizeRow]
    """One row a file."""
    profile: list[ProfileRow]
    """One row a variant and graph node."""
    builds: list[BuildRow] = []
    """One row a batch size of a GPU engine; empty for CPU engines."""
    agreement: list[Agreement]
    """One row a variant."""
    notes: list[str]
    """Whatever else the reader should know."""
    stage_seconds: dict[str, float]
    """Stage → wall time, in order."""

    def accuracy_of(self, variant: str) -> AccuracyRow:
        """Return the row of `variant`."""
        return next(row for row in self.accuracy if row.variant == variant)

    @classmethod
    def load(cls, path: str | Path) -> "Report":
        """Return the report in a `report.json`.

        Raises:
            InputError: missing, unreadable, not JSON, of another schema, or a field is wrong.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"report {str(path)!r} does not exist; name the folder of a finished run, one that was stopped needs --resume")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(
                f"report {str(path)!r} cannot be read: {error.strerror}; mend its permissions or run compress again"
            ) from error
        try:
            schema = json.loads(data).get("schema_version")
        except (ValueError, AttributeError, RecursionError) as error:
            raise InputError(f"report {str(path)!r} is damaged: it holds no JSON object ({error}); run compress again") from error
        if schema != SCHEMA:
            raise InputError(f"report {str(path)!r} has schema {schema}, this version reads {SCHEMA}; run compress again")
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise InputError(f"report {str(path)!r} is damaged: {where}: {first['msg'].lower()}; run compress again") from error
