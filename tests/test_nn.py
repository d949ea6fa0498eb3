"""Linear24 and its trainable form without a GPU: values, shapes, dtypes, gradients, tracing, saving, moving, bad input."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nn_layers import pruned_linear, within_rounding
from torch import nn
from torch.autograd import forward_ad

from twofour.errors import InputError, UnsupportedError
from twofour.nn import Linear24, TrainableLinear24, ops
from twofour.nn.packing import Repacker, _in_weight, pack_weight, packed_shape, packed_zeros, repack, unpack_weight

DTYPES = [torch.bfloat16, torch.float16]


# Sizes: one packed block, around its edges (128 rows, 64 inputs), several blocks, no multiple of eight or four, a single element.
SIZES = [(64, 128), (63, 127), (65, 129), (32, 8), (200, 264), (72, 130), (10, 3), (1, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
@pytest.mark.parametrize("bias", [True, False])
def test_values_are_the_oracles_and_the_dense_layers(inputs: int, outputs: int, dtype: torch.dtype, bias: bool) -> None:
    linear = pruned_linear(inputs, outputs, dtype, bias)
    layer = Linear24.from_linear(linear)
    x = torch.randn(7, inputs).to(dtype)
    y = layer(x)
    assert (y.dtype, y.shape, y.is_contiguous()) == (dtype, (7, outputs), True)
    assert within_rounding(y, x, linear)
    assert torch.equal(y, linear(x))


@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 64), (2, 1, 3, 64), (0, 64), (3, 0, 64)])
def test_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    linear = pruned_linear(64, 24)
    x = torch.randn(shape).bfloat16()
    y = Linear24.from_linear(linear)(x)
    assert y.shape == (*shape[:-1], 24)
    assert torch.equal(y.view(-1, 24), linear(x.view(-1, 64)))


@pytest.mark.parametrize(
    "strided",
    [
        lambda: torch.randn(64, 6).bfloat16().t(),
        lambda: torch.randn(6, 128).bfloat16()[:, ::2],
        lambda: torch.randn(6, 65).bfloat16()[:, 1:],
        lambda: torch.randn(4, 6, 64).bfloat16().transpose(0, 1),
        lambda: torch.randn(64).bfloat16().expand(5, 64),
        lambda: torch.randn(2, 64, 3, 3).bfloat16().movedim(1, -1),
    ],
    ids=["transposed", "every other", "misaligned", "batch swapped", "expanded", "channels moved"],
)
def test_inputs_of_any_strides(strided: Callable[[], torch.Tensor]) -> None:
    linear = pruned_linear(64, 40)
    x = strided()
    assert torch.equal(Linear24.from_linear(linear)(x), linear(x.contiguous()))


@pytest.mark.parametrize("kind", [Linear24, TrainableLinear24])
def test_the_call_is_that_of_a_linear_layer(kind: Any) -> None:
    linear, x = pruned_linear(64, 40), torch.randn(3, 64).bfloat16()
    assert torch.equal(kind.from_linear(linear)(input=x), linear(input=x))


def test_a_transposed_weight_is_packed_like_its_copy() -> None:
    linear = pruned_linear(64, 40)
    strided = copy.deepcopy(linear)
    strided.weight = nn.Parameter(linear.weight.t().contiguous().t(), requires_grad=False)
    assert not strided.weight.is_contiguous()
    assert torch.equal(Linear24.from_linear(strided).packed, Linear24.from_linear(linear).packed)


def test_extreme_values() -> None:
    for value in (torch.finfo(torch.float16).max, torch.finfo(torch.float16).smallest_normal / 4, float("inf"), float("nan")):
        linear = pruned_linear(32, 8, torch.float16, bias=False)
        linear.weight[0, 0:4] = torch.tensor([value, 0, 0, 1.0])
        x = torch.ones(1, 32, dtype=torch.float16)
        assert torch.equal(Linear24.from_linear(linear)(x), linear(x)) or value != value
        assert torch.equal(Linear24.from_linear(linear).weight.isnan(), linear.weight.isnan())


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 140), inputs=st.integers(1, 80), seed=st.integers(0, 99), fp16=st.booleans())
def test_unpack_gives_back_what_was_packed_and_repack_is_pack(rows: int, inputs: int, seed: int, fp16: bool) -> None:
    dtype = torch.float16 if fp16 else torch.bfloat16
    weight = pruned_linear(inputs, rows, dtype, seed=seed).weight
    packed = pack_weight(weight, dtype)
    assert packed.shape == packed_shape(rows, inputs)
    assert torch.equal(unpack_weight(packed, rows, inputs, dtype), weight)
    repacker = Repacker(weight != 0)
    assert torch.equal(repack(weight, repacker.index, repacker.metadata, dtype), packed)


def test_repacking_leaves_out_what_the_mask_drops() -> None:
    linear = pruned_linear(80, 136)
    repacker = Repacker(linear.weight != 0)
    fresh = torch.randn(136, 80).bfloat16()
    packed = repack(fresh, repacker.index, repacker.metadata, torch.bfloat16)
    assert torch.equal(unpack_weight(packed, 136, 80, torch.bfloat16), torch.where(linear.weight != 0, fresh, 0))


def test_a_group_of_fewer_than_two_multiplies_nothing_outside_the_mask() -> None:
    """Such a group is packed with its lowest zero positions too; what is written there is not computed with, as on the CPU."""
    mask = torch.zeros(130, 70, dtype=torch.bool)
    mask[::2, 1::4] = True
    repacker = Repacker(mask)
    packed = repack(torch.randn(130, 70).bfloat16(), repacker.index, repacker.metadata, torch.bfloat16)
    assert not unpack_weight(packed, 130, 70, torch.bfloat16)[~mask].any()


def test_positions_in_a_weight_of_four_gibibytes_do_not_wrap() -> None:
    """The weight itself is not made: 2^31 elements, of which two positions and one of the padding are asked for."""
    rows, inputs, padded = 2**15 + 2, 2**16 - 2, 2**16
    places = torch.tensor([padded * (rows - 1) + 65000, 7, padded - 1])
    assert _in_weight(places, padded, rows, inputs).tolist() == [inputs * (rows - 1) + 65000, 7, rows * inputs]
    assert _in_weight(places[1:], padded, 8, inputs).dtype == torch.int32


def test_a_layer_of_zeros_is_packed_zeros() -> None:
    assert torch.equal(packed_zeros(130, 70), pack_weight(torch.zeros(130, 70), torch.float16))
    layer = Linear24(70, 130)
    assert layer(torch.ones(2, 70).bfloat16()).abs().max() == 0


# Gradients.


def test_the_gradient_reaches_the_input_and_nothing_else() -> None:
    linear, x = pruned_linear(64, 40), torch.randn(2, 3, 64).bfloat16().requires_grad_()
    twin = x.detach().clone().requires_grad_()
    layer = Linear24.from_linear(linear)
    grad = torch.randn(2, 3, 40).bfloat16()
    layer(x).backward(grad)
    linear(twin).backward(grad)
    assert x.grad is not None
    assert twin.grad is not None
    assert torch.equal(x.grad, twin.grad)
    assert list(layer.parameters()) == []


def test_gradients_of_gradients() -> None:
    layer = Linear24.from_linear(pruned_linear(32, 16))
    x = torch.randn(2, 32).bfloat16().requires_grad_()
    grad = torch.randn(2, 16).bfloat16().requires_grad_()
    (gx,) = torch.autograd.grad(layer(x), x, grad, create_graph=True)
    direction = torch.randn(2, 32).bfloat16()
    (second,) = torch.autograd.grad(gx, grad, direction)
    assert torch.equal(second, direction @ layer.weight.t())


def test_forward_mode_derivatives() -> None:
    linear = pruned_linear(32, 16)
    layer, x, direction = Linear24.from_linear(linear), torch.randn(2, 32).bfloat16(), torch.randn(2, 32).bfloat16()
    expected = nn.functional.linear(direction, linear.weight)
    with forward_ad.dual_level():
        y, tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, direction)))
        assert torch.equal(y, layer(x))
        assert torch.equal(tangent, expected)
        with pytest.raises(UnsupportedError, match="TrainableLinear24: forward-mode derivatives are not built"):
            layer.trainable()(x)
    y, tangent = torch.func.jvp(layer, (x,), (direction,))
    assert torch.equal(y, layer(x))
    assert torch.equal(tangent, expected)


def test_a_training_step_moves_kept_weights_only() -> None:
    """Ten steps of three optimizers give the dense layer trained under its mask, to rounding."""
    for make in (
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
        lambda p: torch.optim.AdamW(p, 0.01),
        lambda p: torch.optim.Adam(p, 0.01, foreach=True),
    ):
        linear = pruned_linear(32, 16, torch.float32).requires_grad_(True)
        layer = TrainableLinear24.from_linear(linear, dtype=torch.bfloat16)
        mask, start = layer.mask.clone(), layer.weight.detach().clone()
        optimizers = make(layer.parameters()), make(linear.parameters())
        for step in range(10):
            x = torch.randn(8, 32, generator=torch.Generator().manual_seed(step)).bfloat16()
            layer(x).float().square().mean().backward()
            y = nn.functional.linear(x, linear.weight.bfloat16(), linear.bias.bfloat16())
            y.float().square().mean().backward()
            linear.weight.grad.mul_(mask)  # type: ignore[union-attr]
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        assert torch.equal(layer.weight[~mask], torch.zeros_like(layer.weight[~mask]))
        assert not torch.equal(layer.weight, start)
        assert torch.equal(layer.weight, linear.weight)
        assert torch.equal(layer.bias, linear.bias)  # type: ignore[arg-type]
        frozen = layer.freeze()
        assert torch.equal(frozen.weight, layer.weight.bfloat16())
        assert torch.equal(frozen(x), layer(x))


def test_values_written_outside_the_mask_are_not_computed_with() -> None:
    layer = TrainableLinear24.from_linear(pruned_linear(32, 16))
    x, before = torch.randn(3, 32).bfloat16(), None
    before = layer(x)
    layer.weight.data[~layer.mask] = 7.0
    assert torch.equal(layer(x), before)
    assert torch.equal(layer.freeze()(x), before)
    layer.weight.data[layer.mask] = 0.5
    assert not torch.equal(layer(x), before)


def test_freezing_and_thawing_keep_the_weight() -> None:
    layer = Linear24.from_linear(pruned_linear(40, 24))
    again = layer.trainable().freeze()
    assert torch.equal(again.packed, layer.packed)
    assert torch.equal(again.bias, layer.bias)  # type: ignore[arg-type]
    assert torch.equal(layer.to_linear().weight, layer.weight)


# Autocast.


@pytest.mark.parametrize("kind", [Linear24, TrainableLinear24])
def test_autocast_casts_the_input_to_the_weights_dtype(kind: Any) -> None:
    linear = pruned_linear(32, 16, torch.float32)
    layer = kind.from_linear(linear, dtype=torch.bfloat16)
    x = torch.randn(4, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = layer(x), linear(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(InputError, match=r"x is torch.float64, expected torch.bfloat16"):
        layer(x.double())


@pytest.mark.parametrize("kind", [Linear24, TrainableLinear24])
def test_under_autocast_to_the_other_dtype_the_weights_own_dtype_stays(kind: Any) -> None:
    layer = kind.from_linear(pruned_linear(32, 16))
    x = torch.randn(4, 32).bfloat16().requires_grad_()
    twin = x.detach().clone().requires_grad_()
    expected = layer(x)
    expected.sum().backward()
    with torch.autocast("cpu", torch.float16):
        y = layer(twin)
        y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    assert twin.grad is not None
    assert twin.grad.dtype == torch.bfloat16
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(x.detach().float()), expected)


def test_a_backward_pass_inside_autocast_keeps_the_gradients_dtype() -> None:
    """Gradients of 1e6, which fp16 does not hold."""
    layer = TrainableLinear24.from_linear(pruned_linear(32, 16))
    found = []
    for context in (nullcontext(), torch.autocast("cpu", torch.float16)):
        x = torch.ones(4, 32, dtype=torch.bfloat16, requires_grad=True)
        layer.weight.grad = None
        with context:
            y = layer(x)
            y.backward(torch.full_like(y, 1e6))
        found.append((x.grad, layer.weight.grad))
    assert all(torch.equal(inside, outside) for outside, inside in zip(*found, strict=True))


def test_gradients_on_the_meta_device() -> None:
    for layer in (Linear24(32, 16, device="meta"), TrainableLinear24.from_linear(pruned_linear(32, 16)).to("meta")):
        x = torch.empty(4, 32, dtype=torch.bfloat16, device="meta", requires_grad=True)
        layer(x).sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape


# Tracing.


def a_model(bias: bool = True) -> nn.Module:
    return nn.Sequential(
        Linear24.from_linear(pruned_linear(64, 40, bias=bias)), nn.GELU(), Linear24.from_linear(pruned_linear(40, 8, bias=bias))
    )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_compiles_without_a_graph_break(mode: Any) -> None:
    model = a_model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with mode():
        x = torch.randn(3, 64).bfloat16()
        assert torch.equal(compiled(x), model(x))


def test_compiled_gradients_and_new_sizes() -> None:
    model = a_model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (2, 5, 9):
        x = torch.randn(tokens, 64).bfloat16().requires_grad_()
        twin = x.detach().clone().requires_grad_()
        compiled(x).sum().backward()
        model(twin).sum().backward()
        assert torch.equal(x.grad, twin.grad)  # type: ignore[arg-type]


@pytest.mark.slow
def test_compiles_with_the_default_backend() -> None:
    model = a_model()
    x = torch.randn(3, 64).bfloat16()
    with torch.inference_mode():
        found, expected = torch.compile(model, fullgraph=True)(x), model(x)
    # GELU between the layers is fused in fp32 and differs by a rounding; the second layer passes on at most the sum of |w| of it.
    limit = 2 * torch.finfo(torch.bfloat16).eps * (model[0](x).abs().float() @ model[2].weight.abs().float().t() + expected.abs().float())
    assert bool(((found.float() - expected.float()).abs() <= limit).all())


def test_a_compiled_training_step() -> None:
    layer = TrainableLinear24.from_linear(pruned_linear(32, 16))
    twin = copy.deepcopy(layer)
    x = torch.randn(4, 32).bfloat16()
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).sum().backward()
    twin(x).sum().backward()
    assert torch.equal(layer.weight.grad, twin.weight.grad)  # type: ignore[arg-type]
    assert bool((layer.weight.grad != 0).any())  # type: ignore[union-attr]


@pytest.mark.parametrize("strict", [True, False])
def test_exports_saves_and_loads(strict: bool, tmp_path: Path) -> None:
    model = a_model()
    x = torch.randn(3, 64).bfloat16()
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},), strict=strict)
    assert sum("twofour.linear24" in str(node.target) for node in program.graph.nodes) == 2
    torch.export.save(program, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    more = torch.randn(11, 64).bfloat16()
    assert torch.equal(again(more), model(more))


@pytest.mark.parametrize("op", ["linear24", "linear24_input_grad", "linear24_masked"])
def test_pytorchs_own_operator_checks(op: str) -> None:
    """Schema, fake kernel, autograd registration and AOT tracing, as torch.library.opcheck tests them."""
    linear = pruned_linear(32, 16)
    layer = Linear24.from_linear(linear)
    x, grad = torch.randn(3, 32).bfloat16().requires_grad_(), torch.randn(3, 16).bfloat16().requires_grad_()
    weight = linear.weight.clone().requires_grad_()
    args: dict[str, tuple[Any, ...]] = {
        "linear24": (x, layer.packed, layer.bias, 16, 32, torch.bfloat16),
        "linear24_input_grad": (grad, layer.packed, 16, 32, torch.bfloat16),
        "linear24_masked": (x, weight, weight.detach() != 0, layer.packed, layer.bias),
    }
    torch.library.opcheck(getattr(torch.ops.twofour, op).default, args[op])


def test_maps_over_inputs() -> None:
    layer = Linear24.from_linear(pruned_linear(32, 16))
    x = torch.randn(3, 5, 32).bfloat16()
    assert torch.equal(torch.vmap(layer, in_dims=1, out_dims=1)(x), layer(x))
    with pytest.raises(InputError, match="vmap maps x only"):
        torch.vmap(lambda b: torch.ops.twofour.linear24(x, layer.packed, b, 16, 32, torch.bfloat16))(torch.randn(4, 16))


def test_a_dispatch_mode_sees_the_operator() -> None:
    """What the module launches past the dispatcher is only a call that nobody watches."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    layer, x = Linear24.from_linear(pruned_linear(32, 16)), torch.randn(3, 32).bfloat16()
    with Watch(), torch.no_grad():
        layer(x)
    assert any("twofour.linear24" in name for name in seen)


