"""3×3 convolutions of 16 to 64 channels for training, in Triton: cuDNN takes several times what their bytes take.

Stride 1, padding 1, as many channels out as in, bf16, channels last. Forward and the input's gradient are one kernel: rows of pixels by
weights, the nine taps one after the other. The weight's gradient sums over pixels in `SPLITS` parts, which are added in a fixed order, so
that a run repeats exactly.

    python evidence/narrow.py OUT.json

checks every kernel, these and those of `depthwise_training.py`, against float64 and writes which configuration, or cuDNN, was the fastest
on this GPU; `NARROW_CHOICES` names that file to the experiments. Without it they use cuDNN.
"""

import argparse
import itertools
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import depthwise_training
import torch
import triton
import triton.language as tl
from kernel_choices import Candidate, Case, Operands, choices, distance, last, library_conv, library_gradients, measure, random_operands
from torch import Tensor, nn
from torch.nn import functional as F

SPLITS = 528
SHAPES = ((16, 32), (32, 16), (64, 8))  # channels, height and width
# rows of pixels, warps, stages; with the number of weight rows at once for the weight's gradient
PRODUCTS = ((64, 4, 2), (64, 2, 1), (128, 4, 1), (128, 4, 3), (256, 4, 2), (256, 8, 3))
GRADIENTS = ((64, 128, 4, 2), (64, 256, 4, 2), (64, 256, 8, 3), (128, 64, 4, 3), (128, 128, 4, 2), (32, 256, 4, 3))


