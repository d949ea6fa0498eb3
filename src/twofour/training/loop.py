"""`train`: one recipe, one model, one task; masks held when the model is 2:4."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from twofour.errors import InputError, TrainingError
from twofour.sources import Task
from twofour.training.augment import augmented
from twofour.training.checkpoint import Checkpoint, Epoch
from twofour.training.evaluate import evaluate, loader
from twofour.training.hold import Hold, derive_masks
from twofour.training.recipe import OptimizerSection, Recipe, ScheduleSection


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
) -> Checkpoint:
    """Train `model` in place by `recipe` and return its checkpoint.

    `masks` (True where kept, by parameter name) are held; None derives those of the weights that are 2:4 now, an empty mapping trains
    every weight. Everything random is drawn from `recipe.seed`, so on a CPU
    a run repeats bit for bit. `progress` is called after each epoch; `teacher` is asked for by `recipe.distillation`.

    Raises:
        TrainingError: the loss is not finite.
        InputError: distillation without a teacher, a model without trainable parameters, no data.
    """
    if recipe.distillation.weight and teacher is None:
        raise InputError("the recipe asks for distillation, expected a teacher; pass teacher=")
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make_optimizer(model, recipe.optimizer)
    masks = derive_masks(model) if masks is None else masks
    held = Hold(model, optimizer, masks) if masks else None
    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.cpu_threads or threads)
    try:
        history = _epochs(model, data, recipe, optimizer, teacher, progress)
        if held is not None:
            held.check()
    finally:
        torch.set_num_threads(threads)
        if held is not None:
            held.remove()
        if recipe.channels_last:
            model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return Checkpoint.of(model, data.metric.name, history[-1].metric, history=tuple(history), recipe=recipe.model_dump())


def _epochs(
    model: nn.Module,
    data: Task,
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    teacher: nn.Module | None,
    progress: Callable[[Epoch], None] | None,
) -> list[Epoch]:
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(recipe.seed)
    if not len(data.train):  # type: ignore[arg-type]
        raise InputError(f"data {data.name!r} has no training items, expected at least one")
    batches = loader(data, "train", recipe.batch, generator)
    num_steps = recipe.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(recipe.schedule, min(step, num_steps) / num_steps))
    if teacher is not None:
        teacher.eval()
    history: list[Epoch] = []
    # Dropout and the like draw from torch's global generator: seeded here, given back after.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(recipe.seed)
        for number in range(1, recipe.epochs + 1):
            start = time.perf_counter()
            model.train()
            total = torch.zeros((), dtype=torch.float64)
            for inputs, targets in batches:
                loss = _step(model, data, recipe, optimizer, teacher, _moved(inputs, device), _moved(targets, device), generator)
                schedule.step()
                total += loss.double().cpu()
            mean_loss = float(total) / len(batches)
            if not math.isfinite(mean_loss):
                raise TrainingError(f"training: the loss of epoch {number} is {mean_loss}, expected a finite value; lower the recipe's lr")
            metric = evaluate(model, data)
            epoch = Epoch(number, mean_loss, metric, float(schedule.get_last_lr()[0]), time.perf_counter() - start)
            history.append(epoch)
            if progress is not None:
                progress(epoch)
    model.eval()
    return history


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _step(
    model: nn.Module,
    data: Task,
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    teacher: nn.Module | None,
    inputs: Tensor,
    targets: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """One optimizer step; returns the detached loss."""
    inputs = augmented(inputs, recipe.augmentation, generator)
    outputs = model(inputs)
    loss = data.loss_of(outputs, targets, recipe.label_smoothing)
    if recipe.distillation.weight and teacher is not None:
        with torch.no_grad():
            guide = teacher(inputs)
        weight = recipe.distillation.weight
        loss = (1 - weight) * loss + weight * distillation_loss(outputs, guide, recipe.distillation.temperature)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.detach()
