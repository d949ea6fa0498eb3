"""What 2:4 is: which two of four are kept, whether a weight obeys, and how it is packed. Exact and pure."""

from twofour.pattern.mask import GroupCount, count_groups, select
from twofour.pattern.spec import Pattern
from twofour.pattern.transposable import select_transposable

__all__ = ["GroupCount", "Pattern", "count_groups", "select", "select_transposable"]
