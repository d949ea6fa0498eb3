"""Linear layers with a 2:4 weight: `Linear24`, packed and frozen, and `TrainableLinear24`, dense and trained under its mask."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from twofour.errors import InputError, UnsupportedError
from twofour.nn import launch
from twofour.nn.ops import is_plain_call
from twofour.nn.packing import (
    NAME_OF,
    Repacker,
    check_24,
    check_dtype,
    convert_packed,
    dense_of,
    pack_weight,
    packed_zeros,
    repack,
    rounded_bias,
)

FORMAT = 1
_CODES = {torch.bfloat16: 0, torch.float16: 1}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
# Asked once: torch.compile cannot trace the question before PyTorch 2.12.
_WITH_AUTOCAST = frozenset(kind for kind in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(kind))


def _autocast(x: Tensor, dtype: torch.dtype, layer: str) -> Tensor:
    """`x` in the weight's dtype where autocast allows it.

    Raises:
        InputError: autocast is off, or x is float64 or no floating tensor.
    """
    kind = x.device.type
    castable = x.is_floating_point() and x.dtype != torch.float64
    if castable and kind in _WITH_AUTOCAST and torch.is_autocast_enabled(kind):
        return x.to(dtype)
    raise InputError(f"{layer}: x is {x.dtype}, expected {dtype} like the weight; cast it or run under torch.autocast")


def _refuse_nested(x: Tensor, layer: str) -> None:
    """Do nothing unless x is a nested tensor, which no operator of ours takes.

    Raises:
        InputError: it is one.
    """
    if x.is_nested:
        raise InputError(f"{layer}: x is a nested tensor, expected a strided one; call it on x.values() or pad x")


def _moving_integers(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn`, but integers and bits only move: `Module.type` casts them too."""

    def moved(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        return result if tensor.is_floating_point() or result.dtype == tensor.dtype else tensor.to(result.device)

    return moved


class Linear24(nn.Module):
    """`y = x . W^T + b` with a frozen, packed 2:4 weight; the same call as `nn.Linear`.

    On a Hopper GPU the sparse tensor cores compute it; elsewhere the weight is unpacked once and PyTorch computes the same values. Sums
    are fp32; the bias is added before the one rounding of the result. An infinity or NaN of x at a pruned position does not reach the
    result on the GPU, where a dense layer gives NaN. Gradients flow to x and, if asked for, to nothing else; see `trainable`.

    Under autocast x is cast to the weight's dtype. `.to(dtype)` between bf16 and fp16 rounds and repacks the weight.

    Attributes:
        packed: int16 `[row blocks, input blocks, 4608]`, see `pattern/pack_sm90.py`; 9/16 of the dense bytes.
        bias: fp32 `[out_features]` or None. dtype: of weight, x and y.
    """

    packed: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """Make a layer of zeros, to be filled by `load_state_dict`; `from_linear` makes one from a pruned layer.

        Raises:
            InputError: a size is not positive, or dtype is neither bfloat16 nor float16.
        """
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise InputError(f"Linear24: in_features={in_features}, out_features={out_features}, expected positive sizes")
        check_dtype(dtype, "Linear24")
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.register_buffer("packed", packed_zeros(out_features, in_features, device))
        self.register_buffer("bias", torch.zeros(out_features, device=device, dtype=torch.float32) if bias else None)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, dtype: torch.dtype | None = None, name: str = "linear") -> "Linear24":
        """Return the packed form of a pruned `nn.Linear`, on its device; `dtype` rounds the weight first. `name` stands in errors.

        Raises:
            InputError: the weight is not 2:4 (layer, row, group and its four values are named), or no 16-bit one and no `dtype` given.
        """
        if not isinstance(linear, nn.Linear):
            raise InputError(f"{name}: expected an nn.Linear, got {type(linear).__name__}; other layers stay as they are")
        dtype = dtype or linear.weight.dtype
        check_dtype(dtype, name)
        check_24(linear.weight, name)
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, "meta", dtype)
        layer.packed = pack_weight(linear.weight, dtype, name)
        if linear.bias is not None:
            layer.bias = rounded_bias(linear.bias, dtype)
        return layer.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """Return `x . W^T + b`, `[..., out_features]`, of the leading dimensions of x, named `input` as in `nn.Linear`.

        Raises:
            InputError: x has another dtype (and autocast is off), last dimension, layout or device than the layer.
        """
        x = input
        if x.dtype is not self.dtype:
            x = _autocast(x, self.dtype, "Linear24")
        buffers = self._buffers
        packed, bias = buffers["packed"], buffers["bias"]
        assert packed is not None
        if is_plain_call(x):
            ready = launch.find_ready(x, bias, self.out_features, self.in_features)
            if ready is not None and packed.get_device() == ready.device:
                return launch.run(ready, x, packed, bias)
            if x.shape[-1:] == (self.in_features,) and packed.device == x.device and launch.runs_on(x.device):
                return launch.linear(x, packed, bias, self.out_features, self.in_features)
        _refuse_nested(x, "Linear24")
        if forward_ad._current_level >= 0:
            return self._with_tangent(x)
        y: Tensor = torch.ops.twofour.linear24(x, packed, bias, self.out_features, self.in_features, self.dtype)
        return y

    def _with_tangent(self, x: Tensor) -> Tensor:
        """The layer is linear, so the tangent goes through it too, without bias; PyTorch would drop it at an operator like ours."""
        operands = self.out_features, self.in_features, self.dtype
        primal, tangent = forward_ad.unpack_dual(x)  # type: ignore[no-untyped-call]
        y: Tensor = torch.ops.twofour.linear24(primal, self.packed, self.bias, *operands)
        if tangent is not None:
            y = forward_ad.make_dual(y, torch.ops.twofour.linear24(tangent, self.packed, None, *operands))  # type: ignore[no-untyped-call]
        return y

    @property
    def weight(self) -> Tensor:
        """The dense weight `[out_features, in_features]`, to read; remembered while the packed one is unchanged."""
        return dense_of(self.packed, self.out_features, self.in_features, self.dtype)

    def to_linear(self) -> nn.Linear:
        """Return an `nn.Linear` with the same values; pruned positions are +0."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, self.packed.device, self.dtype)
        with torch.no_grad():
            linear.weight.copy_(self.weight)
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear.train(self.training)

    def trainable(self) -> "TrainableLinear24":
        """Return the layer with its weight as a parameter, trained with the mask held; what is zero now stays zero."""
        return TrainableLinear24.from_linear(self.to_linear(), name="Linear24")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, dtype={self.dtype}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Linear24":
        """Move or convert. The bias takes part as bits and stays fp32; a change of dtype rounds it like the weight."""
        dtype = fn(torch.empty(0, dtype=self.dtype, device=self.packed.device)).dtype
        if dtype not in NAME_OF:
            raise InputError(f"Linear24: cannot be converted to {dtype}, expected bfloat16 or float16; call to_linear() on it first")
        if self.bias is not None:
            self.bias = self.bias.view(torch.int32)
        try:
            super()._apply(_moving_integers(fn), recurse)  # type: ignore[no-untyped-call]
        finally:
            if self.bias is not None:
                self.bias = self.bias.view(torch.float32)
        if dtype != self.dtype:
            self.packed = convert_packed(self.packed, self.out_features, self.in_features, self.dtype, dtype, "Linear24")
            self.bias = None if self.bias is None else rounded_bias(self.bias, dtype)
        self.dtype = dtype
        return self

    def get_extra_state(self) -> Tensor:
        """Return int64 `[format, dtype code (0 bf16, 1 fp16), out_features, in_features]`: a tensor, so that safetensors can hold it."""
        return torch.tensor([FORMAT, _CODES[self.dtype], self.out_features, self.in_features])

    def set_extra_state(self, state: Any) -> None:
        """Do nothing: `load_state_dict` reads the state before the tensors, because they depend on it."""

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name = prefix.rstrip(".") or "Linear24"
        if f"{prefix}packed" in state_dict:
            try:
                state_dict = self._converted(state_dict, prefix, name)
            except InputError as e:
                error_msgs.append(str(e))
                return
        elif f"{prefix}weight" in state_dict:
            error_msgs.append(f"{name}: the state holds a dense weight, expected a packed one; load it into nn.Linear, then convert")
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _converted(self, state_dict: dict[str, Any], prefix: str, name: str) -> dict[str, Any]:
        """The state with its values in this layer's dtype and the bias in fp32.

        Raises:
            InputError: it belongs to another size or format, or says nothing about itself.
        """
        dtype, rows, inputs = read_extra_state(state_dict.get(f"{prefix}_extra_state"), name)
        if (rows, inputs) != (self.out_features, self.in_features):
            raise InputError(f"{name}: the state holds a weight [{rows}, {inputs}], expected [{self.out_features}, {self.in_features}]")
        packed, bias = state_dict[f"{prefix}packed"], state_dict.get(f"{prefix}bias")
        if packed.dtype != torch.int16:
            raise InputError(f"{name}: the state's packed weight is {packed.dtype}, expected torch.int16; save the layer again, uncast")
        changed: dict[str, Any] = {}
        if dtype != self.dtype and packed.shape == self.packed.shape:
            changed[f"{prefix}packed"] = convert_packed(packed, rows, inputs, dtype, self.dtype, name)
        if bias is not None:
            changed[f"{prefix}bias"] = bias.float() if dtype == self.dtype else rounded_bias(bias, self.dtype)
        return {**state_dict, **changed}


def read_extra_state(state: Any, name: str) -> tuple[torch.dtype, int, int]:
    """Return (dtype, out_features, in_features) of a packed layer's `_extra_state`.

    Raises:
        InputError: it is missing, damaged or of a later format.
    """
    numbers = state.tolist() if isinstance(state, Tensor) and state.dtype == torch.int64 and tuple(state.shape) == (4,) else None
    if numbers is None or numbers[1] not in _DTYPES or min(numbers[2:]) < 1:
        raise InputError(f"{name}: the state's _extra_state is missing or damaged, expected four int64 numbers; save the layer again")
    if numbers[0] != FORMAT:
        raise InputError(f"{name}: the packed weight has format {numbers[0]}, expected {FORMAT}; use the version of twofour that wrote it")
    return _DTYPES[numbers[1]], numbers[2], numbers[3]


class TrainableLinear24(nn.Module):
    """`y = x . (W * mask)^T + b` for fine-tuning: a dense weight, repacked at every call, whose pruned positions stay zero.

    The forward product is sparse on a Hopper GPU. Gradients: x gets `g . (W * mask)`, W gets `(g^T . x) * mask`, b gets the sum of g, so
    any optimizer for which a zero weight with zero gradients stays zero holds the mask. `freeze` gives the packed layer.

    Attributes:
        weight: parameter `[out_features, in_features]`, any floating dtype. mask: bool of its shape. bias: parameter or None.
        compute_dtype: bf16 or fp16, of x and y.
    """

    mask: Tensor
    index: Tensor
    metadata: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, compute_dtype: torch.dtype, name: str = "weight") -> None:
        """Take a 2:4 weight; its non-zeros are the mask.

        Raises:
            InputError: the weight is not 2:4, or compute_dtype is neither bfloat16 nor float16.
        """
        super().__init__()
        check_dtype(compute_dtype, name)
        check_24(weight, name)
        self.out_features, self.in_features = weight.shape
        self.compute_dtype = compute_dtype
        self.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.register_buffer("mask", weight.detach() != 0)
        repacker = Repacker(self.mask, name)
        self.register_buffer("index", repacker.index, persistent=False)
        # As int32: a data-parallel wrapper sends every buffer to all processes, and neither NCCL nor gloo carries int16.
        self.register_buffer("metadata", repacker.metadata.view(torch.int32), persistent=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, dtype: torch.dtype | None = None, name: str = "linear") -> "TrainableLinear24":
        """Return the trainable form of a pruned `nn.Linear`; a fp32 one keeps fp32 weights and computes in `dtype` under autocast.

        Raises:
            InputError: as `Linear24.from_linear`.
        """
        if not isinstance(linear, nn.Linear):
            raise InputError(f"{name}: expected an nn.Linear, got {type(linear).__name__}; other layers stay as they are")
        return cls(linear.weight, linear.bias, dtype or linear.weight.dtype, name).train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """Return `x . (W * mask)^T + b`, `[..., out_features]`.

        Raises:
            InputError: as `Linear24.forward`. UnsupportedError: inside a forward-mode `dual_level`.
        """
        x = input
        if x.dtype is not self.compute_dtype:
            x = _autocast(x, self.compute_dtype, "TrainableLinear24")
        _refuse_nested(x, "TrainableLinear24")
        if forward_ad._current_level >= 0:
            raise UnsupportedError("TrainableLinear24: forward-mode derivatives are not built, expected backward ones; use Linear24")
        packed = repack(self.weight.detach(), self.index, self.metadata.view(torch.int16), self.compute_dtype)
        y: Tensor = torch.ops.twofour.linear24_masked(x, self.weight, self.mask, packed, self.bias)
        return y

    def freeze(self) -> Linear24:
        """Return the packed, frozen layer with today's weight."""
        layer = Linear24(self.in_features, self.out_features, self.bias is not None, "meta", self.compute_dtype)
        layer.packed = pack_weight(torch.where(self.mask, self.weight.detach(), 0), self.compute_dtype)
        if self.bias is not None:
            layer.bias = rounded_bias(self.bias, self.compute_dtype)
        return layer.train(self.training)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, dtype={self.compute_dtype}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TrainableLinear24":
        before = self.weight.dtype
        super()._apply(_moving_integers(fn), recurse)  # type: ignore[no-untyped-call]
        after = self.weight.dtype
        if after != before and after in NAME_OF:
            self.compute_dtype = after
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self.mask.is_meta:
            return
        repacker = Repacker(self.mask, args[1].rstrip(".") or "mask")
        self.index, self.metadata = repacker.index, repacker.metadata.view(torch.int32)
