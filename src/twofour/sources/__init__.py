"""What the command line names: a model, its data, its weights. Strings in, modules and tasks out."""

from twofour.sources.data import resolve_task
from twofour.sources.models import ModelSource, resolve_model
from twofour.sources.task import ArrayDataset, Metric, Task
from twofour.sources.weights import load_weights

__all__ = ["ArrayDataset", "Metric", "ModelSource", "Task", "load_weights", "resolve_model", "resolve_task"]
