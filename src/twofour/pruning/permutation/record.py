"""The record of a permutation: what moved, what it keeps, how it was proven; and the way to and from the old order."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from twofour.errors import InputError
from twofour.pruning.permutation.apply import Moves, moved
from twofour.pruning.permutation.proof import Check, tensors_of

FORMAT = "twofour-permutation-1"
# The attribute of a model that carries the record.
ATTRIBUTE = "twofour_permutation"
# The key of an optimizer's group that says which reordering its state follows; it travels with the optimizer's state_dict.
ORDER_KEY = "twofour_order"


def digest(orders: Mapping[str, Mapping[int, Any]]) -> str:
    """Return 16 hex digits that identify the reordering, name → axis → old index of every new place."""
    sha = hashlib.sha256()
    for name in sorted(orders):
        for axis in sorted(orders[name]):
            sha.update(f"{name}\0{axis}\0".encode() + np.ascontiguousarray(orders[name][axis], np.int64).tobytes())
    return sha.hexdigest()[:16]


@dataclass(frozen=True)
class LayerOrder:
    """A weight that counts: the share of its input channels that may move, what it keeps, and what stops the rest.

    Attributes:
        name: parameter name.
        axis: its reduction axis.
        size: number of elements.
        free_share: places along the axis that can trade with others, over all places.
        moved_share: places whose channel has changed, over all places.
        kept_before: magnitude kept by 2:4 over all magnitude, in the old order.
        kept_after: the same in the new order.
        reason: what stops the places that cannot move, empty when all can.
    """

    name: str
    axis: int
    size: int
    free_share: float
    moved_share: float
    kept_before: float
    kept_after: float
    reason: str = ""


@dataclass
class Permutation:
    """A reordering of channels under which a model computes what it computed before.

    Attributes:
        moves: tensor name -> axis -> the old index of every new place.
        names: every name of a tensor -> the name it has in `moves`.
        shapes: shape of every tensor in `moves`.
        layers: one record a weight that counts.
        checks: the comparisons that prove it.
        notes: what a reader should know, one sentence each.
        reason: why the model was left as it is, empty otherwise.
        complete: whether every search ran to the end of its schedule.
    """

    moves: Moves = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    layers: list[LayerOrder] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    reason: str = ""
    seed: int = 0
    complete: bool = True

    @property
    def permuted_share(self) -> float:
        """Weights, by elements, whose input channels moved, over all that count."""
        total = sum(layer.size for layer in self.layers)
        return sum(layer.size for layer in self.layers if layer.moved_share) / total if total else 0.0

    @property
    def kept_before(self) -> float:
        """Magnitude kept by plain 2:4, mean of the layers weighted by size."""
        return self._mean("kept_before")

    @property
    def kept_after(self) -> float:
        """Magnitude kept in the new order, mean of the layers weighted by size."""
        return self._mean("kept_after")

    def _mean(self, attribute: str) -> float:
        total = sum(layer.size for layer in self.layers)
        return sum(getattr(layer, attribute) * layer.size for layer in self.layers) / total if total else 0.0

    @property
    def largest_error(self) -> float:
        """Largest relative difference of any output over all checks."""
        return max((c.error for c in self.checks), default=0.0)

    def __str__(self) -> str:
        if self.reason:
            return f"Permutation: none, {self.reason}"
        count = sum(1 for layer in self.layers if layer.moved_share)
        formats = "/".join(sorted({c.dtype for c in self.checks})) or "nothing to prove"
        return (
            f"Permutation: {count} of {len(self.layers)} weights reordered, kept magnitude {100 * self.kept_before:.2f} % -> "
            f"{100 * self.kept_after:.2f} %, proven in {formats} (largest error {self.largest_error:.1e})"
        )

    def to_new(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A state dict of the original model in the new order; names the permutation does not know pass through."""
        return self._mapped(tensors, back=False)

    def to_old(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A state dict of the permuted model in the original order."""
        return self._mapped(tensors, back=True)

    def _mapped(self, tensors: Mapping[str, torch.Tensor], back: bool) -> dict[str, torch.Tensor]:
        self._refuse_prefix(tensors)
        result = {}
        for name, tensor in tensors.items():
            axes = self.moves.get(self.names.get(name, name), {})
            result[name] = moved(tensor, axes, name=name, back=back) if axes else tensor
        return result

    def _refuse_prefix(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Names of a wrapper (`module.` and the like) would all pass through unmapped."""
        some = next(iter(self.moves), None)
        if some is None or self.names.keys() & tensors.keys():
            return
        for prefix in {name.removesuffix(some) for name in tensors if name.endswith(f".{some}")}:
            if all(prefix + name in tensors for name in self.moves):
                raise InputError(f"tensors name {prefix + some!r}, expected {some!r} as in the model that was permuted; strip {prefix!r}")

    def optimizer_to_new(self, state: Mapping[str, Any], parameters: Sequence[str]) -> dict[str, Any]:
        """The `state_dict()` of an optimizer in the new order, marked as such: `twofour.hold` knows it by the mark.

        Args:
            parameters: names of the optimizer's parameters in the order of its groups.

        Raises:
            InputError: the state follows this permutation already, or a state tensor of a moved parameter has another shape than the
                parameter.
        """
        mark = digest(self.moves) if self.moves else None
        if mark and any(group.get(ORDER_KEY) == mark for group in state["param_groups"]):
            raise InputError("optimizer_to_new: the state follows this permutation already, expected older state; call it once")
        result = self._optimizer(state, parameters, back=False)
        return {**result, "param_groups": [{**group, ORDER_KEY: mark} for group in state["param_groups"]]} if mark else result

    def optimizer_to_old(self, state: Mapping[str, Any], parameters: Sequence[str]) -> dict[str, Any]:
        """The `state_dict()` of an optimizer in the original order, without the mark; arguments as `optimizer_to_new`."""
        result = self._optimizer(state, parameters, back=True)
        groups = [{key: value for key, value in group.items() if key != ORDER_KEY} for group in state["param_groups"]]
        return {**result, "param_groups": groups}

    def _optimizer(self, state: Mapping[str, Any], parameters: Sequence[str], back: bool) -> dict[str, Any]:
        indices = [i for group in state["param_groups"] for i in group["params"]]
        if len(indices) != len(parameters):
            raise InputError(
                f"parameters has {len(parameters)} names, expected {len(indices)}, one for each parameter of the optimizer state"
            )
        result = {**state, "state": dict(state["state"])}
        for index, name in zip(indices, parameters, strict=True):
            key = self.names.get(name, name)
            if key in self.moves and index in state["state"]:
                entries = state["state"][index]
                result["state"][index] = {k: self._entry(name, key, k, v, back) for k, v in entries.items()}
        return result

    def _entry(self, name: str, key: str, slot: str, value: Any, back: bool) -> Any:
        if not isinstance(value, torch.Tensor) or value.numel() <= 1:
            return value
        if list(value.shape) != self.shapes[key]:
            raise InputError(
                f"optimizer state {slot!r} of {name} has shape {list(value.shape)}, expected {self.shapes[key]} as the parameter; "
                "start this optimizer afresh after permuting"
            )
        return moved(value, self.moves[key], name=name, back=back)

    def then(self, later: "Permutation") -> "Permutation":
        """Both permutations as one: the records of the later, the moves from the order before this one."""
        moves: Moves = {name: dict(axes) for name, axes in self.moves.items()}
        for name, axes in later.moves.items():
            for axis, index in axes.items():
                first = moves.setdefault(name, {}).get(axis)
                moves[name][axis] = index if first is None else first[index]
        both = Permutation(**{**self.__dict__, **later.__dict__})
        both.moves, both.names = moves, {**self.names, **later.names}
        both.shapes = {**self.shapes, **later.shapes}
        return both

    def save(self, path: str | Path) -> None:
        """Write the record as one safetensors file: an int32 index a moved axis, everything else as JSON in the metadata."""
        from safetensors.numpy import save_file

        arrays = {f"{name}|{axis}": index.astype(np.int32) for name, axes in self.moves.items() for axis, index in axes.items()}
        plain = {k: v for k, v in self.__dict__.items() if k not in ("moves", "layers", "checks")}
        plain |= {"layers": [asdict(layer) for layer in self.layers], "checks": [asdict(c) for c in self.checks]}
        save_file(arrays, str(path), metadata={"format": FORMAT, "record": json.dumps(plain)})

    @classmethod
    def load(cls, path: str | Path) -> "Permutation":
        """Read what `save` wrote.

        Raises:
            InputError: the file is not a permutation.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise InputError(
                        f"{path} has format {metadata.get('format')!r}, expected {FORMAT!r}; pass a file written by Permutation.save"
                    )
                plain = json.loads(metadata["record"])
                moves: Moves = {}
                for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                    name, _, axis = key.rpartition("|")
                    moves.setdefault(name, {})[int(axis)] = file.get_tensor(key).astype(np.int64)
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path} is not a permutation file ({error}); pass a file written by Permutation.save") from error
        plain["layers"] = [LayerOrder(**layer) for layer in plain["layers"]]
        plain["checks"] = [Check(**c) for c in plain["checks"]]
        return cls(moves=moves, **plain)


def carried(model: nn.Module) -> Permutation | None:
    """The permutation stored with a model, or None."""
    found = model.__dict__.get(ATTRIBUTE)
    return found if isinstance(found, Permutation) else None


def carried_digest(model: nn.Module) -> str:
    """The digest of the permutation stored with a model, empty if it carries none or nothing moved."""
    found = carried(model)
    return digest(found.moves) if found is not None and found.moves else ""


def carry(model: nn.Module, permutation: Permutation) -> None:
    """Store a permutation with a model, after the one it may carry already; its state dict does not change."""
    earlier = carried(model)
    model.__dict__[ATTRIBUTE] = permutation if earlier is None else earlier.then(permutation)


def undo(model: nn.Module, permutation: Permutation, earlier: Permutation | None) -> None:
    """Put the channels of `model` back as they were before `permutation`, its latest one; it then carries `earlier` again."""
    with torch.no_grad():
        old = permutation.to_old({name: tensor.detach().clone() for name, tensor in tensors_of(model).items()})
        for name, tensor in tensors_of(model).items():
            tensor.copy_(old[name])
        gradients = {name: tensor.grad for name, tensor in tensors_of(model).items() if tensor.grad is not None}
        for name, gradient in permutation.to_old(gradients).items():
            gradients[name].copy_(gradient)
    if earlier is None:
        model.__dict__.pop(ATTRIBUTE, None)
    else:
        model.__dict__[ATTRIBUTE] = earlier


def names_and_shapes(model: nn.Module, moves: Moves) -> tuple[dict[str, str], dict[str, list[int]]]:
    """Every name of the moved tensors -> their first name, and their shapes."""
    tensors = tensors_of(model)
    first = {id(tensors[name]): name for name in moves}
    names = {name: first[id(t)] for name, t in tensors.items() if id(t) in first}
    return names, {name: list(tensors[name].shape) for name in moves}
