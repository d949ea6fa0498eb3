"""The contract of the convolution family.

    Y[n, p, q, k] = activation(sum_{r, s, c} X[n, p sh + r dh - top, q sw + s dw - left, c] W[k, r, s, c] + bias[k] + residual[n, p, q, k])

X and Y are NHWC, W is KRSC, accumulation in fp32. Everything here is a pure function of plain values.
"""

from dataclasses import dataclass, field

from twofour.errors import InputError, nearest
from twofour.kernels.gemm import contract as gemm
from twofour.kernels.operands import DTYPE_BYTES, FLOAT16, Footprint, check_dtype, check_pitch, check_sizes

ACTIVATIONS = ("none", "relu", "relu6", "sigmoid", "gelu", "gelu_tanh", "silu", "hardswish")


@dataclass(frozen=True)
class Epilogue:
    """What is fused behind the convolution: `y = activation(acc + bias + residual)`.

    Attributes:
        activation: one of `ACTIVATIONS`; `gelu` is the erf form.
        bias: a vector, one addend an output channel; its type is `bias_dtype` of the tactic.
        residual: an image of the output's type and shape, added before the activation.
    """

    activation: str = "none"
    bias: bool = False
    residual: bool = False

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            hint = nearest(str(self.activation), ACTIVATIONS)
            raise InputError(f"activation {self.activation!r} is not one of {', '.join(ACTIVATIONS)}{hint}")


@dataclass(frozen=True)
class Problem:
    """One convolution as asked.

    Attributes:
        batch, height, width, inputs: of X. outputs: channels of Y.
        kernel, strides, dilations: (vertical, horizontal). pads: (top, left, bottom, right). groups: divides inputs and outputs.
        dtype: of X, W, Y and the residual. sparse: whether W is 2:4 along the input channels.
        x_pitch, y_pitch, residual_pitch: elements from pixel to pixel; None: they follow each other. A wider one is a slice of the
            channels of a larger image; all lines and images then have that pitch.
    """

    batch: int
    height: int
    width: int
    inputs: int
    outputs: int
    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)
    groups: int = 1
    dtype: str = "fp16"
    sparse: bool = False
    epilogue: Epilogue = field(default_factory=Epilogue)
    x_pitch: int | None = None
    y_pitch: int | None = None
    residual_pitch: int | None = None

    def __post_init__(self) -> None:
        check_sizes(1, batch=self.batch, height=self.height, width=self.width, inputs=self.inputs, outputs=self.outputs)
        check_sizes(1, groups=self.groups, kernel_height=self.kernel[0], kernel_width=self.kernel[1])
        check_sizes(1, stride_height=self.strides[0], stride_width=self.strides[1])
        check_sizes(1, dilation_height=self.dilations[0], dilation_width=self.dilations[1])
        check_sizes(0, **dict(zip(("pad_top", "pad_left", "pad_bottom", "pad_right"), self.pads, strict=True)))
        check_dtype("dtype", self.dtype, FLOAT16)
        if self.inputs % self.groups or self.outputs % self.groups:
            raise InputError(f"groups is {self.groups}, expected a divisor of {self.inputs} inputs and {self.outputs} outputs")
        if min(self.out_height, self.out_width) < 1:
            raise InputError(
                f"a kernel of {self.kernel[0]}x{self.kernel[1]} does not fit {self.height}x{self.width} pixels with pads {self.pads}; "
                "use a larger image"
            )
        check_pitch("x_pitch", self.x_pitch, self.inputs)
        check_pitch("y_pitch", self.y_pitch, self.outputs)
        check_pitch("residual_pitch", self.residual_pitch, self.outputs)

    @property
    def out_height(self) -> int:
        """Rows of Y."""
        return (self.height + self.pads[0] + self.pads[2] - self.dilations[0] * (self.kernel[0] - 1) - 1) // self.strides[0] + 1

    @property
    def out_width(self) -> int:
        """Columns of Y."""
        return (self.width + self.pads[1] + self.pads[3] - self.dilations[1] * (self.kernel[1] - 1) - 1) // self.strides[1] + 1

    @property
    def pixels(self) -> int:
        """Pixels of Y over the batch."""
        return self.batch * self.out_height * self.out_width

    @property
    def weight_elems(self) -> int:
        """Elements of W."""
        return self.outputs * self.kernel[0] * self.kernel[1] * (self.inputs // self.groups)

    @property
    def flops(self) -> int:
        """Effective operations: 2 x pixels x weights, zeros and padding counted."""
        return 2 * self.pixels * self.weight_elems

    @property
    def num_bytes(self) -> int:
        """Bytes of X, W, Y and the residual, each once."""
        out = self.pixels * self.outputs * (2 if self.epilogue.residual else 1)
        return DTYPE_BYTES[self.dtype] * (self.batch * self.height * self.width * self.inputs + self.weight_elems + out)

    def x_strides(self) -> tuple[int, int, int, int]:
        """Strides of X in elements, in the order image, channel, row, column."""
        return _strides(self.x_pitch or self.inputs, self.height, self.width)

    def y_strides(self) -> tuple[int, int, int, int]:
        """Strides of Y, as `x_strides`."""
        return _strides(self.y_pitch or self.outputs, self.out_height, self.out_width)

    def residual_strides(self) -> tuple[int, int, int, int]:
        """Strides of the residual, as `x_strides`."""
        return _strides(self.residual_pitch or self.outputs, self.out_height, self.out_width)


def _strides(pitch: int, height: int, width: int) -> tuple[int, int, int, int]:
    return height * width * pitch, 1, width * pitch, pitch


def as_gemm(problem: Problem) -> gemm.Problem | None:
    """Return the matrix product that `problem` is (1x1, stride 1, no pads, one group, nothing between pixels), or None when it is none."""
    p, e = problem, problem.epilogue
    plain = p.kernel == (1, 1) and p.strides == (1, 1) and p.pads == (0, 0, 0, 0) and p.groups == 1
    packed = p.x_pitch in (None, p.inputs) and p.y_pitch in (None, p.outputs) and (not e.residual or p.residual_pitch in (None, p.outputs))
    if not plain or not packed or p.inputs % 8 or p.outputs % 8 or e.activation not in gemm.ACTIVATIONS or p.pixels > gemm.MAX_DIM:
        return None
    epilogue = gemm.Epilogue(e.activation, bias=e.bias, residual=e.residual)
    return gemm.Problem(p.pixels, p.outputs, p.inputs, p.dtype, p.dtype, p.sparse, epilogue)


def footprints(problem: Problem, bias_dtype: str = "fp32") -> dict[str, Footprint]:
    """Return what a launch touches: `x`, `weight`, `d`, and `bias`, `residual` where they are added."""
    p, e = problem, problem.epilogue
    x_pitch, y_pitch = p.x_pitch or p.inputs, p.y_pitch or p.outputs
    found = {
        "x": Footprint(p.dtype, (p.batch * p.height * p.width - 1) * x_pitch + p.inputs),
        "weight": Footprint(p.dtype, p.weight_elems),
        "d": Footprint(p.dtype, (p.pixels - 1) * y_pitch + p.outputs, writes=True),
    }
    if e.bias:
        found["bias"] = Footprint(bias_dtype, p.outputs)
    if e.residual:
        found["residual"] = Footprint(p.dtype, (p.pixels - 1) * (p.residual_pitch or p.outputs) + p.outputs)
    return found
