"""Which layers are pruned and why not, what the record says, and that a refusal changes nothing."""

import copy
import hashlib

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import twofour
from twofour.errors import InputError
from twofour.pattern import count_groups, select
from twofour.pruning import Pruning
from twofour.pruning.magnitude import magnitude_mask
from twofour.sources import Task


def digest(model: nn.Module) -> str:
    return hashlib.sha256(b"".join(v.numpy().tobytes() for v in model.state_dict().values())).hexdigest()


class Zoo(nn.Module):
    """One layer of every kind that eligibility knows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.first = nn.Conv1d(16, 16, 3, padding=1)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.depthwise = nn.Conv1d(16, 16, 3, padding=1, groups=16)
        self.grouped = nn.Conv1d(16, 16, 1, groups=2)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(16, 2, kdim=8, vdim=12, batch_first=True)
        self.odd = nn.Linear(16, 6)
        self.narrow = nn.Linear(6, 16)
        self.up = nn.ConvTranspose1d(16, 16, 1)
        self.gru = nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens).transpose(1, 2)
        x = self.up(self.grouped(self.depthwise(self.conv(self.first(x))))).transpose(1, 2)
        x = self.attention(x, x, x)[0]
        x = self.cross(x, x[..., :8], x[..., :12])[0]
        x = self.narrow(self.odd(x))
        return self.head(self.gru(x)[0].mean(1))


@pytest.fixture(scope="module")
def zoo_record() -> Pruning:
    torch.manual_seed(0)
    return twofour.prune(Zoo(), (torch.randint(0, 20, (2, 5)),), permute=False)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("embed.weight", "embedding"),
        ("first.weight", "first convolution"),
        ("depthwise.weight", "depthwise"),
        ("grouped.weight", "grouped convolution (2 groups)"),
        ("narrow.weight", "6 input channels are not a multiple of 4"),
        ("up.weight", "transposed convolution"),
        ("gru.weight_ih_l0", "recurrent"),
        ("head.weight", "classifier"),
    ],
)
def test_a_layer_left_dense_says_why(zoo_record: Pruning, name: str, reason: str) -> None:
    layer = next(layer for layer in zoo_record.layers if layer.name == name)
    assert not layer.eligible
    assert reason in layer.reason
    assert name not in zoo_record.masks


def test_convolutions_linears_and_attention_projections_are_pruned(zoo_record: Pruning) -> None:
    assert {layer.name for layer in zoo_record.pruned} == {
        "conv.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "cross.q_proj_weight",
        "cross.k_proj_weight",
        "cross.v_proj_weight",
        "cross.out_proj.weight",
        "odd.weight",
    }


def test_flops_are_two_per_multiply_add_and_item(zoo_record: Pruning) -> None:
    flops = {layer.name: layer.flops for layer in zoo_record.layers}
    assert flops["conv.weight"] == 2 * 5 * 16 * 16 * 3
    assert flops["depthwise.weight"] == 2 * 5 * 16 * 3
    assert flops["odd.weight"] == 2 * 5 * 16 * 6
    assert flops["attention.in_proj_weight"] == 2 * 5 * 3 * 16 * 16
    assert flops["cross.k_proj_weight"] == 2 * 5 * 8 * 16
    assert flops["embed.weight"] is None


def test_pruned_values_are_plus_zero_and_kept_values_untouched(demo_net: nn.Module, digits: Task) -> None:
    before = {name: p.detach().clone() for name, p in demo_net.named_parameters()}
    record = twofour.prune(demo_net, digits.example_inputs(), permute=False)
    for name, p in demo_net.named_parameters():
        if name in record.masks:
            mask = record.masks[name]
            assert torch.equal(p[mask], before[name][mask])
            dropped = p[~mask]
            assert not dropped.any()
            assert not torch.signbit(dropped).any()
            assert count_groups(p.detach().numpy()).is_24
            layer = next(layer for layer in record.layers if layer.name == name)
            kept = float(before[name][mask].double().abs().sum() / before[name].double().abs().sum())
            assert layer.kept_magnitude == pytest.approx(kept, rel=1e-12)
        else:
            assert torch.equal(p, before[name])


def test_include_takes_in_the_defaults_and_exclude_wins(demo_net: nn.Module, digits: Task) -> None:
    record = twofour.prune(demo_net, digits.example_inputs(), include=["classifier"], exclude=["stages.0.*"], permute=False)
    by_name = {layer.name: layer for layer in record.layers}
    assert by_name["classifier.weight"].eligible
    assert by_name["stages.0.conv1.weight"].reason == "excluded"
    assert by_name["stages.1.conv1.weight"].eligible


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_names_the_nearest_layer(demo_net: nn.Module, digits: Task, option: str) -> None:
    before = digest(demo_net)
    with pytest.raises(InputError, match=rf"{option} 'clasifier' matches no layer of the model; did you mean 'classifier'\?"):
        twofour.prune(demo_net, digits.example_inputs(), **{option: ["clasifier"]}, permute=False)
    assert digest(demo_net) == before


def test_a_weight_with_nan_is_refused_and_the_model_left_as_it_was(demo_net: nn.Module, digits: Task) -> None:
    with torch.no_grad():
        demo_net.stages[2].conv2.weight[0, 0, 0, 0] = float("nan")
    before = digest(demo_net)
    with pytest.raises(InputError, match=r"'stages.2.conv2.weight' holds NaN or infinity"):
        twofour.prune(demo_net, digits.example_inputs(), permute=False)
    assert digest(demo_net) == before


def test_an_unknown_method_names_the_nearest(demo_net: nn.Module, digits: Task) -> None:
    with pytest.raises(InputError, match=r"method 'magnitud' is unknown.*did you mean 'magnitude'\?"):
        twofour.prune(demo_net, digits.example_inputs(), method="magnitud", permute=False)


def test_a_model_without_an_eligible_layer_says_what_it_has() -> None:
    with pytest.raises(InputError, match=r"no layer that can be 2:4: weight: classifier"):
        twofour.prune(nn.Linear(4, 4), (torch.ones(2, 4),), permute=False)


def test_a_weight_shared_with_an_embedding_stays_dense() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(8, 8)
            self.body = nn.Linear(8, 8)
            self.head = nn.Linear(8, 8, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(self.embed(x)))

    record = twofour.prune(Tied(), (torch.zeros(2, 3, dtype=torch.long),), permute=False)
    by_name = {layer.name: layer for layer in record.layers}
    assert by_name["embed.weight"].reason.startswith("shared with another layer: embedding")
    assert by_name["body.weight"].eligible


def test_a_model_that_cannot_be_captured_falls_back_to_execution_order_and_says_so() -> None:
    class Untraceable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(y) if float(y.sum()) > -1e9 else y

    record = twofour.prune(Untraceable(), (torch.ones(2, 8),), permute=False)
    assert "cannot be captured" in record.notes[0]
    assert [layer.name for layer in record.pruned] == ["a.weight"]


def test_the_last_linear_before_each_output_stays_dense() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.body(x).relu()
            return self.a(y), self.b(y).softmax(-1)

    record = twofour.prune(TwoHeads(), (torch.ones(2, 8),), permute=False)
    assert [layer.name for layer in record.pruned] == ["body.weight"]


def test_modes_of_all_modules_are_given_back(demo_net: nn.Module, digits: Task) -> None:
    demo_net.train()
    demo_net.stages[1].eval()
    modes = [m.training for m in demo_net.modules()]
    twofour.prune(demo_net, digits.example_inputs(), permute=False)
    assert [m.training for m in demo_net.modules()] == modes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_the_mask_is_that_of_the_exact_values_in_every_dtype(dtype: torch.dtype) -> None:
    weight = torch.randn(16, 32, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = select(weight.double().numpy())
    assert np.array_equal(magnitude_mask(weight).numpy(), expected)


def test_the_record_survives_json(zoo_record: Pruning) -> None:
    again = Pruning.from_json(zoo_record.to_json())
    assert again.layers == zoo_record.layers
    assert str(again) == str(zoo_record)
    with pytest.raises(InputError, match="pruning record is damaged"):
        Pruning.from_json('{"method": "magnitude"}')


def test_channels_are_reordered_first_and_the_network_is_the_same(demo_net: nn.Module, digits: Task) -> None:
    demo_net.eval()
    images = digits.example_inputs(16)[0]
    plain = copy.deepcopy(demo_net)
    without = twofour.prune(plain, digits.example_inputs(), permute=False)
    dense = copy.deepcopy(demo_net).double()
    record = twofour.prune(demo_net, digits.example_inputs())
    assert record.kept_magnitude > without.kept_magnitude + 0.002
    assert all(layer.permuted.startswith("yes: ") for layer in record.pruned)
    # The masks belong to the new order: with every dropped value put back by the record, the network computes what it did.
    from twofour.pruning.permutation import carried

    permutation = carried(demo_net)
    assert permutation is not None
    moved = copy.deepcopy(dense)
    moved.load_state_dict(permutation.to_new(dense.state_dict()))
    with torch.no_grad():
        for name, parameter in demo_net.named_parameters():
            kept = record.masks.get(name, torch.ones_like(parameter, dtype=torch.bool))
            assert torch.equal(parameter[kept], moved.state_dict()[name].float()[kept])
        assert float((moved(images.double()) - dense(images.double())).abs().max()) < 1e-12


def test_a_refusal_after_the_reordering_puts_every_channel_back(demo_net: nn.Module, digits: Task) -> None:
    before = digest(demo_net)
    with pytest.raises(InputError, match="calibration holds no batch"):
        twofour.prune(demo_net, digits.example_inputs(), calibration=[])
    assert digest(demo_net) == before
    assert "twofour_permutation" not in vars(demo_net)


PARAMETRISATIONS = {
    "hooked weight norm": torch.nn.utils.weight_norm,
    "weight norm": torch.nn.utils.parametrizations.weight_norm,
    "hooked spectral norm": torch.nn.utils.spectral_norm,
    "spectral norm": torch.nn.utils.parametrizations.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("form", PARAMETRISATIONS)
def test_a_weight_that_a_parametrisation_computes_stays_dense(form: str) -> None:
    torch.manual_seed(0)
    wrapped = PARAMETRISATIONS[form](nn.Linear(16, 16))
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), wrapped, nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    before = {name: p.detach().clone() for name, p in wrapped.named_parameters()}
    record = twofour.prune(model, (torch.randn(2, 8),), permute=False)
    assert [layer.name for layer in record.pruned] == ["0.weight", "4.weight"]
    computed = [layer for layer in record.layers if layer.name.startswith("2.")]
    assert {layer.reason for layer in computed} == {"its weight is computed by a parametrisation; remove the parametrisation first"}
    assert max(layer.flops or 0 for layer in computed) == 2 * 16 * 16
    assert all(torch.equal(p, before[name]) for name, p in wrapped.named_parameters())


def test_arguments_of_another_kind_and_models_that_do_not_run_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    x = torch.randn(2, 8)
    with pytest.raises(InputError, match=r"prune: model is of NoneType, expected a torch\.nn\.Module"):
        twofour.prune(None, (x,))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"prune: example_inputs is of Tensor, expected a tuple of arguments; give \(x,\) for one x"):
        twofour.prune(model, x)  # type: ignore[arg-type]
    whole = nn.Linear(8, 8, bias=False)
    whole.weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(InputError, match="the model does not run on the example inputs, expected inputs that it takes: ") as caught:
        twofour.prune(whole, (x,))
    assert "\n" not in str(caught.value)

    class Checking(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[1] != 8:
                raise ValueError(f"width {x.shape[1]} is not 8\nof this model")
            return self[1](self[0](x))  # type: ignore[no-any-return]

    with pytest.raises(InputError, match=r"expected inputs that it takes: width 9 is not 8$"):
        twofour.prune(Checking(*model), (torch.randn(2, 9),))
