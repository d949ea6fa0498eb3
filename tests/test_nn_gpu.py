"""Linear24 on a Hopper GPU: values, tails, tracing, graphs, streams, threads, several GPUs, timing. Run with `-m gpu`."""

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from nn_layers import pruned_linear, within_rounding
from safetensors.torch import load_file, save_file
from torch import nn

from twofour.nn import Linear24, TrainableLinear24, convert, launch, restore
from twofour.nn.ops import is_plain_call
from twofour.nn.packing import Repacker, pack_weight, repack, unpack_weight

pytestmark = pytest.mark.gpu
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def on_gpu(inputs: int, outputs: int, dtype: torch.dtype = torch.bfloat16, **kwargs: Any) -> tuple[nn.Linear, Linear24]:
    linear = pruned_linear(inputs, outputs, dtype, **kwargs).cuda()
    return linear, Linear24.from_linear(linear)


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).cuda()


def assert_close(found: torch.Tensor, x: torch.Tensor, linear: nn.Linear) -> None:
    assert within_rounding(found.cpu(), x.detach().cpu(), copy.deepcopy(linear).cpu())


def poison(*shape: int) -> None:
    """Leave NaN in the memory that the next output of this shape gets."""
    held = torch.full(shape, float("nan"), device="cuda", dtype=torch.bfloat16)
    del held


# One block, around its edges, no multiple of eight or four, several blocks; tokens around the tiles of 64 to 256 and the split schedule.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 128), (63, 127), (65, 129), (32, 8), (10, 3), (200, 264), (1024, 520)])
@pytest.mark.parametrize("bias", [True, False])
def test_values(inputs: int, outputs: int, dtype: torch.dtype, bias: bool) -> None:
    linear, layer = on_gpu(inputs, outputs, dtype, bias=bias)
    for tokens in (1, 7, 8, 64, 65, 191, 192, 193, 256, 300):
        x = normal(tokens, inputs, dtype=dtype, seed=tokens)
        poison(tokens, outputs)
        with torch.inference_mode():
            y = layer(x)
        assert (y.shape, y.dtype, y.is_contiguous()) == ((tokens, outputs), dtype, True), tokens
        assert_close(y, x, linear)


@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(512, 4096, 4096), (2048, 1024, 4096), (1, 8192, 1024)])
def test_network_sizes_and_repeated_runs(tokens: int, inputs: int, outputs: int) -> None:
    linear, layer = on_gpu(inputs, outputs)
    x = normal(tokens, inputs)
    with torch.inference_mode():
        first = layer(x)
        assert_close(first, x, linear)
        for _ in range(20):
            assert torch.equal(layer(x), first)


def test_the_short_way_and_the_operator_agree() -> None:
    _, layer = on_gpu(256, 264)
    x = normal(40, 256)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            assert is_plain_call(x)
            assert torch.equal(layer(x), torch.ops.twofour.linear24(x, layer.packed, layer.bias, 264, 256, torch.bfloat16))
    assert not is_plain_call(x.clone().requires_grad_())


@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 64), (2, 1, 3, 64), (0, 64), (3, 0, 64)])
def test_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    linear, layer = on_gpu(64, 24)
    x = normal(*shape)
    y = layer(x)
    assert y.shape == (*shape[:-1], 24)
    assert_close(y, x, linear)


def test_inputs_of_any_strides() -> None:
    linear, layer = on_gpu(64, 40)
    for x in (
        normal(64, 6).t(),
        normal(6, 128)[:, ::2],
        normal(6, 65)[:, 1:],
        normal(4, 6, 64).transpose(0, 1),
        normal(64).expand(5, 64),
        normal(2, 64, 3, 3).movedim(1, -1),
    ):
        assert_close(layer(x), x, linear)


def test_packing_on_the_gpu_is_packing_on_the_cpu() -> None:
    weight = pruned_linear(200, 264).weight
    packed = pack_weight(weight, torch.bfloat16)
    assert torch.equal(pack_weight(weight.cuda(), torch.bfloat16).cpu(), packed)
    assert torch.equal(unpack_weight(packed.cuda(), 264, 200, torch.bfloat16).cpu(), weight)
    repacker = Repacker((weight != 0).cuda())
    assert torch.equal(repack(weight.cuda(), repacker.index, repacker.metadata, torch.bfloat16).cpu(), packed)


