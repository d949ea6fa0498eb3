"""`prune` with the methods that look at data: what is applied and recorded, and calibration that cannot be used."""

import itertools

import pytest
import torch
from test_pruning_prune import digest, images, small
from torch import Tensor, nn

from twofour.errors import InputError
from twofour.pattern import count_groups
from twofour.pruning import permute, prune, reestimate_batchnorm
from twofour.pruning.batch_norm import UPDATING, settle_norms
from twofour.pruning.decide import Calibration, permutation_scores, rounds_of
from twofour.pruning.methods import METHODS
from twofour.pruning.permutation import carried
from twofour.pruning.sharded import fill_zero

CALIBRATED = [name for name, method in METHODS.items() if method.is_calibrated]


def batches(count: int = 3, items: int = 16) -> list[Tensor]:
    return [images(items, seed) for seed in range(1, count + 1)]


def perceptron(width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))


@pytest.mark.parametrize("name", CALIBRATED)
def test_every_method_is_applied_and_recorded(name: str) -> None:
    model, dense = small().eval(), small().eval()
    record = prune(model, (images(),), method=name, calibration=batches(), reestimate=True, permute=False)
    assert record.method == name
    for layer in record.pruned:
        weight = model.get_parameter(layer.name).detach()
        assert count_groups(weight.numpy()).is_24
        assert torch.equal(weight != 0, record.masks[layer.name])
        before = dense.get_parameter(layer.name).detach()
        changed = not torch.equal(weight, before * record.masks[layer.name])
        assert changed == (name in UPDATING)
        assert (layer.output_error is None) == (name in ("wanda", "ria"))
    assert record.notes[-1] == "batch-norm statistics re-estimated on 3 batches"


@pytest.mark.parametrize("name", METHODS)
def test_batch_norm_is_re_estimated_where_kept_values_stay(name: str) -> None:
    """Counted on the network, so that the rule cannot part from what the method does to the kept values."""
    model, dense = small().eval(), small().eval()
    record = prune(model, (images(),), method=name, calibration=batches(), permute=False)
    kept = {weight: dense.get_parameter(weight) * mask for weight, mask in record.masks.items()}
    updated = [weight for weight, values in kept.items() if not torch.equal(model.get_parameter(weight), values)]
    again = [k for k in (1, 4) if not torch.equal(model[k].running_mean, dense[k].running_mean)]
    assert (updated, again) in [(["3.weight", "7.weight"], []), ([], [1, 4])]
    stays = f"batch-norm statistics left as they are: after {name} each layer gives nearly what they describe"
    assert record.notes[-1] == (stays if updated else "batch-norm statistics re-estimated on 3 batches")
    by_hand = small().eval()
    dense_record = prune(by_hand, (images(),), method=name, calibration=batches(), reestimate=False, permute=False)
    settled, done = settle_norms(by_hand, dense_record, batches, 1)
    assert digest(by_hand) == digest(model)
    assert (done, settled.notes[-1]) == (not updated, record.notes[-1])


def test_nothing_is_said_of_batch_norm_where_there_is_none() -> None:
    for name in ("magnitude", "alps"):
        model = perceptron()
        record = prune(model, (torch.ones(2, 16),), method=name, calibration=[torch.randn(64, 16)], reestimate=False, permute=False)
        assert settle_norms(model, record, lambda: [], 1) == (record, False)
    record = prune(perceptron(), (torch.ones(2, 16),), method="alps", calibration=[torch.randn(64, 16)], permute=False)
    assert not any("batch-norm" in note for note in record.notes)


def test_batch_norm_is_left_alone_when_asked() -> None:
    model, by_hand = small(), small()
    record = prune(model, (images(),), method="wanda", calibration=batches(), reestimate=False, permute=False)
    assert torch.equal(model[1].running_var, by_hand[1].running_var)
    assert not any("re-estimated" in note for note in record.notes)
    reestimate_batchnorm(model, batches())
    prune(by_hand, (images(),), method="wanda", calibration=batches(), permute=False)
    assert digest(model) == digest(by_hand)


