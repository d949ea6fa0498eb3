"""A task: data to train and validate on, the loss that is minimised, the metric that is reported."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from twofour.errors import InputError, UserCodeError
from twofour.sources.items import Inputs, has_infinite, held_infinite, held_targets, inputs_of
from twofour.sources.user_code import place_of, user_code


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

        Of data held in memory every label and input is looked at; of other data those of the two items.

        Raises:
            InputError: a set is empty; the model does not take the inputs, or its outputs do not fit the classes or labels; there is one
                class only; an item holds NaN that comes out of the model.
        """
        if not len(self.train):  # type: ignore[arg-type]
            raise InputError(f"data {self.name!r} has no training items, expected at least one")
        inputs, targets = self._example(2)
        outputs = self._outputs(model, inputs)
        if not isinstance(outputs, Tensor):
            raise InputError(f"the model returns {type(outputs).__name__}, expected one tensor; wrap it so that forward returns the logits")
        if self.is_classification and self.num_classes < 2:
            raise InputError(
                f"data {self.name!r} have one class, expected at least two; give a Task with a loss of its own for anything else"
            )
        if self.is_classification and (outputs.ndim != 2 or outputs.shape[1] < self.num_classes):
            raise InputError(
                f"the model's outputs are {list(outputs.shape)} for {len(inputs[0])} items, data {self.name!r} have {self.num_classes} "
                "classes; give the model that many outputs, or a Task with a loss of its own"
            )
        self.refuse_labels(outputs, targets)
        if self.collate is None:
            for split, dataset in (("training", self.train), ("validation", self.validation)):
                self._refuse_held(model, outputs, split, dataset)
        self.refuse_infinite(inputs, outputs)

    def _refuse_held(self, model: nn.Module, outputs: Tensor, split: str, dataset: Dataset[Any]) -> None:
        """Look at what a data set in memory holds; `outputs` are the model's for two items."""
        labels = held_targets(dataset)
        if labels is not None:
            self.refuse_labels(outputs[:1].expand(len(labels), *outputs.shape[1:]), labels, split)
            if (
                self.is_classification
                and split == "training"
                and labels.ndim == 1
                and len(labels) > 1
                and bool((labels == labels[0]).all())
            ):
                raise InputError(
                    f"data {self.name!r}: all {len(labels)} training items are of class {int(labels[0])}, expected at least two classes; "
                    "mend the labels, or give a Task with a loss of its own"
                )
        infinite = held_infinite(dataset)
        if infinite is not None and bool(infinite.any()):
            item = int(infinite.nonzero()[0])
            inputs = inputs_of(torch.utils.data.default_collate([dataset[item]])[0])
            self.refuse_infinite(inputs, self._outputs(model, inputs), split, item)

    def _outputs(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        """Return what the model gives in eval mode; whatever it raises becomes one sentence."""
        modes = {module: module.training for module in model.modules()}
        model.eval()
        try:
            with torch.no_grad():
                return model(*inputs)
        except (Exception, SystemExit) as error:
            # Whatever the user's network raises on an input that it was not made for.
            shapes = ", ".join(f"{x.dtype}{list(x.shape)}".removeprefix("torch.") for x in inputs)
            first_line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            place = f" ({place})" if (place := place_of(error)) else ""
            raise InputError(f"the model does not take the inputs of data {self.name!r} ({shapes}): {first_line}{place}") from error
        finally:
            for module, mode in modes.items():
                module.training = mode

    def refuse_infinite(self, inputs: tuple[Tensor, ...], outputs: Tensor, split: str = "validation", first: int = 0) -> None:
        """Do nothing unless an input that holds NaN or infinity makes the model's output so; `first` is the number of the first item.

        A model that expects NaN for a missing value, or infinity in a mask, gives finite outputs.

        Raises:
            InputError: it does; the item is named.
        """
        if bool(outputs.isfinite().all()) or len(outputs) != len(inputs[0]):
            return
        wrong = has_infinite(inputs) & has_infinite((outputs,))
        if bool(wrong.any()):
            item = first + int(wrong.nonzero()[0])
            raise InputError(
                f"data {self.name!r}, {split} item {item}: the input holds NaN or infinity, and so does the model's output for it, "
                "expected finite values; mend or remove the item"
            )

    def refuse_labels(self, outputs: Tensor, targets: Any, split: str = "") -> None:
        """Do nothing if `targets` can be learned from `outputs`; a task with its own loss may have any tensor.

        That is: int64 or uint8, one label an item, each one of the columns of `outputs`; or a probability for each output. With `split`
        they are all of it in order, and the error names the item.

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
        wrong = (targets < 0) | (targets >= outputs.shape[1])
        if bool(wrong.any()):
            item = int(wrong.flatten().nonzero()[0])
            place = f", {split} item {item}" if split and wrong.ndim == 1 else ""
            raise InputError(
                f"data {self.name!r}{place}: label {int(targets.flatten()[item])} does not fit the model's {outputs.shape[1]} outputs, "
                f"expected 0 to {outputs.shape[1] - 1}; mend the labels or num_classes"
            )
