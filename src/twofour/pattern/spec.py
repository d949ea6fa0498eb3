"""The patterns by name: `2:4`, any `N:M`, and `2:4 transposable`."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from twofour.errors import InputError
from twofour.pattern.mask import select
from twofour.pattern.transposable import select_transposable


@dataclass(frozen=True)
class Pattern:
    """At most `n` non-zeros in every `m` consecutive weights along the reduction axis; `transposable`: along the output axis too."""

    n: int = 2
    m: int = 4
    transposable: bool = False

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" + (" transposable" if self.transposable else "")

    @property
    def is_24(self) -> bool:
        """Whether a weight of this pattern runs on Sparse Tensor Cores: every weight of it is 2:4."""
        return self.m == 4 and self.n <= 2

    @classmethod
    def parse(cls, text: "str | Pattern") -> "Pattern":
        """Return the pattern named `text`.

        Raises:
            InputError: not `N:M` with 0 < N < M, or `2:4 transposable`.
        """
        if isinstance(text, Pattern):
            return text
        match = re.fullmatch(r"(\d{1,3}):(\d{1,3})( transposable)?", text)
        if match:
            n, m, transposable = int(match[1]), int(match[2]), bool(match[3])
            if 0 < n < m and (not transposable or (n, m) == (2, 4)):
                return cls(n, m, transposable)
        raise InputError(f"pattern {text!r} is unknown, expected N:M with 0 < N < M such as '2:4' or '4:8', or '2:4 transposable'")

    def why_not(self, shape: tuple[int, ...]) -> str:
        """Return why a weight `[out, in, *kernel]` of this shape cannot have the pattern, or an empty string."""
        if shape[1] % self.m:
            return f"{shape[1]} input channels are not a multiple of {self.m}"
        if self.transposable and shape[0] % 4:
            return f"{shape[0]} output channels are not a multiple of 4"
        return ""

    def mask(self, weight: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Return the mask of largest kept magnitude, True where kept; `weight` floating `[out, in, *kernel]`."""
        return select_transposable(weight) if self.transposable else select(weight, 1, self.n, self.m)
