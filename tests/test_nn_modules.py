"""Saving, moving and copying 2:4 layers, whole models, and every sentence for bad input."""

import copy
import logging
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nn_layers import pruned_linear
from safetensors.torch import load_file, save_file, save_model
from torch import nn

import twofour
from twofour.builder import tactics as tactics_room
from twofour.errors import InputError, MissingExtraError, UnsupportedError
from twofour.jit import driver
from twofour.kernels.gemm import Problem, why_not
from twofour.nn import Linear24, TrainableLinear24, convert, launch, restore
from twofour.nn.convert import disagreement
from twofour.nn.packing import dense_of, unpack_weight


def a_model(dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    return nn.Sequential(pruned_linear(64, 40, dtype), nn.ReLU(), pruned_linear(40, 8, dtype, seed=1))


# Saving and loading.


def test_packed_weights_go_to_safetensors_and_back(tmp_path: Path) -> None:
    model, x = a_model(), torch.randn(3, 64).bfloat16()
    convert(model)
    expected = model(x)
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    state = load_file(tmp_path / "m.safetensors")
    assert sorted(k for k in state if k.startswith("0.")) == ["0._extra_state", "0.bias", "0.packed"]
    fresh = nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 8)).bfloat16()
    assert restore(fresh, state) is fresh
    assert torch.equal(fresh(x), expected)
    assert torch.equal(restore(fresh, state)(x), expected)
    dense_bytes = 2 * 128 * 64  # of the padded block
    assert state["0.packed"].numel() * 2 * 16 == 9 * dense_bytes


def test_a_layer_of_two_names_is_restored_as_one_and_a_model_without_memory_takes_the_state(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = pruned_linear(64, 64)
            self.again = self.first
            self.norm = nn.LayerNorm(64).bfloat16()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.again(self.first(x)))  # type: ignore[no-any-return]

    model, x = Net(), torch.randn(3, 64).bfloat16()
    convert(model)
    save_model(model, str(tmp_path / "m.safetensors"))
    one_name = load_file(tmp_path / "m.safetensors")
    assert sum(name.endswith(".packed") for name in one_name) == 1
    for fresh, state in ((Net(), model.state_dict()), (Net().to("meta"), model.state_dict()), (Net(), one_name)):
        assert torch.equal(restore(fresh, state)(x), model(x))
        assert isinstance(fresh.first, Linear24)
        assert fresh.first is fresh.again


def test_a_state_of_the_other_dtype_is_converted() -> None:
    source = Linear24.from_linear(pruned_linear(64, 40, torch.bfloat16))
    target = Linear24(64, 40, dtype=torch.float16)
    target.load_state_dict(source.state_dict())
    assert target.dtype == torch.float16
    assert torch.equal(target.weight, source.weight.half())


def test_a_bias_assigned_in_16_bits_is_added_in_32() -> None:
    layer, twin = Linear24.from_linear(pruned_linear(64, 40)), Linear24.from_linear(pruned_linear(64, 40, seed=1))
    state = layer.state_dict()
    twin.load_state_dict({**state, "bias": state["bias"].bfloat16()}, assign=True)
    x = torch.randn(3, 64).bfloat16()
    assert torch.equal(twin(x), layer(x))


def test_a_layer_packed_under_inference_mode_is_loaded_into_later() -> None:
    with torch.inference_mode():
        layer = Linear24.from_linear(pruned_linear(64, 40))
        frozen = TrainableLinear24.from_linear(pruned_linear(64, 40)).freeze()
    other = Linear24.from_linear(pruned_linear(64, 40, seed=1))
    for made in (layer, frozen):
        made.load_state_dict(other.state_dict())
        assert torch.equal(made.bias, other.bias)  # type: ignore[arg-type]


def test_a_weight_loaded_in_place_is_computed_with() -> None:
    layer, other = Linear24.from_linear(pruned_linear(32, 8)), Linear24.from_linear(pruned_linear(32, 8, seed=1))
    x = torch.randn(2, 32).bfloat16()
    assert not torch.equal(layer(x), other(x))
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))


