"""What two processes do together for `test_training_distributed.py`: each function returns plain values for the test to judge."""

import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer

from twofour.errors import InputError
from twofour.pruning import Pruning, eligible_names, prune
from twofour.training import derive_masks, hold, sr_ste


def network() -> nn.Module:
    torch.manual_seed(0)
    # 30 and 18 rows: two processes get 15 and 9 each, no multiple of four.
    return nn.Sequential(nn.Linear(16, 30), nn.ReLU(), nn.Linear(30, 20, bias=False), nn.ReLU(), nn.Linear(20, 18), nn.Linear(18, 4))


def batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(8, 16, generator=generator), torch.randint(0, 4, (8,), generator=generator)


def pruned() -> tuple[nn.Module, Pruning]:
    model = network()
    return model, prune(model, (batch(0, 0)[0],), permute=False)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        inputs, targets = batch(step, dist.get_rank())
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()


def nonzero_dropped(state: dict[str, torch.Tensor], masks: dict[str, torch.Tensor]) -> int:
    """Elements that are not +0 in their bits although they were pruned."""
    return sum(int(torch.count_nonzero(state[name].view(torch.int32)[~mask])) for name, mask in masks.items())


def everyone() -> DeviceMesh:
    """All processes, on the CPU also where there is a GPU."""
    return init_device_mesh("cpu", (dist.get_world_size(),))


def full_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def ddp(folder: Path) -> dict[str, Any]:
    model, pruning = pruned()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.01)
    with hold(wrapped, optimizer, pruning):
        train(wrapped, optimizer, range(3))
    if dist.get_rank() == 0:
        save_file(model.state_dict(), folder / "ddp.safetensors")
    return {"nonzero": nonzero_dropped(model.state_dict(), pruning.masks)}


def zero(folder: Path) -> dict[str, Any]:
    model, pruning = pruned()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = ZeroRedundancyOptimizer(wrapped.parameters(), torch.optim.AdamW, lr=0.01)
    nonzero = []
    with hold(wrapped, optimizer, pruning):
        for step in range(3):
            train(wrapped, optimizer, range(step, step + 1))
            nonzero.append(nonzero_dropped(model.state_dict(), pruning.masks))
    same = all(torch.equal(value, model.state_dict()[name]) for name, value in load_file(folder / "ddp.safetensors").items())
    return {"nonzero": sum(nonzero), "same_as_ddp": same}


def fsdp2(folder: Path) -> dict[str, Any]:
    model, pruning = pruned()
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=everyone())
    fully_shard(model, mesh=everyone())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with hold(model, optimizer, pruning) as handle:
        train(model, optimizer, range(3))
        handle.check()
        local_rows = [len(model.get_parameter(name).to_local()) for name in handle.masks]
    state = full_state(model)
    ddp_state = load_file(folder / "ddp.safetensors")
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder / "dcp")
    if dist.get_rank() == 0:
        save_file(state, folder / "fsdp.safetensors")
    return {
        "nonzero": nonzero_dropped(state, pruning.masks) if dist.get_rank() == 0 else 0,
        "local_rows": local_rows,
        "difference_to_ddp": max(float((state[n] - v).abs().max()) for n, v in ddp_state.items()) if dist.get_rank() == 0 else 0.0,
    }


def fsdp2_resumed_with_derived_masks(folder: Path) -> dict[str, Any]:
    model = network()
    fully_shard(model, mesh=everyone())
    set_model_state_dict(
        model, load_file(folder / "fsdp.safetensors"), options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=False)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    _, pruning = pruned()
    masks = derive_masks(model)
    with hold(model, optimizer):
        train(model, optimizer, range(3, 5))
    state = full_state(model)
    try:
        prune(model, (batch(0, 0)[0],), permute=False)
        message = ""
    except InputError as error:
        message = str(error)
    return {
        "same_masks": masks.keys() == pruning.masks.keys() and all(torch.equal(masks[n], m) for n, m in pruning.masks.items()),
        "nonzero": nonzero_dropped(state, pruning.masks) if dist.get_rank() == 0 else 0,
        "prune_refused": message,
    }


def loaded_by_another_number(folder: Path) -> dict[str, Any]:
    """Two processes wrote; one reads, in its own mesh, and trains on."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "shards"))["shards"]
    model = network()
    fully_shard(model, mesh=mesh)
    state = {"model": get_model_state_dict(model)}
    dcp.load(state, checkpoint_id=folder / "dcp")
    set_model_state_dict(model, state["model"])
    masks = derive_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    written = load_file(folder / "fsdp.safetensors")
    same = all(torch.equal(value.full_tensor(), written[name]) for name, value in model.state_dict().items())
    with hold(model, optimizer):
        train(model, optimizer, range(2))
    return {"same": same, "nonzero": nonzero_dropped({n: p.full_tensor().detach() for n, p in model.named_parameters()}, masks)}


def fsdp2_from_scratch(folder: Path) -> dict[str, Any]:
    """SR-STE on pieces of 15 and 9 rows against SR-STE on whole weights."""
    sharded, whole = network(), network()
    fully_shard(sharded, mesh=everyone())
    replicated = nn.parallel.DistributedDataParallel(whole)
    names = eligible_names(whole, (batch(0, 0)[0],))
    states = []
    for model, stepped in ((sharded, sharded), (whole, replicated)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        handle = sr_ste(model, optimizer, names, decay=0.01)
        train(stepped, optimizer, range(3))
        handle.remove()
        states.append(full_state(model))
    if dist.get_rank():
        return {"difference": 0.0, "masks": True}
    masks = [{name: state[name] != 0 for name in names} for state in states]
    return {
        "difference": max(float((states[0][n] - v).abs().max()) for n, v in states[1].items()),
        "masks": all(torch.equal(masks[0][n], masks[1][n]) for n in names),
    }


def fsdp1(folder: Path) -> dict[str, Any]:
    """Flat parameters have no axes to group along."""
    messages = []
    for original in (True, False):
        model, pruning = pruned()
        wrapped = FullyShardedDataParallel(model, use_orig_params=original, device_id=torch.device("cpu"))
        try:
            hold(wrapped, torch.optim.SGD(wrapped.parameters(), lr=0.1), pruning)
            messages.append("")
        except InputError as error:
            messages.append(str(error))
    return {"messages": messages}


CHECKS: tuple[Callable[[Path], dict[str, Any]], ...] = (
    ddp,
    zero,
    fsdp2,
    fsdp2_resumed_with_derived_masks,
    loaded_by_another_number,
    fsdp2_from_scratch,
    fsdp1,
)


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    results = {}
    for check in CHECKS:
        results[check.__name__] = check(folder)
        dist.barrier()
    (folder / f"rank{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    main(int(sys.argv[1]), Path(sys.argv[2]))
