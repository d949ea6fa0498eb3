"""What docs/migration.md promises to users of other tools, and that docs/training.md runs."""

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import twofour
from twofour.pattern import count_groups
from twofour.training import derive_masks

DOCS = Path(__file__).parent.parent / "docs"
INPUTS = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: torch.Tensor = INPUTS) -> None:
    optimizer.zero_grad()
    model(inputs).float().square().mean().backward()
    optimizer.step()


def pruned_trained_and_held(model: nn.Module, inputs: torch.Tensor = INPUTS) -> twofour.Pruning:
    """Prune, train three steps, and find every mask held."""
    pruning = twofour.prune(model, (inputs,), permute=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    before = {name: model.get_parameter(name).detach().clone() for name in pruning.masks}
    with twofour.hold(model, optimizer, pruning):
        for _ in range(3):
            step(model, optimizer, inputs)
    for name, mask in pruning.masks.items():
        weight = model.get_parameter(name).detach()
        assert not weight[~mask].any()
        assert not torch.equal(weight, before[name])
    return pruning


def test_a_model_that_cannot_be_traced() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if float(x.sum()) > 0:
                x = self.a(x)
            for _ in range(int(x.abs().max()) + 1):
                x = torch.tanh(self.b(x))
            return self.head(x)

    torch.manual_seed(0)
    pruning = pruned_trained_and_held(Branching(), INPUTS.abs())
    assert list(pruning.masks) == ["a.weight", "b.weight"]
    assert "cannot be captured as a graph" in pruning.notes[0]


def test_a_module_used_several_times() -> None:
    torch.manual_seed(0)
    block = nn.Linear(16, 16)
    model = nn.Sequential(block, nn.ReLU(), block, nn.ReLU(), block, nn.Linear(16, 4))
    assert list(pruned_trained_and_held(model).masks) == ["0.weight"]


def test_subclasses_of_layers() -> None:
    class MyLinear(nn.Linear):
        pass

    class MyConv(nn.Conv1d):
        pass

    torch.manual_seed(0)
    model = nn.Sequential(MyLinear(16, 16), nn.Unflatten(1, (4, 4)), MyConv(4, 8, 1), MyConv(8, 8, 1), nn.Flatten(), MyLinear(32, 4))
    assert list(pruned_trained_and_held(model).masks) == ["0.weight", "3.weight"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_on_a_cpu(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)
    assert pruned_trained_and_held(model, INPUTS.to(dtype)).masks["0.weight"].device.type == "cpu"


def test_several_models_in_one_process_and_twice() -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        pruned_trained_and_held(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)))


def test_nothing_is_added_to_the_model_or_replaced() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    keys, classes, own_step = list(model.state_dict()), [type(m) for m in model.modules()], torch.optim.AdamW.step
    optimizer = torch.optim.AdamW(model.parameters())
    twofour.prune(model, (INPUTS,), permute=False)
    twofour.hold(model, optimizer)
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == classes
    assert type(optimizer).step is own_step
    assert "step" not in vars(optimizer)
    copied = copy.deepcopy(model)
    assert all(torch.equal(mask, derive_masks(copied)[name]) for name, mask in derive_masks(model).items())


def test_the_mask_of_torch_ao_is_ours_on_matrices() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.pruning import WeightNormSparsifier

        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 4))
        ours = copy.deepcopy(model)
        sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
        sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
        sparsifier.step()
        sparsifier.squash_mask()
    twofour.prune(ours, (INPUTS,), permute=False)
    assert torch.equal(model[0].weight, ours[0].weight)


def test_asp_2d_best_is_transposable() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    twofour.prune(model, (INPUTS,), pattern="2:4 transposable", permute=False)
    weight = model[0].weight.detach()
    assert count_groups(weight.numpy()).is_24
    assert count_groups(weight.t().contiguous().numpy()).is_24


@pytest.mark.filterwarnings("ignore")
def test_the_training_page_runs() -> None:
    def convolutional() -> nn.Module:
        return nn.Sequential(
            *(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(128, 16), nn.Linear(16, 4)),
        )

    torch.manual_seed(0)
    batches = [(torch.randn(8, 1, 8, 8), torch.randint(0, 4, (8,))) for _ in range(5)]
    names: dict[str, Any] = {
        "model": convolutional(),
        "dense": convolutional(),
        "images": batches[0][0],
        "batches": batches,
        "optimizer_of": lambda model: torch.optim.SGD(model.parameters(), lr=0.01),
    }
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "training.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names)
    assert set(derive_masks(names["model"])) == {"3.weight", "7.weight"}
    assert set(derive_masks(names["dense"])) == {"3.weight", "7.weight"}
    assert names["bites"].share == 1