def test_the_trainable_form_saves_its_mask() -> None:
    layer = TrainableLinear24.from_linear(pruned_linear(32, 16))
    other = TrainableLinear24.from_linear(pruned_linear(32, 16, seed=1))
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 32).bfloat16()
    assert torch.equal(other.mask, layer.mask)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(other.freeze().packed, layer.freeze().packed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("_extra_state"), "Linear24: the state's _extra_state is missing or damaged, expected four int64 numbers"),
        (lambda s: s.update(_extra_state=torch.tensor([1, 9, 40, 64])), "_extra_state is missing or damaged"),
        (lambda s: s.update(_extra_state=torch.tensor([2, 0, 40, 64])), "the packed weight has format 2, expected 1; use the version"),
        (lambda s: s.update(_extra_state=torch.tensor([1, 0, 48, 64])), r"the state holds a weight \[48, 64\], expected \[40, 64\]"),
        (lambda s: (s.pop("packed"), s.update(weight=torch.zeros(40, 64))), "the state holds a dense weight, expected a packed one"),
        (lambda s: s.update(packed=torch.zeros(1, 1, 4, dtype=torch.int16)), "size mismatch for packed"),
        (
            lambda s: s.update(packed=torch.zeros(1, 1, 4, dtype=torch.int16), _extra_state=torch.tensor([1, 1, 40, 64])),
            "size mismatch for packed",
        ),
        (
            lambda s: s.update(packed=s["packed"].half()),
            "packed weight is torch.float16, expected torch.int16; save the layer again, uncast",
        ),
    ],
)
def test_a_state_that_does_not_fit(change: Any, message: str) -> None:
    layer = Linear24.from_linear(pruned_linear(64, 40))
    state = dict(layer.state_dict())
    change(state)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.ReLU()), "0: the state holds a packed linear layer, the model a ReLU; build the same model"),
        (lambda: nn.Sequential(), "0: the state holds a packed layer of this name, the model none; build the same model"),
        (lambda: nn.Sequential(nn.Linear(64, 48)), r"0: the state holds a weight \[40, 64\], the model \[48, 64\]"),
        (lambda: a_model().append(nn.Linear(8, 8)), "restore: the state does not fit the model: .*Missing key.*3.weight"),
        (lambda: nn.Sequential(*a_model()[:2], nn.ReLU()), "2: the state holds a packed linear layer, the model a ReLU"),
    ],
)
def test_a_state_of_another_model_leaves_its_layers(make: Any, message: str) -> None:
    model, other = a_model(), make()
    convert(model)
    before = [(name, id(layer)) for name, layer in other.named_modules()]
    values = [p.detach().clone() for p in other[0].parameters()] if len(other) else []
    with pytest.raises(InputError, match=message):
        restore(other, model.state_dict())
    assert [(name, id(layer)) for name, layer in other.named_modules()] == before
    assert all(torch.equal(p, old) for p, old in zip(other[0].parameters() if values else (), values, strict=True))


# Moving and copying.


def test_changing_the_dtype_repacks_the_weight_and_keeps_the_fp32_bias() -> None:
    layer = Linear24.from_linear(pruned_linear(64, 40, torch.bfloat16))
    before, bias = layer.weight.clone(), layer.bias.clone()  # type: ignore[union-attr]
    model = nn.Sequential(layer, nn.Linear(40, 4)).to(torch.float16)
    assert (layer.dtype, layer.packed.dtype, layer.bias.dtype) == (torch.float16, torch.int16, torch.float32)  # type: ignore[union-attr]
    assert torch.equal(layer.weight, before.half())
    assert torch.equal(layer.bias, bias)  # type: ignore[arg-type]
    assert model(torch.randn(2, 64).half()).dtype == torch.float16
    assert torch.equal(layer.bfloat16().weight, before.half().bfloat16())


