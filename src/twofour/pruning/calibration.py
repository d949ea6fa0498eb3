"""Batch-norm statistics measured anew after pruning: no training, most of the one-shot loss recovered.

Pruning changes the mean and variance of every activation; the running statistics still describe the dense network.

Source: Hubara et al. 2021, "Accurate Post Training Quantization With Small Calibration Sets" (batch-norm tuning), arXiv 2006.10518.
"""

import re
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from twofour.errors import InputError, TwofourError
from twofour.pruning.capture import in_eval_mode

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def moved(value: Any, device: torch.device) -> Any:
    """Return `value` with every tensor in it on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: moved(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [moved(item, device) for item in value]
    return value


def call(model: nn.Module, batch: Any, num_inputs: int, device: torch.device) -> None:
    """Run the model on one batch: a tensor, a tuple or list whose first `num_inputs` items are the inputs, or a dict of keywords."""
    if isinstance(batch, Mapping):
        model(**moved(batch, device))
    elif isinstance(batch, (tuple, list)):
        model(*moved(batch[:num_inputs], device))
    else:
        model(moved(batch, device))


def device_of(model: nn.Module) -> torch.device:
    """Return where the model's first parameter is."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def reusable(batches: Iterable[Any]) -> Iterable[Any]:
    """Return something that can be gone through again: `batches` itself, or a list of what an iterator still gives."""
    return list(batches) if iter(batches) is batches else batches


def shapes_of(batch: Any) -> str:
    """Return the shapes of the tensors in a batch, for messages."""
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')}{list(batch.shape)}"
    if isinstance(batch, Mapping):
        return ", ".join(f"{key} {shapes_of(value)}" for key, value in batch.items())
    if isinstance(batch, (tuple, list)):
        return ", ".join(shapes_of(item) for item in batch)
    return type(batch).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the machine has no memory left."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError)
        and bool(re.search(r"can't allocate memory|not enough memory|out of memory|ALLOC_FAILED", str(error)))
    )


def out_of_memory(batch: Any, layer: str) -> InputError:
    """Return the error for a batch that did not fit, naming the layer and a batch to try."""
    tensor = next((t for t in tensors_in(batch) if t.ndim), None)
    items = tensor.shape[0] if tensor is not None else 1
    cure = f"use batches of {items // 2} or fewer" if items > 1 else "use shorter items, or the block-by-block way"
    at = f"layer {layer!r}" if layer else "the model"
    return InputError(f"calibration ran out of memory at {at} with batches of {items} items; {cure}")


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in a batch, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [tensor for item in value for tensor in tensors_in(item)] if isinstance(value, (tuple, list)) else []


def refusal(error: Exception, batch: Any, number: int, layer: str = "", expected: str = "") -> InputError:
    """Return what a user should read when batch `number` could not be run: one sentence that names the batch and, if known, the layer."""
    if isinstance(error, TwofourError):
        return InputError(f"calibration: batch {number}: {error}")
    if is_out_of_memory(error):
        return out_of_memory(batch, layer)
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    at = f" (at layer {layer!r})" if layer else ""
    wanted = f", expected inputs such as {expected}" if expected else ""
    return InputError(f"calibration: batch {number} of {shapes_of(batch)} cannot run{at}: {reason}{wanted}; check the data")


def leaf_hooks(model: nn.Module, reached: Callable[[str], None], skip: Container[nn.Module] = ()) -> list[Any]:
    """Have `reached` called with the name of every module without children just before it runs; return the hooks' handles.

    Where memory ends or a shape does not fit is then known, in layers that are not pruned too.
    """

    def hook(name: str) -> Callable[..., None]:
        return lambda *_: reached(name)

    leaves = ((name, m) for name, m in model.named_modules() if name and not any(True for _ in m.children()) and m not in skip)
    return [module.register_forward_pre_hook(hook(name)) for name, module in leaves]


def run_batch(
    model: nn.Module,
    batch: Any,
    num_inputs: int,
    device: torch.device,
    number: int,
    *,
    expected: str = "",
    where: Callable[[], str] = lambda: "",
) -> None:
    """Run the model on one batch.

    Raises:
        InputError: the model cannot run the batch, or there is no memory for it; `refusal` says it.
    """
    try:
        call(model, batch, num_inputs, device)
    # A model raises whatever its own code meets on inputs it was not made for.
    except Exception as error:
        if "more than 1 value per channel" in str(error):
            raise
        raise refusal(error, batch, number, where(), expected) from error


def tracked_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the batch-norm modules that keep running statistics, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}


def reestimate_batchnorm(model: nn.Module, batches: Iterable[Any], num_inputs: int = 1) -> int:
    """Replace the running statistics of every batch-norm by the plain average over `batches` and return the number of batches.

    mean = Σ mean_b / B, var = Σ var_b / B, over B batches, each normalised by its own statistics. Nothing else changes: parameters,
    momentum and training modes stay as they were, dropout is off. If anything fails the old statistics are put back.

    Args:
        batches: tensors; tuples or lists whose first `num_inputs` items are the model's inputs (labels after them are ignored); or
            dicts of keyword arguments. Moved to the model's device.

    Raises:
        InputError: no batch, a batch too small for batch statistics, or statistics that are not finite.
    """
    norms = tracked_norms(model)
    device = device_of(model)
    kept = {norm: ({name: getattr(norm, name).clone() for name in STATISTICS}, norm.momentum) for norm in norms.values()}
    count = 0
    reached: list[str] = []
    handles = leaf_hooks(model, reached.append)
    try:
        with in_eval_mode(model), torch.no_grad():
            for norm in norms.values():
                norm.reset_running_stats()
                norm.momentum = None
                norm.train()
            for batch in batches:
                reached.clear()
                run_batch(model, batch, num_inputs, device, count + 1, where=lambda: reached[-1] if reached else "")
                count += 1
        if not count:
            raise InputError("calibration holds no batch, expected at least one; pass a list or a DataLoader that is not used up")
        for name, norm in norms.items():
            if not all(bool(torch.isfinite(getattr(norm, s)).all()) for s in STATISTICS[:2]):
                raise InputError(f"calibration: the statistics of {name!r} are not finite, expected finite inputs; check the batches")
    except BaseException as error:
        for norm, (statistics, _) in kept.items():
            for name, value in statistics.items():
                getattr(norm, name).copy_(value)
        if isinstance(error, ValueError) and "more than 1 value per channel" in str(error):
            raise InputError(
                f"calibration: batch {count} has one value a channel, expected several for batch statistics; use larger batches"
            ) from error
        raise
    finally:
        for handle in handles:
            handle.remove()
        for norm, (_, momentum) in kept.items():
            norm.momentum = momentum
    return count
