"""The record of a pruning: per weight what was decided and why, and the masks."""

import json
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from twofour.errors import InputError

# The entry of a file's metadata that holds the record, in ONNX and in safetensors.
PRUNING_KEY = "twofour.pruning"


@dataclass(frozen=True)
class LayerRecord:
    """One weight of the model.

    Attributes:
        name: the parameter's name in `model.named_parameters()`.
        kind: class of the module that holds it.
        shape: `[out, in, *kernel]`.
        flops: multiply-adds × 2 for one item of the example inputs; None where the model did not run the layer.
        eligible: whether the sparse units can take it and it was not excluded.
        reason: why it was left dense, empty when pruned.
        kept_magnitude: Σ|w kept| / Σ|w|, None where nothing was pruned.
        permuted: whether its input channels were reordered first, or why not.
        output_error: ‖X(Ŵ − W)ᵀ‖² / ‖XWᵀ‖² over the calibration data, where the method measures it.
        aliases: other names of the same weight in the file that holds the record.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    flops: int | None
    eligible: bool
    reason: str = ""
    kept_magnitude: float | None = None
    permuted: str = ""
    output_error: float | None = None
    aliases: tuple[str, ...] = ()

    @property
    def num_weights(self) -> int:
        """Number of elements of the weight."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        return {**self.__dict__, "shape": list(self.shape), "aliases": list(self.aliases)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "LayerRecord":
        """Return the record that `to_json` wrote."""
        return cls(**{**value, "shape": tuple(value["shape"]), "aliases": tuple(value.get("aliases", ()))})


@dataclass(frozen=True)
class Pruning:
    """What `prune` did. Masks are bool tensors of the weights' shapes, True where the value is kept.

    `order` identifies the channel order the masks stand in: the digest of the reordering the model carries, empty if none is known.
    """

    method: str
    layers: tuple[LayerRecord, ...]
    masks: dict[str, Tensor] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()
    pattern: str = "2:4"
    order: str = ""

    @property
    def pruned(self) -> tuple[LayerRecord, ...]:
        """The layers that were pruned."""
        return tuple(layer for layer in self.layers if layer.eligible)

    @property
    def share_of_weights(self) -> float:
        """Weights in pruned layers over all weights listed."""
        total = sum(layer.num_weights for layer in self.layers)
        return sum(layer.num_weights for layer in self.pruned) / total if total else 0.0

    @property
    def share_of_flops(self) -> float:
        """FLOPs in pruned layers over all FLOPs listed."""
        total = sum(layer.flops or 0 for layer in self.layers)
        return sum(layer.flops or 0 for layer in self.pruned) / total if total else 0.0

    @property
    def kept_magnitude(self) -> float:
        """Mean of the pruned layers' kept magnitude, weighted by their size."""
        total = sum(layer.num_weights for layer in self.pruned)
        kept = sum((layer.kept_magnitude or 0.0) * layer.num_weights for layer in self.pruned)
        return kept / total if total else 1.0

    def __str__(self) -> str:
        known = any(layer.flops is not None for layer in self.layers)
        flops = f"{100 * self.share_of_flops:.1f} % of FLOPs, " if known else ""
        return (
            f"Pruning({self.method}: {len(self.pruned)} of {len(self.layers)} layers {self.pattern}, "
            f"{100 * self.share_of_weights:.1f} % of weights, {flops}{100 * self.kept_magnitude:.1f} % of magnitude kept)"
        )

    def to_json(self) -> str:
        """Return the record without the masks; these are the weights' own zeros."""
        layers = [layer.to_json() for layer in self.layers]
        value = {"method": self.method, "pattern": self.pattern, "order": self.order, "notes": list(self.notes), "layers": layers}
        return json.dumps(value)

    @classmethod
    def from_json(cls, text: str) -> "Pruning":
        """Return the record that `to_json` wrote.

        Raises:
            InputError: the text is not such a record.
        """
        try:
            value = json.loads(text)
            layers = tuple(LayerRecord.from_json(layer) for layer in value["layers"])
            return cls(value["method"], layers, notes=tuple(value["notes"]), pattern=value["pattern"], order=value.get("order", ""))
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"pruning record is damaged ({error}); export the model again") from error
