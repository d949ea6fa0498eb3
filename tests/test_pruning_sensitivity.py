"""Each layer pruned alone, and the layers left dense for a budget: against doing it by hand; resume; refusals; the command."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pruning_prune import digest
from torch import Tensor, nn

from twofour.errors import InputError
from twofour.pruning import Sensitivity, prune, prune_within, reestimate_batchnorm, sensitivity
from twofour.pruning.sensitivity import LayerSensitivity, _fewest
from twofour.report.sensitivity import plot_sensitivity


def images(items: int, seed: int) -> Tensor:
    return torch.randn(items, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


X = images(256, 5)
BATCHES = list(images(96, 6).split(32))
EXAMPLE = (X[:2],)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    for channels in (8, 16):
        layers += [nn.Conv2d(channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
    reestimate_batchnorm(model, BATCHES)
    return model.eval()


TRUTH = network()(X).detach()


def error(model: nn.Module) -> float:
    """How far the outputs are from the dense network's; lower is better."""
    with torch.no_grad():
        return 100 * float((model.eval()(X) - TRUTH).square().mean().sqrt())


LOWER: dict[str, Any] = {"metric": "error", "direction": "lower"}


@pytest.mark.parametrize(("method", "calibration"), [("magnitude", None), ("magnitude", BATCHES), ("sparsegpt", BATCHES)])
def test_each_layer_costs_what_pruning_it_alone_costs(method: str, calibration: list[Tensor] | None) -> None:
    model = network()
    before = digest(model)
    measured = sensitivity(model, EXAMPLE, error, method=method, calibration=calibration, **LOWER)
    assert digest(model) == before
    assert measured.dense == pytest.approx(0, abs=1e-3)
    assert [layer.name for layer in measured.layers] == ["3.weight", "6.weight", "11.weight"]
    for layer in measured.layers:
        alone = network()
        others = [other.name for other in measured.layers if other.name != layer.name]
        prune(alone, EXAMPLE, method=method, calibration=calibration, exclude=others, permute=False)
        assert layer.value == pytest.approx(error(alone), rel=1e-6)
        assert layer.lost == pytest.approx(layer.value - measured.dense)
    assert measured.ranked[0].lost == max(layer.lost for layer in measured.layers)
    assert f"worst {measured.ranked[0].name}" in str(measured)
    assert Sensitivity.from_json(json.loads(json.dumps(measured.to_json()))) == measured


def test_a_higher_metric_loses_downwards() -> None:
    measured = sensitivity(network(), EXAMPLE, lambda m: -error(m))
    assert all(layer.lost == pytest.approx(measured.dense - layer.value) and layer.lost > 0 for layer in measured.layers)


def test_it_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    calls = 0

    def interrupted(model: nn.Module) -> float:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return error(model)

    model = network()
    before = digest(model)
    with pytest.raises(KeyboardInterrupt):
        sensitivity(model, EXAMPLE, interrupted, resume=path, calibration=BATCHES, **LOWER)
    assert digest(model) == before
    assert len(json.loads(path.read_text())["layers"]) == 1
    calls = 10
    said: list[tuple[str, int, int | None]] = []
    resumed = sensitivity(model, EXAMPLE, interrupted, resume=path, calibration=BATCHES, progress=lambda *what: said.append(what), **LOWER)
    assert calls == 12
    assert said[-1] == ("layer pruned alone", 3, 3)
    assert resumed == sensitivity(model, EXAMPLE, error, calibration=BATCHES, **LOWER)

    def refused(message: str, model: nn.Module = model, **options: Any) -> None:
        with pytest.raises(InputError, match=message):
            sensitivity(model, EXAMPLE, error, **{"resume": path, **LOWER, **options})

    refused("has method 'magnitude', expected 'wanda'; name another file", method="wanda", calibration=BATCHES)
    refused("has metric 'error', expected 'loss'", metric="loss")
    refused("is of other calibration data; delete it or name another file", calibration=BATCHES[:2])
    refused("is of other calibration data", calibration=BATCHES[::-1])
    refused("is of other calibration data")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[3].weight.add_(1)
    refused("is of other weights; delete it or name another file", model=other, calibration=BATCHES)
    path.write_text('{"layers": []}')
    refused("is damaged; delete it and measure again")


