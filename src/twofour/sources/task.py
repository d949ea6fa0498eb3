"""A task: data to train and validate on, the loss that is minimised, the metric that is reported."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset


@dataclass(frozen=True)
class Metric:
    """A number in percent or in its own unit, computed from all outputs and targets of the validation set."""

    name: str
    function: Callable[[Tensor, Tensor], float]
    direction: Literal["higher", "lower"] = "higher"
    unit: str = ""

    def is_better(self, a: float, b: float) -> bool:
        """Whether `a` is strictly better than `b`."""
        return a > b if self.direction == "higher" else a < b


def top1_percent(outputs: Tensor, targets: Tensor) -> float:
    """Return the share of rows whose largest output is the target class, in percent; `outputs` `[items, classes]`, `targets` `[items]`."""
    return 100.0 * float((outputs.argmax(dim=1) == targets).double().mean())


ACCURACY = Metric("accuracy", top1_percent, unit="%")


class ArrayDataset(Dataset[tuple[Tensor, Tensor]]):
    """A data set held in memory; an index may be a list, so a batch costs one gather instead of one call an item."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        if len(inputs) != len(targets):
            raise ValueError(f"inputs hold {len(inputs)} items, targets {len(targets)}")
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int | Sequence[int]) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]


@dataclass(frozen=True)
class Task:
    """Everything a training needs to know about the data.

    `loss(outputs, targets, label_smoothing)` returns a scalar; `collate` turns a list of items into `(inputs, targets)`
    (None: the default of torch, or whole-batch indexing for an `ArrayDataset`).
    """

    name: str
    train: Dataset[Any]
    validation: Dataset[Any]
    num_classes: int
    metric: Metric = ACCURACY
    loss: Callable[[Tensor, Tensor, float], Tensor] | None = None
    collate: Callable[[list[Any]], tuple[Tensor, Tensor]] | None = None

    def loss_of(self, outputs: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
        """Return the scalar loss: the task's own, or cross entropy."""
        if self.loss is not None:
            return self.loss(outputs, targets, label_smoothing)
        return torch.nn.functional.cross_entropy(outputs, targets, label_smoothing=label_smoothing)

    def example_inputs(self, batch: int = 2) -> tuple[Tensor, ...]:
        """Return one batch of validation inputs, as the model takes them."""
        items = [self.validation[i] for i in range(batch)]
        inputs, _ = self.collate(items) if self.collate else torch.utils.data.default_collate(items)
        return (inputs,)
