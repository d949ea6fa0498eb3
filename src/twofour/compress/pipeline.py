"""`compress`: the seven stages in order, and the record of what they found."""

import copy
import datetime
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

from twofour.builder import build
from twofour.compress.assemble import Findings, make_report
from twofour.compress.events import EpochFinished, Event, Listener, StageFinished, StageStarted
from twofour.compress.folder import only_run_in, prepare
from twofour.errors import InputError, VerificationError
from twofour.exchange import Exported, export
from twofour.files import write_text
from twofour.pruning import Pruning, prune, reestimate_batchnorm
from twofour.pruning.apply import is_finite, survey
from twofour.pruning.calibration import tracked_norms
from twofour.pruning.methods import METHODS
from twofour.pruning.methods.method import find_method
from twofour.report import Report, measure
from twofour.report.page import write_page
from twofour.report.record import Agreement, Check
from twofour.runtime import Engine
from twofour.sources import Task, load_weights, resolve_model, resolve_task
from twofour.training import Checkpoint, Epoch, Recipe, calibration_batches, derive_masks, evaluate, load_recipe, predict, train
from twofour.training.recipe import shipped_recipes

BATCHES = (1, 32)
MOST_LOST_POINTS = 0.5
log = logging.getLogger("twofour.compress")


@dataclass(frozen=True)
class Settings:
    """What one `compress` was asked to do; see `compress` for the meaning of each."""

    model: str
    data: str
    out: Path
    weights: Path | None = None
    recipe: Recipe = field(default_factory=Recipe)
    seed: int = 0
    seeds: int = 1
    method: str = "magnitude"
    permute: bool | float = True
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    measure_seconds: float = 2.0
    command: str = ""


@dataclass(frozen=True)
class Compression:
    """The outcome: the report and the folder with all files."""

    report: Report
    out: Path

    def __str__(self) -> str:
        dense, sparse = self.report.accuracy_of("dense"), self.report.accuracy_of("2:4")
        return (
            f"Compression({self.out}: {self.report.metric} {dense.mean:.2f} dense → {sparse.mean:.2f} 2:4, {len(self.report.seeds)} seeds)"
        )


@dataclass(frozen=True)
class SeedRun:
    """The trained networks of one seed."""

    seed: int
    dense: Checkpoint
    one_shot: float
    reestimated: float | None
    sparse: Checkpoint
    control: Checkpoint
    pruning: Pruning


class Stages:
    """Tells the listener and the log when a stage begins and ends, and keeps the seconds."""

    def __init__(self, listener: Listener | None) -> None:
        self._listener = listener
        self.seconds: dict[str, float] = {}

    def tell(self, event: Event) -> None:
        """Pass an event on."""
        if self._listener is not None:
            self._listener(event)

    @contextmanager
    def stage(self, name: str, steps: int = 0) -> Iterator[list[str]]:
        """Time the body; it appends the summaries of the records it made to the list it is given."""
        self.tell(StageStarted(name, steps))
        log.info("%s …", name)
        start = time.perf_counter()
        summaries: list[str] = []
        yield summaries
        self.seconds[name] = time.perf_counter() - start
        for summary in summaries:
            log.info("%s", summary)
        self.tell(StageFinished(name, self.seconds[name], "; ".join(summaries)))


