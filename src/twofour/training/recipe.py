"""A recipe: how a network is trained, as a small TOML file."""

import tomllib
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from twofour.errors import InputError, nearest


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class OptimizerSection(_Section):
    """`lr` is the peak learning rate; `momentum` and `nesterov` are SGD's."""

    name: Literal["sgd", "adam", "adamw"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> "OptimizerSection":
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class ScheduleSection(_Section):
    """Learning rate over the run, per step. `warmup` is the share of the run spent rising; `milestones` are shares too, for `step`."""

    name: Literal["constant", "cosine", "onecycle", "step"] = "cosine"
    warmup: float = Field(0.0, ge=0, lt=1)
    milestones: list[float] = Field(default_factory=lambda: [0.5, 0.75])
    gamma: float = Field(0.1, gt=0)


class AugmentationSection(_Section):
    """`shift`: largest random translation in pixels, zeros moved in; `flip`: mirror half of the images.

    `crop`: cut out a random part of at least this share of the area and enlarge it to the whole; 1 is off.
    """

    shift: int = Field(0, ge=0)
    flip: bool = False
    crop: float = Field(1.0, gt=0, le=1)

    @property
    def is_on(self) -> bool:
        """Whether anything is changed."""
        return bool(self.shift) or self.flip or self.crop < 1


class DistillationSection(_Section):
    """`weight` of the teacher's term in the loss, at `temperature`; 0 is off.

    loss = (1 − weight) · task + weight · T² · KL(teacher/T ‖ student/T). Source: Hinton et al. 2015, arXiv 1503.02531, section 2.
    """

    weight: float = Field(0.0, ge=0, le=1)
    temperature: float = Field(2.0, gt=0)


class Recipe(_Section):
    """One training, whole: `epochs` passes in batches of `batch`, everything random drawn from `seed`.

    `cpu_threads` is for networks so small that threads wait for each other longer than they work (0: torch's own choice);
    `channels_last` lays images out as NHWC while training, which most convolutions prefer. `average` keeps an exponential moving
    average of the weights with this decay a step, which is evaluated and kept instead of the last weights (0: none).
    """

    epochs: int = Field(10, gt=0)
    batch: int = Field(64, gt=0)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    seed: int = Field(0, ge=0, lt=2**62)
    cpu_threads: int = Field(0, ge=0)
    channels_last: bool = False
    average: float = Field(0.0, ge=0, lt=1)
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    augmentation: AugmentationSection = AugmentationSection()
    distillation: DistillationSection = DistillationSection()

    def __str__(self) -> str:
        return f"Recipe({self.epochs} epochs of batch {self.batch}, {self.optimizer.name} lr {self.optimizer.lr:g}, {self.schedule.name})"


def known_keys(path: tuple[Any, ...]) -> list[str]:
    """Return the keys allowed at `path` in a recipe."""
    section: Any = Recipe
    for part in path:
        section = section.model_fields[part].annotation
    return sorted(section.model_fields)


def shipped_recipes() -> dict[str, str]:
    """Return the text of every recipe in the package, by name."""
    folder = resources.files("twofour.training").joinpath("recipes")
    return {f.name.removesuffix(".toml"): f.read_text(encoding="utf-8") for f in folder.iterdir() if f.name.endswith(".toml")}


def parse_recipe(text: str, where: str) -> Recipe:
    """Return the recipe in `text`; `where` names its source in errors.

    Raises:
        InputError: not TOML, an unknown key (names the nearest known one), a value of the wrong type or out of range.
    """
    try:
        return Recipe.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"recipe {where}: not valid TOML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        path = tuple(first["loc"])
        name = ".".join(str(part) for part in path)
        if first["type"] == "extra_forbidden":
            known = known_keys(path[:-1])
            raise InputError(f"recipe {where}: unknown key {name!r}, expected one of {known}{nearest(str(path[-1]), known)}") from error
        raise InputError(f"recipe {where}: {name} = {first['input']!r} is wrong: {first['msg'].lower()}") from error


def load_recipe(spec: str) -> Recipe:
    """Return the recipe named `spec`: a shipped one, or a TOML file.

    Raises:
        InputError: neither exists, or the content is wrong.
    """
    shipped = shipped_recipes()
    if spec in shipped:
        return parse_recipe(shipped[spec], repr(spec))
    path = Path(spec)
    if not path.is_file():
        raise InputError(f"recipe {spec!r} is neither a file nor one of {sorted(shipped)}{nearest(spec, shipped)}")
    try:
        return parse_recipe(path.read_text(encoding="utf-8"), repr(spec))
    except UnicodeDecodeError as error:
        raise InputError(f"recipe {spec!r} is no UTF-8 text; expected a TOML file") from error
    except OSError as error:
        raise InputError(f"recipe {spec!r} cannot be read: {error.strerror}; check its permissions and the disk") from error