def test_an_infinity_at_a_pruned_position_does_not_reach_the_output() -> None:
    linear = pruned_linear(64, 8, bias=False)
    linear.weight.zero_()
    linear.weight[:, 2:4] = 1  # positions 0 and 1 of the first group are pruned
    layer = Linear24.from_linear(linear.cuda())
    x = torch.ones(4, 64, device="cuda", dtype=torch.bfloat16)
    x[0, 0], x[1, 2], x[2, 2] = float("inf"), float("inf"), float("nan")
    y = layer(x).float()
    assert torch.equal(y[0], torch.full_like(y[0], 2.0))
    assert bool(y[1].isinf().all())
    assert bool(y[2].isnan().all())


def test_gradients_and_a_training_step() -> None:
    linear, layer = on_gpu(256, 136)
    x, grad = normal(3, 20, 256).requires_grad_(), normal(3, 20, 136, seed=1)
    layer(x).backward(grad)
    assert x.grad is not None
    assert torch.equal(x.grad, torch.matmul(grad, linear.weight))
    trained = layer.trainable()
    optimizer = torch.optim.AdamW(trained.parameters(), 0.01, fused=True)
    losses = []
    for _ in range(10):
        loss = (trained(x.detach()).float() - grad.float()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert not trained.weight[~trained.mask].any()
    assert_close(trained(x.detach()), x, trained.freeze().to_linear())


def test_nothing_outside_the_mask_is_multiplied() -> None:
    """Groups of one non-zero, which packing fills up with a zero position: what is written there is not computed with."""
    linear, _ = on_gpu(256, 136)
    linear.weight[:, torch.arange(256) % 4 != 1] = 0
    layer, x = TrainableLinear24.from_linear(linear), normal(20, 256)
    before = layer(x)
    layer.weight.data[~layer.mask] = 7.0
    assert torch.equal(layer(x), before)
    assert_close(before, x, linear)


@pytest.mark.parametrize("kind", [Linear24, TrainableLinear24])
def test_autocast(kind: Any) -> None:
    linear = pruned_linear(64, 40, torch.float32).cuda()
    layer, x = kind.from_linear(linear, dtype=torch.bfloat16), torch.randn(5, 64, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        y = layer(x)
    assert_close(y, x.bfloat16(), linear.bfloat16())


def a_model() -> nn.Sequential:
    return nn.Sequential(on_gpu(256, 1024)[1], nn.ReLU(), on_gpu(1024, 256, seed=1)[1])


# 512 tokens of 1024 outputs are few tiles, which are split along the inputs and use a workspace.
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("tokens", [5, 512])
def test_compiled(mode: str, tokens: int) -> None:
    model = a_model()
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    with torch.inference_mode():
        for seed in range(4):
            x = normal(tokens, 256, seed=seed)
            # ReLU is exact, so fused or not the values are the same.
            assert torch.equal(compiled(x).clone(), model(x)), seed


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_training(mode: str) -> None:
    """fp32 weights under autocast: what is packed in the compiled graph is what eager packs, step after step, and the mask holds."""
    layer = TrainableLinear24.from_linear(pruned_linear(264, 136, torch.float32).cuda(), dtype=torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    for seed in range(4):
        x = normal(20, 264, dtype=torch.float32, seed=seed)
        torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast("cuda", torch.bfloat16):
            y = compiled(x)
            assert torch.equal(y, layer(x)), seed
            assert torch.equal(y, layer.freeze()(x)), seed
        y.float().square().sum().backward()
        assert layer.weight.grad is not None
        assert layer.weight.grad.any()
        assert not layer.weight.grad[~layer.mask].any()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter -= 1e-3 * parameter.grad
                parameter.grad = None


def test_compiled_gradients_of_changing_sizes() -> None:
    model = a_model()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for tokens in (3, 64, 100):
        x, twin = normal(tokens, 256).requires_grad_(), normal(tokens, 256).requires_grad_()
        compiled(x).sum().backward()
        model(twin).sum().backward()
        assert torch.equal(x.grad, twin.grad)  # type: ignore[arg-type]


def test_exported(tmp_path: Path) -> None:
    model, x = a_model(), normal(5, 256)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},))
    torch.export.save(program, tmp_path / "m.pt2")
    more = normal(77, 256)
    with torch.no_grad():
        assert torch.equal(torch.export.load(tmp_path / "m.pt2").module()(more), model(more))


def test_the_trainable_form_is_exported() -> None:
    layer, x = TrainableLinear24.from_linear(pruned_linear(264, 136).cuda()), normal(5, 264)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},))
    more = normal(77, 264)
    with torch.no_grad():
        assert torch.equal(program.module()(more), layer(more))


