"""Plan + inputs → outputs. Needs neither torch nor onnx nor a compiler."""

from twofour.runtime.engine import Engine, load

__all__ = ["Engine", "load"]
