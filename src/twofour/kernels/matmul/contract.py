"""The contract of the batched matrix products, whose operands are both activations; a library tactic only.

    D[b, i, j] = scale * sum_k A[b, i, k] B[b, k, j],  fp32 accumulation

Everything here is a pure function of plain values.
"""

from dataclasses import dataclass

from twofour.errors import InputError
from twofour.kernels.operands import DTYPE_BYTES, FLOAT16, MAX_ELEMS, Footprint, check_dtype, check_sizes

Strides = tuple[int, int, int]


@dataclass(frozen=True)
class Problem:
    """One batched product as asked.

    Attributes:
        batch, rows, columns, depth: D is `[batch, rows, columns]`, A `[batch, rows, depth]`, B `[batch, depth, columns]`.
        dtype: of all operands. scale: factor of the product.
        a_strides, b_strides, d_strides: in elements, in the order of those axes; one of the last two is 1, so that an operand lies
            row by row or transposed; batch 0 means that all share one matrix (A and B only). None: row by row, nothing between.
    """

    batch: int
    rows: int
    columns: int
    depth: int
    dtype: str = "fp16"
    scale: float = 1.0
    a_strides: Strides | None = None
    b_strides: Strides | None = None
    d_strides: Strides | None = None

    def __post_init__(self) -> None:
        check_sizes(1, batch=self.batch, rows=self.rows, columns=self.columns, depth=self.depth)
        check_dtype("dtype", self.dtype, FLOAT16)
        if not abs(self.scale) < 2.0**60:
            raise InputError(f"scale is {self.scale}, expected a finite number")
        for name in "abd":
            strides, shape = self.strides(name), self.shape(name)
            if any(isinstance(s, bool) or not 0 <= s <= MAX_ELEMS for s in strides):
                raise InputError(f"{name}_strides are {strides}, expected whole numbers from 0 to {MAX_ELEMS}")
            row, column = strides[1:]
            if not (column == 1 and row >= shape[2]) and not (row == 1 and column >= shape[1]):
                raise InputError(f"{name}_strides are {strides} for {shape}, expected rows or columns of neighbours that do not overlap")
            if name == "d" and (column != 1 or (self.batch > 1 and strides[0] < (shape[1] - 1) * row + shape[2])):
                raise InputError(f"d_strides are {strides} for {shape}, expected rows of neighbours in matrices that do not overlap")

    def shape(self, name: str) -> tuple[int, int, int]:
        """Return the shape of "a", "b" or "d"."""
        return {
            "a": (self.batch, self.rows, self.depth),
            "b": (self.batch, self.depth, self.columns),
            "d": (self.batch, self.rows, self.columns),
        }[name]

    def strides(self, name: str) -> Strides:
        """Return the strides of "a", "b" or "d"."""
        given: Strides | None = getattr(self, f"{name}_strides")
        _, rows, columns = self.shape(name)
        return given or (rows * columns, columns, 1)

    @property
    def flops(self) -> int:
        """2 x batch x rows x columns x depth."""
        return 2 * self.batch * self.rows * self.columns * self.depth

    @property
    def num_bytes(self) -> int:
        """Bytes of A, B and D, each once."""
        elems = self.rows * self.depth + self.depth * self.columns + self.rows * self.columns
        return DTYPE_BYTES[self.dtype] * self.batch * elems


def footprints(problem: Problem) -> dict[str, Footprint]:
    """Return what a launch touches: `a`, `b` and `d`."""
    found = {}
    for name in "abd":
        shape, strides = problem.shape(name), problem.strides(name)
        elements = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        found[name] = Footprint(problem.dtype, elements, writes=name == "d")
    return found
