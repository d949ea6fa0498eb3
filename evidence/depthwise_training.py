"""Depthwise 3×3 convolutions for training, in Triton, for where cuDNN takes longer than their bytes need.

Stride 1 or 2, padding 1, one filter a channel, channels last. A thread takes `vec` channels of one column and walks down a strip of `rows`
rows: each row is read as three neighbouring pixels, of which two come from the L1 cache, and serves three rows of the other side from
registers; `ahead` rows are under way while one is computed with. Threads that lie side by side take `part` channels of all columns, so that
a block's neighbours are its own. The weight's gradient sums over images and pixels in as many parts as there are blocks, which are added
in a fixed order, so that a run repeats exactly. Products and sums are fp32.

`evidence/narrow.py` measures these kernels with its own, and `NARROW_CHOICES` names what it wrote. What the bytes take at 4.2 TB/s, 512
images in bf16 (stride 1: forward, input's and weight's gradient each; stride 2: the input once, the output once, a quarter of it):

    channels, size   stride   MB    µs        channels, size   stride   MB    µs
     32, 32            1       67   16.0      192, 16            2       63   15.0
     96, 32            1      201   47.9      384,  8            1       50   12.0
    144, 32            1      302   71.9      576,  8            1       75   18.0
    144, 32            2      189   44.9      576,  8            2       47   11.2
    192, 16            1      101   24.0      960,  4            1       31    7.5
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from kernel_choices import Candidate, Case, Operands, choices, last, library_conv, library_gradients, random_operands
from torch import Tensor, nn

# channels, height and width, stride: those of MobileNetV2's CIFAR form
SHAPES = (
    (32, 32, 1),
    (96, 32, 1),
    (144, 32, 1),
    (144, 32, 2),
    (192, 16, 1),
    (192, 16, 2),
    (384, 8, 1),
    (576, 8, 1),
    (576, 8, 2),
    (960, 4, 1),
)
KINDS = ("depthwise forward", "depthwise input", "depthwise weight")
# channels side by side; for the weight's gradient powers of two, of which those above the channels are masked
PARTS, SUM_PARTS = (16, 32, 48, 64, 96, 144), (32, 64)
MULTIPROCESSORS = 132
# channels a thread, rows a strip, rows ahead, warps, blocks that a multiprocessor's registers are to hold at once
WALKS = (
    (8, 4, 6, 4, 3),
    (8, 8, 3, 4, 2),
    (8, 8, 3, 4, 3),
    (8, 16, 3, 4, 2),
    (4, 4, 6, 4, 5),
    (4, 8, 4, 4, 4),
    (4, 8, 4, 4, 5),
    (4, 8, 6, 8, 2),
    (4, 16, 4, 4, 4),
    (2, 8, 6, 8, 4),
)
# the same for the weight's gradient, which has as many blocks as there are at once
SUMS = (
    (8, 4, 2, 4, 2),
    (8, 4, 2, 4, 3),
    (8, 8, 3, 4, 2),
    (4, 4, 4, 4, 4),
    (4, 4, 4, 4, 5),
    (4, 8, 3, 4, 3),
    (4, 8, 3, 4, 4),
    (4, 16, 3, 4, 2),
    (2, 8, 4, 8, 2),
    (2, 8, 4, 8, 3),
)


@triton.jit
def _three(x, at, is_row, is_left, is_right, channels):  # type: ignore[no-untyped-def]
    """Pixels at `at` and the neighbours of each in its row; zero outside the image."""
    before = tl.load(x + at - channels, mask=is_row & is_left, other=0.0)
    here = tl.load(x + at, mask=is_row, other=0.0)
    after = tl.load(x + at + channels, mask=is_row & is_right, other=0.0)
    return before, here, after


@triton.jit
def _two(x, at, is_row, is_right, channels):  # type: ignore[no-untyped-def]
    """Pixels at `at` and those right of them; zero outside the image."""
    return tl.load(x + at, mask=is_row, other=0.0), tl.load(x + at + channels, mask=is_row & is_right, other=0.0)


@triton.jit
def _row_of_filter(w, at, along_tap, mask):  # type: ignore[no-untyped-def]
    a = tl.load(w + at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(w + at + along_tap, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(w + at + 2 * along_tap, mask=mask, other=0.0).to(tl.float32)
    return a, b, c


@triton.jit
def _add_row(total, pixels, weights):  # type: ignore[no-untyped-def]
    return total + pixels[0] * weights[0] + pixels[1] * weights[1] + pixels[2] * weights[2]


@triton.jit
def _add_products(total, pixels, above):  # type: ignore[no-untyped-def]
    return total[0] + pixels[0] * above, total[1] + pixels[1] * above, total[2] + pixels[2] * above


@triton.jit
def _fp32(x):  # type: ignore[no-untyped-def]
    # NOTE: a shift or a mask an element; a plain conversion becomes two instructions.
    if x.dtype == tl.bfloat16:
        wide = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def _wide(pixels):  # type: ignore[no-untyped-def]
    return _fp32(pixels[0]), _fp32(pixels[1]), _fp32(pixels[2])


@triton.jit
def _items(num_items, columns, strips, channels, part, ITEMS: tl.constexpr, VEC: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which of a block's items are any; their channels `[ITEMS, VEC]`, column, strip and image `[ITEMS, 1]`."""
    item = (tl.program_id(0) * ITEMS + tl.arange(0, ITEMS))[:, None]
    vectors, parts = part // VEC, channels // part
    side = item // vectors
    channel = side // columns % parts * part + item % vectors * VEC + tl.arange(0, VEC)[None, :]
    rest = side // columns // parts
    return item < num_items, channel, side % columns, rest % strips, rest // strips


