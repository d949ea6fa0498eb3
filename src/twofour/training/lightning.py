"""Masks held in a Lightning training: `Trainer(callbacks=[HoldMasks()])`."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from twofour.errors import InputError, MissingExtraError
from twofour.pruning import Pruning
from twofour.training.hold import Hold, hold
from twofour.training.wrapped import unwrap_optimizer

try:
    from lightning.pytorch import Callback
except ImportError as error:
    raise MissingExtraError("twofour.training.lightning needs Lightning, which cannot be imported; run: pip install lightning") from error


class HoldMasks(Callback):  # type: ignore[misc]
    """Holds the masks from the first step to the end of the fit, under every optimizer that trains a pruned weight.

    Args:
        pruning: what `twofour.prune` returned; without it the masks are those of the weights that are 2:4 when the fit starts, which is
            also right when it goes on from a checkpoint.
        module: dotted name, inside the LightningModule, of the network that was pruned; empty for the LightningModule itself.
        ema: averages of that network, as of `twofour.hold`.

    At the end of the fit the weights are checked, so an average swapped in by another callback is not taken for the pruned network.
    """

    def __init__(self, pruning: Pruning | None = None, module: str = "", ema: nn.Module | Sequence[nn.Module] = ()) -> None:
        self.pruning, self.module, self.ema = pruning, module, ema
        self.handles: list[Hold] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Hold; checkpoints are loaded and models wrapped by now."""
        network = pl_module.get_submodule(self.module)
        own = {id(p) for p in network.parameters() if p.ndim > 1}
        trained = [o for o in trainer.optimizers if own & {id(p) for group in unwrap_optimizer(o).param_groups for p in group["params"]}]
        if not trained:
            raise InputError(f"HoldMasks: no optimizer of the fit trains the module {self.module!r}, expected at least one")
        self.handles = [hold(network, optimizer, self.pruning, ema=self.ema) for optimizer in trained]

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Check that every pruned weight is zero, and let go."""
        handles = self._let_go()
        for handle in handles:
            handle.check()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Let go."""
        self._let_go()

    def _let_go(self) -> list[Hold]:
        handles, self.handles = self.handles, []
        for handle in handles:
            handle.remove()
        return handles
