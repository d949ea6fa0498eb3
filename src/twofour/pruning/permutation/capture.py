"""The network as graphs of ATen operations: evaluation and training, with the batch left open."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from twofour.errors import InputError
from twofour.pruning.capture import exporter_quiet


@dataclass(frozen=True)
class Inputs:
    """Positional and keyword arguments of a call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, example: Any) -> "Inputs":
        """From what a user passes: a tensor, a tuple of arguments, or a mapping of keyword arguments."""
        if isinstance(example, Inputs):
            return example
        if isinstance(example, torch.Tensor):
            return cls((example,), {})
        if isinstance(example, Mapping):
            return cls((), dict(example))
        if isinstance(example, Sequence) and not isinstance(example, str):
            return cls(tuple(example), {})
        raise InputError(
            f"example_inputs is a {type(example).__name__}, expected a tensor, a sequence of arguments or a mapping of keyword arguments"
        )

    def tensors(self) -> list[torch.Tensor]:
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, torch.Tensor)]

    def leaves(self) -> list[Any]:
        """All arguments, flat."""
        return list(pytree.tree_leaves((self.args, self.kwargs)))

    @property
    def batch(self) -> int | None:
        """Size of the first axis of the first tensor that has axes."""
        return next((t.shape[0] for t in self.tensors() if t.ndim), None)

    def map(self, change: Any) -> "Inputs":
        args, kwargs = pytree.tree_map_only(torch.Tensor, change, (self.args, self.kwargs))
        return Inputs(args, kwargs)

    def resized(self, batch: int) -> "Inputs":
        """The same inputs with another batch: samples are repeated and, in floating tensors, perturbed so that no two are alike."""
        old = self.batch
        generator = torch.Generator().manual_seed(batch)

        def change(t: torch.Tensor) -> torch.Tensor:
            if t.ndim == 0 or t.shape[0] != old:
                return t
            chosen = torch.arange(batch) % t.shape[0]
            grown = t.detach()[chosen.to(t.device)]
            if grown.is_floating_point() and batch > t.shape[0]:
                noise = torch.randn(grown.shape, generator=generator).to(grown)
                noise[: t.shape[0]] = 0
                grown = grown + noise * grown.std().clamp_min(1e-3)
            return grown

        return self.map(change)


@dataclass(frozen=True)
class Capture:
    """One exported graph and the batch sizes at which it is to be read."""

    program: ExportedProgram
    mode: str
    batches: tuple[int, ...]
    symbolic: bool
    note: str = ""


@contextlib.contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Run a block with caches and fused attention off; training flags, settings and random state are put back."""
    flags = {module: module.training for module in model.modules()}
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = list({id(c): c for c in found if hasattr(c, "use_cache")}.values())
    cached = [c.use_cache for c in configs]
    fast = torch.backends.mha.get_fastpath_enabled()
    state = torch.get_rng_state()
    try:
        for config in configs:
            config.use_cache = False
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.set_rng_state(state)
        torch.backends.mha.set_fastpath_enabled(fast)
        for config, value in zip(configs, cached, strict=True):
            config.use_cache = value
        for module, training in flags.items():
            module.training = training


def set_mode(model: nn.Module, mode: str) -> None:
    """`eval`, `train`, or `leaves`: modules without children train, the containers around them evaluate."""
    for module in model.modules():
        module.training = mode == "train" or (mode == "leaves" and next(module.children(), None) is None)


def capture(
    model: nn.Module, inputs: Inputs, modes: Sequence[str] = ("eval", "train"), open_batch: bool = True
) -> tuple[list[Capture], str | None]:
    """The graphs of evaluation and training, or the reason why there are none.

    Args:
        modes: `("eval",)` leaves training out, `open_batch=False` captures one fixed batch: quicker, and weaker; for trials only.
    """
    captures: list[Capture] = []
    batches = _batches(inputs)
    with quiet(model):
        set_mode(model, "eval")
        if not open_batch:
            fixed = inputs.resized(batches[0])
            return [Capture(_program(model, fixed, None, None), "eval", batches[:1], False)], None
        evaluated, reason = _export(model, inputs, "eval", batches)
        if not evaluated:
            return [], f"evaluation cannot be captured: {reason}"
        captures += evaluated
        if "train" not in modes:
            return captures, None
        set_mode(model, "train")
        trained, reason = _export(model, inputs, "train", batches)
        if not trained:
            set_mode(model, "leaves")
            note = f"training captured with containers in evaluation: {reason}"
            trained, second = _export(model, inputs, "leaves", batches, note)
            if not trained:
                return [], f"training cannot be captured: {second}"
        captures += trained
    return captures, None


def _batches(inputs: Inputs) -> tuple[int, int]:
    batch = inputs.batch
    if batch is None:
        raise InputError("example_inputs holds no tensor with a batch axis, expected one whose first axis is the batch")
    first = max(batch, 2)
    return first, first + 1


def _export(model: nn.Module, inputs: Inputs, mode: str, batches: tuple[int, int], note: str = "") -> tuple[list[Capture], str]:
    """A capture with an open batch; where the model does not allow it, one for each of two batch sizes."""
    first = inputs.resized(batches[0])

    def dynamic(leaf: Any) -> Any:
        return {0: Dim.DYNAMIC} if isinstance(leaf, torch.Tensor) and leaf.ndim and leaf.shape[0] == batches[0] else None

    # A keyword argument's place in the signature is unknown here, so positional arguments keep theirs and shapes go by the same structure.
    shapes = pytree.tree_map(dynamic, (first.args, first.kwargs))
    reason = ""
    try:
        program = _program(model, first, (*shapes[0], *shapes[1].values()) if not shapes[1] else None, shapes)
        return [Capture(program, mode, batches, True, note)], ""
    except Exception as error:  # noqa: BLE001 - export raises errors of any kind; the fixed-batch captures below follow
        reason = sentence(error)
    found = []
    for batch in batches:
        try:
            found.append(
                Capture(_program(model, inputs.resized(batch), None, None), mode, (batch,), False, note or f"fixed batch: {reason}")
            )
        except Exception as error:  # noqa: BLE001 - export raises errors of any kind; the reason is reported
            return [], sentence(error)
    return found, reason


def _program(model: nn.Module, inputs: Inputs, positional: Any, shapes: Any) -> ExportedProgram:
    dynamic = None
    if shapes is not None:
        dynamic = positional if positional is not None else _by_name(model, inputs, shapes)
    with torch.enable_grad(), exporter_quiet():
        program = torch.export.export(model, inputs.args, inputs.kwargs or None, dynamic_shapes=dynamic, strict=False)
        decomposed: ExportedProgram = program.run_decompositions({})
        return decomposed


def _by_name(model: nn.Module, inputs: Inputs, shapes: Any) -> Any:
    import inspect

    names = list(inspect.signature(model.forward).parameters)
    return {**dict(zip(names, shapes[0], strict=False)), **shapes[1]}


def sentence(error: Exception) -> str:
    """The kind of an error and the first line of its message."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"{type(error).__name__}: {line[:200]}"
