"""The PyTorch operators of a 2:4 linear layer, with what PyTorch needs to trace, differentiate and map them.

`twofour::linear24`             y = x . W^T + b                      with W packed
`twofour::linear24_input_grad`  g . W, the gradient with respect to x
`twofour::linear24_masked`      y = x . (W * mask)^T + b             W packed now, its dense form given for the gradients; b of any dtype

`define` and `impl` instead of `custom_op`, which costs 5 us more a call.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from twofour.errors import InputError
from twofour.nn import launch
from twofour.nn.packing import NAME_OF, dense_of, packed_shape

_library: Any = torch.library.Library("twofour", "DEF")  # type: ignore[no-untyped-call]
_library.define("linear24(Tensor x, Tensor packed, Tensor? bias, int rows, int inputs, ScalarType dtype) -> Tensor")
_library.define("linear24_input_grad(Tensor grad, Tensor packed, int rows, int inputs, ScalarType dtype) -> Tensor")
_library.define("linear24_masked(Tensor x, Tensor weight, Tensor mask, Tensor packed, Tensor? bias) -> Tensor")


def check(x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, inputs: int, dtype: torch.dtype) -> None:
    """Do nothing for operands that fit together.

    Raises:
        InputError: a wrong dtype, layout, shape or device; the sentence names the operand.
    """
    if dtype not in NAME_OF or x.dtype != dtype:
        raise InputError(f"linear24: x is {x.dtype} and the weight {dtype}, expected both bfloat16 or both float16; cast x or use autocast")
    if x.layout != torch.strided:
        raise InputError(f"linear24: x has layout {x.layout}, expected a strided tensor; call x.to_dense()")
    if x.ndim == 0 or x.shape[-1] != inputs:
        raise InputError(f"linear24: x has shape {list(x.shape)}, expected [..., {inputs}]: the layer has {inputs} input features")
    if packed.dtype != torch.int16 or tuple(packed.shape) != packed_shape(rows, inputs) or not packed.is_contiguous():
        raise InputError(
            f"linear24: packed is {packed.dtype} {list(packed.shape)}, expected contiguous torch.int16 {list(packed_shape(rows, inputs))} "
            f"for a weight [{rows}, {inputs}]; pack it with Linear24.from_linear"
        )
    if bias is not None and (bias.dtype != torch.float32 or tuple(bias.shape) != (rows,) or not bias.is_contiguous()):
        raise InputError(f"linear24: bias is {bias.dtype} {list(bias.shape)}, expected contiguous torch.float32 [{rows}]; cast it")
    if x.device != packed.device or (bias is not None and bias.device != x.device):
        raise InputError(f"linear24: x is on {x.device} and the weight on {packed.device}, expected one device; move one with .to()")


def _dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """PyTorch's product of the unpacked weight; contiguous rows, because for others it may round before it adds the bias."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    # Autocast has done its part before; on its own it would cast to its dtype here.
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(rows, weight, None if bias is None else bias.to(x.dtype)).view(*x.shape[:-1], weight.shape[0])


def _linear24(x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, inputs: int, dtype: torch.dtype) -> Tensor:
    check(x, packed, bias, rows, inputs, dtype)
    if launch.runs_on(x.device):
        return launch.linear(x, packed, bias, rows, inputs)
    return _dense_linear(x, dense_of(packed, rows, inputs, dtype), bias)


def _linear24_input_grad(grad: Tensor, packed: Tensor, rows: int, inputs: int, dtype: torch.dtype) -> Tensor:
    with torch.autocast(grad.device.type, enabled=False):
        return torch.matmul(grad.contiguous(), dense_of(packed, rows, inputs, dtype))


def _rounded(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The bias rounded to the product's dtype, in the fp32 that the kernel adds. NOTE: of two casts in a row a compiler drops the first."""
    return None if bias is None else bias.to(dtype).float()


def _linear24_masked(x: Tensor, weight: Tensor, mask: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    (rows, inputs), bias = weight.shape, _rounded(bias, x.dtype)
    check(x, packed, bias, rows, inputs, x.dtype)
    if launch.runs_on(x.device):
        return launch.linear(x, packed, bias, rows, inputs)
    return _dense_linear(x, torch.where(mask, weight, 0).to(x.dtype), bias)


def _fake_linear24(x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, inputs: int, dtype: torch.dtype) -> Tensor:
    check(x, packed, bias, rows, inputs, dtype)
    return x.new_empty((*x.shape[:-1], rows))


def _fake_input_grad(grad: Tensor, packed: Tensor, rows: int, inputs: int, dtype: torch.dtype) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], inputs))


