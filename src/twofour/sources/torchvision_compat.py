"""torchvision beside a torch it was not compiled for.

The CUDA build of torchvision fails to import beside a CPU build of torch, because its Python part describes two operators that only its
compiled part would have declared. Declared here, without an implementation, they let it import. They are declared only after an import
has failed for want of them: beside its own torch the compiled part declares them, and a second declaration aborts the process.
"""

import sys
from types import ModuleType
from typing import Any

from twofour.errors import MissingExtraError

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[Any] = []


def import_torchvision() -> ModuleType:
    """Return the torchvision module.

    Raises:
        MissingExtraError: torchvision is not installed, or cannot be imported beside this torch.
    """
    try:
        return _imported()
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise MissingExtraError(f"torchvision cannot be imported beside this torch ({error}); install a matching pair") from error
    import torch

    for name in ("nms", "qnms"):
        _declared.append(torch.library.define(f"torchvision::{name}", _SCHEMA))
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    return _imported()


def _imported() -> ModuleType:
    try:
        import torchvision
    except ImportError as error:
        raise MissingExtraError(f"torchvision cannot be imported ({error}); pip install torchvision") from error
    module: ModuleType = torchvision
    return module
