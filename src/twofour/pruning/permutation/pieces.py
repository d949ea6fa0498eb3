"""Small pieces of networks, together using every operation of the rule table: what random networks are built of.

An image piece maps [batch, channels, 8, 8] to the same shape; a token piece maps [batch, 16, channels] to the same shape.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Build = Callable[[int], nn.Module]
IMAGE: dict[str, Build] = {}
TOKENS: dict[str, Build] = {}


class Piece(nn.Module):
    """A function of its input and of named modules, parameters and buffers."""

    def __init__(self, function: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def image(build: Build) -> Build:
    IMAGE[build.__name__] = build
    return build


def tokens(build: Build) -> Build:
    TOKENS[build.__name__] = build
    return build


def conv(c: int, o: int | None = None, k: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(c, o or c, k, padding=k // 2, **options)


def scale(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))
