"""One table: ATen operation -> how channel order flows through it."""

from twofour.pruning.permutation import rules_layers, rules_views
from twofour.pruning.permutation.table import RULES, Rule

__all__ = ["RULES", "Rule", "rules_layers", "rules_views"]