@triton.jit
def _shifted(x, rows, tap, channel, num_rows, SIZE: tl.constexpr, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pixels `rows` moved by `tap`, one column a (tap, channel); zero outside the image."""
    down, right = tap // 3 - 1, tap % 3 - 1
    h, w = (rows // SIZE) % SIZE, rows % SIZE
    at_h, at_w = h[:, None] + down[None, :], w[:, None] + right[None, :]
    inside = (at_h >= 0) & (at_h < SIZE) & (at_w >= 0) & (at_w < SIZE) & (tap[None, :] < 9) & (rows[:, None] < num_rows)
    return tl.load(x + rows[:, None] * C + ((down * SIZE + right) * C + channel)[None, :], mask=inside, other=0.0)


@triton.jit(do_not_specialize=["last_tap"])
def _product_kernel(  # type: ignore[no-untyped-def]
    x,
    w,
    y,
    num_rows,
    along_out,
    along_in,
    along_tap,
    last_tap,
    SIZE: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, C)
    total = tl.zeros([ROWS, C], tl.float32)
    for tap in tl.range(0, 9, num_stages=STAGES):
        pixels = _shifted(x, rows, tap + tl.zeros([C], tl.int32), c, num_rows, SIZE, C)
        # The input's gradient takes the taps backwards: last_tap is 8 there and 0 forward.
        where = tl.where(last_tap > 0, last_tap - tap, tap) * along_tap
        weights = tl.load(w + c[:, None] * along_in + c[None, :] * along_out + where)
        total = tl.dot(pixels, weights, total)
    tl.store(y + rows[:, None] * C + c[None, :], total.to(y.dtype.element_ty), mask=rows[:, None] < num_rows)


@triton.jit
def _gradient_kernel(  # type: ignore[no-untyped-def]
    x, g, parts, num_rows, splits, SIZE: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr
):
    c = tl.arange(0, C)
    k = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)
    tap, channel = k // C, k % C
    total = tl.zeros([DEPTH, C], tl.float32)
    for start in tl.range(tl.program_id(0) * ROWS, num_rows, splits * ROWS, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS)
        pixels = _shifted(x, rows, tap, channel, num_rows, SIZE, C)
        above = tl.load(g + rows[:, None] * C + c[None, :], mask=rows[:, None] < num_rows, other=0.0)
        total = tl.dot(tl.trans(pixels), above, total)
    at = parts + (tl.program_id(0) * C + c[None, :]) * 9 * C + k[:, None]
    tl.store(at, total, mask=k[:, None] < 9 * C)


def launch_product(x: Tensor, weight: Tensor, backwards: bool, rows: int, warps: int, stages: int) -> Tensor:
    """Return the convolution of channels-last `x`, or with `backwards` its input's gradient where `x` is the output's."""
    n, channels, size, _ = x.shape
    y, num_rows = torch.empty_like(x), n * size * size
    along_out, along_in, along_tap = weight.stride(0), weight.stride(1), weight.stride(3)
    assert weight.stride(2) == 3 * along_tap
    if backwards:
        along_out, along_in = along_in, along_out
    _product_kernel[(triton.cdiv(num_rows, rows),)](
        x, weight, y, num_rows, along_out, along_in, along_tap, 8 * backwards, size, channels, rows, stages, num_warps=warps
    )
    return y


def launch_gradient(above: Tensor, x: Tensor, rows: int, depth: int, warps: int, stages: int) -> Tensor:
    """Return the weight's gradient in the input's type, channels last."""
    n, channels, size, _ = x.shape
    num_rows = n * size * size
    splits = min(SPLITS, triton.cdiv(num_rows, rows))
    parts = torch.empty(splits, channels, 9 * channels, device=x.device)
    _gradient_kernel[(splits, triton.cdiv(9 * channels, depth))](
        x, above, parts, num_rows, splits, size, channels, rows, depth, stages, num_warps=warps
    )
    return parts.sum(0).to(x.dtype).view(channels, 3, 3, channels).permute(0, 3, 1, 2)


@torch.library.custom_op("evidence::narrow_conv", mutates_args=())
def narrow_conv(x: Tensor, weight: Tensor) -> Tensor:
    """Convolution, stride 1 and padding 1."""
    chosen = choices().get(f"forward {x.shape[1]}")
    if chosen is None:
        return library_conv(x, weight)
    return launch_product(last(x), weight, False, *chosen)


@torch.library.custom_op("evidence::narrow_conv_input", mutates_args=())
def narrow_conv_input(above: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the input."""
    chosen = choices().get(f"input {x.shape[1]}")
    if chosen is None:
        return library_gradients(above, x, weight, [True, False])[0]
    return launch_product(last(above), weight, True, *chosen)


@torch.library.custom_op("evidence::narrow_conv_weight", mutates_args=())
def narrow_conv_weight(above: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the weight."""
    chosen = choices().get(f"weight {x.shape[1]}")
    if chosen is None:
        return library_gradients(above, x, weight, [False, True])[1]
    return launch_gradient(last(above), last(x), *chosen)


@narrow_conv.register_fake
@narrow_conv_input.register_fake
def _(x: Tensor, *_: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@narrow_conv_weight.register_fake
def _(above: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.channels_last)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, Tensor]:
    x, weight = ctx.saved_tensors
    to_input = narrow_conv_input(above, x, weight) if ctx.needs_input_grad[0] else None
    return to_input, narrow_conv_weight(above, x, weight)


narrow_conv.register_autograd(_backward, setup_context=_keep)


class NarrowConv(nn.Conv2d):
    """A convolution of this kind; three channels in are filled up with zeros to as many as there are out."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(torch.bfloat16)
        x, added = x.to(torch.bfloat16), self.out_channels - self.in_channels
        if added:
            x, weight = (F.pad(t, (0, 0, 0, 0, 0, added)).contiguous(memory_format=torch.channels_last) for t in (x, weight))
        return narrow_conv(x, weight)  # type: ignore[no-any-return]


def use_narrow(model: nn.Module) -> int:
    """Let the model's narrow and depthwise convolutions run on our kernels where a kernel was chosen; return how many do."""
    count = 0
    for module in model.modules():
        if type(module) is nn.Conv2d and (module.kernel_size, module.stride, module.padding) == ((3, 3), (1, 1), (1, 1)):
            alike = module.in_channels in (3, module.out_channels) and module.groups == 1 and module.bias is None
            if alike and any(f"{kind} {module.out_channels}" in choices() for kind in ("forward", "input", "weight")):
                module.__class__ = NarrowConv
                count += 1
    return count + depthwise_training.use_depthwise(model)


def candidates(channels: int) -> Iterator[Candidate]:
    """Give kind, configuration and call on (above, x, weight) of every kernel; an empty configuration is cuDNN."""
    yield "forward", (), lambda above, x, weight: library_conv(x, weight)
    yield "input", (), lambda above, x, weight: library_gradients(above, x, weight, [True, False])[0]
    yield "weight", (), lambda above, x, weight: library_gradients(above, x, weight, [False, True])[1]
    for c in PRODUCTS:
        yield "forward", c, lambda above, x, weight, c=c: launch_product(x, weight, False, *c)  # type: ignore[misc]
        yield "input", c, lambda above, x, weight, c=c: launch_product(above, weight, True, *c)  # type: ignore[misc]
    for c in GRADIENTS:
        if c[1] < 2 * 9 * channels:
            yield "weight", c, lambda above, x, weight, c=c: launch_gradient(above, x, *c)  # type: ignore[misc]


def operands(channels: int, size: int, batch: int, device: str = "cuda") -> Operands:
    """Return a gradient above, an input and a weight, bf16, channels last."""
    shape = (batch, channels, size, size)
    return random_operands(shape, shape, (channels, channels, 3, 3), device)


def exact(kind: str, operands: Operands) -> Tensor:
    """Return what a kind is in float64."""
    above, x, weight = (t.double() for t in operands)
    return library_conv(x, weight) if kind == "forward" else library_gradients(above, x, weight, [True, True])[kind == "weight"]


def error(kind: str, found: Tensor, above: Tensor, x: Tensor, weight: Tensor) -> float:
    """Return ‖found − float64‖ / ‖float64‖."""
    return distance(found, exact(kind, (above, x, weight)))


def cases() -> Iterator[Case]:
    """Give the convolutions to measure."""
    for channels, size in SHAPES:
        about = {"channels": channels, "size": size}
        yield Case(str(channels), about, partial(operands, channels, size), partial(candidates, channels), exact)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    a = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    measure(itertools.chain(cases(), depthwise_training.cases()), a.out)


if __name__ == "__main__":
    main()
