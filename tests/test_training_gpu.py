"""Masks held on the GPU: fused steps, GradScaler, CUDA graphs, a model moved after pruning. Run with `-m gpu`."""

import pytest
import torch
from torch import nn

from twofour.pruning import prune, reestimate_batchnorm
from twofour.training import derive_masks, hold, sr_ste

pytestmark = pytest.mark.gpu


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 32), nn.Linear(32, 4)
    )


def images() -> torch.Tensor:
    return torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def assert_held(model: nn.Module, masks: dict[str, torch.Tensor]) -> None:
    for name, mask in masks.items():
        weight = model.get_parameter(name).detach()
        assert not weight.view(torch.int32)[~mask.to(weight.device)].any(), name


@pytest.mark.parametrize("channels_last", [False, True])
def test_fused_steps_with_a_scaler_of_a_model_moved_after_pruning(channels_last: bool) -> None:
    model = network()
    pruning = prune(model, (images(),), permute=False)  # masks on the CPU
    model.to("cuda", memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    scaler = torch.amp.GradScaler("cuda")
    before = model[3].weight.detach().clone()
    with hold(model, optimizer, pruning):
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.float16):
                loss = model(images().cuda()).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            assert_held(model, pruning.masks)
    assert not torch.equal(before, model[3].weight.detach())
    assert derive_masks(model).keys() == pruning.masks.keys()


def test_pruning_on_the_gpu_equals_pruning_on_the_cpu() -> None:
    on_cpu, on_gpu = network(), network().cuda()
    batches = [images(), 2 * images()]
    first, second = prune(on_cpu, (images(),), permute=False), prune(on_gpu, (images().cuda(),), permute=False)
    for name, mask in first.masks.items():
        assert torch.equal(mask, second.masks[name].cpu())
        assert torch.equal(on_cpu.get_parameter(name), on_gpu.get_parameter(name).cpu())
    reestimate_batchnorm(on_cpu, batches)
    reestimate_batchnorm(on_gpu, batches)
    # Convolutions of cuDNN may use tf32: ten mantissa bits over 36 products.
    torch.testing.assert_close(on_cpu[1].running_var, on_gpu[1].running_var.cpu(), rtol=36 * 2.0**-10, atol=0)


def test_a_step_in_a_cuda_graph_replays_the_masking() -> None:
    model = network().cuda()
    model[1].eval()
    pruning = prune(model, (images().cuda(),), permute=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = images().cuda()
    with hold(model, optimizer, pruning):

        def step() -> None:
            optimizer.zero_grad(set_to_none=False)
            model(x).square().mean().backward()
            optimizer.step()

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        before = model[3].weight.detach().clone()
        graph.replay()
        torch.cuda.synchronize()
        assert not torch.equal(before, model[3].weight.detach())
        assert_held(model, pruning.masks)


def test_sr_ste_on_the_gpu() -> None:
    model = network().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    handle = sr_ste(model, optimizer, ["3.weight", "5.weight"])
    for _ in range(3):
        optimizer.zero_grad()
        model(images().cuda()).square().mean().backward()
        optimizer.step()
    assert set(derive_masks(model)) == {"3.weight", "5.weight"}
    assert handle.masks["3.weight"].is_cuda
