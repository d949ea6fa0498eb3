"""`compress`: the seven stages in order, and the record of what they found."""

import datetime
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from twofour.compress.assemble import Findings, make_report
from twofour.compress.checks import agreement_of, check_accuracy, check_agreement, check_export, check_pattern
from twofour.compress.engines import CPU_BATCHES, Built, Target, build_engines, target_of
from twofour.compress.events import Listener
from twofour.compress.folder import OUTPUTS, Standing, clear, only_run_in, prepare
from twofour.compress.records import Records
from twofour.compress.settings import Settings
from twofour.compress.stages import Stages
from twofour.compress.trainings import CONTROL, SeedRun, Trainings
from twofour.errors import InputError, TwofourError, UserCodeError, VerificationError, nearest
from twofour.exchange import Exported, export, inspect, refuse_unexportable
from twofour.files import write_text
from twofour.plan import Plan
from twofour.pruning.apply import is_finite, survey
from twofour.pruning.methods import METHODS
from twofour.pruning.methods.method import find_method
from twofour.report import Measurement, Report, measure
from twofour.report.page import write_page
from twofour.report.record import Agreement
from twofour.runtime import Engine
from twofour.sources import Task, load_weights, resolve_model, resolve_task
from twofour.sources.models import MODELS
from twofour.training import Recipe, derive_masks, load_recipe
from twofour.training.augment import refuse_unaugmentable
from twofour.training.recipe import shipped_recipes

log = logging.getLogger("twofour.compress")


@dataclass(frozen=True)
class Compression:
    """The outcome: the report and the folder with all files."""

    report: Report
    out: Path

    @property
    def failed_checks(self) -> list[str]:
        """Names of the checks that failed; empty when all passed."""
        return [check.name for check in self.report.checks if not check.passed]

    def __str__(self) -> str:
        dense, sparse = self.report.accuracy_of("dense"), self.report.accuracy_of("2:4")
        seeds = f"{len(self.report.seeds)} seed{'s' if len(self.report.seeds) > 1 else ''}"
        return f"Compression({self.out}: {self.report.metric} {dense.mean:.2f} dense → {sparse.mean:.2f} 2:4, {seeds})"


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
    device: str = "cpu",
    workers: int | None = None,
    skip_bad: bool = False,
    measure_seconds: float = 2.0,
    overwrite: bool = False,
    resume: bool = False,
    command: str = "",
    listener: Listener | None = None,
) -> Compression:
    """Train or load a dense network, prune it to 2:4, retrain it with the mask held, check, export, build, measure, report.

    Writes into `out`: dense.safetensors, sparse.safetensors, dense.onnx, sparse.onnx, model.plan, report.json, report.html, run.json,
    log.txt. Files come from the first seed; the table is over all seeds. While it runs, the folder `state` holds what is needed to go on.

    Args:
        model, data: names as on the command line.
        weights: the dense network's weights; None trains them by the recipe.
        recipe: a Recipe, a shipped recipe's name or a TOML file; None takes the recipe named like the data.
        epochs: replaces the recipe's number of epochs.
        permute: reorder channels before pruning, as in `prune`.
        seed, seeds: the runs use seed, seed + 1, …, seed + seeds − 1.
        device: where the trainings run and what the engines are for: `cpu`, `cuda`, `cuda:N`, or `auto`: a GPU where torch sees one.
            Where the GPU cannot run the engine (no Hopper, libraries missing) the engines are the CPU's, and the report says why.
        workers: processes that load data; None leaves it to the data.
        skip_bad: leave out images that cannot be read, and say how many, instead of refusing them.
        resume: go on from the last complete epoch or stage of the run in `out`; on a CPU the weights are those of a run that was never
            stopped, bit for bit. Without such a run a new one starts; a finished one is only read.

    Raises:
        InputError: any argument is wrong; nothing has been written then.
        TrainingError: the loss is not finite; the last good epoch is kept as last-good.safetensors.
        VerificationError: a check failed before export.
    """
    if seeds < 1 or seed < 0:
        raise InputError(f"compress: seed {seed}, seeds {seeds}: expected seed of 0 or more and at least one seed")
    if epochs is not None and epochs < 1:
        raise InputError(f"compress: epochs {epochs}, expected 1 or more")
    if overwrite and resume:
        raise InputError("compress: both overwrite and resume were asked for, expected one of them")
    chosen = _recipe(recipe, data)
    if epochs is not None:
        chosen = chosen.model_copy(update={"epochs": epochs})
    settings = Settings(
        model,
        data,
        Path(out),
        Path(weights) if weights is not None else None,
        chosen,
        seed,
        seeds,
        method,
        permute,
        tuple(include),
        tuple(exclude),
        refuse_absent_device(found_device(device)),
        measure_seconds,
        command,
    )
    resolve_model(model)
    task = resolve_task(data, workers=workers, skip_bad=skip_bad)
    arguments = settings.arguments(task)
    if not (resume and (settings.out / "run.json").exists()):
        _refuse_early(settings, task)
    standing = prepare(settings.out, arguments, overwrite=overwrite, resume=resume)
    with only_run_in(settings.out):
        if standing == "new":
            clear(settings.out)
        records = Records(settings.out)
        if standing == "finished":
            records.verify()
            records.drop()
            return Compression(Report.load(settings.out / "report.json"), settings.out)
        with _logged(settings, standing):
            records.begin(arguments)
            try:
                return _run(settings, task, Stages(listener, records.path("seconds.json")), records)
            except TwofourError:
                # Nothing half-written: what cannot be gone on from is taken away, the log apart.
                if not records.hold_progress:
                    clear(settings.out)
                raise


