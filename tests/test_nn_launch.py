"""The way from a tensor to a launch, with the driver replaced by a product on the same addresses: padding, copies, caches, guards."""

import ctypes
import threading
from typing import Any

import numpy as np
import pytest
import torch
from nn_layers import pruned_linear, within_rounding
from torch.utils._python_dispatch import TorchDispatchMode

from twofour.kernels.gemm import Config, Problem
from twofour.nn import Linear24, TrainableLinear24, launch
from twofour.nn.packing import unpack_weight


def at(address: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """`count` elements of host memory as a tensor; writes go through."""
    assert address % 16 == 0
    size = torch.empty(0, dtype=dtype).element_size()
    raw = (ctypes.c_uint8 * (count * size)).from_address(address)
    return torch.from_numpy(np.frombuffer(raw, np.uint8)).view(dtype)


class HostGemm:
    """`Gemm` on host addresses: reads X, packed W and bias and writes D in exactly the sizes its problem says."""

    made: list["HostGemm"] = []  # noqa: RUF012 - emptied by the fixture

    def __init__(self, problem: Problem, config: Config | None = None, *, device: int = 0) -> None:
        self.problem, self.config, self.device = problem, config, device
        self.workspace_bytes = 8192 if problem.tokens == 1 else 0
        self.streams: list[int] = []
        self.workspaces: list[int] = []
        self.addresses: list[int] = []
        HostGemm.made.append(self)

    def enqueue(self, x: int, weight: int, d: int, scale: int, bias: int, residual: int, workspace: int, stream: int) -> None:
        self.addresses.append(x)
        p = self.problem
        dtype = torch.bfloat16 if p.dtype == "bf16" else torch.float16
        packed = at(weight, p.row_blocks * p.k_blocks * 4608, torch.int16).view(p.row_blocks, p.k_blocks, 4608)
        dense = unpack_weight(packed, p.outputs, p.inputs, dtype).float()
        y = at(x, p.tokens * p.inputs, dtype).view(p.tokens, p.inputs).float() @ dense.t()
        assert bool(bias) == p.epilogue.bias
        if bias:
            y += at(bias, p.outputs, torch.float32)
        at(d, p.tokens * p.outputs, dtype).view(p.tokens, p.outputs).copy_(y)
        assert bool(workspace) == bool(self.workspace_bytes)
        self.streams.append(stream)
        self.workspaces.append(workspace)


class World:
    """What the launch asks PyTorch and the driver, to be changed by a test."""

    def __init__(self) -> None:
        self.current, self.stream, self.capturing = -1, 17, False
        self.entered: list[int] = []
        self.readied: list[str] = []


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """The launch path on host memory: a CPU tensor's device number is -1."""
    world = World()
    HostGemm.made = []

    class Device:
        def __init__(self, device: int) -> None:
            self.device = device

        def __enter__(self) -> None:
            self.before, world.current = world.current, self.device
            world.entered.append(self.device)

        def __exit__(self, *_: Any) -> None:
            world.current = self.before

    monkeypatch.setattr(launch, "Gemm", HostGemm)
    monkeypatch.setattr(launch, "_prepared", type(launch._prepared)())
    monkeypatch.setattr(launch, "_ready", type(launch._ready)())
    monkeypatch.setattr(launch, "_configs", {})
    monkeypatch.setattr(launch, "_workspaces", {})
    monkeypatch.setattr(launch, "_thread", threading.local())
    monkeypatch.setattr(launch, "runs_on", lambda device: True)
    monkeypatch.setattr(launch, "place", lambda device: torch.device("cpu"))
    monkeypatch.setattr(launch.driver, "use_device", lambda device: world.readied.append(threading.current_thread().name))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: world.current)
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: world.capturing)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: world.stream, raising=False)
    return world


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 128), (72, 136), (63, 127), (65, 129), (10, 3), (1, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_sizes_reach_the_kernel_padded_to_eights(world: World, inputs: int, outputs: int, dtype: torch.dtype, bias: bool) -> None:
    linear = pruned_linear(inputs, outputs, dtype, bias)
    x = torch.randn(2, 3, inputs).to(dtype)
    y = Linear24.from_linear(linear)(x)
    assert (y.shape, y.is_contiguous()) == ((2, 3, outputs), True)
    assert within_rounding(y, x, linear)
    (made,) = HostGemm.made
    assert made.problem == launch.problem_of(6, outputs, inputs, dtype, bias)
    assert (made.problem.outputs % 8, made.problem.inputs % 8) == (0, 0)


def test_strided_and_misaligned_inputs_are_copied_and_others_are_not(world: World) -> None:
    linear = pruned_linear(64, 40)
    layer = Linear24.from_linear(linear)
    for x in (torch.randn(64, 6).bfloat16().t(), torch.randn(6, 65).bfloat16()[:, 1:], torch.randn(6 * 64 + 1).bfloat16()[1:].view(6, 64)):
        assert within_rounding(layer(x), x, linear)
    x = torch.randn(6, 64).bfloat16()
    layer(x)
    assert HostGemm.made[-1].addresses[-1] == x.data_ptr()


def test_no_tokens_launch_nothing(world: World) -> None:
    assert Linear24.from_linear(pruned_linear(64, 40))(torch.zeros(2, 0, 64).bfloat16()).shape == (2, 0, 40)
    assert HostGemm.made == []


def test_a_launch_is_prepared_once_a_size(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (Linear24.from_linear(pruned_linear(64, 40, seed=s)) for s in range(2))
    for tokens in (3, 5, 3, 5):
        first(torch.randn(tokens, 64).bfloat16())
        second(torch.randn(tokens, 64).bfloat16())
    assert [g.problem.tokens for g in HostGemm.made] == [3, 5]
    first.half()(torch.randn(3, 64).half())
    assert [g.problem.dtype for g in HostGemm.made] == ["bf16", "bf16", "fp16"]
    monkeypatch.setattr(launch, "MOST_PREPARED", 2)
    for tokens in range(10, 15):
        second(torch.randn(tokens, 64).bfloat16())
    assert len(launch._prepared) == len(launch._ready) == 2


def test_a_measured_config_is_used(world: World) -> None:
    layer, x = Linear24.from_linear(pruned_linear(64, 40)), torch.randn(3, 64).bfloat16()
    layer(x)
    assert HostGemm.made[-1].config is None
    config = Config(tile_rows=128, tile_tokens=128)
    launch.use_config(launch.problem_of(3, 40, 64, torch.bfloat16, True), -1, config)
    layer(x)
    assert HostGemm.made[-1].config is config


def test_the_current_stream_and_one_workspace_a_stream(world: World) -> None:
    layer, x = Linear24.from_linear(pruned_linear(64, 40)), torch.randn(1, 64).bfloat16()
    for world.stream in (17, 23, 17):
        layer(x)
    (made,) = HostGemm.made
    assert made.streams == [17, 23, 17]
    assert made.workspaces[0] == made.workspaces[2] != made.workspaces[1]


def test_a_captured_graph_gets_its_own_workspace(world: World) -> None:
    layer, x = Linear24.from_linear(pruned_linear(64, 40)), torch.randn(1, 64).bfloat16()
    layer(x)
    world.capturing = True
    layer(x)
    (made,) = HostGemm.made
    assert len(launch._workspaces) == 1
    assert made.workspaces[1] != made.workspaces[0]


def test_a_tensor_of_another_gpu_makes_it_current_for_the_call(world: World) -> None:
    layer, x = Linear24.from_linear(pruned_linear(64, 40)), torch.randn(3, 64).bfloat16()
    layer(x)
    assert world.entered == []
    world.current = 3
    layer(x)
    assert (world.entered, world.current) == ([-1], 3)


def test_every_thread_gets_a_context_once(world: World) -> None:
    layer, x = Linear24.from_linear(pruned_linear(64, 40)), torch.randn(3, 64).bfloat16()

    def work() -> None:
        layer(x)
        layer(x)

    work()
    thread = threading.Thread(target=work, name="other")
    thread.start()
    thread.join()
    assert world.readied == ["MainThread", "other"]


def test_the_trainable_form_launches_too(world: World) -> None:
    layer = Linear24.from_linear(pruned_linear(72, 40)).trainable()
    x = torch.randn(3, 72).bfloat16().requires_grad_()
    layer(x).sum().backward()
    assert len(HostGemm.made) == 1
    assert layer.weight.grad is not None
    assert not layer.weight.grad[~layer.mask].any()


def test_a_bias_of_fp32_is_rounded_where_no_compiler_sees_it(world: World) -> None:
    """Inductor drops the first of two casts in a row, so that a compiled layer would add another bias than the frozen one."""
    seen: list[torch.Tensor] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.extend(args[4:] if func is torch.ops.twofour.linear24_masked.default else ())
            return func(*args, **kwargs or {})

    layer = TrainableLinear24.from_linear(pruned_linear(72, 40, torch.float32), dtype=torch.bfloat16)
    x = torch.randn(64, 72, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad(), Watch():
        y = layer(x)
    assert torch.equal(seen[0], layer.bias)
    assert not torch.equal(seen[0], seen[0].bfloat16().float())
    assert torch.equal(y, layer.freeze()(x))
