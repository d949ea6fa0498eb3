"""The plan: what an engine needs to run, as one safetensors file."""

from twofour.plan.program import Program, Step, Value
from twofour.plan.record import Plan, ValueSpec

__all__ = ["Plan", "Program", "Step", "Value", "ValueSpec"]
