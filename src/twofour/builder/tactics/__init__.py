"""Ways to compute one operation, our kernels and the libraries' beside each other; the fastest measured one is used."""

from twofour.builder.tactics.gemm import Choice, Tactic, choose, prepare, tactics

__all__ = ["Choice", "Tactic", "choose", "prepare", "tactics"]
