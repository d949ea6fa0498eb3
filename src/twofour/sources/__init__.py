"""What the command line names: a model, its data, its weights. Strings in, modules and tasks out."""

from twofour.sources.data import resolve_task
from twofour.sources.items import ArrayDataset, Inputs, inputs_of
from twofour.sources.models import ModelSource, resolve_model
from twofour.sources.task import Metric, Task
from twofour.sources.weights import load_weights

__all__ = ["ArrayDataset", "Inputs", "Metric", "ModelSource", "Task", "inputs_of", "load_weights", "resolve_model", "resolve_task"]
