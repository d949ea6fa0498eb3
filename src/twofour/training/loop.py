"""`train`: one recipe, one model, one task; masks held when the model is 2:4."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from twofour.errors import InputError, TrainingError, UserCodeError
from twofour.sources import Task
from twofour.sources.user_code import user_code
from twofour.training.augment import augmented, refuse_unaugmentable
from twofour.training.checkpoint import Checkpoint, Epoch
from twofour.training.evaluate import batches_of, evaluate, forward, loader
from twofour.training.hold import Hold, derive_masks
from twofour.training.recipe import OptimizerSection, Recipe, ScheduleSection
from twofour.training.state import Training, seeded

# How often a training tells where it is within an epoch, and how many steps may pass before its loss is looked at.
SECONDS_BETWEEN_STEPS = 0.25
STEPS_BETWEEN_LOOKS = 50


@dataclass(frozen=True)
class Step:
    """Where a training is within an epoch: items seen of all, items a second since the epoch began."""

    epoch: int
    items: int
    of_items: int
    items_per_s: float


def make_optimizer(model: nn.Module, settings: OptimizerSection) -> torch.optim.Optimizer:
    """Return the recipe's optimizer; biases and norm parameters (one axis) take no weight decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise InputError("the model has no parameter that requires a gradient, expected at least one")
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.nesterov)
    if settings.name == "adam":
        return torch.optim.Adam(groups, lr=settings.lr)
    return torch.optim.AdamW(groups, lr=settings.lr)


def lr_factor(settings: ScheduleSection, progress: float) -> float:
    """Return the learning rate over its peak at `progress` in [0, 1).

    `warmup` rises linearly (cosine for onecycle); then cosine: (1 + cos πt) / 2; step: gamma^(milestones passed); onecycle: cosine to 0.
    """
    if progress < settings.warmup:
        share = progress / settings.warmup
        return (1 - math.cos(math.pi * share)) / 2 * 0.96 + 0.04 if settings.name == "onecycle" else max(share, 1e-3)
    t = (progress - settings.warmup) / (1 - settings.warmup)
    if settings.name in ("cosine", "onecycle"):
        return (1 + math.cos(math.pi * t)) / 2
    if settings.name == "step":
        return settings.gamma ** sum(progress >= m for m in settings.milestones)
    return 1.0


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T² · KL(teacher/T ‖ student/T), the mean over the batch; both are logits `[items, classes]`."""
    log_p = torch.log_softmax(student / temperature, dim=1)
    q = torch.log_softmax(teacher / temperature, dim=1)
    return temperature**2 * torch.nn.functional.kl_div(log_p, q, reduction="batchmean", log_target=True)


def train(
    model: nn.Module,
    data: Task,
    recipe: Recipe,
    *,
    masks: Mapping[str, Tensor] | None = None,
    teacher: nn.Module | None = None,
    progress: Callable[[Epoch], None] | None = None,
    steps: Callable[[Step], None] | None = None,
    state: str | Path | None = None,
) -> Checkpoint:
    """Train `model` in place by `recipe` and return its checkpoint.

    `masks` (True where kept, by parameter name) are held; None derives those of the weights that are 2:4 now, an empty mapping trains
    every weight. Everything random is drawn from `recipe.seed`, so on a CPU a run repeats bit for bit. `teacher` is asked for by
    `recipe.distillation`.

    Args:
        progress: called after each epoch of this call.
        steps: called a few times a second with the place within the epoch.
        state: file that takes everything needed to go on, after every epoch; if it exists, the training goes on from it and ends with
            the weights of one that was never stopped. It is left for the caller to remove.

    Raises:
        TrainingError: the loss is not finite; `state` then holds the last epoch whose loss was.
        InputError: distillation without a teacher, a model without trainable parameters, no data, a label without an output, a state of
            another training.
    """
    if recipe.distillation.weight and teacher is None:
        raise InputError("the recipe asks for distillation, expected a teacher; pass teacher=")
    if not len(data.train):  # type: ignore[arg-type]
        raise InputError(f"data {data.name!r} has no training items, expected at least one")
    refuse_unaugmentable(data, recipe.augmentation)
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make_optimizer(model, recipe.optimizer)
    masks = derive_masks(model) if masks is None else masks
    average = _average(model, recipe.average) if recipe.average else None
    held = Hold(model, optimizer, masks, ema=() if average is None else average) if masks else None
    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.cpu_threads or threads)
    try:
        run = _Run(model, data, recipe, optimizer, masks, teacher, average, Path(state) if state is not None else None)
        history = run.epochs(progress, steps)
        if held is not None:
            held.check()
        if average is not None:
            model.load_state_dict(average.module.state_dict())
    finally:
        torch.set_num_threads(threads)
        if held is not None:
            held.remove()
        if recipe.channels_last:
            model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return Checkpoint.of(model, data.metric.name, history[-1].metric, history=tuple(history), recipe=recipe.model_dump())


def _average(model: nn.Module, decay: float) -> AveragedModel:
    """Return a copy of `model` that follows it: average ← decay · average + (1 − decay) · weight, batch-norm statistics included."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)  # type: ignore[no-untyped-call]