def test_the_bias_is_rounded_with_the_weight() -> None:
    """Else a GPU, which adds it in fp32, and a CPU, which adds it in the dtype of x, would differ by more than rounding."""
    linear = pruned_linear(64, 40, torch.float16)
    state = Linear24.from_linear(linear).state_dict()
    loaded = Linear24(64, 40, dtype=torch.bfloat16)
    loaded.load_state_dict(state)
    for layer in (Linear24.from_linear(linear).bfloat16(), loaded):
        assert torch.equal(layer.bias, linear.bias.bfloat16().float())  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [Linear24, TrainableLinear24])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_type_casts_the_values_and_leaves_the_integers(kind: Any, dtype: torch.dtype) -> None:
    layer = kind.from_linear(pruned_linear(64, 40))
    expected = layer.weight.detach().to(dtype)
    nn.Sequential(layer).type(dtype)
    assert torch.equal(layer.weight, expected)
    assert layer(torch.randn(2, 64).to(dtype)).dtype == dtype


def test_a_move_that_fails_leaves_the_bias_whole() -> None:
    layer = Linear24.from_linear(pruned_linear(64, 40))

    def fail(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel():
            raise RuntimeError("out of memory")
        return tensor

    with pytest.raises(RuntimeError, match="out of memory"):
        layer._apply(fail)
    assert layer(torch.randn(2, 64).bfloat16()).dtype == torch.bfloat16


def test_other_dtypes_are_refused() -> None:
    layer = Linear24.from_linear(pruned_linear(64, 40))
    with pytest.raises(InputError, match=r"cannot be converted to torch.float32, expected bfloat16 or float16; call to_linear\(\)"):
        layer.float()
    assert layer.bias is not None
    assert layer.bias.dtype == torch.float32
    assert layer(torch.randn(1, 64).bfloat16()).dtype == torch.bfloat16


def test_the_meta_device_and_back() -> None:
    layer = Linear24.from_linear(pruned_linear(64, 40))
    state = layer.state_dict()
    empty = copy.deepcopy(layer).to("meta").half().bfloat16()
    assert empty.packed.is_meta
    assert empty(torch.empty(3, 64, dtype=torch.bfloat16, device="meta")).shape == (3, 40)
    back = empty.to_empty(device="cpu")
    back.load_state_dict(state)
    assert torch.equal(back.weight, layer.weight)
    assert Linear24(64, 40, device="meta").packed.shape == layer.packed.shape


def test_a_trainable_layer_on_the_meta_device_takes_a_state_as_others_do() -> None:
    layer = TrainableLinear24.from_linear(pruned_linear(64, 40))
    empty = copy.deepcopy(layer).to("meta")
    with pytest.warns(UserWarning, match="no-op"):
        empty.load_state_dict(layer.state_dict())
    empty.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(2, 64).bfloat16()
    assert torch.equal(empty(x), layer(x))


@pytest.mark.parametrize("kind", [Linear24, TrainableLinear24])
def test_copies_are_independent(kind: Any) -> None:
    layer = kind.from_linear(pruned_linear(64, 40))
    x = torch.randn(2, 64).bfloat16()
    expected = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301 - our own bytes
        assert torch.equal(twin(x), expected)
        twin.load_state_dict(kind.from_linear(pruned_linear(64, 40, seed=5)).state_dict())
        assert not torch.equal(twin(x), expected)
    assert torch.equal(layer(x), expected)


def test_the_dense_form_is_unpacked_once_and_forgotten_with_its_layer() -> None:
    layer = Linear24.from_linear(pruned_linear(64, 40))
    assert layer.weight.data_ptr() == layer.weight.data_ptr()
    with torch.inference_mode():
        made = Linear24.from_linear(pruned_linear(64, 40, seed=2))
        assert not made.packed.is_inference()
        untracked = made.packed.clone()
        first = dense_of(untracked, 40, 64, torch.bfloat16)
        untracked.copy_(layer.packed)
        assert not torch.equal(dense_of(untracked, 40, 64, torch.bfloat16), first)
    assert torch.equal(layer.weight, unpack_weight(layer.packed, 40, 64, torch.bfloat16))


def test_data_parallel_training(tmp_path: Path) -> None:
    """The trainable form as it is; the packed one where the wrapper is told, as the documentation says, to leave packed weights alone."""
    wrapper, x = nn.parallel.DistributedDataParallel, torch.randn(4, 64).bfloat16()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        for trainable in (True, False):
            model = nn.Sequential(pruned_linear(64, 40), nn.Linear(40, 4).bfloat16())
            convert(model, exclude=["1"], trainable=trainable)
            if not trainable:
                packed = [name for name, buffer in model.named_buffers() if buffer.dtype == torch.int16]
                wrapper._set_params_and_buffers_to_ignore_for_model(model, packed)
            parallel = wrapper(model)
            assert torch.equal(parallel(x), model(x))
            parallel(x).sum().backward()
            assert model[1].weight.grad is not None
    finally:
        torch.distributed.destroy_process_group()


# Whole models.


def test_convert_tells_for_each_layer_what_was_done_and_why() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(16, 32)
            self.first, self.twice, self.unused = (pruned_linear(32, 32, seed=s) for s in range(3))
            self.again = self.twice
            self.dense = nn.Linear(32, 32).bfloat16()
            self.dense.weight.data[2, 8:12] = torch.tensor([0.5, -1.0, 0.25, 2.0])
            self.dense.weight.data[:2] = 0
            self.dense.weight.data[2, :8] = 0
            self.full = pruned_linear(32, 32, torch.float32)
            self.hooked = pruned_linear(32, 32)
            self.hooked.register_forward_hook(lambda *_: None)
            self.kept = pruned_linear(32, 32)
            self.attention = nn.MultiheadAttention(32, 2).bfloat16()
            self.head = pruned_linear(32, 16)
            self.embed.to(torch.bfloat16).weight = self.head.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.kept(self.hooked(self.dense(self.again(self.twice(self.first(self.embed(tokens)))))))
            x = self.attention(x, x, x)[0]
            return self.head(self.full(x.float()).bfloat16())  # type: ignore[no-any-return]

    net = Net()
    tokens = torch.randint(16, (5, 7))
    with torch.no_grad():
        before = net(tokens)
        record = convert(net, tokens, exclude=["ke*"])
        assert torch.equal(net(tokens), before)
    reasons = {layer.name: layer.reason for layer in record.layers}
    assert {layer.name for layer in record.converted} == {"first", "twice"}
    assert record.converted[0].tokens == (35,)
    assert isinstance(net.first, Linear24)
    assert net.twice is net.again
    assert isinstance(net.twice, Linear24)
    assert reasons["unused"] == "it did not run on the example inputs"
    assert reasons["dense"] == "not 2:4: row 2, inputs 8-11 = 0.5, -1, 0.25, 2"
    assert reasons["full"] == "its weight is torch.float32; pass dtype=torch.bfloat16 to round it and run under autocast"
    assert reasons["hooked"] == "it has hooks, which would be lost"
    assert reasons["kept"] == "excluded"
    assert reasons["head"] == "its weight is shared with another layer"
    assert reasons["attention.out_proj"].startswith("a NonDynamicallyQuantizableLinear, whose owner may read its weight directly")
    lines = str(record).splitlines()
    assert lines[0] == "Conversion(2 of 9 linear layers 2:4)"
    assert len(lines) == 10
    assert "  dense [32, 32]: dense, not 2:4: row 2, inputs 8-11 = 0.5, -1, 0.25, 2" in lines


class Traced(torch.Tensor):
    """A tensor of a class of its own, as quantised and sharded weights are."""


def replaced_forward(linear: nn.Linear) -> None:
    plain = linear.forward
    linear.forward = lambda x: 2 * plain(x)  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (replaced_forward, "its forward has been replaced by another, which would be lost"),
        (lambda m: m.register_parameter("lora_a", nn.Parameter(torch.zeros(2))), "it holds lora_a too, which would be lost"),
        (lambda m: m.register_full_backward_pre_hook(lambda *_: None), "it has hooks, which would be lost"),
        (lambda m: setattr(m, "weight", nn.Parameter(m.weight.data.as_subclass(Traced))), "its weight is a Traced, not a plain tensor"),
        (
            lambda m: setattr(m, "weight", nn.Parameter(m.weight.data.to_sparse())),
            "its weight is a tensor of layout torch.sparse_coo, not a plain tensor",
        ),
    ],
)
def test_a_layer_that_is_more_than_its_weight_stays_dense(change: Any, reason: str) -> None:
    model = nn.Sequential(pruned_linear(64, 40))
    change(model[0])
    record = convert(model)
    assert [layer.reason for layer in record.layers] == [reason]
    assert type(model[0]) is nn.Linear


