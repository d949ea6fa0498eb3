"""Channel permutation that is proven harmless: reorder input channels before pruning, so that 2:4 keeps more magnitude."""

from twofour.pruning.permutation.permute import permute
from twofour.pruning.permutation.record import LayerOrder, Permutation, carried, undo

__all__ = ["LayerOrder", "Permutation", "carried", "permute", "undo"]
