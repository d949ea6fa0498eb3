"""What every block of a transformer is called with, recorded without running any block."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from twofour.errors import InputError
from twofour.pruning.calibration import device_of, moved, run_batch
from twofour.pruning.capture import in_eval_mode

HIDDEN = "hidden_states"


@dataclass
class Batch:
    """One batch on its way: what the next block gets, and for each block its other arguments.

    Attributes:
        hidden: the activations.
        others: per block, positional arguments after the first and keyword arguments.
    """

    hidden: Tensor
    others: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


class _CalledAgain(BaseException):
    """A block is called after the last one; its argument is the block's index. No Exception, as `_LastBlock`."""


class _LastBlock(BaseException):
    """Ends a forward pass at the last block: what comes after it is not needed. No Exception, so that no model catches it."""


def run_block(block: nn.Module, index: int, batch: Batch, device: torch.device) -> Tensor:
    """Return what the block gives for a batch, on `device`."""
    args, kwargs = batch.others[index]
    result = block(moved(batch.hidden, device), *_on(args, device), **_on(kwargs, device))
    hidden: Tensor = result[0] if isinstance(result, tuple) else result
    return hidden


def _on(value: Any, device: torch.device) -> Any:
    """Return `value` with its tensors on `device`; unlike `moved`, a tuple stays a tuple."""
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(_on(item, device) for item in value)
    if isinstance(value, (dict, list, Tensor)):
        return {key: _on(item, device) for key, item in value.items()} if isinstance(value, dict) else moved(value, device)
    return value


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Run the body with the `use_cache` of every Hugging Face config in the model off: a cache would grow with every call of a block."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None and hasattr(c, "use_cache")}
    before = {key: config.use_cache for key, config in configs.items()}
    for config in configs.values():
        config.use_cache = False
    try:
        yield
    finally:
        for key, config in configs.items():
            config.use_cache = before[key]


def capture_inputs(model: nn.Module, blocks: Sequence[nn.Module], batches: Iterable[Any], num_inputs: int) -> list[Batch]:
    """Return, for every batch, the first block's activations and all blocks' other arguments; the model is not changed.

    Each block is stood in for by a function that hands its activations on. The next block must be handed that very tensor: then nothing
    happens between blocks, and running them one by one is what the model does.

    Raises:
        InputError: no batch, one that the model cannot run, or blocks that are not called once each in order on each other's output.
    """
    captured: list[Batch] = []
    device = device_of(model)
    tuples: list[bool] = []
    with in_eval_mode(model), torch.no_grad(), _without_cache(model):
        for number, batch in enumerate(batches, 1):
            # The first batch goes on behind the last block, where a block that is called once more would show.
            with _stand_ins(blocks, tuples, end=number > 1) as record:
                try:
                    run_batch(model, batch, num_inputs, device, number)
                except _LastBlock:
                    pass
                except _CalledAgain as again:
                    raise InputError(
                        f"block {again.args[0]} of the model is called again after the last, expected a plain chain; use prune"
                    ) from None
                except InputError:
                    # What the last block would have given may have another shape than what stands in for it.
                    if len(record.others) < len(blocks):
                        raise
                if len(record.others) < len(blocks):
                    raise InputError("the model's blocks are not all called in a forward pass, expected a plain chain; use prune")
                captured.append(record)
    if not captured:
        raise InputError("calibration holds no batch, expected at least one; pass a list or a DataLoader that is not used up")
    return captured


@contextmanager
def _stand_ins(blocks: Sequence[nn.Module], tuples: list[bool], end: bool) -> Iterator[Batch]:
    """Put recording functions in the blocks' places, with `end` the last one ends the pass.

    `tuples` remembers whether a block returns a tuple, found by running the first.
    """
    record = Batch(torch.empty(0))
    kept = [vars(block).get("forward") for block in blocks]
    real = blocks[0].forward

    def stand_in(index: int) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            named = not args
            hidden = kwargs.pop(HIDDEN, None) if named else args[0]
            if len(record.others) == len(blocks):
                raise _CalledAgain(index)
            if index != len(record.others) or not isinstance(hidden, Tensor) or (index and hidden is not record.hidden):
                raise InputError(
                    f"block {index} of the model is not called on what block {index - 1} gives, expected a plain chain; use prune"
                )
            record.hidden = hidden
            record.others.append((args[1:], kwargs))
            if not tuples:
                tuples.append(isinstance(real(hidden, *args[1:], **kwargs), tuple))
            if end and index + 1 == len(blocks):
                raise _LastBlock
            return (hidden, None) if tuples[0] else hidden

        return forward

    try:
        for index, block in enumerate(blocks):
            block.forward = stand_in(index)
        yield record
    finally:
        for block, forward in zip(blocks, kept, strict=True):
            if forward is None:
                vars(block).pop("forward", None)
            else:
                block.forward = forward
