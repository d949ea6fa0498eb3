"""Outputs and metric of a model on a task's validation set."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from twofour.pruning.capture import in_eval_mode
from twofour.sources import ArrayDataset, Task


def loader(task: Task, split: str, batch: int, generator: torch.Generator | None = None) -> DataLoader[Any]:
    """Return an iterable of `(inputs, targets)`; with a generator the order is shuffled and a last incomplete batch dropped."""
    dataset: Any = task.train if split == "train" else task.validation
    order = RandomSampler(dataset, generator=generator) if generator is not None else SequentialSampler(dataset)
    drop_last = generator is not None and len(dataset) >= batch
    if isinstance(dataset, ArrayDataset) and task.collate is None:
        return DataLoader(dataset, batch_size=None, sampler=BatchSampler(order, batch, drop_last))
    return DataLoader(dataset, batch_size=batch, sampler=order, drop_last=drop_last, collate_fn=task.collate)


def predict(run: Callable[[Tensor], Tensor], task: Task, batch: int = 256) -> tuple[Tensor, Tensor]:
    """Return `(outputs, targets)` over the validation set, on the CPU, from anything callable on a batch of inputs."""
    outputs, targets = [], []
    for inputs, target in loader(task, "validation", batch):
        outputs.append(run(inputs).cpu())
        targets.append(target)
    return torch.cat(outputs), torch.cat(targets)


def calibration_batches(task: Task, batch: int = 256, most: int = 8) -> Iterator[Tensor]:
    """Give the inputs of the first `most` batches of the training set, in its order, without augmentation or labels."""
    for inputs, _ in islice(loader(task, "train", batch), most):
        yield inputs


def evaluate_loss(model: nn.Module, task: Task, batch: int = 256) -> float:
    """Return the task's loss of `model` in eval mode over the validation set, without label smoothing."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with in_eval_mode(model), torch.inference_mode():
        outputs, targets = predict(lambda inputs: model(inputs.to(device)), task, batch)
        return float(task.loss_of(outputs, targets, 0.0))


def evaluate(model: nn.Module, task: Task, batch: int = 256) -> float:
    """Return the task's metric of `model` in eval mode on the validation set."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with in_eval_mode(model), torch.inference_mode():
        outputs, targets = predict(lambda inputs: model(inputs.to(device)), task, batch)
    return task.metric.function(outputs, targets)