def captured(model: nn.Module, x: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(x)
    return graph, y


@torch.no_grad()
@pytest.mark.parametrize("tokens", [5, 512])
def test_cuda_graphs_replayed_on_two_streams_at_once(tokens: int) -> None:
    model = a_model()
    inputs = [normal(tokens, 256, seed=i) for i in range(2)]
    graphs = [captured(model, x) for x in inputs]
    streams = [torch.cuda.Stream() for _ in range(2)]
    for turn in range(20):
        for i, x in enumerate(inputs):
            x.copy_(normal(tokens, 256, seed=100 + 2 * turn + i))
        torch.cuda.synchronize()
        for (graph, _), stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for (_, y), x in zip(graphs, inputs, strict=True):
            assert torch.equal(y, model(x)), turn


@torch.no_grad()
def test_two_streams_at_once() -> None:
    """512 tokens, the split schedule: each stream has its own workspace."""
    _, layer = on_gpu(4096, 1024)
    inputs = [normal(512, 4096, seed=i) for i in range(2)]
    expected = [layer(x) for x in inputs]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    found: list[list[torch.Tensor]] = [[], []]
    for _ in range(50):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[i].append(layer(inputs[i]))
    torch.cuda.synchronize()
    for i in range(2):
        assert all(torch.equal(y, expected[i]) for y in found[i])


@torch.no_grad()
def test_the_current_stream_is_honoured() -> None:
    """The input is written late on a side stream; a launch on another stream would read the old one."""
    _, layer = on_gpu(1024, 1024)
    new = normal(256, 1024, seed=1)
    expected, x = layer(new), torch.zeros_like(new)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.copy_(new)
        y = layer(x)
    stream.synchronize()
    assert torch.equal(y, expected)


@torch.no_grad()
def test_a_fresh_thread() -> None:
    _, layer = on_gpu(256, 264)
    x = normal(9, 256)
    expected, found = layer(x), []
    thread = threading.Thread(target=lambda: found.append(layer(x)))
    thread.start()
    thread.join()
    assert torch.equal(found[0], expected)


@TWO_GPUS
@torch.no_grad()
def test_a_layer_on_the_second_gpu_while_the_first_is_current() -> None:
    linear = pruned_linear(512, 264)
    layer = Linear24.from_linear(linear).to("cuda:1")
    x = normal(512, 512).to("cuda:1")
    y = layer(x)
    assert (y.device.index, torch.cuda.current_device()) == (1, 0)
    assert_close(y, x, linear)
    assert torch.equal(layer.to("cuda:0")(x.to("cuda:0")).cpu(), y.cpu())


def test_moving_copying_and_saving(tmp_path: Path) -> None:
    linear, layer = on_gpu(256, 264)
    x = normal(9, 256)
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    assert torch.equal(layer.to("cpu").to("cuda")(x), expected)
    half = copy.deepcopy(layer).half()
    assert_close(half(x.half()), x.half(), copy.deepcopy(linear).half())
    model = nn.Sequential(layer)
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    fresh = restore(nn.Sequential(nn.Linear(256, 264, device="cuda", dtype=torch.bfloat16)), load_file(tmp_path / "m.safetensors"))
    assert torch.equal(fresh(x), expected)


def test_operands_on_two_devices_are_refused() -> None:
    _, layer = on_gpu(64, 40)
    with pytest.raises(ValueError, match="x is on cpu and the weight on cuda:0, expected one device"):
        layer(torch.zeros(2, 64).bfloat16())
    with pytest.raises(ValueError, match="x is on cuda:0 and the weight on cpu, expected one device"):
        layer.cpu()(normal(2, 64))


def test_convert_by_measured_time(tmp_path: Path) -> None:
    """The faster way is taken, the record holds both times, and the model computes the same to rounding."""
    model = nn.Sequential(pruned_linear(4096, 4096), nn.ReLU(), pruned_linear(4096, 64, seed=1), nn.Linear(64, 64)).bfloat16().cuda()
    model[3].weight.data[0, :4] = 1.0
    x = normal(2048, 4096)
    original = copy.deepcopy(model[0])
    record = convert(model, x, cache_folder=tmp_path)
    first, second, last = record.layers
    for layer in (first, second):
        assert layer.sparse_us is not None, record
        assert layer.dense_us is not None, record
        assert layer.converted is (layer.sparse_us < layer.dense_us), record
        assert layer.tokens == (2048,)
    assert last.reason.startswith("not 2:4: row 0, inputs 0-3 = 1, 1, 1, 1")
    assert first.converted, f"a square layer of 4096 at 2048 tokens should be faster 2:4:\n{record}"
    assert launch._configs[launch.problem_of(2048, 4096, 4096, torch.bfloat16, True), 0]
    with torch.no_grad():
        assert_close(model[0](x), x, original)
