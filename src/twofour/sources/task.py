"""A task: data to train and validate on, the loss that is minimised, the metric that is reported."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from twofour.errors import InputError, UserCodeError
from twofour.sources.user_code import place_of, user_code

# What one batch holds for the model: its only input, or one tensor an argument of its `forward`, in order.
Inputs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Metric:
    """A number in percent or in its own unit, computed from all outputs and targets of the validation set."""

    name: str
    function: Callable[[Tensor, Tensor], float]
    direction: Literal["higher", "lower"] = "higher"
    unit: str = ""

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise InputError(
                f"metric {self.name!r}: function is {type(self.function).__name__}, expected function(outputs, targets) -> float"
            )
        if self.direction not in ("higher", "lower"):
            raise InputError(f"metric {self.name!r}: direction is {self.direction!r}, expected 'higher' or 'lower'")

    def is_better(self, a: float, b: float) -> bool:
        """Whether `a` is strictly better than `b`."""
        return a > b if self.direction == "higher" else a < b


def top1_percent(outputs: Tensor, targets: Tensor) -> float:
    """Return the share of rows whose largest output is the target class, in percent; `outputs` `[items, classes]`, `targets` `[items]`."""
    return 100.0 * float((outputs.argmax(dim=1) == targets).double().mean())


ACCURACY = Metric("accuracy", top1_percent, unit="%")


def inputs_of(value: Any) -> tuple[Tensor, ...]:
    """Return the model's positional inputs in one batch: a tensor, or a tuple or list of tensors.

    Raises:
        InputError: it is something else.
    """
    inputs = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if not inputs or not all(isinstance(x, Tensor) for x in inputs):
        kinds = sorted({type(x).__name__ for x in inputs})
        raise InputError(
            f"task: a batch's inputs are {kinds or 'empty'}, expected a tensor or a tuple of tensors in the order of the model's forward; "
            "let collate return that"
        )
    return inputs


class ArrayDataset(Dataset[tuple[Inputs, Tensor]]):
    """A data set held in memory; an index may be a list, so a batch costs one gather instead of one call an item.

    `inputs` is `[items, …]`, or a tuple of such tensors for a model of several inputs.
    """

    def __init__(self, inputs: Inputs, targets: Tensor) -> None:
        lengths = {len(x) for x in inputs_of(inputs)}
        if lengths != {len(targets)}:
            raise ValueError(f"inputs hold {sorted(lengths)} items, targets {len(targets)}")
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int | Sequence[int]) -> tuple[Inputs, Tensor]:
        if isinstance(self.inputs, Tensor):
            return self.inputs[index], self.targets[index]
        return tuple(x[index] for x in self.inputs), self.targets[index]


def _is_dataset(value: object) -> bool:
    return hasattr(value, "__getitem__") and hasattr(value, "__len__")


@dataclass(frozen=True)
class Task:
    """Everything a training needs to know about the data.

    Attributes:
        loss: `loss(outputs, targets, label_smoothing)` returns a scalar; None is cross entropy of `[items, classes]` outputs.
        collate: turns a list of items into `(inputs, targets)`; None is torch's default, or whole-batch indexing for an `ArrayDataset`.
            Inputs are a tensor, or a tuple of tensors for a model that takes several.
        workers: processes that load items; 0 loads in the training's own.
        notes: what the report should say about the data.
    """

    name: str
    train: Dataset[Any]
    validation: Dataset[Any]
    num_classes: int
    metric: Metric = ACCURACY
    loss: Callable[[Tensor, Tensor, float], Tensor] | None = None
    collate: Callable[[list[Any]], tuple[Inputs, Tensor]] | None = None
    workers: int = 0
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field, is_right, expected in (
            ("train", _is_dataset(self.train), "a data set with __getitem__ and __len__"),
            ("validation", _is_dataset(self.validation), "a data set with __getitem__ and __len__"),
            ("num_classes", isinstance(self.num_classes, int) and self.num_classes > 0, "a whole number of 1 or more"),
            ("metric", isinstance(self.metric, Metric), "a twofour.sources.Metric"),
            ("loss", self.loss is None or callable(self.loss), "a function (outputs, targets, label_smoothing) or None"),
            ("collate", self.collate is None or callable(self.collate), "a function of a list of items or None"),
        ):
            if not is_right:
                value = getattr(self, field)
                shown = repr(value) if isinstance(value, (str, int, float)) else type(value).__name__
                raise InputError(f"task {self.name!r}: {field} is {shown}, expected {expected}")

    @property
    def is_classification(self) -> bool:
        """Whether the outputs are one score a class: the loss is cross entropy."""
        return self.loss is None

    def loss_of(self, outputs: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
        """Return the scalar loss: the task's own, or cross entropy."""
        if self.loss is not None:
            with user_code(f"the loss of data {self.name!r}"):
                loss = self.loss(outputs, targets, label_smoothing)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                kind = f"a tensor {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise UserCodeError(f"the loss of data {self.name!r} returned {kind}, expected a tensor of one element, differentiable")
            return loss
        return torch.nn.functional.cross_entropy(outputs, targets, label_smoothing=label_smoothing)

    def metric_of(self, outputs: Tensor, targets: Tensor) -> float:
        """Return the metric of all outputs and targets.

        Raises:
            UserCodeError: its function raised, or returned no finite number.
        """
        with user_code(f"the metric {self.metric.name!r} of data {self.name!r}"):
            value = float(self.metric.function(outputs, targets))
        if not math.isfinite(value):
            raise UserCodeError(
                f"the metric {self.metric.name!r} of data {self.name!r} is {value} on {len(targets)} validation items, expected a finite "
                "number; mend its function or the data"
            )
        return value

    def example_inputs(self, batch: int = 2) -> tuple[Tensor, ...]:
        """Return one batch of validation inputs, as the model takes them; a set of fewer items is gone through again.

        Raises:
            InputError: the validation set is empty, or a batch is not `(inputs, targets)`.
        """
        return self._example(batch)[0]

    def _example(self, batch: int) -> tuple[tuple[Tensor, ...], Any]:
        """Inputs and targets of the first validation items."""
        count = len(self.validation)  # type: ignore[arg-type]
        if not count:
            raise InputError(f"data {self.name!r} has no validation items, expected at least one")
        with user_code(f"data {self.name!r}: a validation item"):
            items = [self.validation[i % count] for i in range(batch)]
        with user_code(f"data {self.name!r}: collating validation items"):
            made = self.collate(items) if self.collate else torch.utils.data.default_collate(items)
        if not isinstance(made, (tuple, list)) or len(made) != 2:
            kind = f"{type(made).__name__} of {len(made)}" if isinstance(made, (tuple, list)) else type(made).__name__
            raise InputError(f"data {self.name!r}: a batch is a {kind}, expected (inputs, targets)")
        return inputs_of(made[0]), made[1]

    def refuse_unfit(self, model: nn.Module) -> None:
        """Run the model on two items; do nothing if its outputs can be trained on this task.

        Raises:
            InputError: the model does not take the inputs, or its outputs do not fit the classes or labels.
        """
        inputs, targets = self._example(2)
        modes = {module: module.training for module in model.modules()}
        model.eval()
        try:
            with torch.no_grad():
                outputs = model(*inputs)
        except (Exception, SystemExit) as error:
            # Whatever the user's network raises on an input that it was not made for.
            shapes = ", ".join(f"{x.dtype}{list(x.shape)}".removeprefix("torch.") for x in inputs)
            first_line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            place = f" ({place})" if (place := place_of(error)) else ""
            raise InputError(f"the model does not take the inputs of data {self.name!r} ({shapes}): {first_line}{place}") from error
        finally:
            for module, mode in modes.items():
                module.training = mode
        if not isinstance(outputs, Tensor):
            raise InputError(f"the model returns {type(outputs).__name__}, expected one tensor; wrap it so that forward returns the logits")
        if self.is_classification and (outputs.ndim != 2 or outputs.shape[1] < self.num_classes):
            raise InputError(
                f"the model's outputs are {list(outputs.shape)} for {len(inputs[0])} items, data {self.name!r} have {self.num_classes} "
                "classes; give the model that many outputs, or a Task with a loss of its own"
            )
        self.refuse_labels(outputs, targets)

    def refuse_labels(self, outputs: Tensor, targets: Any) -> None:
        """Do nothing if `targets` can be learned from `outputs`; a task with its own loss may have any tensor.

        That is: int64 or uint8, one label an item, each one of the columns of `outputs`; or a probability for each output.

        Raises:
            InputError: the targets are no tensor, of another type or shape, or a label has no output.
        """
        if not isinstance(targets, Tensor):
            kind = type(targets).__name__
            raise InputError(f"data {self.name!r}: a batch's targets are a {kind}, expected a tensor; give labels as numbers, or a collate")
        if not self.is_classification or (targets.is_floating_point() and targets.shape == outputs.shape):
            return
        expected = outputs.shape[:1] + outputs.shape[2:]
        if targets.dtype not in (torch.int64, torch.uint8) or targets.shape != expected:
            raise InputError(
                f"data {self.name!r}: labels are {str(targets.dtype).removeprefix('torch.')}{list(targets.shape)}, expected class numbers "
                f"int64{list(expected)}; convert them with .long() and one number an item, or give a Task with a loss of its own"
            )
        if not targets.numel():
            return
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= outputs.shape[1]:
            wrong = low if low < 0 else high
            raise InputError(
                f"data {self.name!r}: label {wrong} does not fit the model's {outputs.shape[1]} outputs, "
                f"expected 0 to {outputs.shape[1] - 1}; mend the labels or num_classes"
            )