def test_layers_of_other_outputs_do_not_stop_the_example() -> None:
    class Pair(nn.Linear):
        def forward(self, input: torch.Tensor) -> Any:
            return super().forward(input), None

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.none, self.pair = pruned_linear(64, 40), nn.Linear(40, 0).bfloat16(), Pair(40, 8).bfloat16()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            self.none(x)
            return self.pair(x)[0]  # type: ignore[no-any-return]

    record = convert(Net(), torch.randn(3, 64).bfloat16())
    assert [layer.converted for layer in record.layers] == [True, False, False]
    assert [layer.reason.split(",")[0] for layer in record.dense] == ["its weight has no elements", "a Pair"]


def test_an_encoder_layers_fused_path_would_read_the_weight() -> None:
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True).bfloat16().eval()
    layer.linear1, layer.linear2 = pruned_linear(32, 64), pruned_linear(64, 32)
    x = torch.randn(2, 5, 32).bfloat16()
    assert "the fused path of nn.TransformerEncoderLayer reads its weight" in str(convert(layer, x))
    assert torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            before = layer(x)
            assert len(convert(layer, x).converted) == 2
            assert torch.equal(layer(x), before)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("inputs", [lambda x: x, lambda x: (x,), lambda x: {"input": x}])
def test_ways_to_give_the_example(inputs: Any) -> None:
    assert len(convert(a_model(), inputs(torch.randn(3, 64).bfloat16())).converted) == 2


