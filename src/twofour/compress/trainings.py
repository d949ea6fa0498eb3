"""The trainings of one seed: dense, then pruned and retrained, and the control; each goes on from its finished record."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from twofour.compress.events import EpochFinished, EpochsRestored, StepsDone
from twofour.compress.folder import LAST_GOOD
from twofour.compress.records import Pruned, Records
from twofour.compress.settings import Settings
from twofour.compress.stages import Stages
from twofour.errors import TrainingError, UserCodeError
from twofour.pruning import Pruning, prune
from twofour.pruning.batch_norm import settle_norms
from twofour.pruning.methods import METHODS
from twofour.sources import Task, load_weights, resolve_model
from twofour.training import Checkpoint, Epoch, Recipe, Step, calibration_batches, evaluate, train
from twofour.training.state import epochs_done, last_good

CONTROL = "dense + same training"
log = logging.getLogger("twofour.compress")


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


@dataclass(frozen=True)
class Trainings:
    """What the trainings of all seeds share."""

    settings: Settings
    task: Task
    stages: Stages
    records: Records

    def all(self) -> list[SeedRun]:
        """Train dense, prune, retrain and train the control, for every seed."""
        settings = self.settings
        trainings = 3 if settings.weights is None else 2
        runs = []
        with self.stages.stage("train, prune, retrain", settings.seeds * trainings * settings.recipe.epochs) as said:
            for seed in range(settings.seed, settings.seed + settings.seeds):
                runs.append(self.of_seed(seed))
                said += [f"seed {seed}: {record}" for record in (runs[-1].dense, runs[-1].pruning, runs[-1].sparse, runs[-1].control)]
        return runs

    def of_seed(self, seed: int) -> SeedRun:
        """Return the networks of one seed.

        Every step starts from a fresh module filled from the record before it, whether that was just made or read, so that a run that
        was stopped and one that was not take the same path.
        """
        recipe = self.settings.recipe.model_copy(update={"seed": self.settings.recipe.seed + seed})
        if self.settings.weights is None:
            dense = self._checkpoint("dense", "dense", seed, recipe, lambda: self.module(recipe), {})
        else:
            dense = self.records.checkpoint(f"seed{seed}-dense", lambda _: self._given(recipe), lambda _: None)
        pruned = self.records.pruned(f"seed{seed}-pruned", lambda: self._pruned(recipe, dense))
        self.stages.mark()
        teacher = self.module(recipe, dense.state) if recipe.distillation.weight else None
        masks = pruned.pruning.masks
        sparse = self._checkpoint(
            "2:4", "sparse", seed, recipe, lambda: self.module(recipe, pruned.state), masks, teacher, pruning=pruned.pruning
        )
        control = self._checkpoint(CONTROL, "control", seed, recipe, lambda: self.module(recipe, dense.state), {}, teacher)
        return SeedRun(seed, dense, pruned.one_shot, pruned.reestimated, sparse, control, pruned.pruning)

    def module(self, recipe: Recipe, state: dict[str, Tensor] | None = None) -> nn.Module:
        """Return a fresh network, initialised from the recipe's seed or filled with `state`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            model = resolve_model(self.settings.model).make(self.task.num_classes)
        if state is not None:
            model.load_state_dict(state)
        return model.to(self.settings.device)

    def _given(self, recipe: Recipe) -> Checkpoint:
        model = self.module(recipe)
        assert self.settings.weights is not None
        load_weights(model, self.settings.weights)
        return Checkpoint.of(model, self.task.metric.name, evaluate(model, self.task), model=self.settings.model, data=self.settings.data)

    def _pruned(self, recipe: Recipe, dense: Checkpoint) -> Pruned:
        settings, task = self.settings, self.task
        model = self.module(recipe, dense.state).cpu()
        record = prune(
            model,
            task.example_inputs(),
            method=settings.method,
            permute=settings.permute,
            include=settings.include,
            exclude=settings.exclude,
            calibration=calibration_batches(task) if METHODS[settings.method].is_calibrated else None,
            reestimate=False,
        )
        model.to(settings.device)
        one_shot = evaluate(model, task)
        record, again = settle_norms(model, record, lambda: calibration_batches(task), len(task.example_inputs()))
        reestimated = evaluate(model, task) if again else None
        state = Checkpoint.of(model, task.metric.name, one_shot).state
        return Pruned(state, record, one_shot, reestimated)

    def _checkpoint(
        self,
        variant: str,
        stem: str,
        seed: int,
        recipe: Recipe,
        start: Callable[[], nn.Module],
        masks: dict[str, Tensor],
        teacher: nn.Module | None = None,
        pruning: Pruning | None = None,
    ) -> Checkpoint:
        """Return the checkpoint of one training: read, finished, or made."""
        task, stages = self.task, self.stages

        def progress(epoch: Epoch) -> None:
            log.info("seed %d, %s, epoch %d: loss %.4f, %s %.2f", seed, variant, epoch.number, epoch.loss, task.metric.name, epoch.metric)
            stages.tell(EpochFinished(variant, seed, epoch, recipe.epochs))

        def steps(step: Step) -> None:
            stages.tell(StepsDone(variant, seed, step, recipe.epochs))

        def restored(done: int) -> None:
            log.info("seed %d, %s: resumed after epoch %d", seed, variant, done)
            stages.tell(EpochsRestored(variant, seed, done, recipe.epochs))

        def make(state: Path) -> Checkpoint:
            if done := epochs_done(state):
                restored(done)
            try:
                made = train(start(), task, recipe, masks=masks, teacher=teacher, progress=progress, steps=steps, state=state)
            except TrainingError as error:
                raise TrainingError(f"seed {seed}, {variant}: {self._kept(state, error)}") from error
            except UserCodeError as error:
                raise UserCodeError(f"seed {seed}, {variant}, {error}") from error
            finally:
                stages.mark()
            names = {"model": self.settings.model, "data": self.settings.data}
            return Checkpoint(made.state, made.metric_name, made.metric, made.history, made.recipe, **names, pruning=pruning)

        return self.records.checkpoint(f"seed{seed}-{stem}", make, lambda made: restored(len(made.history)))

    def _kept(self, state: Path, error: TrainingError) -> str:
        """Write the last good epoch as a checkpoint of its own and return the error's sentence with its name."""
        sentence = str(error).partition("; the state after epoch")[0]
        if not state.exists():
            return f"{sentence}; no epoch was finished, nothing is kept"
        tensors, history = last_good(state)
        path = self.records.out / LAST_GOOD
        metric = (self.task.metric.name, history[-1].metric)
        Checkpoint(tensors, *metric, tuple(history), model=self.settings.model, data=self.settings.data).save(path)
        return f"{sentence}; the network after epoch {history[-1].number} is kept in {str(path)!r}"
