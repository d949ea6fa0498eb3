"""What 2:4 is: which two of four are kept, whether a weight obeys, and how it is packed. Exact and pure."""

from twofour.pattern.mask import GroupCount, count_groups, select

__all__ = ["GroupCount", "count_groups", "select"]
