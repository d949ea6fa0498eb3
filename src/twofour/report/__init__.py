"""Accuracy, speed and memory of anything runnable → the report."""

from twofour.report.measure import Measurement, measure
from twofour.report.record import Report

__all__ = ["Measurement", "Report", "measure"]
