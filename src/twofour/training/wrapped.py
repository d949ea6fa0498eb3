"""What trainers wrap around models and optimizers, taken off."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from twofour.errors import InputError


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the module inside DistributedDataParallel, DataParallel, AveragedModel and torch.compile's wrapper.

    Raises:
        InputError: the model is wrapped by FSDP1.
    """
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise InputError("hold: the model is wrapped by FSDP1, whose flat parameters have no axes to group along; use fully_shard (FSDP2)")
    inner: Any = model
    while True:
        if isinstance(inner, (nn.parallel.DistributedDataParallel, nn.DataParallel, torch.optim.swa_utils.AveragedModel)):
            inner = inner.module
        elif isinstance(getattr(inner, "_orig_mod", None), nn.Module):
            inner = inner._orig_mod
        else:
            return inner  # type: ignore[no-any-return]


def averaged_module(average: nn.Module, names: Iterable[str]) -> nn.Module:
    """Return the module that holds the averaged tensors under the model's `names`: `average` or its `.module`."""
    inner = unwrap_model(average)
    module = getattr(inner, "module", None)
    own = {name for name, _ in inner.named_parameters(remove_duplicate=False)} | {n for n, _ in inner.named_buffers(remove_duplicate=False)}
    return unwrap_model(module) if isinstance(module, nn.Module) and not own.issuperset(names) else inner


def unwrap_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer of torch inside the wrappers of Accelerate, Lightning and others that keep it as `.optimizer`.

    Raises:
        InputError: there is none, so no step can be followed.
    """
    inner = optimizer
    while isinstance(getattr(inner, "optimizer", None), torch.optim.Optimizer) or type(inner).__name__ == "LightningOptimizer":
        inner = inner.optimizer
    if not isinstance(inner, torch.optim.Optimizer):
        raise InputError(f"hold: {type(optimizer).__name__} is not a torch.optim.Optimizer and wraps none; pass the optimizer that steps")
    if getattr(inner, "_overlap_with_ddp", False):
        raise InputError("hold: ZeroRedundancyOptimizer with overlap_with_ddp steps inside the backward, pass one that steps itself")
    return inner
