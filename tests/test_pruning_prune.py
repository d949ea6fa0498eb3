"""`prune` as a whole: patterns, batch-norm re-estimation, and bad input that leaves the model exactly as it was."""

import copy
import hashlib
import json

import pytest
import torch
from torch import nn

from twofour.errors import InputError
from twofour.pattern import count_groups
from twofour.pruning import Pruning, prune, reestimate_batchnorm


def digest(model: nn.Module) -> str:
    """Of every parameter's and buffer's name, dtype and bytes, and of every module's mode."""
    sha = hashlib.sha256()
    for name, value in model.state_dict().items():
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        sha.update(value.detach().contiguous().view(torch.uint8).numpy().tobytes() if value.numel() and value.ndim else str(value).encode())
    for name, module in model.named_modules():
        sha.update(f"{name} {module.training} {getattr(module, 'momentum', '')}".encode())
    return sha.hexdigest()


def small(norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        norm(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3),
        norm(16),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(64, 8),
        nn.Linear(8, 4),
    )


def images(items: int = 16, seed: int = 1) -> torch.Tensor:
    return torch.randn(items, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "2:4 transposable"])
def test_every_pattern_is_applied_and_recorded(pattern: str) -> None:
    model = small()
    pruning = prune(model, (images(),), pattern=pattern, permute=False)
    assert pruning.pattern == pattern
    assert [layer.name for layer in pruning.pruned] == ["3.weight", "7.weight"]
    n, m = (int(part) for part in pattern.split()[0].split(":"))
    for name, mask in pruning.masks.items():
        weight = model.get_parameter(name).detach()
        assert count_groups(weight.numpy(), 1, n, m).is_24
        assert torch.equal(weight != 0, mask)
        if "transposable" in pattern:
            assert count_groups(weight.numpy(), 0).is_24
    assert Pruning.from_json(pruning.to_json()).pattern == pattern
    assert f"2 of 4 layers {pattern}" in str(pruning)


def test_a_layer_too_narrow_for_the_pattern_stays_dense_with_the_reason() -> None:
    model = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 16), nn.Linear(16, 4))
    pruning = prune(model, (torch.ones(2, 16),), pattern="4:8", permute=False)
    assert {layer.name: layer.reason for layer in pruning.layers}["1.weight"] == "12 input channels are not a multiple of 8"


def test_kept_magnitude_is_the_share_of_the_sum() -> None:
    model = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(1, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2.0, 3.0, 4.0]]))
    assert prune(model, (torch.ones(1, 4),), permute=False).pruned[0].kept_magnitude == pytest.approx(0.7, rel=1e-15)


def test_reestimated_statistics_are_the_plain_average_of_the_batches() -> None:
    model = small()
    with torch.no_grad():
        for batch in range(3):  # statistics that are not those of the batches below
            model.train()
            model(5 * images(seed=10 + batch))
    model.eval()
    batches = [images(seed=s) for s in (1, 2, 3)]
    assert reestimate_batchnorm(model, batches) == 3
    activations = [model[0](b).detach().double() for b in batches]
    mean = torch.stack([a.mean((0, 2, 3)) for a in activations]).mean(0)
    var = torch.stack([a.var((0, 2, 3)) for a in activations]).mean(0)
    # fp32 averages of 256 values: relative rounding below 256 · 2^-24.
    torch.testing.assert_close(model[1].running_mean.double(), mean, rtol=2e-5, atol=2e-5 * float(var.max()) ** 0.5)
    torch.testing.assert_close(model[1].running_var.double(), var, rtol=2e-5, atol=0)
    assert int(model[1].num_batches_tracked) == 3


def test_a_batch_norm_that_the_data_never_reach_keeps_its_statistics() -> None:
    class WithHead(nn.Module):
        """The second norm is run in training only."""

        def __init__(self) -> None:
            super().__init__()
            self.body, self.norm, self.aux, self.head = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.BatchNorm1d(8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm(self.body(x))
            return self.head(self.aux(x) if self.training else x)

    model, data = WithHead(), 5 * torch.randn(64, 8) + 3
    model(data)
    model.eval()
    trained = {name: value.clone() for name, value in model.aux.state_dict().items()}
    record = prune(model, (data[:2],), calibration=[data[:0], data, {"x": data[:0]}], permute=False)
    assert record.notes[-1] == "batch-norm statistics re-estimated on 1 batches; those of 'aux' stay, as no batch reaches them"
    assert all(torch.equal(value, trained[name]) for name, value in model.aux.state_dict().items())
    inner = (data @ model.body.weight.T + model.body.bias).detach()
    torch.testing.assert_close(model.norm.running_mean, inner.mean(0), rtol=1e-5, atol=1e-4)
    before = digest(model)
    with pytest.raises(InputError, match="calibration holds no batch, expected at least one"):
        prune(model, (data[:2],), calibration=[data[:0]], permute=False)
    assert digest(model) == before
    model.norm = model.aux
    del model.aux
    model.forward = lambda x: model.head(model.body(x))  # type: ignore[method-assign]
    with pytest.raises(InputError, match="calibration never reaches batch-norm 'norm', expected batches that use it; give such batches"):
        reestimate_batchnorm(model, [data])
    assert torch.equal(model.norm.running_mean, trained["running_mean"])
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_reestimation_changes_nothing_but_the_statistics() -> None:
    model = small()
    model.train()
    model[4].eval()
    model[4].momentum = 0.25
    before = copy.deepcopy(model)
    reestimate_batchnorm(model, [images()])
    for norm in (1, 4):
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            assert not torch.equal(getattr(model[norm], name), getattr(before[norm], name))
            getattr(model[norm], name).copy_(getattr(before[norm], name))
    assert digest(model) == digest(before)


def test_calibration_of_prune_reestimates_after_pruning() -> None:
    model, by_hand = small(), small()
    batches = [images(seed=s) for s in (1, 2)]
    pruning = prune(
        model, (images(),), calibration=[[b, torch.zeros(16)] for b in batches], permute=False
    )  # labels after the inputs are not used
    prune(by_hand, (images(),), permute=False)
    reestimate_batchnorm(by_hand, [{"input": b} for b in batches])
    assert digest(model) == digest(by_hand)
    assert pruning.notes[-1] == "batch-norm statistics re-estimated on 2 batches"


def test_calibration_of_a_model_without_batch_norm_is_noted() -> None:
    pruning = prune(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), (torch.ones(2, 8),), calibration=[torch.ones(2, 8)], permute=False)
    assert pruning.notes[-1] == "calibration was not used: the model has no batch-norm with running statistics"