def test_a_fp32_model_is_rounded_on_request_and_runs_under_autocast() -> None:
    model, x = a_model(torch.float32), torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(x)
    assert len(convert(model, x, dtype=torch.bfloat16).converted) == 2
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), before)


def test_a_model_is_converted_for_training() -> None:
    model = a_model()
    assert len(convert(model, trainable=True).converted) == 2
    assert [type(m) for m in model] == [TrainableLinear24, nn.ReLU, TrainableLinear24]
    assert len(list(model.parameters())) == 4


def test_a_pruned_model_converts() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)).bfloat16()
    x = torch.randn(8, 64).bfloat16()
    pruning = twofour.prune(model, (x,))
    assert {layer.name for layer in convert(model, x).converted} >= {layer.name.removesuffix(".weight") for layer in pruning.pruned}


def test_a_layer_that_computes_something_else_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = pruned_linear(64, 40)
    layer = Linear24.from_linear(linear)
    assert disagreement(layer, linear, 8) == ""
    layer.packed[0, 0, 3] += 64  # a bit of one kept value
    assert "its 2:4 form computes" in disagreement(layer, linear, 8)
    monkeypatch.setattr(Linear24, "from_linear", classmethod(lambda cls, *_, **__: layer))
    model = nn.Sequential(linear)
    record = convert(model)
    assert model[0] is linear
    assert "its 2:4 form computes" in record.layers[0].reason