@pytest.mark.parametrize("permute", [False, 0.3])
def test_the_costliest_layers_stay_dense_until_the_budget_is_met(permute: float) -> None:
    measured = sensitivity(network(), EXAMPLE, error, calibration=BATCHES, **LOWER)
    by_hand = []
    for count in range(3):
        one = network()
        prune(one, EXAMPLE, calibration=BATCHES, exclude=[layer.name for layer in measured.ranked[:count]], permute=False)
        by_hand.append(error(one))
    assert by_hand == sorted(by_hand, reverse=True)
    model = network()
    budget = (by_hand[0] + by_hand[1]) / 2
    done = prune_within(model, EXAMPLE, error, measured, budget, permute=permute, calibration=BATCHES)
    assert len(done.kept_dense) == 1
    assert permute or done.value == pytest.approx(by_hand[1], rel=1e-6)
    assert done.kept_dense == tuple(layer.name for layer in measured.ranked[: len(done.kept_dense)])
    assert done.value == pytest.approx(error(model), rel=1e-5)
    assert done.value - done.dense <= budget
    reasons = {layer.name: layer.reason for layer in done.pruning.layers}
    worst = measured.ranked[0]
    assert reasons[worst.name] == f"kept dense for the budget: pruned alone it costs {worst.lost:.2f} error"
    assert {layer.name for layer in done.pruning.pruned} == set(done.pruning.masks)
    assert done.pruning.share_of_flops < done.flops_share_all
    share = f"{100 * done.pruning.share_of_flops:.1f} instead of {100 * done.flops_share_all:.1f} % of FLOPs are 2:4"
    assert share in str(done)
    for name, mask in done.pruning.masks.items():
        assert not model.get_parameter(name).detach()[~mask].any()
    generous = prune_within(network(), EXAMPLE, error, measured, 1e6, permute=False, calibration=BATCHES)
    assert generous.kept_dense == ()


def test_a_budget_leaves_batch_norm_as_prune_does() -> None:
    model, by_hand = network(), network()
    measured = sensitivity(model, EXAMPLE, error, method="sparsegpt", calibration=BATCHES, **LOWER)
    done = prune_within(model, EXAMPLE, error, measured, 1e6, permute=False, calibration=BATCHES)
    record = prune(by_hand, EXAMPLE, method="sparsegpt", calibration=BATCHES, permute=False)
    assert digest(model) == digest(by_hand)
    assert done.value == error(by_hand)
    assert done.pruning.notes == record.notes


def test_the_fewest_is_found_by_halving() -> None:
    for most in (1, 2, 5, 16):
        for threshold in range(most + 1):
            tried: list[int] = []

            def fits(count: int, tried: list[int] = tried, threshold: int = threshold) -> bool:
                tried.append(count)
                return count >= threshold

            assert _fewest(fits, most) == threshold
            assert len(tried) <= 2 + most.bit_length()


def test_what_cannot_be_met_is_refused_and_the_model_left() -> None:
    measured = sensitivity(network(), EXAMPLE, error, **LOWER)

    def refused(message: str, budget: float = 1.0, measured: Sensitivity = measured, **options: Any) -> None:
        model = network()
        before = digest(model)
        with pytest.raises(InputError, match=message):
            prune_within(model, EXAMPLE, error, measured, budget, **{"permute": 0.1, **options})
        assert digest(model) == before

    refused("no layer can be pruned within a budget of 1e-06 error; give a larger budget", 1e-6)
    refused("budget -1 is negative, expected 0 or more", -1)
    refused("budget nan is negative", float("nan"))
    refused(r"the sensitivity is of other layers \(first: '3.weight'\), expected those to prune", exclude=["3"])


def test_a_metric_that_is_not_finite_is_refused() -> None:
    model = network()
    before = digest(model)
    with pytest.raises(InputError, match="sensitivity: accuracy of the dense network is nan, expected a finite number"):
        sensitivity(model, EXAMPLE, lambda m: float("nan"))
    values = iter([1.0, float("inf")])
    with pytest.raises(InputError, match=r"accuracy with only '3.weight' pruned is inf, expected a finite number; .* or exclude the layer"):
        sensitivity(model, EXAMPLE, lambda m: next(values))
    assert digest(model) == before


