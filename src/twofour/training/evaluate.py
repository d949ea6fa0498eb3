"""Outputs and metric of a model on a task's validation set."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from twofour.errors import InputError
from twofour.pruning.capture import in_eval_mode
from twofour.sources import ArrayDataset, Inputs, Task, inputs_of
from twofour.sources.user_code import user_code


def loader(task: Task, split: str, batch: int, generator: torch.Generator | None = None) -> DataLoader[Any]:
    """Return an iterable of `(inputs, targets)`; with a generator the order is shuffled and a last incomplete batch dropped."""
    dataset: Any = task.train if split == "train" else task.validation
    order = RandomSampler(dataset, generator=generator) if generator is not None else SequentialSampler(dataset)
    drop_last = generator is not None and len(dataset) >= batch
    if isinstance(dataset, ArrayDataset) and task.collate is None:
        return DataLoader(dataset, batch_size=None, sampler=BatchSampler(order, batch, drop_last))
    # NOTE: workers are started anew for every pass, so that whatever they draw follows from the state of the main process alone.
    return DataLoader(dataset, batch_size=batch, sampler=order, drop_last=drop_last, collate_fn=task.collate, num_workers=task.workers)


def batches_of(batches: Iterable[Any]) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """Give `(inputs, targets)` of every batch; whatever the data raise becomes one sentence.

    Raises:
        InputError: a batch is not `(inputs, targets)`, an item cannot be read, or a worker process ended.
    """
    iterator = iter(batches)
    while True:
        try:
            inputs, targets = next(iterator)
        except StopIteration:
            return
        except InputError as error:
            # A worker's error arrives as text, with the traceback of its process before the sentence.
            raise InputError(str(error).rpartition(f"{InputError.__name__}: ")[2].strip()) from error
        except (Exception, SystemExit) as error:
            lines = [line for line in str(error).splitlines() if line.strip()] or [""]
            told = lines[-1] if "Traceback" in str(error) else f"{type(error).__name__}: {lines[0]}"
            raise InputError(f"data: a batch cannot be loaded: {told.strip()}; mend the data set or its collate") from error
        yield inputs_of(inputs), targets


def predict(run: Callable[..., Tensor], task: Task, batch: int = 256) -> tuple[Tensor, Tensor]:
    """Return `(outputs, targets)` over the validation set, on the CPU, from anything callable on a batch's inputs.

    Raises:
        InputError: an item cannot be loaded, or holds NaN that comes out as NaN.
    """
    outputs, targets = [], []
    done = 0
    for inputs, target in batches_of(loader(task, "validation", batch)):
        outputs.append(run(*inputs).cpu())
        task.refuse_infinite(inputs, outputs[-1], "validation", done)
        targets.append(target)
        done += len(inputs[0])
    return torch.cat(outputs), torch.cat(targets)


def calibration_batches(task: Task, batch: int = 256, most: int = 8) -> Iterator[Inputs]:
    """Give the inputs of the first `most` batches of the training set, in its order, without augmentation or labels."""
    for inputs, _ in islice(batches_of(loader(task, "train", batch)), most):
        yield inputs if len(inputs) > 1 else inputs[0]


def forward(model: nn.Module, inputs: Iterable[Tensor], device: torch.device) -> Tensor:
    """Return the model's outputs for a batch's inputs, on `device`.

    Raises:
        UserCodeError: the model raised.
    """
    arguments = [x.to(device) for x in inputs]
    with user_code("the model's forward"):
        outputs: Tensor = model(*arguments)
    return outputs


def evaluate_loss(model: nn.Module, task: Task, batch: int = 256) -> float:
    """Return the task's loss of `model` in eval mode over the validation set, without label smoothing."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with in_eval_mode(model), torch.inference_mode():
        outputs, targets = predict(lambda *inputs: forward(model, inputs, device), task, batch)
        return float(task.loss_of(outputs, targets, 0.0))


def evaluate(model: nn.Module, task: Task, batch: int = 256) -> float:
    """Return the task's metric of `model` in eval mode on the validation set."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with in_eval_mode(model), torch.inference_mode():
        outputs, targets = predict(lambda *inputs: forward(model, inputs, device), task, batch)
    task.refuse_labels(outputs, targets, "validation")
    return task.metric_of(outputs, targets)