def timed_world(
    monkeypatch: pytest.MonkeyPatch, times: dict[str, float], left_out: dict[str, str] | None = None, also: dict[str, float] | None = None
) -> list[Problem]:
    """A CPU on which `convert` believes in a Hopper GPU whose measured times are given by the beginning of a tactic's name."""
    asked: list[Problem] = []

    def choose(problem: Problem, **_: Any) -> Any:
        asked.append(problem)
        names = [str(t) for t in tactics_room.tactics(problem)]
        found = {
            n: us * problem.tokens
            for prefix, us in (also or times if problem.epilogue.bias else times).items()
            for n in names
            if n.startswith(prefix)
        }
        return SimpleNamespace(times_us=found, left_out=left_out or {})

    monkeypatch.setattr(tactics_room, "choose", choose)
    monkeypatch.setattr("twofour.jit.driver.num_sms", lambda device: 132)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launch, "_configs", {})
    monkeypatch.setattr(launch, "runs_on", lambda device: True)
    monkeypatch.setattr(sys.modules["twofour.nn.convert"], "disagreement", lambda *_: "")
    return asked


@pytest.mark.parametrize(("dense", "converted"), [(0.3, True), (0.2, False), (0.1, False)])
def test_a_layer_is_converted_where_it_is_measured_faster(monkeypatch: pytest.MonkeyPatch, dense: float, converted: bool) -> None:
    asked = timed_world(monkeypatch, {"twofour:2:4": 0.2, "twofour:dense": 0.01, "cublaslt": dense})
    model = nn.Sequential(pruned_linear(64, 40))
    record = convert(model, torch.randn(100, 64).bfloat16()).layers[0]
    assert [(p.tokens, p.outputs, p.inputs) for p in asked] == [(100, 40, 64)]
    assert record.converted is converted
    assert isinstance(model[0], Linear24 if converted else nn.Linear)
    assert (record.sparse_us, record.dense_us) == pytest.approx((20.0, 100 * dense))
    expected = "2:4, faster than dense" if converted else "dense, dense is as fast or faster"
    assert str(record) == f"0 [40, 64]: {expected}; 2:4 20.0 us, dense {100 * dense:.1f} us"
    (((problem, device), config),) = launch._configs.items()
    assert (problem, device) == (launch.problem_of(100, 40, 64, torch.bfloat16, True), 0)
    assert why_not(problem, config) is None