def test_an_iterator_of_batches_serves_statistics_and_batch_norm() -> None:
    model, by_list = small(), small()
    prune(model, (images(),), method="sparsegpt", calibration=iter(batches()), permute=False)
    prune(by_list, (images(),), method="sparsegpt", calibration=batches(), permute=False)
    assert digest(model) == digest(by_list)


def test_the_whole_network_loses_less_with_the_data_than_without() -> None:
    dense, x = perceptron(64), torch.randn(512, 64) * torch.logspace(-1, 1, 64)
    errors = {}
    for name in METHODS:
        model = perceptron(64)
        prune(model, (x[:2],), method=name, calibration=[x], permute=False)
        errors[name] = float((model(x) - dense(x)).detach().square().mean())
    assert errors["alps"] < errors["sparsegpt"] < errors["wanda"] < errors["magnitude"], errors


def test_rounds_hold_what_fits_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rounds_of({"a": 3, "b": 3, "c": 9, "d": 1}, 6) == [["a", "b"], ["c"], ["d"]]
    at_once, one_by_one = small(), small()
    prune(at_once, (images(),), method="sparsegpt", calibration=batches(), permute=False)
    monkeypatch.setattr("twofour.pruning.decide.rounds_of", lambda sizes: [[name] for name in sizes])
    said = []
    report = lambda *what: said.append(what)  # noqa: E731 - a list's append with a tuple
    prune(one_by_one, (images(),), method="sparsegpt", calibration=batches(), permute=False, progress=report)
    assert digest(at_once) == digest(one_by_one)
    through = [("calibration batch", number, 3) for number in (1, 2, 3)]
    assert said == [*through, ("layer", 1, 2), *through, ("layer", 2, 2)]


# ---- permutation by scores


def best_order(scores: Tensor) -> float:
    """Largest sum of the two largest of every four over all orders of eight columns."""
    best = 0.0
    for group in itertools.combinations(range(8), 4):
        rest = [k for k in range(8) if k not in group]
        kept = sum(float(scores[:, some].topk(2, 1).values.sum()) for some in (list(group), rest))
        best = max(best, kept)
    return best


def test_the_search_keeps_the_most_of_the_given_scores() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    x = torch.randn(32, 8)
    before = model(x)
    scores = torch.rand(8, 8, generator=torch.Generator().manual_seed(3))
    record = permute(model, (x,), targets={"2.weight": 1}, scores={"2.weight": scores})
    layer = record.layers[0]
    assert layer.kept_after == pytest.approx(best_order(scores) / float(scores.sum()), rel=1e-6)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match=r"scores of '2.weight' have shape \[8, 4\], expected \[8, 8\]"):
        permute(model, (x,), targets={"2.weight": 1}, scores={"2.weight": scores[:, :4]})
    with pytest.raises(InputError, match=r"scores of 'x' have shape \[8, 8\], expected a parameter's name"):
        permute(model, (x,), targets={"2.weight": 1}, scores={"x": scores})


def reallocated(scores: Tensor) -> list[int]:
    """RIA's heuristic: the channels by falling sum, dealt out to the groups to and fro."""
    ranked = scores.sum(0).argsort(descending=True).tolist()
    groups: list[list[int]] = [[] for _ in range(len(ranked) // 4)]
    for turn in range(4):
        dealt = ranked[turn * len(groups) : (turn + 1) * len(groups)]
        for group, channel in zip(groups if turn % 2 == 0 else reversed(groups), dealt, strict=True):
            group.append(channel)
    return [channel for group in groups for channel in group]


def test_rias_permutation_is_the_proven_search_on_its_scores_and_beats_the_heuristic() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 4)).eval()
    data = torch.randn(256, 32) * torch.logspace(-1, 1, 32)
    scores = permutation_scores(model, ["2.weight"], METHODS["ria"], Calibration([data], (data[:2],)))
    assert scores is not None
    heuristic = scores["2.weight"][:, reallocated(scores["2.weight"])].reshape(48, 16, 4).topk(2, -1).values.sum()
    dense = model(data).detach()
    record = prune(model, (data[:2],), method="ria", calibration=[data], exclude=["0"])
    permutation = carried(model)
    assert permutation is not None
    (layer,) = [layer for layer in permutation.layers if layer.name == "2.weight"]
    assert layer.kept_after * float(scores["2.weight"].sum()) > float(heuristic)
    assert layer.kept_after > layer.kept_before
    moved = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 4))
    torch.manual_seed(0)
    fresh = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 4))
    moved.load_state_dict(permutation.to_new(fresh.state_dict()))
    torch.testing.assert_close(moved(data).detach(), dense, rtol=1e-4, atol=1e-4)
    kept = model[2].weight.detach() != 0
    assert torch.equal(model[2].weight.detach()[kept], moved[2].weight.detach()[kept])
    assert torch.equal(kept, record.masks["2.weight"])