def found_device(device: str) -> str:
    """Return what `auto` stands for here, the first GPU if torch sees one, else the CPU; any other device as it is."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def refuse_absent_device(device: str) -> str:
    """Return `device` if torch can train on it here.

    Raises:
        InputError: it is unknown or absent.
    """
    kind, _, index = device.partition(":")
    if device != "cpu" and (kind != "cuda" or device == "cuda:" or (index and not index.isdigit())):
        raise InputError(f"device {device!r} is unknown, expected cpu, cuda or cuda:N{nearest(device, ['cpu', 'cuda'])}")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {device!r} is not here: torch sees {torch.cuda.device_count()} GPUs; use cpu, or install torch for CUDA")
    return device


def _recipe(recipe: str | Recipe | None, data: str) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if recipe is None and data not in shipped_recipes():
        resolve_task(data)
        raise InputError(
            f"compress: there is no recipe named after data {data!r}; give --recipe, one of {sorted(shipped_recipes())} or a file"
        )
    return load_recipe(data if recipe is None else recipe)


class _LogFile(logging.FileHandler):
    """A log that cannot be written ends the run with one sentence, as any other file does."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Raise what writing the record raised."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            raise InputError(f"file {self.baseFilename!r} cannot be written: {error.strerror}") from error
        super().handleError(record)


@contextmanager
def _logged(settings: Settings, standing: Standing) -> Iterator[None]:
    """Run the body with the package's log going to the folder's log.txt as well."""
    handler = _LogFile(settings.out / "log.txt", mode="a" if standing == "unfinished" else "w", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("twofour")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    except BaseException as error:
        with suppress(InputError):
            # An error of our own says it all; of anybody else's code the place is needed.
            foreign = isinstance(error, UserCodeError) or not isinstance(error, (TwofourError, KeyboardInterrupt))
            log.error("ended: %s: %s", type(error).__name__, error, exc_info=foreign)
        raise
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        with suppress(OSError):
            handler.close()


def _refuse_early(settings: Settings, task: Task) -> None:
    """Raise for everything that would fail after the first training; an untrained or the given network serves for it."""
    recipe, weights, method = settings.recipe, settings.weights, settings.method
    if recipe.distillation.weight and weights is None:
        raise InputError("compress: the recipe distils from a dense network, expected --weights with that network")
    find_method(method, METHODS)
    refuse_unaugmentable(task, recipe.augmentation)
    source = resolve_model(settings.model)
    model = source.make(task.num_classes)
    if weights is not None:
        load_weights(model, weights, spec=settings.model)
        if broken := [name for name, value in model.state_dict().items() if value.is_floating_point() and not is_finite(value)]:
            raise InputError(f"compress: weights {str(weights)!r} hold NaN or infinity in {broken[0]!r}; load a sound checkpoint")
        if sparse := derive_masks(model):
            raise InputError(
                f"compress: weights {str(weights)!r} are 2:4 already in {len(sparse)} layers (first: {next(iter(sparse))!r}), "
                "expected the dense network, which is also the control"
            )
    task.refuse_unfit(model)
    survey(model, task.example_inputs(), include=settings.include, exclude=settings.exclude)
    # The package's own networks are exported by its tests.
    if settings.model not in MODELS:
        refuse_unexportable(model, task.example_inputs())


def _run(settings: Settings, task: Task, stages: Stages, records: Records) -> Compression:
    log.info("%s", settings.command or f"compress {settings.model} --data {settings.data}")
    trainings = Trainings(settings, task, stages, records)
    runs = trainings.all()
    first = runs[0]
    with stages.stage("check") as said:
        checks = [check_pattern(run) for run in runs]
        said += [f"{check.name}: {'passed' if check.passed else 'FAILED'}, {check.detail}" for check in checks]
    if failed := [check for check in checks if not check.passed]:
        raise VerificationError(f"compress: {failed[0].name}: {failed[0].detail}; nothing is exported")
    modules = {
        variant: trainings.module(settings.recipe, checkpoint.state).cpu().eval()
        for variant, checkpoint in (("dense", first.dense), ("2:4", first.sparse))
    }
    with stages.stage("export") as said:
        exported = _exported(settings, task, first, modules, records)
        said += [str(e) for e in exported.values()]
        checks += [check_export(variant, e) for variant, e in exported.items()]
    with stages.stage("build") as said:
        built = _built(settings, exported, records)
        said += [built.target.why_cpu] if built.target.why_cpu else []
        said.append(str(built.plans["2:4"]))
    with stages.stage("measure") as said:
        found = _measured(settings, task, built, modules, records)
        agreement = [Agreement(**row) for row in found["agreement"]]
        measurements = [Measurement(**row) for row in found["measurements"]]
        checks += [check_agreement(row) for row in agreement] + check_accuracy(runs, task)
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
                    for variant, checkpoint in (("dense", run.dense), ("2:4", run.sparse), (CONTROL, run.control))
                    if checkpoint.history
                ],
                pruning=first.pruning,
                built=built,
                checks=checks,
                measurements=measurements,
                sizes=sizes,
                profiles={variant: [(n, o, us) for n, o, us in rows] for variant, rows in found["profiles"].items()},
                agreement=agreement,
                notes=task.notes,
                stage_seconds=stages.seconds,
            )
        )
        write_text(settings.out / "report.json", report.model_dump_json(indent=1) + "\n")
        said.append(str(settings.out / "report.html"))
    records.seal(OUTPUTS[:-1])
    write_page(report, settings.out / "report.html")
    records.drop()
    return Compression(report, settings.out)


