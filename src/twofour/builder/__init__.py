"""ONNX + device → Plan."""

from twofour.builder.build import build

__all__ = ["build"]