# ---- bad input: one sentence, and the model to the bit what it was


def refused(model: nn.Module, message: str, example: Tensor | None = None, permute: float = False, **arguments: object) -> None:
    before = digest(model)
    hooks = sum(len(m._forward_pre_hooks) for m in model.modules())
    for name in ("wanda", "sparsegpt"):
        with pytest.raises(InputError, match=message) as caught:
            prune(model, (images() if example is None else example,), method=name, permute=permute, **arguments)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
        assert digest(model) == before
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == hooks


def test_a_method_that_looks_at_data_asks_for_it() -> None:
    refused(small(), "method '(wanda|sparsegpt)' looks at data, expected calibration batches; give calibration=, or use 'magnitude'")


def test_calibration_that_is_no_series_of_batches() -> None:
    refused(small(), "calibration is of int, expected batches to go through; give a list of batches", calibration=3)
    refused(small(), r"calibration is of dict, .*; give a list of batches, \[batch\] for one", calibration={"x": images()})
    refused(small(), "calibration is of str, expected batches", calibration="text")


def test_no_batch() -> None:
    refused(small(), "calibration holds no batch, expected at least one", calibration=[])
    refused(small(), "calibration holds no batch, expected at least one", calibration=iter(()), permute=0.1)


def test_too_little() -> None:
    refused(small(), r"calibration reaches layer '7.weight' with 16 rows \(tokens or pixels\), expected 32 or more", calibration=batches(1))