def compress(
    model: str,
    data: str,
    *,
    out: str | Path,
    weights: str | Path | None = None,
    recipe: str | Recipe | None = None,
    epochs: int | None = None,
    seed: int = 0,
    seeds: int = 1,
    method: str = "magnitude",
    permute: bool | float = True,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    measure_seconds: float = 2.0,
    overwrite: bool = False,
    command: str = "",
    listener: Listener | None = None,
) -> Compression:
    """Train or load a dense network, prune it to 2:4, retrain it with the mask held, check, export, build, measure, report.

    Writes into `out`: dense.safetensors, sparse.safetensors, dense.onnx, sparse.onnx, model.plan, report.json, report.html, log.txt.
    Files come from the first seed; the table is over all seeds.

    Args:
        model, data: names as on the command line.
        weights: the dense network's weights; None trains them by the recipe.
        recipe: a Recipe, a shipped recipe's name or a TOML file; None takes the recipe named like the data.
        epochs: replaces the recipe's number of epochs.
        permute: reorder channels before pruning, as in `prune`.
        seed, seeds: the runs use seed, seed + 1, …, seed + seeds − 1.

    Raises:
        InputError: any argument is wrong; nothing has been written then.
    """
    if seeds < 1 or seed < 0:
        raise InputError(f"compress: seed {seed}, seeds {seeds}: expected seed of 0 or more and at least one seed")
    if epochs is not None and epochs < 1:
        raise InputError(f"compress: epochs {epochs}, expected 1 or more")
    if recipe is None:
        if data not in shipped_recipes():
            resolve_task(data)
            raise InputError(
                f"compress: there is no recipe named after data {data!r}; give --recipe, one of {sorted(shipped_recipes())} or a file"
            )
        recipe = data
    chosen = load_recipe(recipe) if isinstance(recipe, str) else recipe
    if epochs is not None:
        chosen = chosen.model_copy(update={"epochs": epochs})
    source, task = resolve_model(model), resolve_task(data)
    _refuse_early(source.make(task.num_classes), task, chosen, weights, method, include, exclude)
    settings = Settings(
        model,
        data,
        prepare(Path(out), overwrite),
        Path(weights) if weights is not None else None,
        chosen,
        seed,
        seeds,
        method,
        permute,
        tuple(include),
        tuple(exclude),
        measure_seconds,
        command,
    )
    with only_run_in(settings.out):
        return _logged(settings, task, Stages(listener))


