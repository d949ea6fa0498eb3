"""Masks held in a Hugging Face `Trainer`: `Trainer(..., callbacks=[HoldMasks()])`."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from twofour.errors import MissingExtraError
from twofour.pruning import Pruning
from twofour.training.hold import Hold, hold

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise MissingExtraError(
        "twofour.training.huggingface needs Transformers, which cannot be imported; run: pip install transformers"
    ) from error


class HoldMasks(TrainerCallback):  # type: ignore[misc]
    """Holds the masks from the first step to the end of the training, then checks them.

    Args:
        pruning: what `twofour.prune` returned for the trainer's model; without it the masks are those of the weights that are 2:4 when
            the training starts, which is also right when it goes on from a checkpoint.
        ema: averages of the model, as of `twofour.hold`.
    """

    def __init__(self, pruning: Pruning | None = None, ema: nn.Module | Sequence[nn.Module] = ()) -> None:
        self.pruning, self.ema = pruning, ema
        self.handle: Hold | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **more: Any) -> None:
        """Hold; the optimizer is made and checkpoints are loaded by now."""
        self.handle = hold(model, optimizer, self.pruning, ema=self.ema)

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Check that every pruned weight is zero, and let go."""
        if self.handle is not None:
            handle, self.handle = self.handle, None
            handle.remove()
            handle.check()
