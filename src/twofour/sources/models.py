"""Names of models on the command line → a module and how its inputs look."""

import difflib
import importlib.util
import inspect
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from twofour.errors import InputError, MissingExtraError, nearest
from twofour.sources.files import call_function, is_function_spec
from twofour.sources.huggingface import huggingface_model
from twofour.sources.torchvision_compat import import_torchvision

# How many relatives of a model are tried against a weights file that does not fit it, and what share of the tensors must fit.
MOST_CANDIDATES, LEAST_FIT = 24, 0.9


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


def torchvision_model(name: str) -> Callable[[int], nn.Module]:
    """Return what makes torchvision's network `name` without weights."""
    import_torchvision()
    from torchvision.models import get_model, get_model_builder, list_models

    if name not in list_models():
        raise InputError(f"model 'torchvision:{name}' is unknown{nearest(name, list_models())}; twofour models lists all")
    # Detection and segmentation networks would fetch the weights of their backbone otherwise.
    backbone = {"weights_backbone": None} if "weights_backbone" in inspect.signature(get_model_builder(name)).parameters else {}
    return lambda num_classes: get_model(name, weights=None, num_classes=num_classes, **backbone)  # type: ignore[no-any-return]


def timm_model(name: str) -> Callable[[int], nn.Module]:
    """Return what makes timm's network `name` without weights."""
    import_torchvision()
    try:
        import timm
    except ModuleNotFoundError as error:
        raise MissingExtraError("models named timm:NAME need timm; pip install 'twofour[timm]'") from error
    if name not in timm.list_models():
        raise InputError(f"model 'timm:{name}' is unknown{nearest(name, timm.list_models())}; twofour models lists all")
    return lambda num_classes: timm.create_model(name, pretrained=False, num_classes=num_classes)  # type: ignore[no-any-return]


def own_model(spec: str) -> Callable[[int], nn.Module]:
    """Return what makes the module of the user's FILE.py:FUNCTION; the function may take `num_classes`."""

    def make(num_classes: int) -> nn.Module:
        made = call_function(spec, num_classes=num_classes)
        if not isinstance(made, nn.Module):
            raise InputError(f"function {spec!r} returned {type(made).__name__}, expected a torch.nn.Module")
        return made

    return make


def nearest_model(spec: str, state: Mapping[str, Tensor]) -> str:
    """Return the model of the same zoo and family whose parameters the tensors fit best, empty if none fits better than `spec`.

    Candidates are made without memory (the meta device); the head does not count, because its size follows from the data.
    """
    zoo, _, name = spec.partition(":")
    if zoo not in ("torchvision", "timm"):
        return ""
    family = re.match(r"[a-z]+", name)
    names = [n.partition(":")[2] for n in list_models() if n.startswith(f"{zoo}:")]
    related = difflib.get_close_matches(name, [n for n in names if family and n.startswith(family[0])], n=MOST_CANDIDATES, cutoff=0.0)
    shapes = {(key, tuple(value.shape)) for key, value in state.items()}
    fits = {}
    for candidate in {name, *related}:
        with torch.device("meta"), suppress(Exception):
            own = {(key, tuple(value.shape)) for key, value in ZOOS[zoo](candidate)(1000).state_dict().items()}
            fits[candidate] = len(own & shapes) / len(own | shapes)
    best = max(fits, key=lambda candidate: (fits[candidate], candidate == name), default=name)
    return f"{zoo}:{best}" if best != name and fits[best] >= LEAST_FIT else ""


# Prefix -> what makes the maker of the network named after the colon.
ZOOS: dict[str, Callable[[str], Callable[[int], nn.Module]]] = {
    "torchvision": torchvision_model,
    "timm": timm_model,
    "hf": huggingface_model,
}


def list_models() -> list[str]:
    """Return every name that `resolve_model` takes here, the user's own files apart; a zoo that is not installed adds none."""
    names = sorted(MODELS)
    try:
        import_torchvision()
    except MissingExtraError:
        return names
    from torchvision.models import list_models as torchvision_names

    names += [f"torchvision:{name}" for name in torchvision_names()]
    if importlib.util.find_spec("timm") is not None:
        import timm

        names += [f"timm:{name}" for name in timm.list_models()]
    return names


def known_models() -> list[str]:
    """Return every way to name a model, for messages and help."""
    return [*sorted(MODELS), *(f"{zoo}:NAME" for zoo in ZOOS if zoo != "hf"), "hf:NAME_OR_DIR", "FILE.py:FUNCTION"]


def names_source(spec: str) -> bool:
    """Whether `spec` is the name of a model here, or of one in a file or a zoo."""
    return spec in MODELS or is_function_spec(spec) or spec.partition(":")[0] in ZOOS


def is_model_spec(spec: str) -> bool:
    """Whether `spec` names a model rather than a file or folder: a known name wins over a folder of that name."""
    return names_source(spec) or not (Path(spec).exists() or "/" in spec or "." in spec)


def resolve_model(spec: str) -> ModelSource:
    """Return the source that `spec` names: `demo`, `torchvision:NAME`, `timm:NAME`, `hf:NAME_OR_DIR`, or `FILE.py:FUNCTION`.

    Raises:
        InputError: the name is unknown. MissingExtraError: its library is not installed.
    """
    if spec in MODELS:
        return ModelSource(spec, MODELS[spec])
    if is_function_spec(spec):
        return ModelSource(spec, own_model(spec))
    zoo, colon, name = spec.partition(":")
    if colon and zoo in ZOOS:
        if not name.strip():
            raise InputError(f"model {spec!r} names no network, expected {zoo}:{'NAME_OR_DIR' if zoo == 'hf' else 'NAME'}")
        return ModelSource(spec, ZOOS[zoo](name))
    if Path(spec).suffix in (".onnx", ".plan"):
        raise InputError(
            f"model {spec!r} is a finished graph, expected a network to train; twofour inspect, build, run and measure take it"
        )
    raise InputError(f"model {spec!r} is unknown, expected one of {known_models()}{nearest(spec, [*MODELS, *ZOOS])}")