def _logged(settings: Settings, task: Task, stages: Stages) -> Compression:
    """Run with the package's log going to the folder's log.txt as well."""
    handler = logging.FileHandler(settings.out / "log.txt", mode="w", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("twofour")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        return _run(settings, task, stages)
    except BaseException as error:
        log.error("ended: %s: %s", type(error).__name__, error)
        raise
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        handler.close()


def _refuse_early(
    model: nn.Module,
    task: Task,
    recipe: Recipe,
    weights: str | Path | None,
    method: str,
    include: Sequence[str],
    exclude: Sequence[str],
) -> None:
    """Raise InputError for everything that would fail after the first training; an untrained or the given network serves for it."""
    if recipe.distillation.weight and weights is None:
        raise InputError("compress: the recipe distils from a dense network, expected --weights with that network")
    find_method(method, METHODS)
    if weights is not None:
        load_weights(model, weights)
        if broken := [name for name, value in model.state_dict().items() if value.is_floating_point() and not is_finite(value)]:
            raise InputError(f"compress: weights {str(weights)!r} hold NaN or infinity in {broken[0]!r}; load a sound checkpoint")
        if sparse := derive_masks(model):
            raise InputError(
                f"compress: weights {str(weights)!r} are 2:4 already in {len(sparse)} layers (first: {next(iter(sparse))!r}), "
                "expected the dense network, which is also the control"
            )
    survey(model, task.example_inputs(), include=include, exclude=exclude)


def _run(settings: Settings, task: Task, stages: Stages) -> Compression:
    log.info("%s", settings.command or f"compress {settings.model} --data {settings.data}")
    runs = _train_all(settings, task, stages)
    first = runs[0]
    example = task.example_inputs()
    with stages.stage("check") as said:
        checks = [_check_pattern(run) for run in runs]
        said += [f"{check.name}: {'passed' if check.passed else 'FAILED'}, {check.detail}" for check in checks]
    if failed := [check for check in checks if not check.passed]:
        raise VerificationError(f"compress: {failed[0].name}: {failed[0].detail}; nothing is exported")
    dense, sparse = _module(settings, task, first.dense), _module(settings, task, first.sparse)
    with stages.stage("export") as said:
        first.dense.save(settings.out / "dense.safetensors")
        first.sparse.save(settings.out / "sparse.safetensors")
        exported = {
            "dense": export(dense, example, settings.out / "dense.onnx"),
            "2:4": export(sparse, example, settings.out / "sparse.onnx", pruning=first.pruning),
        }
        said += [str(e) for e in exported.values()]
        checks += [_check_export(variant, e) for variant, e in exported.items()]
    with stages.stage("build") as said:
        plans = {variant: build(e.path) for variant, e in exported.items()}
        plans["2:4"].save(settings.out / "model.plan")
        said.append(str(plans["2:4"]))
    with stages.stage("measure") as said:
        engines = {variant: Engine(plan) for variant, plan in plans.items()}
        agreement = [_agreement("dense", engines["dense"], dense, task), _agreement("2:4", engines["2:4"], sparse, task)]
        checks += [_check_agreement(row) for row in agreement] + _check_accuracy(runs, task)
        measurements = measure({**plans}, batch=BATCHES, seconds=settings.measure_seconds)
        profiles = {variant: engine.profile(*engine.random_inputs(BATCHES[-1])) for variant, engine in engines.items()}
        said += [str(m) for m in measurements]
    with stages.stage("report") as said:
        sizes = {
            variant: [settings.out / f"{stem}{end}" for end in (".safetensors", ".onnx")]
            for variant, stem in (("dense", "dense"), ("2:4", "sparse"))
        }
        sizes["2:4"].append(settings.out / "model.plan")
        report = make_report(
            Findings(
                created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                command=settings.command,
                model=settings.model,
                data=settings.data,
                metric=task.metric,
                recipe=settings.recipe.model_dump(),
                seeds=[run.seed for run in runs],
                accuracy=_accuracy(runs),
                histories=[
                    (variant, run.seed, checkpoint.history)
                    for run in runs
                    for variant, checkpoint in (("dense", run.dense), ("2:4", run.sparse), ("dense + same training", run.control))
                    if checkpoint.history
                ],
                pruning=first.pruning,
                plan=plans["2:4"],
                checks=checks,
                measurements=measurements,
                sizes=sizes,
                profiles=profiles,
                agreement=agreement,
                stage_seconds=stages.seconds,
            )
        )
        write_text(settings.out / "report.json", report.model_dump_json(indent=1) + "\n")
        write_page(report, settings.out / "report.html")
        said.append(str(settings.out / "report.html"))
    return Compression(report, settings.out)


def _accuracy(runs: list[SeedRun]) -> dict[str, list[float]]:
    """Return the metric of every variant, a value a seed."""
    rows = {"dense": [run.dense.metric for run in runs], "2:4 one-shot": [run.one_shot for run in runs]}
    reestimated = [run.reestimated for run in runs if run.reestimated is not None]
    if reestimated:
        rows["2:4 one-shot, batch-norm re-estimated"] = reestimated
    rows["2:4"] = [run.sparse.metric for run in runs]
    rows["dense + same training"] = [run.control.metric for run in runs]
    return rows


def _module(settings: Settings, task: Task, checkpoint: Checkpoint) -> nn.Module:
    model = resolve_model(settings.model).make(task.num_classes)
    model.load_state_dict(checkpoint.state)
    return model.eval()


def _train_all(settings: Settings, task: Task, stages: Stages) -> list[SeedRun]:
    """Train dense, prune, retrain and train the control, for every seed."""
    trainings = 3 if settings.weights is None else 2
    runs = []
    with stages.stage("train, prune, retrain", settings.seeds * trainings * settings.recipe.epochs) as said:
        for seed in range(settings.seed, settings.seed + settings.seeds):
            runs.append(_train_seed(settings, task, stages, seed))
            said += [f"seed {seed}: {record}" for record in (runs[-1].dense, runs[-1].pruning, runs[-1].sparse, runs[-1].control)]
    return runs


def _train_seed(settings: Settings, task: Task, stages: Stages, seed: int) -> SeedRun:
    recipe = settings.recipe.model_copy(update={"seed": settings.recipe.seed + seed})
    names = {"model": settings.model, "data": settings.data}

    def run(variant: str, model: nn.Module, pruning: Pruning | None = None) -> Checkpoint:
        def progress(epoch: Epoch) -> None:
            log.info("seed %d, %s, epoch %d: loss %.4f, %s %.2f", seed, variant, epoch.number, epoch.loss, task.metric.name, epoch.metric)
            stages.tell(EpochFinished(variant, seed, epoch, recipe.epochs))

        masks = {} if pruning is None else pruning.masks
        made = train(model, task, recipe, masks=masks, teacher=teacher, progress=progress)
        return Checkpoint(made.state, made.metric_name, made.metric, made.history, made.recipe, **names, pruning=pruning)

    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        model = resolve_model(settings.model).make(task.num_classes)
    teacher: nn.Module | None = None
    if settings.weights is not None:
        load_weights(model, settings.weights)
        dense = Checkpoint.of(model, task.metric.name, evaluate(model, task), **names)
    else:
        dense = run("dense", model)
    teacher = copy.deepcopy(model) if recipe.distillation.weight else None
    control = copy.deepcopy(model)
    pruning = prune(
        model,
        task.example_inputs(),
        method=settings.method,
        permute=settings.permute,
        include=settings.include,
        exclude=settings.exclude,
        calibration=calibration_batches(task) if METHODS[settings.method].is_calibrated else None,
        reestimate=False,
    )
    one_shot = evaluate(model, task)
    reestimated = None
    if tracked_norms(model):
        reestimate_batchnorm(model, calibration_batches(task))
        reestimated = evaluate(model, task)
    sparse = run("2:4", model, pruning)
    return SeedRun(seed, dense, one_shot, reestimated, sparse, run("dense + same training", control), pruning)


def _check_pattern(run: SeedRun) -> Check:
    """Every pruned weight is exactly +0 where its mask says so, after all training."""
    wrong = 0
    for name, mask in run.pruning.masks.items():
        dropped = run.sparse.state[name][~mask]
        wrong += int((dropped != 0).sum()) + int(torch.signbit(dropped).sum())
    detail = f"{len(run.pruning.masks)} layers, {wrong} of the pruned weights are not +0"
    return Check(name=f"masks held through training, seed {run.seed}", passed=wrong == 0, detail=detail)


def _check_export(variant: str, exported: Exported) -> Check:
    detail = f"largest error {exported.largest_error:.1e}, allowed {exported.tolerance:.1e}"
    if variant == "2:4":
        required = [w for w in exported.inspection.weights if w.required]
        detail += f"; {sum(w.is_24 for w in required)} of {len(required)} pruned layers 2:4 in the file"
    return Check(name=f"ONNX equals the module, {variant}", passed=exported.largest_error <= exported.tolerance, detail=detail)


def _check_agreement(row: Agreement) -> Check:
    """The engine predicts what torch predicts; a tie may fall to either side, so one item in a thousand may differ."""
    detail = f"{row.differing_predictions} of {row.items} predictions differ, largest error {row.largest_error:.1e}"
    passed = row.differing_predictions <= row.items / 1000 and math.isfinite(row.largest_error)
    return Check(name=f"engine predicts what torch predicts, {row.variant}", passed=passed, detail=detail)


def _check_accuracy(runs: list[SeedRun], task: Task) -> list[Check]:
    """2:4 stays within half a point of the control, for a metric in percent."""
    if task.metric.unit != "%":
        return []
    sign = 1 if task.metric.direction == "higher" else -1
    lost = sign * fmean(run.control.metric - run.sparse.metric for run in runs)
    detail = f"{lost:+.2f} points lost against dense with the same training, allowed {MOST_LOST_POINTS}; mean of {len(runs)} seeds"
    return [Check(name="accuracy kept", passed=lost <= MOST_LOST_POINTS, detail=detail.replace("-", "−"))]


def _agreement(variant: str, engine: Engine, model: nn.Module, task: Task) -> Agreement:
    def by_module(inputs: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(inputs)  # type: ignore[no-any-return]

    ours, targets = predict(engine, task)
    theirs, _ = predict(by_module, task)
    return Agreement(
        variant="2:4" if variant == "2:4" else "dense",
        engine_metric=task.metric.function(ours, targets),
        torch_metric=task.metric.function(theirs, targets),
        differing_predictions=int((ours.argmax(1) != theirs.argmax(1)).sum()),
        items=len(targets),
        largest_error=float((ours - theirs).abs().max()),
    )
