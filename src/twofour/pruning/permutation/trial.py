"""Random networks built of pieces: whatever may move is moved at random, and nothing may change.

Networks are captured several at a time, which shares the fixed cost of a capture; each is judged by its own outputs.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from twofour.pruning.permutation import pieces_images, pieces_tokens
from twofour.pruning.permutation.analysis import analyse
from twofour.pruning.permutation.apply import Moves, Reordering, apply_, atom_order, moves_of
from twofour.pruning.permutation.capture import Inputs, capture, quiet, set_mode
from twofour.pruning.permutation.pieces import IMAGE, TOKENS
from twofour.pruning.permutation.proof import LIMIT, difference, redraw, run, tensors_of, widened
from twofour.pruning.permutation.spaces import derive

CHANNELS = 16
# Importing the pieces enters them into their tables.
FAMILIES = (pieces_images, pieces_tokens)


class Network(nn.Module):
    """A stem, pieces on images, pieces on tokens, and one or two heads."""

    def __init__(self, images: Sequence[str], tokens: Sequence[str], *, two_heads: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.images = nn.ModuleList(IMAGE[name](CHANNELS) for name in images)
        self.patches = nn.Conv2d(CHANNELS, CHANNELS, 2, stride=2) if tokens else None
        self.tokens = nn.ModuleList(TOKENS[name](CHANNELS) for name in tokens)
        self.head = nn.Linear(CHANNELS, 5)
        self.second = nn.Conv2d(CHANNELS, 4, 1) if two_heads else None
        self.pieces = (*images, *tokens)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.stem(x)
        for piece in self.images:
            y = piece(y)
        outputs = [self.second(y).mean((2, 3))] if self.second is not None else []
        if self.patches is not None:
            t = self.patches(y).flatten(2).transpose(1, 2)
            for piece in self.tokens:
                t = piece(t)
            pooled = t.mean(1)
        else:
            pooled = y.mean((2, 3))
        return (self.head(pooled), *outputs)


class Several(nn.Module):
    """Networks that see the same input."""

    def __init__(self, networks: Sequence[Network]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> tuple[tuple[Tensor, ...], ...]:
        return tuple(network(x) for network in self.networks)


def random_network(rng: random.Random) -> Network:
    """One to three image pieces, and in two of five networks one or two token pieces."""
    images = rng.choices(list(IMAGE), k=rng.randint(1, 3))
    tokens = rng.choices(list(TOKENS), k=rng.randint(1, 2)) if rng.random() < 0.4 else []
    return Network(images, tokens, two_heads=rng.random() < 0.2)


@dataclass
class Outcome:
    """What came of some networks.

    Attributes:
        networks: how many there were.
        permuted: in how many at least one weight was moved along its input channels.
        worst: largest relative difference of any output.
        failures: pieces of each network that changed, with its error, and captures that failed.
    """

    networks: int = 0
    permuted: int = 0
    worst: float = 0.0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __iadd__(self, other: "Outcome") -> "Outcome":
        self.networks += other.networks
        self.permuted += other.permuted
        self.worst = max(self.worst, other.worst)
        self.failures += other.failures
        self.seconds += other.seconds
        return self


def moved_inputs(moves: Moves, network: int) -> list[str]:
    """Weights of one network, head apart, that moved along their input channels."""
    mine = f"networks.{network}."
    return [name for name, axes in moves.items() if name.startswith(mine) and 1 in axes]


def shuffle(networks: Sequence[Network], seed: int, *, thorough: bool = True) -> tuple[Outcome, list[list[str]]]:
    """Move everything that may move, at random, and compare each network with itself before.

    Args:
        thorough: capture with an open batch and training as well; otherwise evaluation at a fixed batch.

    Returns:
        The outcome, and for each network the weights that moved along their input channels.
    """
    started = time.monotonic()
    model = Several(networks)
    inputs = Inputs.of(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed)))
    captures, reason = capture(model, inputs, ("eval", "train") if thorough else ("eval",), open_batch=thorough)
    if reason:
        names = [" ".join(n.pieces) for n in networks]
        return Outcome(len(networks), failures=[f"{reason}: {names}"]), [[] for _ in networks]
    analysis = analyse(model, captures)
    spaces = derive(analysis.ledger)
    rng = np.random.default_rng(seed)
    found = [Reordering(orbit, rng.permutation(orbit.size)) for orbit in spaces.orbits]
    moves = moves_of(analysis.held, atom_order(analysis.ledger.num_atoms, found))
    errors = _errors(model, inputs, moves)
    moved = [moved_inputs(moves, k) for k in range(len(networks))]
    failures = [f"error {e:.1e}: {' '.join(n.pieces)}" for n, e in zip(networks, errors, strict=True) if not e <= LIMIT]
    return Outcome(len(networks), sum(bool(m) for m in moved), max(errors), failures, time.monotonic() - started), moved


def _errors(model: Several, inputs: Inputs, moves: Moves) -> list[float]:
    """Largest relative difference of each network, as it is and redrawn, at two batch sizes."""
    twin = widened(model)
    assert isinstance(twin, Several)
    double = inputs.map(lambda t: t.double())
    sized = [double, double.resized(3)]
    errors = [0.0] * len(model.networks)
    with quiet(twin):
        set_mode(twin, "eval")
        for again in (False, True):
            if again:
                redraw(twin)
            before = [[run(n, s) for n in twin.networks] for s in sized]
            apply_(tensors_of(twin), moves)
            for results, s in zip(before, sized, strict=True):
                for k, (old, n) in enumerate(zip(results, twin.networks, strict=True)):
                    errors[k] = max(errors[k], difference(old, run(n, s)))
    return errors


def trial(count: int, *, seed: int = 0, together: int = 25, progress: Callable[[Outcome], None] | None = None) -> Outcome:
    """`count` random networks from a seed; one bundle in sixteen is captured with training and an open batch.

    Args:
        together: networks to a capture.
    """
    rng = random.Random(seed)
    total = Outcome()
    while total.networks < count:
        number = rng.randrange(1 << 30)
        torch.manual_seed(number)
        networks = [random_network(rng) for _ in range(min(together, count - total.networks))]
        total += shuffle(networks, number, thorough=rng.random() < 0.0625)[0]
        if progress is not None:
            progress(total)
    return total
