"""Weights that live in pieces on several processes (DTensor: FSDP2, tensor parallelism): whole tensor in, own piece out."""

import sys
from typing import Any

import torch
from torch import Tensor


def is_sharded(weight: Tensor) -> bool:
    """Whether `weight` is a DTensor; asks without importing `torch.distributed.tensor` where nothing else has."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(weight, module.DTensor)


def local(weight: Tensor) -> Tensor:
    """Return this process's piece of `weight` (a view), or `weight` itself."""
    sharded: Any = weight
    piece: Tensor = sharded.to_local() if is_sharded(weight) else weight
    return piece


def whole(weight: Tensor) -> Tensor:
    """Return all of `weight`; every process that holds a piece must call it."""
    sharded: Any = weight
    full: Tensor = sharded.full_tensor() if is_sharded(weight) else weight
    return full


def piece_like(full: Tensor, weight: Tensor) -> Tensor:
    """Return the piece of `full`, known whole to every process, that lies where this process's piece of `weight` lies."""
    if not is_sharded(weight):
        return full.to(weight.device)
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = weight
    # Without a source rank nothing is sent: every process cuts its own piece.
    return local(distribute_tensor(full.to(sharded.device_mesh.device_type), sharded.device_mesh, sharded.placements, src_data_rank=None))


def fill_zero(weight: Tensor, dropped: Tensor) -> None:
    """Set `weight` to +0 where `dropped`, in place. Selected, not multiplied: NaN · 0 would stay NaN. torch has no fp8 selection."""
    target = weight.view(torch.uint8) if weight.element_size() == 1 else weight
    target.masked_fill_(dropped, 0)
