"""What permutation buys trained networks: kept magnitude and one-shot accuracy, permuted or not, batch-norm re-estimated or not.

The networks and data are real and lie outside the project: a folder with `cifar10/` (sheets of images, read by its own conventions) and
`resnet-cifar10/` (checkpoints of the residual networks for CIFAR-10).
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twofour.errors import InputError
from twofour.pattern import select
from twofour.pruning.permutation.permute import permute
from twofour.pruning.permutation.record import Permutation

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CHECKPOINTS = {20: "resnet20-12fca82f.th", 32: "resnet32-d509ac18.th", 44: "resnet44-014dd654.th", 56: "resnet56-4bfd9763.th"}


class CifarBlock(nn.Module):
    """Two 3x3 convolutions; where the shape changes the shortcut takes every second pixel and pads channels with zeros.

    Source: He et al. 2015, arXiv 1512.03385, section 4.2, shortcut option A.
    """

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)
        self.pad = (channels - channels_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.pad:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """The residual network of `depth` layers for 32x32 images."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        count = (depth - 2) // 6
        self.layer1: nn.Module
        self.layer2: nn.Module
        self.layer3: nn.Module
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        for number, (before, channels) in enumerate([(16, 16), (16, 32), (32, 64)], 1):
            blocks = [CifarBlock(before if k == 0 else channels, channels, 2 if k == 0 and number > 1 else 1) for k in range(count)]
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Gain:
    """One measured variant. `accuracy` in percent of the test images; `kept` in percent of the magnitude of the pruned weights."""

    net: str
    variant: str
    permuted: bool
    reestimated: bool
    kept_percent: float
    accuracy_percent: float
    seed: int


def read_cifar(folder: Path, split: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Normalised images `[n, 3, 32, 32]` float32 and labels int64 of the split `tr` or `te`.

    Raises:
        InputError: the folder holds no sheets of this split.
    """
    from PIL import Image

    sheets = sorted(folder.glob(f"{split}_*.webp"))
    if not sheets:
        raise InputError(f"{folder} holds no sheet {split}_*.webp, expected the CIFAR-10 sheets; name the folder that has them")
    tiles: list[npt.NDArray[np.uint8]] = []
    for sheet in sheets:
        pixels = np.asarray(Image.open(sheet)).reshape(50, 32, 50, 32, 3)
        tiles.append(pixels.transpose(0, 2, 1, 3, 4).reshape(-1, 32, 32, 3))
        if count is not None and sum(map(len, tiles)) >= count:
            break
    images = torch.from_numpy(np.concatenate(tiles)[:count].copy()).permute(0, 3, 1, 2).float() / 255
    labels = torch.from_numpy(np.load(folder / f"labels_{split}.npy").astype(np.int64))[: len(images)]
    return (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None], labels


def load_resnet(folder: Path, depth: int) -> CifarResNet:
    """The trained network of `depth` layers from its published checkpoint."""
    model = CifarResNet(depth)
    state = torch.load(folder / CHECKPOINTS[depth], map_location="cpu", weights_only=True)["state_dict"]
    model.load_state_dict({k.removeprefix("module."): v for k, v in state.items()})
    return model.eval()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 500) -> float:
    """Percent of images classified right."""
    model.eval()
    with torch.no_grad():
        right = sum(int((model(images[k : k + batch]).argmax(1) == labels[k : k + batch]).sum()) for k in range(0, len(images), batch))
    return 100.0 * right / len(labels)


def prune_one_shot(model: nn.Module, targets: list[str]) -> float:
    """Set the smaller two of every four to zero in the named weights, in place; returns the percent of magnitude kept."""
    kept = total = 0.0
    with torch.no_grad():
        for name in targets:
            weight = model.get_parameter(name)
            mask = torch.from_numpy(select(weight.detach().numpy()))
            kept += float(weight.abs()[mask].double().sum())
            total += float(weight.abs().double().sum())
            weight.mul_(mask)
    return 100.0 * kept / total


def reestimate(model: nn.Module, images: Tensor, batch: int = 250) -> None:
    """Replace the running statistics of batch-norm by averages over `images`, in place; nothing else is trained."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.eval()
    for norm in norms:
        norm.train()
    with torch.no_grad():
        for k in range(0, len(images), batch):
            model(images[k : k + batch])
    model.eval()


def measure_resnet(
    data: Path, depth: int, *, seeds: int = 3, seconds: float = 20.0, calibration: int = 2500
) -> tuple[list[Gain], Permutation]:
    """Every variant of one network on all test images, and the permutation of the first seed.

    Args:
        data: the folder that holds `cifar10` and `resnet-cifar10`.
        seeds: searches; the plain variants have one result.
        calibration: training images that batch-norm is re-estimated on.
    """
    images, labels = read_cifar(data / "cifar10", "te")
    training, _ = read_cifar(data / "cifar10", "tr", calibration)
    dense = load_resnet(data / "resnet-cifar10", depth)
    name = f"resnet{depth}-cifar10"
    gains = [Gain(name, "dense", False, False, 100.0, accuracy(dense, images, labels), 0)]
    first: Permutation | None = None
    targets: list[str] = []
    for seed in range(-1, seeds):
        model = copy.deepcopy(dense)
        if seed >= 0 or first is None:
            found = permute(
                copy.deepcopy(dense) if seed < 0 else model, images[:2], seed=max(seed, 0), seconds=0.5 if seed < 0 else seconds
            )
            targets = [layer.name for layer in found.layers]
            first = found if seed == 0 else first
            if seed >= 0:
                gains.append(Gain(name, "dense", True, False, 100.0, accuracy(model, images, labels), seed))
        kept = prune_one_shot(model, targets)
        gains.append(Gain(name, "2:4 one-shot", seed >= 0, False, kept, accuracy(model, images, labels), max(seed, 0)))
        reestimate(model, training)
        gains.append(Gain(name, "2:4 one-shot", seed >= 0, True, kept, accuracy(model, images, labels), max(seed, 0)))
    assert first is not None
    return gains, first


def rows(gains: list[Gain]) -> list[dict[str, Any]]:
    """Rows of the `accuracy` kind of a results file."""
    made = []
    for g in gains:
        variant = g.variant + (" permuted" if g.permuted else "") + (" bn re-estimated" if g.reestimated else "")
        made.append(
            {
                "net": g.net,
                "data": "cifar10 test",
                "seed": g.seed,
                "variant": variant,
                "metric": "accuracy_percent",
                "value": g.accuracy_percent,
            }
            | {"kept_magnitude_percent": g.kept_percent}
        )
    return made
