"""A training between two epochs, on disk: everything `train` needs to go on as if it had never stopped.

One safetensors file: tensors `model/NAME`, `mask/NAME`, `optimizer/INDEX/KEY` and `rng/…`; the metadata holds the rest as JSON.
"""

import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from twofour.errors import InputError
from twofour.files import written_aside
from twofour.training.checkpoint import Epoch

SCHEMA = 1
KEY = "twofour.training"


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Run the body with the global generators of torch, NumPy and Python seeded; give each its own state back after."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


@dataclass
class Training:
    """The live parts of a training, which are saved after each epoch and filled again on resuming.

    Attributes:
        order: the generator that shuffles the data and draws augmentations.
        average: running average of the model's weights, if the recipe keeps one.
        plan: what the training was asked for (recipe, number of items); a state of another plan is refused.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    order: torch.Generator
    masks: Mapping[str, Tensor]
    plan: dict[str, Any]
    average: nn.Module | None = None

    def save(self, path: Path, history: list[Epoch]) -> None:
        """Write the state after the last epoch of `history`, aside and renamed.

        Raises:
            InputError: the file cannot be written; an earlier one stays as it was.
        """
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"mask/{name}": mask for name, mask in self.masks.items()}
        if self.average is not None:
            tensors |= {f"average/{name}": value for name, value in self.average.state_dict().items()}
        optimizer = self.optimizer.state_dict()
        plain: dict[str, dict[str, Any]] = {}
        for index, values in optimizer["state"].items():
            for key, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{index}/{key}"] = value
                else:
                    plain.setdefault(str(index), {})[key] = value
        tensors |= {"rng/torch": torch.get_rng_state(), "rng/order": self.order.get_state()}
        device = next(self.model.parameters()).device
        if device.type == "cuda":
            tensors["rng/cuda"] = torch.cuda.get_rng_state(device)
        kind, keys, *rest = np.random.get_state()
        about = {
            "schema": SCHEMA,
            "plan": self.plan,
            "history": [asdict(epoch) for epoch in history],
            "groups": optimizer["param_groups"],
            "plain": plain,
            "schedule": self.schedule.state_dict(),
            "numpy": [kind, np.asarray(keys).tolist(), *rest],
            "python": random.getstate(),
            # The order in which a tensor lies in memory decides which kernel sums it, so it is part of the state.
            "strides": {name: list(value.stride()) for name, value in tensors.items() if not value.is_contiguous()},
        }
        stored = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        with written_aside(path) as aside:
            save_file(stored, aside, {KEY: json.dumps(about)})

    def load(self, path: Path) -> list[Epoch]:
        """Fill everything from the file and return the epochs done.

        Raises:
            InputError: the file is damaged, or of another model, recipe, mask or amount of data.
        """
        about, tensors = _read(path)
        if differs := [name for name, value in json.loads(json.dumps(self.plan)).items() if about["plan"].get(name) != value]:
            name = differs[0]
            raise InputError(
                f"training state {str(path)!r} is of another training: {name} was {about['plan'].get(name)!r}, is {self.plan[name]!r} now; "
                "give the same arguments, or remove the file"
            )
        masks = _part(tensors, "mask/")
        if masks.keys() != self.masks.keys() or not all(torch.equal(masks[name], mask.cpu()) for name, mask in self.masks.items()):
            raise InputError(f"training state {str(path)!r} holds other masks than the pruning; remove the file to train anew")
        try:
            self.model.load_state_dict(_part(tensors, "model/"))
            if self.average is not None:
                self.average.load_state_dict(_part(tensors, "average/"))
            self.optimizer.load_state_dict({"state": _optimizer_state(about, tensors), "param_groups": about["groups"]})
            self.schedule.load_state_dict(about["schedule"])
            kind, keys, *rest = about["numpy"]
            np.random.set_state((kind, np.array(keys, np.uint32), *rest))
            version, internal, gauss = about["python"]
            random.setstate((version, tuple(internal), gauss))
            torch.set_rng_state(tensors["rng/torch"])
            self.order.set_state(tensors["rng/order"])
            device = next(self.model.parameters()).device
            if device.type == "cuda" and "rng/cuda" in tensors:
                torch.cuda.set_rng_state(tensors["rng/cuda"], device)
            return [Epoch(**epoch) for epoch in about["history"]]
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            first_line = str(error).splitlines()[0]
            raise InputError(f"training state {str(path)!r} does not fit this training: {first_line}; remove the file") from error


def last_good(path: Path) -> tuple[dict[str, Tensor], list[Epoch]]:
    """Return the model's tensors and the epochs in a training state.

    Raises:
        InputError: the file is missing or damaged.
    """
    about, tensors = _read(path)
    model = {name: value.contiguous() for name, value in _part(tensors, "model/").items()}
    return model, [Epoch(**epoch) for epoch in about["history"]]


def epochs_done(path: Path) -> int:
    """Return the number of epochs behind a training state, 0 where there is no file.

    Raises:
        InputError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return 0
    try:
        with safe_open(path, "pt") as file:
            return len(json.loads((file.metadata() or {})[KEY])["history"])
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise InputError(f"training state {str(path)!r} is damaged ({error}); remove it to train anew") from error


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})[KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a safetensors file is no mapping
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise InputError(f"training state {str(path)!r} is damaged ({error}); remove it to train anew") from error
    if about.get("schema") != SCHEMA:
        raise InputError(f"training state {str(path)!r} has schema {about.get('schema')}, this version reads {SCHEMA}; remove it")
    for name, stride in about["strides"].items():
        tensors[name] = torch.empty_strided(tensors[name].shape, stride, dtype=tensors[name].dtype).copy_(tensors[name])
    return about, tensors


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _optimizer_state(about: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Any]]:
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in about["plain"].items()}
    for name, value in _part(tensors, "optimizer/").items():
        index, _, key = name.partition("/")
        state.setdefault(int(index), {})[key] = value
    return state
