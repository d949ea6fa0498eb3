"""The contract of the attention family: scaled dot-product attention over heads.

    O = softmax(scale Q . K^T) . V  for every image and head;  causal: token t sees keys 0 .. t only

Everything here is a pure function of plain values.
"""

from dataclasses import dataclass

from twofour.errors import InputError
from twofour.kernels.operands import DTYPE_BYTES, FLOAT16, MAX_ELEMS, Footprint, check_dtype, check_sizes
from twofour.kernels.pointwise.contract import span

Strides = tuple[int, int, int, int]


@dataclass(frozen=True)
class Problem:
    """One attention as asked.

    Attributes:
        batch, heads, tokens, keys: of Q `[batch, heads, tokens, head]` and of K, V `[batch, heads, keys, head]`.
        head: features of a head, a multiple of 8. scale: factor of the products, often 1 / sqrt(head).
        causal: whether later keys are hidden. dtype: of all operands.
        q_strides, k_strides, v_strides, o_strides: in elements, in the order (image, head, token, feature), the last 1; None: tokens
            hold their heads side by side, `[batch, tokens, heads, head]`. A projection that yields Q, K and V together is three views.
    """

    batch: int
    heads: int
    tokens: int
    keys: int
    head: int
    scale: float
    causal: bool = False
    dtype: str = "fp16"
    q_strides: Strides | None = None
    k_strides: Strides | None = None
    v_strides: Strides | None = None
    o_strides: Strides | None = None

    def __post_init__(self) -> None:
        check_sizes(1, batch=self.batch, heads=self.heads, tokens=self.tokens, keys=self.keys, head=self.head)
        check_dtype("dtype", self.dtype, FLOAT16)
        if not 0.0 < self.scale < 2.0**20:
            raise InputError(f"scale is {self.scale}, expected a positive number")
        if self.causal and self.tokens != self.keys:
            raise InputError(f"causal attention of {self.tokens} tokens over {self.keys} keys, expected as many of both")
        for name, strides in (("q", self.q_strides), ("k", self.k_strides), ("v", self.v_strides), ("o", self.o_strides)):
            if strides is not None and (any(isinstance(s, bool) or not 0 <= s <= MAX_ELEMS for s in strides) or strides[3] != 1):
                raise InputError(f"{name}_strides are {strides}, expected whole numbers from 0 to {MAX_ELEMS} with 1 for the features")

    def strides(self, name: str) -> Strides:
        """Return the strides of "q", "k", "v" or "o"."""
        given: Strides | None = getattr(self, f"{name}_strides")
        line = self.heads * self.head
        return given or ((self.tokens if name in "qo" else self.keys) * line, self.head, line, 1)

    def shape(self, name: str) -> tuple[int, int, int, int]:
        """Return the shape of "q", "k", "v" or "o" in the order of the strides."""
        return self.batch, self.heads, self.tokens if name in "qo" else self.keys, self.head

    @property
    def flops(self) -> int:
        """4 x batch x heads x tokens x keys x head; half of it when causal."""
        return 4 * self.batch * self.heads * self.tokens * self.keys * self.head // (2 if self.causal else 1)

    @property
    def num_bytes(self) -> int:
        """Bytes of Q, K, V and O, each once."""
        return 2 * DTYPE_BYTES[self.dtype] * self.batch * self.heads * self.head * (self.tokens + self.keys)


def footprints(problem: Problem) -> dict[str, Footprint]:
    """Return what a launch touches: `q`, `k`, `v` and `d`."""
    found = {n: Footprint(problem.dtype, span(problem.shape(n), problem.strides(n))) for n in "qkv"}
    found["d"] = Footprint(problem.dtype, span(problem.shape("o"), problem.strides("o")), writes=True)
    return found