def refused(model: nn.Module, message: str, **arguments: object) -> None:
    """The call is refused with the message and the model is what it was, to the bit."""
    before = digest(model)
    with pytest.raises(InputError, match=message):
        prune(model, (images(),), **arguments, permute=False)  # type: ignore[arg-type]
    assert digest(model) == before


def test_a_weight_that_cannot_be_written_or_is_written_twice_is_refused() -> None:
    """Each would end half way through the writing, or with what another layer keeps."""
    with torch.inference_mode():
        made_there = small()
        pruned_there = small()
        prune(pruned_there, (images(),), permute=False)
    assert int((pruned_there[3].weight == 0).sum()) == pruned_there[3].weight.numel() // 2
    refused(made_there, "weight '3.weight' was made in inference mode, expected one that can be written; make the model outside of it")
    expanded, shared = small(), small()
    expanded[7].weight = nn.Parameter(torch.randn(1, 64).expand(8, 64))
    refused(expanded, "weight '7.weight' is expanded, expected memory of its own for every value; replace it by a contiguous clone")
    shared.append(nn.Linear(4, 4))
    shared.append(nn.Linear(4, 4))
    shared[10].weight = nn.Parameter(shared[9].weight.data)
    refused(shared, "weight '9.weight' lies in the memory of '10.weight', expected memory of its own; tie the layers by one parameter")
    shared[10].weight = nn.Parameter(shared[9].weight.data.clone())
    prune(shared, (images(),))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused(value: float) -> None:
    model = small()
    with torch.no_grad():
        model[7].weight[0, 0] = value  # the last pruned layer: the one before it must not have been touched
    refused(model, "weight '7.weight' holds NaN or infinity, expected finite values; load a sound checkpoint")


def test_unusable_calibration_is_refused_and_undone() -> None:
    refused(small(), "calibration holds no batch, expected at least one", calibration=[])
    refused(small(), r"calibration: the statistics of '1' are not finite", calibration=[images(), images() * float("nan")])
    one_pixel = nn.Sequential(nn.Conv2d(3, 8, 6), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
    refused(one_pixel, "calibration: batch 0 has one value a channel, expected several", calibration=[images(1)])
    wrong = r"calibration: batch 2 of float32\[2, 5, 6, 6\] cannot run \(at layer '0'\): Given groups=1, .* to have 3 channels.*; check"
    refused(small(), wrong, calibration=[images(), torch.ones(2, 5, 6, 6)])


def test_unknown_names_are_refused() -> None:
    refused(small(), "pruning method 'magnitud' is unknown, expected one of .*did you mean 'magnitude'", method="magnitud")
    refused(small(), "pattern '2-4' is unknown", pattern="2-4")
    refused(small(), "the model has no layer that can be 63:64: 0.weight: 3 input channels", pattern="63:64", exclude=["7"])


def test_a_meta_model_is_refused() -> None:
    with torch.device("meta"):
        model = small()
    with pytest.raises(InputError, match=r"weight '0\.weight' is on the meta device, expected values; load the checkpoint first"):
        prune(model, (images(),), permute=False)
    assert all(p.is_meta for p in model.parameters())
    lazy = nn.Sequential(nn.LazyLinear(8))
    with pytest.raises(InputError, match=r"weight '0\.weight' has no shape yet, expected an initialised model; run it once first"):
        prune(lazy, (torch.ones(2, 4),), permute=False)


def test_a_layer_without_elements_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 0), nn.Linear(0, 8), nn.Linear(8, 2))
    pruning = prune(model, (torch.ones(2, 8),), permute=False)
    assert {layer.name: layer.reason for layer in pruning.layers if not layer.eligible}.items() >= {
        ("1.weight", "no elements"),
        ("2.weight", "no elements"),
    }
    assert [layer.name for layer in pruning.pruned] == ["0.weight"]


def test_integer_weights_stay_as_they_are() -> None:
    class Counted(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.float().t()

    model = nn.Sequential(nn.Linear(8, 8), Counted(8, 8), nn.Linear(8, 2))
    model[1].weight = nn.Parameter(torch.arange(64, dtype=torch.int8).reshape(8, 8), requires_grad=False)
    before = model[1].weight.clone()
    pruning = prune(model, (torch.ones(2, 8),), permute=False)
    assert {layer.name: layer.reason for layer in pruning.layers}["1.weight"] == "dtype torch.int8 is not a floating format"
    assert torch.equal(model[1].weight, before)


def test_a_record_of_another_kind_is_refused() -> None:
    with pytest.raises(InputError, match="pruning record is damaged"):
        Pruning.from_json(json.dumps({"method": "magnitude"}))
