"""Names of models on the command line → a module and how its inputs look."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from twofour.errors import InputError, nearest


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with batch-norm and an identity or 1×1 shortcut.

    Source: He et al. 2015, arXiv 1512.03385, section 3.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class DemoNet(nn.Module):
    """A residual network for small grey images: a stem, three stages, a linear classifier."""

    def __init__(self, num_classes: int = 10, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.stages = nn.Sequential(
            ResidualBlock(width, width, 1), ResidualBlock(width, 2 * width, 2), ResidualBlock(2 * width, 4 * width, 2)
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.stages(self.stem(x))).flatten(1))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class ModelSource:
    """A model's name and the function that makes a fresh one: `make(num_classes) -> nn.Module`, initialised from torch's global seed."""

    spec: str
    make: Callable[[int], nn.Module]


MODELS: dict[str, Callable[[int], nn.Module]] = {"demo": DemoNet}


def resolve_model(spec: str) -> ModelSource:
    """Return the source that `spec` names.

    Raises:
        InputError: the name is unknown.
    """
    if spec not in MODELS:
        raise InputError(f"model {spec!r} is unknown, expected one of {sorted(MODELS)}{nearest(spec, MODELS)}")
    return ModelSource(spec, MODELS[spec])