def _exported(settings: Settings, task: Task, first: SeedRun, modules: dict[str, nn.Module], records: Records) -> dict[str, Exported]:
    """Write checkpoints and ONNX files, or find them written."""
    stems = {"dense": "dense", "2:4": "sparse"}
    paths = {variant: settings.out / f"{stem}.onnx" for variant, stem in stems.items()}
    found = records.read("export")
    if found is not None:
        return {variant: Exported(str(path), found[variant][0], found[variant][1], inspect(path)) for variant, path in paths.items()}
    checkpoints = {"dense": first.dense, "2:4": first.sparse}
    example = task.example_inputs()
    exported = {}
    for variant, path in paths.items():
        checkpoints[variant].save(path.with_suffix(".safetensors"))
        exported[variant] = export(modules[variant], example, path, pruning=first.pruning if variant == "2:4" else None)
    records.write(
        "export",
        {variant: (e.largest_error, e.tolerance) for variant, e in exported.items()},
        *(file for path in paths.values() for file in (path, path.with_suffix(".safetensors"))),
    )
    return exported


def _built(settings: Settings, exported: dict[str, Exported], records: Records) -> Built:
    """Build the plans, or find them built."""
    files = {"dense": records.path("dense.plan"), "2:4": settings.out / "model.plan"}
    if (target := records.read("build")) is not None:
        return Built({variant: Plan.load(file) for variant, file in files.items()}, Target.from_json(target))
    onnx = {variant: Path(e.path) for variant, e in exported.items()}
    built = build_engines(target_of(settings.device), onnx, records.path("timing-cache.json"), _layer_told)
    for variant, plan in built.plans.items():
        plan.save(files[variant])
    records.write("build", asdict(built.target), *files.values())
    return built


def _layer_told(done: int, total: int, layer: str) -> None:
    log.info("timing layer %d of %d: %s", done + 1, total, layer)


def _measured(settings: Settings, task: Task, built: Built, modules: dict[str, nn.Module], records: Records) -> Any:
    """Measure the engines and compare them with torch, or find that done; plain JSON values."""
    found = records.read("measure")
    if found is None:
        target = built.target
        reference = "cpu" if target.device == "cpu" else settings.device
        engines = {variant: Engine(plan, device=target.number) for variant, plan in built.plans.items()}
        measured = measure({**built.plans}, batch=target.batches, seconds=settings.measure_seconds, device=target.number)
        found = {
            "agreement": [
                agreement_of(variant, engine, modules[variant], task, device=reference).model_dump() for variant, engine in engines.items()
            ],
            "measurements": [m.to_json() for m in measured],
            "profiles": {variant: engine.profile(*engine.random_inputs(CPU_BATCHES[-1])) for variant, engine in engines.items()},
        }
        records.write("measure", found)
    return found


def _accuracy(runs: list[SeedRun]) -> dict[str, list[float]]:
    """Return the metric of every variant, a value a seed."""
    rows = {"dense": [run.dense.metric for run in runs], "2:4 one-shot": [run.one_shot for run in runs]}
    reestimated = [run.reestimated for run in runs if run.reestimated is not None]
    if reestimated:
        rows["2:4 one-shot, batch-norm re-estimated"] = reestimated
    rows["2:4"] = [run.sparse.metric for run in runs]
    rows[CONTROL] = [run.control.metric for run in runs]
    return rows