def test_the_wrong_shape_names_batch_and_layer() -> None:
    message = (
        r"calibration: batch 2 of float32\[16, 3, 9, 9\] cannot run \(at layer '7.weight'\): mat1 and mat2 shapes cannot be multiplied "
        r".*, expected inputs such as float32\[16, 3, 6, 6\]; check the data"
    )
    refused(small(), message, calibration=[images(), torch.ones(16, 3, 9, 9)])
    refused(small(), r"batch 1 of str cannot run", calibration=["text"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_names_batch_and_layer(value: float) -> None:
    broken = images()
    broken[3, 1, 2, 2] = value
    message = r"calibration: batch 2: the input of layer '3.weight' holds NaN or infinity, expected finite values; check the data"
    refused(small().eval(), message, calibration=[images(), broken])


def test_a_layer_that_is_never_reached() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.rare, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rare(x) if float(x.sum()) > 1e3 else self.body(x))

    message = "calibration never reaches layer 'rare.weight', expected batches that use it; give such batches, or exclude it"
    refused(Branches(), message, torch.ones(2, 8), calibration=[torch.ones(64, 8)])


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"),
    ],
)
def test_out_of_memory_names_the_layer_and_suggests_a_batch(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    real = model[7].forward

    def full(x: Tensor) -> Tensor:
        if len(x) == 48:
            raise error
        return real(x)

    monkeypatch.setattr(model[7], "forward", full)
    message = "calibration ran out of memory at layer '7.weight' with batches of 48 items; use batches of 24 or fewer"
    refused(model, message, calibration=batches(2, 48))
    monkeypatch.setattr("twofour.pruning.decide.choose", lambda *a: (_ for _ in ()).throw(error))
    with pytest.raises(InputError, match=r"no memory to choose what layer '3.weight' keeps \(72 inputs\); use method 'wanda'"):
        prune(model, (images(),), method="sparsegpt", calibration=batches(), permute=False)


def test_a_decomposition_that_fails_names_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Tensor:
        raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge.")

    monkeypatch.setattr("torch.linalg.eigh", fails)
    model = small()
    before = digest(model)
    message = r"layer '3.weight': XᵀX cannot be decomposed \(linalg.eigh: The algorithm failed to converge.\), expected finite inputs"
    with pytest.raises(InputError, match=message):
        prune(model, (images(),), method="alps", calibration=batches(), permute=False)
    assert digest(model) == before


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_out_of_memory_in_a_layer_that_is_not_pruned_names_it_too(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    before = digest(model)
    hooks = sum(len(m._forward_pre_hooks) for m in model.modules())
    real = model[2].forward

    def full(x: Tensor) -> Tensor:
        if len(x) == 48:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(x)

    monkeypatch.setattr(model[2], "forward", full)
    with pytest.raises(InputError, match="ran out of memory at layer '2' with batches of 48 items; use batches of 24 or fewer"):
        prune(model, (images(),), method=method, calibration=[images(), images(48)], permute=False)
    assert digest(model) == before
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == hooks


def test_batch_norm_that_cannot_be_re_estimated_takes_the_update_back() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 6), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2)).eval()
    before = digest(model)
    with pytest.raises(InputError, match="has one value a channel, expected several"):
        prune(model, (images(),), method="alps", calibration=[images(1, seed) for seed in range(40)], reestimate=True, permute=False)
    assert digest(model) == before


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
def test_an_interruption_of_the_writing_takes_it_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small().eval()
    before, written = digest(model), []

    def interrupted(weight: Tensor, dropped: Tensor) -> None:
        written.append(fill_zero(weight, dropped))
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("twofour.pruning.apply.fill_zero", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prune(model, (images(),), method=name, calibration=batches(), reestimate=True)
    assert len(written) == 2
    assert digest(model) == before


def test_an_update_too_large_for_the_format_is_refused() -> None:
    """Sixteen equal inputs: each kept weight must take over a dropped one, and twice 60,000 is no half."""
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 4)).half()
    with torch.no_grad():
        model[0].weight.fill_(6e4)
    x = (1e-4 * (torch.rand(256, 1) + 0.01 * torch.rand(256, 16))).half()
    before = digest(model)
    for name in ("sparsegpt", "alps"):
        with pytest.raises(InputError, match=r"layer .0.weight.: the new values do not fit torch.float16, expected finite ones; use"):
            prune(model, (x[:2],), method=name, calibration=[x], permute=False)
        assert digest(model) == before


def test_a_singular_hessian_is_told_in_the_record() -> None:
    model = perceptron(64)
    record = prune(model, (torch.ones(2, 64),), method="sparsegpt", calibration=[torch.randn(40, 64)], permute=False)
    assert "0.weight: Hessian singular (40 rows for 64 columns), damped by 1 % of its mean diagonal" in record.notes


@pytest.mark.parametrize("name", ["sparsegpt", "alps"])
def test_autocast_around_the_call_or_inside_the_model_changes_no_sum(name: str) -> None:
    """Of the first layer, whose input is float32 either way."""

    class Casting(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x).float()

    x = torch.randn(128, 16, generator=torch.Generator().manual_seed(0))
    around, plain, inside = perceptron(), perceptron(), Casting(*perceptron())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prune(around, (x[:2],), method=name, calibration=[x], permute=False)
    for model in (plain, inside):
        prune(model, (x[:2],), method=name, calibration=[x], permute=False)
    assert torch.equal(around[0].weight, plain[0].weight)
    assert torch.equal(inside[0].weight, plain[0].weight)


@pytest.mark.parametrize("name", CALIBRATED)
def test_a_batch_without_items_does_not_count(name: str) -> None:
    models = [small().eval(), small().eval()]
    for model, given in zip(models, ([*batches(), images(16)[:0]], batches()), strict=True):
        prune(model, (images(),), method=name, calibration=given, reestimate=False, permute=False)
    assert digest(models[0]) == digest(models[1])
    with pytest.raises(InputError, match=r"calibration never reaches layer '3\.weight', expected batches that use it"):
        prune(small().eval(), (images(),), method=name, calibration=[images(16)[:0]], permute=False)
