"""torchvision beside a torch it was not compiled for.

The CUDA build of torchvision imports beside a CPU build of torch as long as two operators exist that its compiled part would have
declared; they are declared here, without an implementation, and only then.
"""

from types import ModuleType
from typing import Any

from twofour.errors import MissingExtraError

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[Any] = []


def import_torchvision() -> ModuleType:
    """Return the torchvision module.

    Raises:
        MissingExtraError: torchvision is not installed.
    """
    import torch

    for name in ("nms", "qnms"):
        try:
            getattr(torch.ops.torchvision, name)
        except AttributeError:
            _declared.append(torch.library.define(f"torchvision::{name}", _SCHEMA))
    try:
        import torchvision  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtraError(f"torchvision cannot be imported ({error}); pip install 'twofour[vision]'") from error
    module: ModuleType = torchvision
    return module
