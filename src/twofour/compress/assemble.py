"""What a run found → its Report."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twofour.compress.engines import Built
from twofour.pruning import Pruning
from twofour.report.environment import environment
from twofour.report.measure import Measurement
from twofour.report.record import (
    AccuracyRow,
    Agreement,
    BuildRow,
    Check,
    EpochRow,
    LayerRow,
    MemoryRow,
    ProfileRow,
    Report,
    SizeRow,
    SpeedRow,
    TrainingRow,
)
from twofour.sources import Metric
from twofour.training import Epoch
from twofour.version import __version__


@dataclass(frozen=True)
class Findings:
    """Everything the stages of one run hand over. `profiles` holds (node, operation, microseconds) rows by variant."""

    created: str
    command: str
    model: str
    data: str
    metric: Metric
    recipe: dict[str, Any]
    seeds: list[int]
    accuracy: dict[str, list[float]]
    histories: Sequence[tuple[str, int, tuple[Epoch, ...]]]
    pruning: Pruning
    built: Built
    checks: list[Check]
    measurements: list[Measurement]
    sizes: dict[str, list[Path]]
    profiles: dict[str, list[tuple[str, str, float]]]
    agreement: list[Agreement]
    notes: Sequence[str]
    stage_seconds: dict[str, float]


def statement_of(built: Built) -> str:
    """Return the sentences that say what sparsity can and cannot gain with these engines."""
    plan = built.plans["2:4"]
    if plan.backend == "cuda":
        where = f"This engine ran on {plan.about['machine']['gpu']} in {plan.precision}"
        if plan.about["sparse_kernels"]:
            return f"{where}, with sparse kernels where they were faster."
        return f"{where}, without sparse kernels: {plan.about['why_no_sparse_kernels']}. Any difference between the two columns is noise."
    why = f"{built.target.why_cpu}. " if built.target.why_cpu else ""
    return (
        f"{why}This engine ran on the CPU. {plan.about['why_no_sparse_kernels']}. "
        "Any difference in speed between the two columns is noise; the gain needs a GPU with Sparse Tensor Cores."
    )


def build_rows(built: Built) -> list[BuildRow]:
    """Return the build reports that the plans carry."""
    return [
        BuildRow(variant="2:4" if variant == "2:4" else "dense", batch=record["batch"], record=record)
        for variant, plan in built.plans.items()
        for record in plan.about.get("builds", ())
    ]


def layer_rows(pruning: Pruning) -> list[LayerRow]:
    """Return the per-layer table of a pruning."""
    return [
        LayerRow(
            name=layer.name.removesuffix(".weight"),
            kind=layer.kind,
            shape=list(layer.shape),
            parameters=layer.num_weights,
            flops=layer.flops,
            eligible=layer.eligible,
            reason=layer.reason,
            kept_magnitude=layer.kept_magnitude,
            permuted=layer.permuted,
        )
        for layer in pruning.layers
    ]


def profile_rows(profiles: dict[str, list[tuple[str, str, float]]]) -> list[ProfileRow]:
    """Return where the time goes, slowest first within each variant; shares are of the variant's total."""
    rows = []
    for variant, events in profiles.items():
        total = sum(microseconds for _, _, microseconds in events) or 1.0
        for node, operation, microseconds in events:
            share = microseconds / total
            rows.append(
                ProfileRow(
                    variant="2:4" if variant == "2:4" else "dense", node=node, operation=operation, share=share, microseconds=microseconds
                )
            )
    return rows


def make_report(found: Findings) -> Report:
    """Return the Report of a run."""
    plan = found.built.plans["2:4"]
    speed, memory = [], []
    for m in found.measurements:
        values = m.to_json()
        peak = values.pop("peak_bytes")
        variant = values.pop("name")
        speed.append(SpeedRow(variant=variant, **values))
        if peak is not None:
            memory.append(MemoryRow(variant=variant, batch=m.batch, peak_bytes=peak))
    return Report(
        twofour=__version__,
        created=found.created,
        command=found.command,
        model=found.model,
        data=found.data,
        metric=found.metric.name,
        metric_unit=found.metric.unit,
        metric_direction=found.metric.direction,
        seeds=found.seeds,
        recipe=found.recipe,
        method=found.pruning.method,
        backend=plan.backend,
        sparse_kernels=bool(plan.about.get("sparse_kernels")),
        statement=statement_of(found.built),
        environment=environment(),
        accuracy=[AccuracyRow.model_validate({"variant": variant, "values": values}) for variant, values in found.accuracy.items()],
        training=[
            TrainingRow.model_validate({"variant": variant, "seed": seed, "epochs": [EpochRow(**epoch.__dict__) for epoch in history]})
            for variant, seed, history in found.histories
        ],
        layers=layer_rows(found.pruning),
        checks=found.checks,
        speed=speed,
        memory=memory,
        sizes=[
            SizeRow.model_validate({"file": path.name, "variant": variant, "bytes": path.stat().st_size})
            for variant, paths in found.sizes.items()
            for path in paths
        ],
        profile=profile_rows(found.profiles),
        builds=build_rows(found.built),
        agreement=found.agreement,
        notes=[*found.notes, *found.pruning.notes],
        stage_seconds=found.stage_seconds,
    )