def test_a_metric_may_be_a_tensor_and_must_be_a_number(tmp_path: Path) -> None:
    model = network()
    before = digest(model)
    measured = sensitivity(model, EXAMPLE, lambda m: torch.tensor(error(m)), resume=tmp_path / "s.json", **LOWER)  # type: ignore[arg-type, return-value]
    assert measured == sensitivity(model, EXAMPLE, lambda m: float(torch.tensor(error(m))), **LOWER)
    done = prune_within(network(), EXAMPLE, lambda m: torch.tensor(0.0), measured, 1.0, permute=False)  # type: ignore[arg-type, return-value]
    assert type(done.value) is float
    for value, kind in ((None, "NoneType"), (torch.ones(2), "Tensor")):
        with pytest.raises(InputError, match=f"sensitivity: accuracy of the dense network is of {kind}, expected a number; have the"):
            sensitivity(model, EXAMPLE, lambda m, value=value: value)  # type: ignore[misc]
    assert digest(model) == before


def test_the_picture_has_a_bar_a_layer(tmp_path: Path) -> None:
    measured = sensitivity(network(), EXAMPLE, error, **LOWER)
    plot_sensitivity(measured, tmp_path / "a.svg")
    plot_sensitivity(measured, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    plot_sensitivity(measured, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
    text = (tmp_path / "a.svg").read_text()
    assert all(layer.name in text for layer in measured.layers)
    assert "error added when only this layer is pruned (magnitude 2:4); dense" in text


def test_small_losses_are_told_with_their_digits() -> None:
    layer = LayerSensitivity("a.weight", (4, 4), None, 0.04728, 0.009169)
    assert "loss 0.03811 dense" in str(Sensitivity("loss", "lower", 0.038112, "magnitude", "2:4", (layer,)))
    assert "worst a.weight at 0.04728" in str(Sensitivity("loss", "lower", 0.038112, "magnitude", "2:4", (layer,)))


# ---- the command

ARGUMENTS = ("prune", "demo", "--data", "digits", "--weights", "d.safetensors")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run `twofour prune demo …` on a briefly trained network."""
    from twofour.cli import main
    from twofour.sources import resolve_model

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    torch.manual_seed(0)
    from twofour.training import Checkpoint

    Checkpoint.of(resolve_model("demo").make(10), "accuracy", 0.0).save("d.safetensors")

    def call(*more: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main([*ARGUMENTS, *more])
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return call


def test_the_commands_sensitivity_and_budget(run: Any) -> None:
    code, out, _ = run("--sensitivity", "--by", "loss", "--method", "wanda", "--out", "s.json")
    assert code == 0
    assert "Sensitivity(wanda 2:4, loss" in out
    assert len(json.loads(Path("s.json").read_text())["layers"]) == 8
    assert Path("s.svg").read_text().startswith("<?xml")
    code, out, _ = run("--keep-dense", "auto", "--budget", "100", "--no-permute", "--out", "p.safetensors")
    assert code == 0
    assert "0 of 8 layers stay dense" in out
    assert Path("p.sensitivity.json").is_file()


def test_the_command_takes_every_method(run: Any) -> None:
    code, out, _ = run("--method", "sparsegpt", "--no-permute", "--out", "p.safetensors")
    assert code == 0
    assert "Pruning(sparsegpt: 8 of 10 layers 2:4" in out
    assert "note: stages.2.conv2.weight: Hessian singular (" in out
    assert "note: batch-norm statistics left as they are: after sparsegpt each layer gives nearly what they describe\n" in out
    assert re.search(r"accuracy: dense [\d.]+, one-shot 2:4 [\d.]+\n", out)
    code, out, _ = run("--method", "wanda", "--by-block", "--resume", "blocks", "--out", "b.safetensors")
    assert code == 0
    assert "outside the blocks" not in out
    assert len(list(Path("blocks").glob("block-*.safetensors"))) == 3
    assert "note: batch-norm statistics re-estimated on 6 batches\n" in out
    assert re.search(r"accuracy: dense [\d.]+, one-shot 2:4 [\d.]+, with batch-norm re-estimated [\d.]+", out)


def test_the_command_says_what_dense_layers_cost_in_time(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from twofour.errors import UnsupportedError
    from twofour.report.budget import BudgetTime

    asked = ("--keep-dense", "auto", "--budget", "0.5", "--pattern", "1:4", "--no-permute", "--out", "p.safetensors")
    values = iter([90.0, *(89.0 - 0.1 * i for i in range(8)), 80.0, *[89.9] * 9])
    monkeypatch.setattr("twofour.cli.prune_model.evaluate", lambda *_: next(values))

    def absent(*_: object, **__: object) -> None:
        raise UnsupportedError("build: none can be used here")

    monkeypatch.setattr("twofour.cli.prune_model.time_of_budget", absent)
    code, out, err = run(*asked)
    assert code == 0, err
    assert "time: not measured, as no plan can be built here: build: none can be used here" in " ".join(out.split())
    assert "accuracy: dense 90.00, 1:4 89.90\n" in out
    assert "% of FLOPs are 1:4; metric 90.00 → 89.90)" in " ".join(out.split())
    values = iter([80.0, *[89.9] * 9])
    monkeypatch.setattr("twofour.cli.prune_model.time_of_budget", lambda *_, **__: BudgetTime("H100", 32, "fp16", 1200.0, 1000.0))
    code, out, _ = run(*asked)
    assert "time: 1.200 ms instead of 1.000 ms with none of them dense (+20.0 %; H100, batch 32, fp16" in " ".join(out.split())


def test_the_command_looks_at_as_much_data_as_asked(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    real = prune

    def spy(*arguments: Any, **options: Any) -> Any:
        seen.append([len(batch) for batch in options["calibration"]])
        return real(*arguments, **options)

    monkeypatch.setattr("twofour.cli.prune_model.prune", spy)
    run("--method", "wanda", "--no-permute", "--calibration", "96", "--batch", "32", "--out", "p.safetensors")
    run("--method", "wanda", "--no-permute", "--calibration", "40", "--out", "p.safetensors")
    run("--method", "wanda", "--no-permute", "--calibration", "100", "--batch", "64", "--out", "p.safetensors")
    assert seen == [[32, 32, 32], [40], [50, 50]]
    code, _, err = run("--method", "wanda", "--no-permute", "--calibration", "4", "--out", "q.safetensors")
    assert code == 2
    assert "rows (tokens or pixels), expected 32 or more; give more batches" in err
    assert not Path("q.safetensors").exists()
    code, _, err = run("--device", "cuda:99", "--out", "q.safetensors")
    assert code == 2
    assert "device 'cuda:99' is not here" in err


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--keep-dense", "auto"), "--keep-dense auto and --budget belong together, expected both"),
        (("--budget", "1"), "--keep-dense auto and --budget belong together, expected both"),
        (("--sensitivity", "--by-block"), "--sensitivity, --keep-dense and --by-block exclude each other"),
        (("--by", "loss"), "--by says what --sensitivity measures, expected both"),
        (("--resume", "r"), "--resume keeps finished blocks, expected --by-block"),
        (("--sensitivity",), "--out 'p.safetensors' does not end with .json"),
        (("--method", "wonda"), "pruning method 'wonda' is unknown, .*did you mean 'wanda'"),
    ],
)
def test_the_command_refuses_contradictions(run: Any, more: tuple[str, ...], sentence: str) -> None:
    code, _, err = run(*more, "--out", "p.safetensors")
    assert code == 2
    assert re.search(sentence, err), err
    assert not Path("p.safetensors").exists()


def test_a_place_that_cannot_be_written_is_said_before_anything_is_pruned(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def begun(*_: object) -> None:
        raise AssertionError("work has begun")

    monkeypatch.setattr("twofour.cli.prune_model.run", begun)
    for more in ((), ("--sensitivity",), ("--keep-dense", "auto", "--budget", "1")):
        name = "absent/p.json" if "--sensitivity" in more else "absent/p.safetensors"
        code, _, err = run(*more, "--out", name)
        assert code == 2
        assert f"file '{name}' cannot be written: its folder does not exist; make it first" in err


def test_files_cannot_be_measured(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from twofour.cli import main

    with pytest.raises(SystemExit):
        main(["prune", "./folder", "--sensitivity", "--out", "s.json"])
    assert "run the network, expected MODEL with --data and --weights" in capsys.readouterr().err
