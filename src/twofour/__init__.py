"""2:4 structured sparsity from a dense network to a verified, measured engine.

The names below are imported on first use, so `import twofour` stays free of torch, onnx and compilers.
"""

import importlib
from typing import TYPE_CHECKING, Any

from twofour.version import __version__

if TYPE_CHECKING:
    from twofour.builder import build as build
    from twofour.builder import estimate as estimate
    from twofour.compress import compress as compress
    from twofour.exchange import export as export
    from twofour.exchange import inspect as inspect
    from twofour.plan import Plan as Plan
    from twofour.pruning import Permutation as Permutation
    from twofour.pruning import Pruning as Pruning
    from twofour.pruning import permute as permute
    from twofour.pruning import prune as prune
    from twofour.pruning import prune_blocks as prune_blocks
    from twofour.pruning import prune_files as prune_files
    from twofour.pruning import prune_within as prune_within
    from twofour.pruning import sensitivity as sensitivity
    from twofour.report import measure as measure
    from twofour.runtime import Engine as Engine
    from twofour.runtime import load as load
    from twofour.training import Checkpoint as Checkpoint
    from twofour.training import Recipe as Recipe
    from twofour.training import hold as hold
    from twofour.training import train as train

# Public name -> the room that holds it.
_ROOM_OF = {
    "Checkpoint": "training",
    "Engine": "runtime",
    "Permutation": "pruning",
    "Plan": "plan",
    "Pruning": "pruning",
    "Recipe": "training",
    "build": "builder",
    "compress": "compress",
    "estimate": "builder",
    "export": "exchange",
    "hold": "training",
    "inspect": "exchange",
    "load": "runtime",
    "measure": "report",
    "permute": "pruning",
    "prune": "pruning",
    "prune_blocks": "pruning",
    "prune_files": "pruning",
    "prune_within": "pruning",
    "sensitivity": "pruning",
    "train": "training",
}

__all__ = ["__version__", *sorted(_ROOM_OF)]


def __getattr__(name: str) -> Any:
    if name == "nn":
        return importlib.import_module("twofour.nn")
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'twofour' has no attribute {name!r}")
    return getattr(importlib.import_module(f"twofour.{_ROOM_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_ROOM_OF))
