"""What can go wrong, one kind a cause. Each message is one sentence: where, what was expected, what came, what to do."""

import difflib
from collections.abc import Iterable


class TwofourError(Exception):
    """Base of every error this package raises on purpose; the command line prints it as one sentence and exits with 2."""


class InputError(TwofourError, ValueError):
    """An argument, file or setting given by the user cannot be used."""


class UserCodeError(InputError):
    """Code that the user brought (a model, a metric, a loss, a data set) raised, or returned what cannot be used."""


class MissingExtraError(TwofourError, ImportError):
    """An optional package is needed and absent; the message holds the pip line."""


class UnsupportedError(TwofourError, NotImplementedError):
    """The request is valid but cannot be carried out here: this GPU, this operator, this model."""


class VerificationError(TwofourError):
    """A transformation did not reproduce what it was given; its result is discarded."""


class PlanFormatError(InputError):
    """A plan file is malformed, damaged or made by an incompatible version."""


class TrainingError(TwofourError, RuntimeError):
    """Training cannot go on (the loss is not finite, for example)."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the known name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
