"""The plan: what an engine needs to run, as one safetensors file."""

from twofour.plan.record import Plan, ValueSpec

__all__ = ["Plan", "ValueSpec"]
