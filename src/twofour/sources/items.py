"""What the items of a data set are, and what of them is seen without loading one."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from twofour.errors import InputError

# What one batch holds for the model: its only input, or one tensor an argument of its `forward`, in order.
Inputs = Tensor | tuple[Tensor, ...]
# How many items are looked at together for values that are not finite.
CHUNK = 4096


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


def _held(dataset: Dataset[Any]) -> tuple[tuple[Tensor, ...], Tensor] | None:
    # NOTE: the exact types only, because a subclass may change what an item is.
    if type(dataset) is ArrayDataset:
        return inputs_of(dataset.inputs), dataset.targets
    if type(dataset) is TensorDataset and len(dataset.tensors) == 2:
        return (dataset.tensors[0],), dataset.tensors[1]
    return None


def _of_held(dataset: Dataset[Any], read: Callable[[tuple[Tensor, ...], Tensor], Tensor]) -> Tensor | None:
    """Return what `read` gives, an entry an item, of inputs and targets held in memory (or of a subset of them), None for any other."""
    if type(dataset) is Subset:
        whole = _of_held(dataset.dataset, read)
        return None if whole is None else whole[torch.as_tensor(dataset.indices, dtype=torch.int64)]
    held = _held(dataset)
    return None if held is None else read(*held)


def held_targets(dataset: Dataset[Any]) -> Tensor | None:
    """Return the targets `[items, …]` of a data set that holds them in memory (or a subset of one), None for any other."""
    return _of_held(dataset, lambda _, targets: targets)


def has_infinite(inputs: Sequence[Tensor]) -> Tensor:
    """Return `[items]` bool: whether any input of the item holds NaN or infinity."""
    found = torch.zeros(len(inputs[0]), dtype=torch.bool)
    for values in inputs:
        for start in range(0, len(values) if values.is_floating_point() else 0, CHUNK):
            finite = values[start : start + CHUNK, None].flatten(1).isfinite().all(1)
            found[start : start + CHUNK] |= ~finite.cpu()
    return found


def held_infinite(dataset: Dataset[Any]) -> Tensor | None:
    """Return `has_infinite` of a data set that holds its inputs in memory (or a subset of one), None for any other."""
    return _of_held(dataset, lambda inputs, _: has_infinite(inputs))
