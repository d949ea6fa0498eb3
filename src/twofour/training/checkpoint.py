"""A trained model on disk: safetensors under the model's own names, with how it came about in the metadata."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from twofour.errors import InputError
from twofour.files import written_aside
from twofour.pruning import Pruning
from twofour.pruning.record import PRUNING_KEY

SCHEMA = 1
KEY = "twofour.checkpoint"


@dataclass(frozen=True)
class Epoch:
    """One pass over the training data: mean loss, the validation metric after it, the last learning rate, wall time."""

    number: int
    loss: float
    metric: float
    lr: float
    seconds: float


@dataclass(frozen=True)
class Checkpoint:
    """Weights and how they were reached. `model` and `data` are the command line's names, empty for objects made in Python."""

    state: dict[str, Tensor] = field(repr=False)
    metric_name: str
    metric: float
    history: tuple[Epoch, ...] = ()
    recipe: dict[str, Any] = field(default_factory=dict, repr=False)
    model: str = ""
    data: str = ""
    pruning: Pruning | None = field(default=None, repr=False)

    def __str__(self) -> str:
        kind = self.pruning.pattern if self.pruning is not None else "dense"
        return f"Checkpoint({self.model or 'model'}, {kind}, {self.metric_name} {self.metric:.2f} after {len(self.history)} epochs)"

    @classmethod
    def of(cls, module: nn.Module, metric_name: str, metric: float, /, **how: Any) -> "Checkpoint":
        """Return a checkpoint of `module` as it is now; tensors are copied to the CPU."""
        state = {name: value.detach().cpu().clone().contiguous() for name, value in module.state_dict().items()}
        return cls(state, metric_name, metric, **how)

    def save(self, path: str | Path) -> None:
        """Write the file.

        Raises:
            InputError: the folder does not exist or cannot be written.
        """
        from safetensors.torch import save_file

        about = {
            "schema": SCHEMA,
            "model": self.model,
            "data": self.data,
            "metric": {"name": self.metric_name, "value": self.metric},
            "recipe": self.recipe,
            "history": [asdict(epoch) for epoch in self.history],
        }
        metadata = {"format": "pt", KEY: json.dumps(about)}
        if self.pruning is not None:
            metadata[PRUNING_KEY] = self.pruning.to_json()
        with written_aside(path) as aside:
            save_file(self.state, aside, metadata)

    @classmethod
    def load(cls, path: str | Path) -> "Checkpoint":
        """Return the checkpoint in the file.

        Raises:
            InputError: missing, damaged, or not written by this package.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not path.is_file():
            raise InputError(f"checkpoint {str(path)!r} does not exist")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a safetensors file is no mapping
            about = json.loads(metadata[KEY])
            if about["schema"] != SCHEMA:
                raise InputError(f"checkpoint {str(path)!r} has schema {about['schema']}, this version reads {SCHEMA}; update twofour")
            return cls(
                state,
                about["metric"]["name"],
                about["metric"]["value"],
                tuple(Epoch(**epoch) for epoch in about["history"]),
                about["recipe"],
                about["model"],
                about["data"],
                Pruning.from_json(metadata[PRUNING_KEY]) if PRUNING_KEY in metadata else None,
            )
        except InputError:
            raise
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"checkpoint {str(path)!r} is damaged or was not written by twofour: {error}") from error

    @staticmethod
    def pruning_of(path: str | Path) -> Pruning | None:
        """Return the pruning record in a weights file, or None where it holds none.

        Raises:
            InputError: the record is damaged.
        """
        from safetensors import safe_open

        if Path(path).suffix != ".safetensors":
            return None
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(PRUNING_KEY)
        return Pruning.from_json(text) if text else None
