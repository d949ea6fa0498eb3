"""Hold pruned weights at zero through any training loop, with the optimizer's own hooks."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from twofour.errors import InputError, VerificationError, nearest
from twofour.pruning import Pruning
from twofour.pruning.permutation.record import digest
from twofour.pruning.sharded import fill_zero, local, piece_like
from twofour.training.masks import count_dense_groups, derive_masks
from twofour.training.order import Orders, accept_averages, carried_orders, refuse_older_state
from twofour.training.wrapped import averaged_module, unwrap_model, unwrap_optimizer

__all__ = ["Hold", "derive_masks", "hold"]
log = logging.getLogger(__name__)


class Hold:
    """The handle of `hold`: keeps the masks, counts the steps, lets go on `remove()` or at the end of a `with` block.

    Attributes:
        masks: bool masks by parameter name, True where the weight is kept.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        masks: Mapping[str, Tensor],
        *,
        ema: nn.Module | Iterable[nn.Module] = (),
        orders: Orders | None = None,
        order: str = "",
    ) -> None:
        self.model = _named_as(masks, model)
        self.optimizer = unwrap_optimizer(optimizer)
        self.masks = dict(masks)
        self._calls, self._skipped = 0, torch.zeros(())
        self.averages = _modules(ema)
        self._held = _paired(self.model, self.masks, "the model")
        averages = [averaged_module(average, self.masks) for average in self.averages]
        self._averaged = [pair for average in averages for pair in _paired(average, self.masks, "ema")]
        stepped = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        trained = [weight for _, weight, _ in self._held if weight.requires_grad]
        if trained and not any(id(weight) in stepped for weight in trained):
            raise InputError(
                "hold: the optimizer trains none of the pruned weights, expected an optimizer made from this model's parameters"
            )
        elsewhere = [name for name, weight, _ in self._held if weight.requires_grad and id(weight) not in stepped]
        if elsewhere:
            log.warning(
                "hold: %d pruned weights are not trained by this optimizer (first: %s); hold the optimizer that trains them too",
                len(elsewhere),
                elsewhere[0],
            )
        if orders is None:
            orders = carried_orders(self.model)
            if order and orders and order != digest(orders):
                raise InputError("hold: the pruning is of another channel order than the model's, expected its latest; prune it again")
        else:
            order = ""
        accept_averages(self.model, averages, orders)
        self._handles = refuse_older_state(self.model, self.optimizer, orders, order)
        self.apply()
        for _, weight, dropped in self._averaged:
            _fill(weight, dropped)
        self._handles.append(self.optimizer.register_step_pre_hook(self._before_step))
        self._handles.append(self.optimizer.register_step_post_hook(self._after_step))

    @property
    def num_steps(self) -> int:
        """Steps of the optimizer seen; a step that a GradScaler skips is none. Under a fused optimizer on a GPU reading it waits."""
        return self._calls - int(self._skipped)

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # LBFGS and others evaluate the closure several times inside one step: each evaluation sees the pruned network, and with the
        # gradients masked every search direction stays in the space of the kept weights.
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            return None

        def masked() -> Any:
            self.apply()
            loss = closure()
            self.mask_gradients()
            return loss

        return ((args[0], masked, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": masked})

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls += 1
        # A GradScaler lets a fused optimizer skip inside its kernel, and says so in a tensor, which is counted without waiting for it.
        found_inf = getattr(optimizer, "found_inf", None)
        if isinstance(found_inf, Tensor):
            self._skipped = self._skipped.to(found_inf.device) + (found_inf != 0).any()
        self.apply()

    def apply(self) -> None:
        """Set every pruned weight to exactly +0."""
        for index, (name, weight, dropped) in enumerate(self._held):
            if dropped.device != weight.device:
                dropped = dropped.to(weight.device)
                self._held[index] = (name, weight, dropped)
            _fill(weight, dropped)

    def mask_gradients(self) -> None:
        """Set the gradients of the pruned weights to +0, so that what reads them next (clipping, logging) sees the kept weights only.

        Call it before `clip_grad_norm_` if the norm should not count the pruned places; holding itself does not need it.
        """
        for _, weight, dropped in self._held:
            if weight.grad is not None:
                _fill(weight.grad, dropped.to(weight.grad.device))

    def check(self) -> None:
        """Do nothing if every pruned weight, of the model and of the averages, is zero and still the model's own.

        Raises:
            VerificationError: something else than the held optimizer changed the weights; names the first weight.
        """
        parameters = dict(self.model.named_parameters())
        for name, weight, _ in self._held:
            if parameters.get(name) is not weight:
                raise VerificationError(
                    f"hold: parameter {name!r} was replaced after hold was called, expected the same object; "
                    "call hold last, after loading, wrapping and moving the model"
                )
        for pairs, where in ((self._held, "the model"), (self._averaged, "ema")):
            for name, count in _violations(pairs).items():
                if count:
                    raise VerificationError(
                        f"hold: weight {name!r} of {where} has {count} non-zeros where it was pruned, expected none; a copied or unpickled "
                        "optimizer (it has lost its hooks), an average begun before pruning, or a loaded state changed it: "
                        "call hold again with what is in use"
                    )

    def violations(self) -> dict[str, int]:
        """Return, by name, how many pruned elements of this process's piece of each weight are not zero."""
        return _violations(self._held)

    def set_mask(self, name: str, mask: Tensor) -> None:
        """Hold `name` by another mask from now on; what it drops becomes zero at once.

        Raises:
            InputError: no such weight, or another shape.
        """
        if name not in self.masks:
            raise InputError(f"hold: the mask {name!r} belongs to no held weight{nearest(name, self.masks)}")
        (pair,) = _paired(self.model, {name: mask}, "the model")
        self.masks[name] = mask
        self._held[list(self.masks).index(name)] = pair
        _fill(pair[1], pair[2])

    def remove(self) -> None:
        """Stop holding; the weights keep their values. Calling it again does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> "Hold":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()
        if kind is None:
            self.check()


Pair = tuple[str, nn.Parameter, Tensor]


def _violations(pairs: Sequence[Pair]) -> dict[str, int]:
    return {name: int(torch.count_nonzero((local(w.detach()) != 0) & dropped.to(w.device))) for name, w, dropped in pairs}


@torch.no_grad()
def _fill(weight: Tensor, dropped: Tensor) -> None:
    fill_zero(local(weight.detach()), dropped)


def _modules(ema: nn.Module | Iterable[nn.Module]) -> tuple[nn.Module, ...]:
    averages: tuple[Any, ...] = tuple(ema) if isinstance(ema, Iterable) and not isinstance(ema, nn.Module) else (ema,)
    for average in averages:
        if not isinstance(average, nn.Module):
            raise InputError(f"hold: ema is {average!r:.40}, expected a module (AveragedModel or a copy of the model) or several")
    return averages


def _paired(model: nn.Module, masks: Mapping[str, Tensor], where: str) -> list[Pair]:
    """Return name, parameter and this process's piece of the inverted mask, for each mask."""
    parameters = dict(model.named_parameters())
    pairs = []
    for name, mask in masks.items():
        if name not in parameters:
            raise InputError(
                f"hold: the mask {name!r} belongs to no parameter of {where}; give the model that was pruned, in the same wrapping"
            )
        weight = parameters[name]
        if weight.shape != mask.shape:
            raise InputError(
                f"hold: mask {name!r} has shape {list(mask.shape)}, its weight in {where} {list(weight.shape)}; prune the model again"
            )
        pairs.append((name, weight, ~piece_like(mask, weight)))
    return pairs


def _named_as(masks: Mapping[str, Tensor], model: nn.Module) -> nn.Module:
    """Return `model` if the masks go by its names (it was pruned in its wrapping), else what it wraps."""
    inner = unwrap_model(model)
    return model if inner is not model and masks.keys() <= dict(model.named_parameters()).keys() else inner


def hold(
    model: nn.Module,
    optimizer: Any,
    pruning: Pruning | None = None,
    *,
    ema: nn.Module | Iterable[nn.Module] = (),
    orders: Orders | None = None,
) -> Hold:
    """Keep the pruned weights of `model` exactly zero after every step of `optimizer` and return the handle.

    Works with any optimizer derived from `torch.optim.Optimizer`, fused and compiled steps, `GradScaler`, gradient accumulation, DDP,
    FSDP2 and ZeRO, because it uses the optimizer's public hooks; the wrappers of Accelerate and Lightning are taken off. Call it last,
    after the model is wrapped and the optimizer made. Nothing global is touched: several models can be held at once.

    Clipping before the step sees the gradients of the pruned places too; `handle.mask_gradients()` before it takes them out.

    Args:
        pruning: what `prune` returned; without it the masks are those of the weights that are 2:4 now.
        ema: averages of the model (`AveragedModel` or any module with the same names): masked once, and zeros average to zero. A copy
            begun before pruning that is not given here is not seen: it brings the pruned weights back where it is used.
            `handle.check()` finds them only once they are loaded into `model`, `twofour.export` only with `pruning=`.
        orders: name → axis → old index of every new place, of the reordering that the optimizer's state and the averages must follow; by
            default the one the model carries from `permute`, `{}` for none. A model loaded in a new process carries none; there the
            record `pruning` says which reordering the optimizer's state must be marked with. Without the record it cannot be known.

    Raises:
        InputError: no weight is 2:4, the optimizer trains none of them, `ema` is of another model, the optimizer's state or an
            average is older than the reordering, or `pruning` is of another reordering than the model carries.
    """
    masks = pruning.masks if pruning is not None and pruning.masks else derive_masks(model)
    if not masks:
        dense, total = count_dense_groups(model)
        raise InputError(
            f"hold: no weight of the model is 2:4, expected a pruned model; call twofour.prune first, or if that was done, a step without "
            f"the hooks (a copied or unpickled optimizer has lost them) has filled pruned places since ({dense} of {total} groups hold "
            "more than two non-zeros now): restore the pruned checkpoint, or pass pruning="
        )
    order = pruning.order if pruning is not None else ""
    return Hold(model, optimizer, masks, ema=ema, orders=orders, order=order)
