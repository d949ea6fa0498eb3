"""ONNX + device → Plan."""

from twofour.builder.build import build
from twofour.builder.estimate import Estimate, estimate
from twofour.builder.gpu import measure_gain
from twofour.builder.record import BuildRecord, LayerRecord, records_of

__all__ = ["BuildRecord", "Estimate", "LayerRecord", "build", "estimate", "measure_gain", "records_of"]