def test_which_calls_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    plain: list[bool] = []

    class Cuda:
        """A tensor that says it is on a GPU."""

        is_cuda, requires_grad, layout = True, False, torch.strided

        def is_neg(self) -> bool:
            return False

    monkeypatch.setattr(ops, "Tensor", Cuda)
    x: Any = Cuda()
    assert ops.is_plain_call(x)
    with torch.inference_mode():
        assert ops.is_plain_call(x)
    with torch.no_grad():
        assert ops.is_plain_call(x)
    from torch.utils._python_dispatch import TorchDispatchMode

    with TorchDispatchMode():
        assert not ops.is_plain_call(x)
    with torch._subclasses.FakeTensorMode():
        assert not ops.is_plain_call(x)
    with torch.device("cpu"):
        assert not ops.is_plain_call(x)
    with torch.autograd.forward_ad.dual_level():
        assert not ops.is_plain_call(x)
    torch.vmap(lambda y: (plain.append(ops.is_plain_call(x)), y)[1])(torch.ones(2))
    torch.func.grad(lambda y: (plain.append(ops.is_plain_call(x)), y)[1])(torch.tensor(1.0))
    torch.jit.trace(lambda y: (plain.append(ops.is_plain_call(x)), y)[1], torch.ones(2), check_trace=False)
    assert plain == [False, False, False]
    monkeypatch.setattr(Cuda, "requires_grad", True)
    assert not ops.is_plain_call(x)
    with torch.no_grad():
        assert ops.is_plain_call(x)
    monkeypatch.setattr(ops, "_is_compiling", lambda: True)
    assert not ops.is_plain_call(x)
    with torch.no_grad():
        assert not ops.is_plain_call(x)