def _fake_masked(x: Tensor, weight: Tensor, mask: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    check(x, packed, _rounded(bias, x.dtype), weight.shape[0], weight.shape[1], x.dtype)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


for _name, _real, _fake in (
    ("linear24", _linear24, _fake_linear24),
    ("linear24_input_grad", _linear24_input_grad, _fake_input_grad),
    ("linear24_masked", _linear24_masked, _fake_masked),
):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _real, _key)
    torch.library.register_fake(f"twofour::{_name}", _fake, lib=_library)
for _key in ("SparseCPU", "SparseCUDA", "SparseCsrCPU", "SparseCsrCUDA", "MkldnnCPU"):
    _library.impl("linear24", check, _key)
    _library.impl("linear24_masked", _fake_masked, _key)


def _keep_frozen(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, _, ctx.rows, ctx.inputs, ctx.dtype = inputs
    ctx.save_for_backward(packed)


def _frozen_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (packed,) = ctx.saved_tensors
    gx = torch.ops.twofour.linear24_input_grad(grad, packed, ctx.rows, ctx.inputs, ctx.dtype) if ctx.needs_input_grad[0] else None
    gb = _sum_tokens(grad) if ctx.needs_input_grad[2] else None
    return gx, None, gb, None, None, None


def _keep_input_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, ctx.rows, ctx.inputs, ctx.dtype = inputs
    ctx.save_for_backward(packed)


def _input_grad_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (packed,) = ctx.saved_tensors
    return torch.ops.twofour.linear24(grad, packed, None, ctx.rows, ctx.inputs, ctx.dtype), None, None, None, None


def _keep_masked(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, mask, _, bias = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, mask)


def _masked_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, mask = ctx.saved_tensors
    rows, inputs = weight.shape
    gx = gw = None
    # A backward pass inside autocast would else multiply in autocast's dtype: in fp16 a gradient of bf16 may overflow.
    with torch.autocast("cpu" if grad.is_meta else grad.device.type, enabled=False):
        if ctx.needs_input_grad[0]:
            gx = torch.matmul(grad, torch.where(mask, weight, 0).to(grad.dtype))
        if ctx.needs_input_grad[1]:
            gw = torch.where(mask, torch.matmul(grad.reshape(-1, rows).t(), x.reshape(-1, inputs)), 0).to(weight.dtype)
    # By way of the product's dtype, as `nn.Linear` under autocast gives it.
    gb = _sum_tokens(grad).to(grad.dtype).to(ctx.bias_dtype) if ctx.needs_input_grad[4] else None
    return gx, gw, None, None, gb


def _sum_tokens(grad: Tensor) -> Tensor:
    return grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32)


torch.library.register_autograd("twofour::linear24", _frozen_backward, setup_context=_keep_frozen, lib=_library)
torch.library.register_autograd("twofour::linear24_input_grad", _input_grad_backward, setup_context=_keep_input_grad, lib=_library)
torch.library.register_autograd("twofour::linear24_masked", _masked_backward, setup_context=_keep_masked, lib=_library)


def _vmap(op: Any) -> Any:
    """Mapping over x alone: leading dimensions are free, so the mapped one becomes one of them."""

    def rule(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *rest: Any) -> tuple[Tensor, int]:
        if in_dims[0] is None or any(d is not None for d in in_dims[1:]):
            raise InputError(f"{op}: vmap maps x only, expected the weight and bias unmapped; loop over the layers instead")
        return op(x.movedim(in_dims[0], 0), *rest), 0

    return rule


for _name in ("linear24", "linear24_input_grad"):
    torch.library.register_vmap(f"twofour::{_name}", _vmap(getattr(torch.ops.twofour, _name)), lib=_library)


def _plain_keys() -> frozenset[int]:
    """The thread states in which nothing watches operators: no mode, no tracer, no transform; grad mode or inference mode."""
    key, make = torch._C.DispatchKey, torch._C.DispatchKeySet
    inference = make(key.BackendSelect)
    return frozenset((inference.raw_repr(), (inference | make(key.ADInplaceOrView)).raw_repr()))


_PLAIN = _plain_keys()
_included = torch._C._dispatch_tls_local_include_set
_num_function_modes = torch._C._len_torch_function_stack
_is_compiling = torch.compiler.is_compiling


def is_plain_call(x: Tensor) -> bool:
    """Return whether an eager call on `x` may launch at once instead of through the dispatcher, which costs several microseconds.

    False whenever anything could watch or change the operator: compilation, tracing, export, a dispatch or function mode, a functional
    transform, a tensor subclass, a lazy negation, a gradient, a tangent.
    """
    return (
        not _is_compiling()
        and type(x) is Tensor
        and x.is_cuda
        and _included().raw_repr() in _PLAIN
        and not _num_function_modes()
        and forward_ad._current_level < 0
        and not (x.requires_grad and torch.is_grad_enabled())
        and x.layout is torch.strided
        and not x.is_neg()
    )
