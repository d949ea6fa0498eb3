"""Checkpoint ↔ ONNX: export that is checked, inspection of any file."""

from twofour.exchange.export import Exported, export, refuse_unexportable
from twofour.exchange.inspect import Inspection, WeightVerdict, inspect

__all__ = ["Exported", "Inspection", "WeightVerdict", "export", "inspect", "refuse_unexportable"]
