"""The CIFAR-10 networks of the accuracy experiments, by name, with how their dense form comes about."""

import itertools
import logging
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accuracy_oneshot import Block, CifarResNet, load
from filelock import FileLock, Timeout
from fleet import Images, Member, OutOfTimeError, Program, Recipe, train_together
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

log = logging.getLogger("networks")


class WideBlock(nn.Module):
    """Two 3×3 convolutions; a 1×1 convolution as shortcut where the shape changes. Source: He et al. 2015, arXiv 1512.03385, option B."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


class CifarResNet18(nn.Module):
    """ResNet-18 for 32×32 pixels: a 3×3 convolution of stride 1 first and no pooling before the four stages of 64 to 512 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64)
        blocks: list[nn.Module] = []
        for (before, channels), stride in zip(itertools.pairwise((64, 64, 128, 256, 512)), (1, 2, 2, 2), strict=True):
            blocks += [WideBlock(before, channels, stride), WideBlock(channels, channels, 1)]
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.blocks(torch.relu(self.bn1(self.conv1(x)))).mean((2, 3)))  # type: ignore[no-any-return]


class Inverted(nn.Module):
    """1×1 to `expansion` times the channels, 3×3 depthwise, 1×1 back; added to its input where the shape stays.

    Source: Sandler et al. 2018, arXiv 1801.04381, section 3.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels_in * expansion
        widen = [nn.Conv2d(channels_in, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()] if expansion > 1 else []
        depthwise = [nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()]
        self.layers = nn.Sequential(*widen, *depthwise, nn.Conv2d(hidden, channels_out, 1, bias=False), nn.BatchNorm2d(channels_out))
        self.is_residual = stride == 1 and channels_in == channels_out

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.is_residual else y


class CifarMobileNetV2(nn.Module):
    """MobileNetV2 for 32×32 pixels: the strides of the first convolution and of the second stage are 1."""

    STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self) -> None:
        super().__init__()
        blocks, channels = [], 32
        for expansion, channels_out, count, stride in self.STAGES:
            for k in range(count):
                blocks.append(Inverted(channels, channels_out, stride if k == 0 else 1, expansion))
                channels = channels_out
        self.first = nn.Sequential(nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6())
        self.blocks = nn.Sequential(*blocks)
        self.last = nn.Sequential(nn.Conv2d(channels, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6())
        self.linear = nn.Linear(1280, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.last(self.blocks(self.first(x))).mean((2, 3)))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Network:
    """An architecture.

    Attributes:
        dense: how its dense form is trained where nobody else's is taken.
        published: file of the network that others trained on all 50,000 images, or "".
        regions: blocks that are compiled one by one.
    """

    make: type[nn.Module]
    arguments: tuple[int, ...]
    dense: Recipe
    regions: tuple[type[nn.Module], ...]
    published: str = ""

    def __call__(self) -> nn.Module:
        return self.make(*self.arguments)


SMALL = Recipe(epochs=100, lr=0.4, weight_decay=2e-4, batch=512)
LARGE = Recipe(epochs=80, lr=0.4, weight_decay=5e-4, batch=512)
NETWORKS = {
    **{f"ResNet-{d}": Network(CifarResNet, (d,), SMALL, (Block,), f"resnet{d}-*.th") for d in (20, 32, 44, 56)},
    "ResNet-18": Network(CifarResNet18, (), LARGE, (WideBlock,)),
    "MobileNetV2": Network(CifarMobileNetV2, (), LARGE, (Inverted,)),
}


def program_of(network: Network, how: str) -> Program:
    """Return the program of an architecture: compiled `blocks` (alike ones once), `whole`, or `off`; without a GPU always off."""
    compiled = how != "off" and torch.cuda.is_available()
    return Program(network(), compiled=compiled, regions=network.regions if how == "blocks" else ())


def dense_network(
    name: str,
    train: Images,
    folder: Path,
    kept: Path,
    program: Program,
    *,
    published: bool,
    recipe: Recipe | None = None,
    until: float = math.inf,
) -> tuple[nn.Module, float]:
    """Return the dense network and the seconds its training took here, 0 if none.

    What is trained here is written to `kept`, once, whichever process comes first; its weights are rounded to fp16.

    Args:
        published: take the network of others where there is one; they trained it on all 50,000 images.

    Raises:
        OutOfTimeError: `until` is over; its state was saved.
    """
    network = NETWORKS[name]
    model = network()
    if published and network.published:
        load(model, next((folder / "resnet-cifar10").glob(network.published)))
        return model, 0.0
    recipe = recipe or network.dense
    recipe = replace(recipe, batch=min(recipe.batch, len(train)))
    kept.mkdir(parents=True, exist_ok=True)
    path = kept / f"{name}-{len(train)}-images-{recipe.epochs}-epochs.safetensors"
    seconds = 0.0
    try:
        # Another process may be training it: this one waits for it no longer than it has time.
        with FileLock(path.with_suffix(".lock"), timeout=-1 if math.isinf(until) else max(0.0, until - time.monotonic())):
            if not path.exists():
                torch.manual_seed(0)
                model = network()
                member = Member(model, program, train, recipe, seed=0)
                log.info("%s: dense, %s", name, recipe)
                say = lambda line: log.info("%s dense %s", name, line)  # noqa: E731
                seconds = sum(train_together([member], say=say, saved=path.with_suffix(".pt"), until=until))
                state = {key: value.contiguous().cpu() for key, value in member.model.state_dict().items()}
                save_file({key: value.half() if value.ndim > 1 else value for key, value in state.items()}, path.with_suffix(".tmp"))
                path.with_suffix(".tmp").replace(path)
                path.with_suffix(".pt").unlink(missing_ok=True)
    except Timeout as error:
        raise OutOfTimeError("time is up while another process trains the dense network") from error
    model = network()
    model.load_state_dict(load_file(path))
    return model, seconds