class _Run:
    """The epochs of one training."""

    def __init__(
        self,
        model: nn.Module,
        data: Task,
        recipe: Recipe,
        optimizer: torch.optim.Optimizer,
        masks: Mapping[str, Tensor],
        teacher: nn.Module | None,
        average: AveragedModel | None,
        state: Path | None,
    ) -> None:
        self.model, self.data, self.recipe, self.optimizer, self.state = model, data, recipe, optimizer, state
        self.teacher = teacher.eval() if teacher is not None else None
        self.average = average
        self.device = next(model.parameters()).device
        self.order = torch.Generator().manual_seed(recipe.seed)
        self.batches = loader(data, "train", recipe.batch, self.order)
        num_steps = recipe.epochs * len(self.batches)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_factor(recipe.schedule, min(step, num_steps) / num_steps)
        )
        plan = {"recipe": recipe.model_dump(), "items": len(data.train)}  # type: ignore[arg-type]
        self.training = Training(model, optimizer, self.schedule, self.order, masks, plan, average)

    def epochs(self, progress: Callable[[Epoch], None] | None, steps: Callable[[Step], None] | None) -> list[Epoch]:
        """Train what is left of the recipe; return every epoch, those before an interruption included."""
        history: list[Epoch] = []
        # Dropout, workers and the data sets of users draw from the global generators: seeded here, given back after.
        with seeded(self.recipe.seed, self.device):
            if self.state is not None and self.state.exists():
                history = self.training.load(self.state)
            for number in range(len(history) + 1, self.recipe.epochs + 1):
                start = time.perf_counter()
                try:
                    loss = self._epoch(number, steps)
                    metric = evaluate(self.average.module if self.average is not None else self.model, self.data)
                except UserCodeError as error:
                    raise UserCodeError(f"epoch {number}: {error}") from error
                epoch = Epoch(number, loss, metric, float(self.schedule.get_last_lr()[0]), time.perf_counter() - start)
                history.append(epoch)
                if self.state is not None:
                    self.training.save(self.state, history)
                if progress is not None:
                    progress(epoch)
        self.model.eval()
        return history

    def _epoch(self, number: int, steps: Callable[[Step], None] | None) -> float:
        """One pass over the training data; returns the mean loss."""
        self.model.train()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        start = told = time.perf_counter()
        items, of_items = 0, len(self.data.train)  # type: ignore[arg-type]
        for index, (inputs, targets) in enumerate(batches_of(self.batches), 1):
            total += self._step(inputs, targets).double()
            items += len(inputs[0])
            if index % STEPS_BETWEEN_LOOKS == 0:
                self._refuse_infinite(number, float(total) / index)
            now = time.perf_counter()
            if steps is not None and now - told >= SECONDS_BETWEEN_STEPS:
                told = now
                steps(Step(number, items, of_items, items / (now - start)))
        loss = float(total) / len(self.batches)
        self._refuse_infinite(number, loss)
        return loss

    def _refuse_infinite(self, number: int, loss: float) -> None:
        if not math.isfinite(loss):
            kept = f"; the state after epoch {number - 1} is kept in {str(self.state)!r}" if self.state is not None and number > 1 else ""
            raise TrainingError(
                f"training: the loss of epoch {number} is {loss}, expected a finite value; lower the recipe's lr, or "
                f"mend inputs that are not finite{kept}"
            )

    def _step(self, inputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        """One optimizer step; returns the detached loss."""
        recipe = self.recipe
        inputs = tuple(x.to(self.device) for x in inputs)
        if recipe.augmentation.is_on:
            inputs = (augmented(inputs[0], recipe.augmentation, self.order), *inputs[1:])
        outputs = forward(self.model, inputs, self.device)
        self.data.refuse_labels(outputs, targets)
        loss = self.data.loss_of(outputs, targets.to(self.device), recipe.label_smoothing)
        if self.teacher is not None and recipe.distillation.weight:
            with torch.no_grad():
                guide = forward(self.teacher, inputs, self.device)
            weight = recipe.distillation.weight
            loss = (1 - weight) * loss + weight * distillation_loss(outputs, guide, recipe.distillation.temperature)
        self.optimizer.zero_grad(set_to_none=True)
        with user_code("the backward pass"):
            loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return loss.detach()