def test_a_config_that_cannot_add_the_bias_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 192 tokens leave no registers for a bias: where only they were timed without one, the product with it is timed too."""
    asked = timed_world(monkeypatch, {"twofour:2:4:256x192": 0.1, "cublaslt": 0.2}, also={"twofour:2:4:256x1": 0.15})
    record = convert(nn.Sequential(pruned_linear(4096, 4096)), torch.randn(1500, 4096).bfloat16()).layers[0]
    assert [p.epilogue.bias for p in asked] == [False, True]
    assert record.sparse_us == pytest.approx(0.15 * 1500)
    (((problem, _), config),) = launch._configs.items()
    assert why_not(problem, config) is None


def test_a_layer_without_a_figure_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    timed_world(monkeypatch, {"cublaslt": 1.0}, {"twofour:2:4:x": "unstable, spread 9 %"})
    record = convert(nn.Sequential(pruned_linear(64, 40)), torch.randn(2, 64).bfloat16()).layers[0]
    assert str(record) == "0 [40, 64]: dense, no 2:4 kernel was timed (twofour:2:4:x: unstable, spread 9 %) at 2 tokens"


# Bad input.


@pytest.mark.parametrize("kind", [Linear24, TrainableLinear24])
def test_a_weight_that_is_not_24_names_layer_group_and_values(kind: Any) -> None:
    linear = pruned_linear(64, 40)
    linear.weight[7, 12:16] = torch.tensor([1.0, 0.0, -2.5, 0.125])
    with pytest.raises(InputError) as e:
        kind.from_linear(linear, name="decoder.3.fc1")
    assert str(e.value) == (
        "decoder.3.fc1: expected at most 2 non-zeros in every 4 inputs, got row 7, inputs 12-15 = 1, 0, -2.5, 0.125; "
        "prune it with twofour.prune first"
    )


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            lambda: Linear24.from_linear(pruned_linear(8, 8, torch.float32)),
            "linear: weight dtype is torch.float32, expected",
        ),
        (lambda: Linear24.from_linear(nn.Conv1d(4, 4, 1)), "linear: expected an nn.Linear, got Conv1d"),
        (lambda: TrainableLinear24.from_linear(nn.ReLU()), "linear: expected an nn.Linear, got ReLU"),
        (lambda: Linear24(0, 8), "in_features=0, out_features=8, expected positive sizes"),
        (lambda: Linear24(8, 8, dtype=torch.float32), "Linear24: weight dtype is torch.float32"),
        (lambda: convert(nn.Linear(8, 8)), "convert: the model is itself an nn.Linear"),
        (lambda: convert(a_model(), exclude=["3"]), "exclude '3' matches no linear layer of the model"),
        (lambda: convert(a_model(), exclude="*.head"), r"exclude is '\*.head', expected a list of patterns; write \['\*.head'\]"),
        (lambda: convert(a_model(), dtype=torch.float32), "convert: dtype is torch.float32, expected torch.bfloat16 or torch.float16"),
        (
            lambda: convert(a_model(), torch.zeros(2, 60).bfloat16()),
            "convert: the model does not run on the example inputs, expected inputs that it takes: mat1 and mat2 shapes",
        ),
        (
            lambda: Linear24.from_linear(nn.LazyLinear(8, dtype=torch.float16)),
            "linear: the weight is a UninitializedParameter, expected a plain tensor",
        ),
        (lambda: convert("model"), "convert: the model is a str, expected a torch.nn.Module"),  # type: ignore[arg-type]
        (lambda: restore(a_model(), "x.safetensors"), "restore: the state is a str, expected names and tensors"),  # type: ignore[arg-type]
        (lambda: convert(a_model(), 3), "example_inputs is a int, expected a tensor, a tuple of arguments or a dict"),
    ],
)
def test_bad_layers(act: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        act()


LAYER = Linear24.from_linear(pruned_linear(64, 40))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 64), "Linear24: x is torch.float32, expected torch.bfloat16 like the weight; cast it or run under torch.autocast"),
        (torch.zeros(2, 64).half(), "Linear24: x is torch.float16, expected torch.bfloat16"),
        (torch.zeros(2, 64, dtype=torch.int64), "Linear24: x is torch.int64, expected torch.bfloat16"),
        (torch.zeros(2, 60).bfloat16(), r"x has shape \[2, 60\], expected \[..., 64\]: the layer has 64 input features"),
        (torch.tensor(1.0).bfloat16(), r"x has shape \[\], expected \[..., 64\]"),
        (torch.zeros(2, 64, device="meta"), "Linear24: x is torch.float32, expected torch.bfloat16"),
        (torch.zeros(2, 64, device="meta").bfloat16(), "x is on meta and the weight on cpu, expected one device"),
    ],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_bad_inputs(x: torch.Tensor, message: str, compiled: bool) -> None:
    layer = torch.compile(LAYER, backend="eager") if compiled else LAYER
    with pytest.raises(Exception, match=message):
        layer(x)


@pytest.mark.parametrize("layer", [LAYER, LAYER.trainable()])
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch._mkldnn])
def test_sparse_inputs_are_refused(layout: torch.layout, layer: nn.Module) -> None:
    x = torch.eye(2, 64).bfloat16()
    with pytest.raises(InputError, match=rf"x has layout {layout}, expected a strided tensor; call x.to_dense\(\)"):
        layer(x.to_mkldnn() if layout == torch._mkldnn else x.to_sparse(layout=layout))  # type: ignore[attr-defined]


@pytest.mark.parametrize("layer", [LAYER, LAYER.trainable()])
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_inputs_are_refused(layout: torch.layout, layer: nn.Module) -> None:
    x = torch.nested.nested_tensor([torch.zeros(n, 64).bfloat16() for n in (2, 3)], layout=layout)
    with pytest.raises(InputError, match=r"x is a nested tensor, expected a strided one; call it on x.values\(\) or pad x"):
        layer(x)
    assert layer(x.values()).shape == (5, 40) if layout == torch.jagged else True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float32}, "x is torch.bfloat16 and the weight torch.float32, expected both bfloat16 or both float16"),
        ({"packed": LAYER.packed.float()}, r"packed is torch.float32 \[1, 1, 4608\], expected contiguous torch.int16 \[1, 1, 4608\]"),
        ({"rows": 200}, r"expected contiguous torch.int16 \[2, 1, 4608\] for a weight \[200, 64\]"),
        ({"bias": torch.zeros(40).bfloat16()}, r"bias is torch.bfloat16 \[40\], expected contiguous torch.float32 \[40\]"),
        ({"bias": torch.zeros(48)}, r"bias is torch.float32 \[48\], expected contiguous torch.float32 \[40\]"),
    ],
)
def test_bad_operands_of_the_operator(change: dict[str, Any], message: str) -> None:
    given = {"x": torch.zeros(2, 64).bfloat16(), "packed": LAYER.packed, "bias": LAYER.bias, "rows": 40, "inputs": 64}
    with pytest.raises(InputError, match=message):
        torch.ops.twofour.linear24(**{**given, "dtype": torch.bfloat16, **change})


@pytest.mark.parametrize(
    ("capability", "reason"),
    [((8, 6), "GPU 0 has compute capability 8.6, expected 9.0 (Hopper)"), ((10, 0), "GPU 0 has compute capability 10.0, expected 9.0")],
)
def test_other_gpus_compute_with_the_unpacked_weight_and_say_so_once(
    capability: tuple[int, int], reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    launch.why_not.cache_clear()
    launch.runs_on.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda", 0)
    with caplog.at_level(logging.WARNING):
        assert not launch.runs_on(gpu)
        assert not launch.runs_on(gpu)
    assert [r.message for r in caplog.records if reason in r.message] == caplog.messages
    assert len(caplog.messages) == 1
    monkeypatch.setattr(torch.version, "hip", "6.0")
    launch.why_not.cache_clear()
    assert launch.why_not(gpu) == "this PyTorch drives AMD GPUs, expected an NVIDIA GPU of compute capability 9.0"
    launch.why_not.cache_clear()
    launch.runs_on.cache_clear()


@pytest.fixture
def no_driver() -> Iterator[None]:
    driver.bindings.cache_clear()
    yield
    driver.bindings.cache_clear()


@pytest.mark.usefixtures("no_driver")
def test_missing_bindings_are_told_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.delattr("cuda.bindings", raising=False)
    with pytest.raises(MissingExtraError, match=r"launching kernels needs cuda.bindings, which is not .*pip install 'twofour\[cuda\]'"):
        launch.prepare((3, 40, 64, torch.bfloat16, True, 0))


@pytest.mark.usefixtures("no_driver")
def test_a_missing_driver_is_told_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(flags: int) -> Any:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    monkeypatch.setattr("cuda.bindings.driver.cuInit", absent)
    with pytest.raises(UnsupportedError, match=r"no NVIDIA driver was found \(Failed to dlopen libcuda.so.1\); install one, or run on"):
        launch.prepare((3, 40, 64, torch.bfloat16, True, 0))


def test_a_missing_compiler_is_told_not_hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TWOFOUR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "capability", lambda device: (9, 0))
    monkeypatch.setattr(driver, "num_sms", lambda device: 132)
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    monkeypatch.delattr("cuda.bindings.nvrtc", raising=False)
    with pytest.raises(MissingExtraError, match=r"compiling kernels needs NVRTC, which could not .*pip install 'twofour\[cuda\]'"):
        launch.prepare((3, 40, 64, torch.bfloat16, True, 0))


def test_a_gpu_that_is_too_old_is_told_by_the_kernel_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "capability", lambda device: (8, 0))
    with pytest.raises(UnsupportedError, match=r"GPU 0 has compute capability 8.0, expected 9.0 \(Hopper\)"):
        launch.prepare((3, 40, 64, torch.bfloat16, True, 0))