@triton.jit(do_not_specialize=["num_items", "size", "out_size", "strips", "first_tap", "step"])
def _forward_kernel(  # type: ignore[no-untyped-def]
    x,
    w,
    y,
    num_items,
    size,
    out_size,
    strips,
    first_tap,
    step,
    channels,
    part,
    STRIDE: tl.constexpr,
    ITEMS: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    AHEAD: tl.constexpr,
):
    is_item, channel, column, strip, image = _items(num_items, out_size, strips, channels, part, ITEMS, VEC)
    # The input's gradient takes the taps backwards: from 8 by -1; forward from 0 by 1.
    w += first_tap * channels
    upper = _row_of_filter(w, channel, step * channels, is_item)
    middle = _row_of_filter(w + 3 * step * channels, channel, step * channels, is_item)
    lower = _row_of_filter(w + 6 * step * channels, channel, step * channels, is_item)

    top, along = strip * ROWS * STRIDE - 1, size * channels
    at = ((image * size + top) * size + column * STRIDE) * channels + channel
    is_left, is_right = column > 0, column * STRIDE + 1 < size
    at_y = ((image * out_size + strip * ROWS) * out_size + column) * channels + channel
    zero = tl.zeros([ITEMS, VEC], tl.float32)
    above_it, beside_it = zero, zero
    TOTAL: tl.constexpr = STRIDE * (ROWS - 1) + 3
    ready = (_three(x, at, is_item & (top >= 0) & (top < size), is_left, is_right, channels),)
    for i in tl.static_range(1, AHEAD):
        ready += (_three(x, at + i * along, is_item & (top + i < size), is_left, is_right, channels),)
    for i in tl.static_range(TOTAL):
        pixels = _wide(ready[0])
        ready = ready[1:]
        if i + AHEAD < TOTAL:
            row = top + i + AHEAD
            ready += (_three(x, at + (i + AHEAD) * along, is_item & (row < size), is_left, is_right, channels),)
        # Row i is the lowest of one row of the output, and of the next ones the middle and the upper.
        done = _add_row(above_it, pixels, lower)
        if STRIDE == 1:
            above_it = _add_row(beside_it, pixels, middle)
            beside_it = _add_row(zero, pixels, upper)
        elif i % 2 == 0:
            above_it = _add_row(zero, pixels, upper)
        else:
            above_it = _add_row(above_it, pixels, middle)
        if i >= 2 and (STRIDE == 1 or i % 2 == 0):
            is_out = is_item & (strip * ROWS + (i - 2) // STRIDE < out_size)
            tl.store(y + at_y + (i - 2) // STRIDE * out_size * channels, done.to(y.dtype.element_ty), mask=is_out)


@triton.jit(do_not_specialize=["num_items", "size", "out_size", "strips"])
def _input_kernel(  # type: ignore[no-untyped-def]
    g,
    w,
    y,
    num_items,
    size,
    out_size,
    strips,
    channels,
    part,
    ITEMS: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """The input's gradient at stride 2: pixel (r, c) of the output's gives pixels 2r, 2r + 1 by 2c, 2c + 1, with its next neighbours."""
    is_item, channel, column, strip, image = _items(num_items, out_size, strips, channels, part, ITEMS, VEC)
    upper = _row_of_filter(w, channel, channels, is_item)
    middle = _row_of_filter(w + 3 * channels, channel, channels, is_item)
    lower = _row_of_filter(w + 6 * channels, channel, channels, is_item)

    top = strip * ROWS
    at = ((image * out_size + top) * out_size + column) * channels + channel
    at_y = ((image * size + 2 * top) * size + 2 * column) * channels + channel
    is_right, is_odd = column + 1 < out_size, is_item & (2 * column + 1 < size)
    ready = (_two(g, at, is_item & (top < out_size), is_right, channels),)
    for i in tl.static_range(1, AHEAD):
        ready += (_two(g, at + i * out_size * channels, is_item & (top + i < out_size), is_right, channels),)
    here, right = _fp32(ready[0][0]), _fp32(ready[0][1])
    for i in tl.static_range(ROWS):
        ready = ready[1:]
        if i + AHEAD < ROWS + 1:
            is_row = is_item & (top + i + AHEAD < out_size)
            ready += (_two(g, at + (i + AHEAD) * out_size * channels, is_row, is_right, channels),)
        below, across = _fp32(ready[0][0]), _fp32(ready[0][1])
        # Row 2r + 1 - k of the input has tap k of row r; so has every column.
        to = y + at_y + 2 * i * size * channels
        row = 2 * (top + i)
        even = here * middle[1]
        tl.store(to, even.to(y.dtype.element_ty), mask=is_item & (row < size))
        even = here * middle[2] + right * middle[0]
        tl.store(to + channels, even.to(y.dtype.element_ty), mask=is_odd & (row < size))
        odd = here * lower[1] + below * upper[1]
        tl.store(to + size * channels, odd.to(y.dtype.element_ty), mask=is_item & (row + 1 < size))
        odd = here * lower[2] + right * lower[0] + below * upper[2] + across * upper[0]
        tl.store(to + (size + 1) * channels, odd.to(y.dtype.element_ty), mask=is_odd & (row + 1 < size))
        here, right = below, across


@triton.jit(do_not_specialize=["num_columns", "size", "out_size", "strips", "blocks"])
def _weight_kernel(  # type: ignore[no-untyped-def]
    x,
    g,
    sums,
    num_columns,
    size,
    out_size,
    strips,
    blocks,
    channels,
    STRIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    AHEAD: tl.constexpr,
):
    channel = (tl.program_id(1) * PART + tl.arange(0, PART))[None, :]
    is_channel = channel < channels
    along, along_g = size * channels, out_size * channels
    zero = tl.zeros([COLUMNS, PART], tl.float32)
    upper, middle, lower = (zero, zero, zero), (zero, zero, zero), (zero, zero, zero)
    TOTAL: tl.constexpr = STRIDE * (ROWS - 1) + 3
    for start in range(tl.program_id(0) * COLUMNS, num_columns, blocks * COLUMNS):
        item = (start + tl.arange(0, COLUMNS))[:, None]
        column, strip, image = item % out_size, item // out_size % strips, item // out_size // strips
        is_item = (item < num_columns) & is_channel
        is_left, is_right = column > 0, column * STRIDE + 1 < size
        first = strip * ROWS
        top = first * STRIDE - 1
        at = ((image * size + top) * size + column * STRIDE) * channels + channel
        at_g = ((image * out_size + first) * out_size + column) * channels + channel

        # Rows of the input, and with each the row of the output's gradient that it is the upper one of.
        ready = (_three(x, at, is_item & (top >= 0) & (top < size), is_left, is_right, channels),)
        gradients = (tl.load(g + at_g, mask=is_item & (first < out_size), other=0.0),)
        for i in tl.static_range(1, AHEAD):
            ready += (_three(x, at + i * along, is_item & (top + i < size), is_left, is_right, channels),)
            if i % STRIDE == 0 and i // STRIDE < ROWS:
                is_row = is_item & (first + i // STRIDE < out_size)
                gradients += (tl.load(g + at_g + i // STRIDE * along_g, mask=is_row, other=0.0),)
        above_it, beside_it = zero, zero
        for i in tl.static_range(TOTAL):
            pixels = _wide(ready[0])
            ready = ready[1:]
            if i + AHEAD < TOTAL:
                is_row = is_item & (top + i + AHEAD < size)
                ready += (_three(x, at + (i + AHEAD) * along, is_row, is_left, is_right, channels),)
                if (i + AHEAD) % STRIDE == 0 and (i + AHEAD) // STRIDE < ROWS:
                    is_row = is_item & (first + (i + AHEAD) // STRIDE < out_size)
                    gradients += (tl.load(g + at_g + (i + AHEAD) // STRIDE * along_g, mask=is_row, other=0.0),)
            if STRIDE == 1:
                if i >= 2:
                    lower = _add_products(lower, pixels, above_it)
                if i >= 1 and i <= ROWS:
                    middle = _add_products(middle, pixels, beside_it)
                above_it = beside_it
            elif i % 2 == 0:
                if i >= 2:
                    lower = _add_products(lower, pixels, beside_it)
            else:
                middle = _add_products(middle, pixels, beside_it)
            if i % STRIDE == 0 and i // STRIDE < ROWS:
                beside_it = _fp32(gradients[0])
                gradients = gradients[1:]
                upper = _add_products(upper, pixels, beside_it)

    to = sums + (tl.program_id(0) * channels + tl.program_id(1) * PART + tl.arange(0, PART)) * 9
    is_any = tl.program_id(1) * PART + tl.arange(0, PART) < channels
    for tap in tl.static_range(3):
        tl.store(to + tap, tl.sum(upper[tap], 0), mask=is_any)
        tl.store(to + 3 + tap, tl.sum(middle[tap], 0), mask=is_any)
        tl.store(to + 6 + tap, tl.sum(lower[tap], 0), mask=is_any)


def _taps_first(weight: Tensor) -> Tensor:
    return weight.reshape(len(weight), 9).t().contiguous()


def _registers(warps: int, together: int) -> int:
    """Return how many registers a thread may have: 65536 a multiprocessor, handed out by eights."""
    return min(255, 65536 // (32 * warps * together) // 8 * 8)


def launch_forward(x: Tensor, weight: Tensor, stride: int, part: int, vec: int, rows: int, ahead: int, warps: int, together: int) -> Tensor:
    """Return the convolution of channels-last `x`."""
    return _walk(x, weight, stride, False, part, vec, rows, ahead, warps, together)


def launch_input(
    above: Tensor, weight: Tensor, size: int, stride: int, part: int, vec: int, rows: int, ahead: int, warps: int, together: int
) -> Tensor:
    """Return the gradient of an input of height and width `size`, from the channels-last gradient of the output."""
    if stride == 1:
        return _walk(above, weight, 1, True, part, vec, rows, ahead, warps, together)
    n, channels, out_size, _ = above.shape
    y = torch.empty(n, channels, size, size, dtype=above.dtype, device=above.device, memory_format=torch.channels_last)
    strips, items = triton.cdiv(out_size, rows), 32 * warps
    num_items = n * strips * out_size * channels // vec
    _input_kernel[(triton.cdiv(num_items, items),)](
        above, _taps_first(weight), y, num_items, size, out_size, strips, channels, part, items, vec, rows, min(ahead, rows + 1),
        num_warps=warps, maxnreg=_registers(warps, together),
    )  # fmt: skip
    return y


def _walk(
    x: Tensor, weight: Tensor, stride: int, backwards: bool, part: int, vec: int, rows: int, ahead: int, warps: int, together: int
) -> Tensor:
    n, channels, size, _ = x.shape
    out_size = (size - 1) // stride + 1
    y = torch.empty(n, channels, out_size, out_size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    strips, items = triton.cdiv(out_size, rows), 32 * warps
    num_items = n * strips * out_size * channels // vec
    first_tap, step = (8, -1) if backwards else (0, 1)
    _forward_kernel[(triton.cdiv(num_items, items),)](
        x, _taps_first(weight), y, num_items, size, out_size, strips, first_tap, step, channels, part, stride, items, vec, rows,
        min(ahead, stride * (rows - 1) + 3), num_warps=warps, maxnreg=_registers(warps, together),
    )  # fmt: skip
    return y


def launch_weight(above: Tensor, x: Tensor, stride: int, part: int, vec: int, rows: int, ahead: int, warps: int, together: int) -> Tensor:
    """Return the weight's gradient in the input's type, from channels-last gradient and input."""
    n, channels, size, _ = x.shape
    out_size = above.shape[2]
    strips, columns = triton.cdiv(out_size, rows), 32 * warps * vec // part
    num_columns, parts = n * strips * out_size, triton.cdiv(channels, part)
    blocks = max(1, min(MULTIPROCESSORS * together // parts, triton.cdiv(num_columns, columns)))
    sums = torch.empty(blocks, channels * 9, device=x.device)
    _weight_kernel[(blocks, parts)](
        x, above, sums, num_columns, size, out_size, strips, blocks, channels, stride, columns, part, rows,
        min(ahead, stride * (rows - 1) + 3), num_warps=warps, maxnreg=_registers(warps, together),
    )  # fmt: skip
    return sums.sum(0).to(x.dtype).view(channels, 1, 3, 3)


def _chosen(kind: str, x: Tensor, stride: int) -> list[int] | None:
    """Return the configuration for these channels and stride, if there is one; the kernels take square images."""
    return choices().get(f"depthwise {kind} {x.shape[1]}/{stride}") if x.shape[2] == x.shape[3] else None


@torch.library.custom_op("evidence::depthwise_conv", mutates_args=())
def depthwise_conv(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Convolution, padding 1."""
    chosen = _chosen("forward", x, stride)
    if chosen is None:
        return last(library_conv(x, weight, stride, len(weight)))
    return launch_forward(last(x), weight, stride, *chosen)


@torch.library.custom_op("evidence::depthwise_conv_input", mutates_args=())
def depthwise_conv_input(above: Tensor, x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Gradient of the input."""
    chosen = _chosen("input", x, stride)
    if chosen is None:
        return last(library_gradients(above, x, weight, [True, False], stride, len(weight))[0])
    return launch_input(last(above), weight, x.shape[2], stride, *chosen)


@torch.library.custom_op("evidence::depthwise_conv_weight", mutates_args=())
def depthwise_conv_weight(above: Tensor, x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Gradient of the weight."""
    chosen = _chosen("weight", x, stride)
    if chosen is None:
        return library_gradients(above, x, weight, [False, True], stride, len(weight))[1].contiguous()
    return launch_weight(last(above), last(x), stride, *chosen)


@depthwise_conv.register_fake
def _(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    n, channels, height, width = x.shape
    shape = n, channels, (height - 1) // stride + 1, (width - 1) // stride + 1
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@depthwise_conv_input.register_fake
def _(above: Tensor, x: Tensor, weight: Tensor, stride: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@depthwise_conv_weight.register_fake
def _(above: Tensor, x: Tensor, weight: Tensor, stride: int) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    ctx.stride = inputs[2]
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight = ctx.saved_tensors
    to_input = depthwise_conv_input(above, x, weight, ctx.stride) if ctx.needs_input_grad[0] else None
    to_weight = depthwise_conv_weight(above, x, weight, ctx.stride) if ctx.needs_input_grad[1] else None
    return to_input, to_weight, None


depthwise_conv.register_autograd(_backward, setup_context=_keep)


class DepthwiseConv(nn.Conv2d):
    """A convolution of this kind."""

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv(x.to(torch.bfloat16), self.weight.to(torch.bfloat16), self.stride[0])  # type: ignore[no-any-return]


def use_depthwise(model: nn.Module) -> int:
    """Let the model's convolutions of this kind run here where a kernel was chosen; return how many do."""
    count = 0
    for module in model.modules():
        if type(module) is nn.Conv2d and (module.kernel_size, module.padding, module.dilation) == ((3, 3), (1, 1), (1, 1)):
            alike = module.groups == module.in_channels == module.out_channels and module.stride in ((1, 1), (2, 2))
            name = f"{module.out_channels}/{module.stride[0]}"
            if alike and module.bias is None and any(f"{kind} {name}" in choices() for kind in KINDS):
                module.__class__ = DepthwiseConv
                count += 1
    return count


def candidates(channels: int, size: int, stride: int) -> Iterator[Candidate]:
    """Give kind, configuration and call on (above, x, weight) of every kernel; an empty configuration is cuDNN."""
    forward, to_input, to_weight = KINDS
    yield forward, (), lambda above, x, weight: library_conv(x, weight, stride, channels)
    yield to_input, (), lambda above, x, weight: library_gradients(above, x, weight, [True, False], stride, channels)[0]
    yield to_weight, (), lambda above, x, weight: library_gradients(above, x, weight, [False, True], stride, channels)[1]
    out_size = (size - 1) // stride + 1
    for part in PARTS:
        for c in ((part, *walk) for walk in WALKS if channels % part == 0 and walk[1] <= out_size):
            yield forward, c, lambda above, x, weight, c=c: launch_forward(x, weight, stride, *c)  # type: ignore[misc]
            yield to_input, c, lambda above, x, weight, c=c: launch_input(above, weight, x.shape[2], stride, *c)  # type: ignore[misc]
    for part in SUM_PARTS:
        for c in ((part, *sums) for sums in SUMS if part <= 2 * channels and sums[1] <= out_size):
            yield to_weight, c, lambda above, x, weight, c=c: launch_weight(above, x, stride, *c)  # type: ignore[misc]


def operands(channels: int, size: int, stride: int, batch: int, device: str = "cuda") -> Operands:
    """Return a gradient above, an input and a weight, bf16, channels last."""
    out_size = (size - 1) // stride + 1
    return random_operands((batch, channels, out_size, out_size), (batch, channels, size, size), (channels, 1, 3, 3), device)


def exact(stride: int, kind: str, operands: Operands) -> Tensor:
    """Return what a kind is in float64."""
    above, x, weight = (t.double() for t in operands)
    if kind == KINDS[0]:
        return library_conv(x, weight, stride, len(weight))
    return library_gradients(above, x, weight, [True, True], stride, len(weight))[kind == KINDS[2]]


def cases() -> Iterator[Case]:
    """Give the convolutions to measure."""
    for shape in SHAPES:
        channels, size, stride = shape
        about = {"channels": channels, "size": size, "stride": stride}
        yield Case(f"{channels}/{stride}", about, partial(operands, *shape), partial(candidates, *shape), partial(exact, stride))
