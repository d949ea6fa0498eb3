"""Recipes, the loop and checkpoints."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import twofour
from twofour.errors import InputError, TrainingError
from twofour.pruning import Pruning
from twofour.sources import ArrayDataset, Metric, Task
from twofour.training import Checkpoint, Recipe, load_recipe
from twofour.training.augment import augmented, shifted
from twofour.training.loop import distillation_loss, lr_factor
from twofour.training.recipe import AugmentationSection, ScheduleSection, parse_recipe, shipped_recipes


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_parses(name: str) -> None:
    assert load_recipe(name).epochs > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optimizer]\nname = 'sgd'\nmomentum = 0.0\nnesterov = true", "nesterov needs a momentum above 0"),
        ("epoch = 3", r"recipe 'r.toml': unknown key 'epoch', expected one of .*did you mean 'epochs'\?"),
        ("[optimizer]\nlearning_rate = 0.1", r"unknown key 'optimizer.learning_rate'"),
        ("[optimizer]\nwieght_decay = 0.1", r"did you mean 'weight_decay'\?"),
        ("epochs = 'three'", r"epochs = 'three' is wrong: input should be a valid integer"),
        ("epochs = 0", r"epochs = 0 is wrong: input should be greater than 0"),
        ("[optimizer]\nlr = nan", r"optimizer.lr = nan is wrong"),
        ("[schedule]\nname = 'cos'", r"schedule.name = 'cos' is wrong: input should be 'constant', 'cosine'"),
        ("epochs = ", r"not valid TOML"),
    ],
)
def test_a_wrong_recipe_gets_one_sentence(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_recipe(text, "'r.toml'")


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"recipe 'digit' is neither a file nor one of .*did you mean 'digits'\?"):
        load_recipe("digit")


@given(st.sampled_from(["constant", "cosine", "onecycle", "step"]), st.floats(0, 0.9), st.floats(0, 1, exclude_max=True))
def test_the_schedule_stays_between_zero_and_the_peak(name: str, warmup: float, progress: float) -> None:
    assert 0 <= lr_factor(ScheduleSection(name=name, warmup=warmup), progress) <= 1  # type: ignore[arg-type]


def test_the_schedules_have_the_values_of_their_formulas() -> None:
    assert lr_factor(ScheduleSection(name="cosine"), 0.5) == pytest.approx(0.5)
    assert lr_factor(ScheduleSection(name="step"), 0.6) == pytest.approx(0.1)
    assert lr_factor(ScheduleSection(name="constant", warmup=0.5), 0.25) == pytest.approx(0.5)
    assert lr_factor(ScheduleSection(name="onecycle", warmup=0.3), 0.3) == pytest.approx(1.0)


def test_shifted_moves_each_image_by_whole_pixels_with_zeros_moved_in() -> None:
    images = torch.arange(1.0, 1 + 50 * 4 * 4).reshape(50, 1, 4, 4)
    moved = shifted(images, 1, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    seen = set()
    for image, source in zip(moved, padded, strict=True):
        offsets = [(i, j) for i in range(3) for j in range(3) if torch.equal(image[0], source[0, i : i + 4, j : j + 4])]
        assert len(offsets) == 1
        seen.add(offsets[0])
    assert len(seen) == 9


def test_flip_mirrors_about_half_and_nothing_changes_when_off() -> None:
    images = torch.rand(400, 1, 3, 3)
    flipped = augmented(images, AugmentationSection(flip=True), torch.Generator().manual_seed(0))
    mirrored = sum(torch.equal(a, b.flip(-1)) for a, b in zip(flipped, images, strict=True))
    # Binomial(400, 1/2): five standard deviations are 50.
    assert abs(mirrored - 200) < 50
    assert augmented(images, AugmentationSection(), torch.Generator()) is images


def test_distillation_loss_is_the_kl_divergence_at_temperature() -> None:
    student, teacher = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    q, p = (teacher / 3).softmax(1), (student / 3).softmax(1)
    expected = 9 * (q * (q / p).log()).sum(1).mean()
    assert float(distillation_loss(student, teacher, 3.0)) == pytest.approx(float(expected), rel=1e-12)


def tiny_task(targets: Tensor | None = None) -> Task:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=generator)
    y = (x[:, 0] > 0).long() if targets is None else targets
    return Task("tiny", ArrayDataset(x, y), ArrayDataset(x, y), num_classes=2)


QUICK = parse_recipe("epochs = 30\nbatch = 16\n[optimizer]\nlr = 2e-2", "quick")


def tiny_net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))


def test_a_run_repeats_bit_for_bit_and_leaves_the_global_generator_alone() -> None:
    recipe = Recipe(epochs=3, batch=16)
    first, second = tiny_net(), tiny_net()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    a = twofour.train(first, tiny_task(), recipe)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(8)
    b = twofour.train(second, tiny_task(), recipe)
    assert all(torch.equal(a.state[k], b.state[k]) for k in a.state)
    assert [e.loss for e in a.history] == [e.loss for e in b.history]


def test_training_learns_and_holds_a_pruned_model() -> None:
    model, task = tiny_net(), tiny_task()
    record = twofour.prune(model, task.example_inputs(), permute=False)
    checkpoint = twofour.train(model, task, QUICK)
    assert checkpoint.metric > 90
    for name, mask in record.masks.items():
        assert not checkpoint.state[name][~mask].any()


def test_a_loss_that_is_not_finite_stops_and_names_the_epoch() -> None:
    task = tiny_task()
    broken = Task("tiny", task.train, task.validation, 2, loss=lambda o, t, s: o.sum() * float("inf"))
    with pytest.raises(TrainingError, match=r"the loss of epoch 1 is (nan|inf|-inf), expected a finite value; lower the recipe's lr"):
        twofour.train(tiny_net(), broken, Recipe(epochs=2, batch=16))


def test_distillation_needs_a_teacher_and_follows_it() -> None:
    recipe = parse_recipe("epochs = 30\nbatch = 16\n[optimizer]\nlr = 2e-2\n[distillation]\nweight = 1.0", "r")
    with pytest.raises(InputError, match="expected a teacher; pass teacher="):
        twofour.train(tiny_net(), tiny_task(), recipe)
    # The targets are turned round: only the teacher can have taught the student what it knows.
    task = tiny_task()
    teacher = tiny_net()
    twofour.train(teacher, task, QUICK)
    wrong = tiny_task(1 - task.validation[list(range(64))][1])
    taught = twofour.train(tiny_net(), wrong, recipe, teacher=teacher)
    assert taught.metric < 20


def test_a_metric_may_be_better_when_lower() -> None:
    assert Metric("error", lambda o, t: 0.0, "lower").is_better(1.0, 2.0)
    assert Metric("accuracy", lambda o, t: 0.0).is_better(2.0, 1.0)


def test_too_little_data_and_nothing_to_train_get_one_sentence() -> None:
    empty = Task("none", ArrayDataset(torch.zeros(0, 8), torch.zeros(0).long()), tiny_task().validation, 2)
    with pytest.raises(InputError, match=r"data 'none' has no training items"):
        twofour.train(tiny_net(), empty, Recipe(epochs=1, batch=16))
    frozen = tiny_net().requires_grad_(False)
    with pytest.raises(InputError, match="no parameter that requires a gradient"):
        twofour.train(frozen, tiny_task(), Recipe(epochs=1, batch=16))


def test_a_checkpoint_survives_its_file(tmp_path: Path) -> None:
    model, task = tiny_net(), tiny_task()
    record = twofour.prune(model, task.example_inputs(), permute=False)
    made = twofour.train(model, task, Recipe(epochs=2, batch=16))
    checkpoint = Checkpoint(made.state, made.metric_name, made.metric, made.history, made.recipe, "tiny", "data", record)
    checkpoint.save(tmp_path / "c.safetensors")
    again = Checkpoint.load(tmp_path / "c.safetensors")
    assert all(torch.equal(again.state[k], made.state[k]) for k in made.state)
    assert (again.history, again.recipe, again.metric) == (made.history, made.recipe, made.metric)
    assert isinstance(again.pruning, Pruning)
    assert again.pruning.layers == record.layers
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.safetensors"]
    assert math.isfinite(again.metric)


def test_a_damaged_or_foreign_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(InputError, match="does not exist"):
        Checkpoint.load(tmp_path / "none.safetensors")
    save_file({"w": torch.ones(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(InputError, match="damaged or was not written by twofour"):
        Checkpoint.load(tmp_path / "foreign.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "foreign.safetensors").read_bytes()[:20])
    with pytest.raises(InputError, match="damaged"):
        Checkpoint.load(tmp_path / "cut.safetensors")


def test_a_checkpoint_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    checkpoint = Checkpoint.of(tiny_net(), "accuracy", 1.0)
    with pytest.raises(InputError, match=r"cannot be written: its folder does not exist"):
        checkpoint.save(tmp_path / "missing" / "c.safetensors")
    assert not list(tmp_path.iterdir())


def test_masks_are_held_as_given_and_an_empty_mapping_trains_every_weight() -> None:
    model, task = tiny_net(), tiny_task()
    record = twofour.prune(model, task.example_inputs(), pattern="1:4", permute=False)
    held = twofour.train(model, task, QUICK, masks=record.masks)
    name = record.pruned[0].name
    assert float((held.state[name] != 0).float().mean()) <= 0.25
    free = twofour.train(model, task, QUICK, masks={})
    assert float((free.state[name] != 0).float().mean()) > 0.9


def test_masks_of_a_record_are_those_of_the_weights() -> None:
    from twofour.training import recorded_masks

    for pattern in ("2:4", "4:8", "1:4"):
        model = tiny_net()
        record = twofour.prune(model, tiny_task().example_inputs(), pattern=pattern, permute=False)
        masks = recorded_masks(model, Pruning.from_json(record.to_json()))
        assert all(torch.equal(masks[name], mask) for name, mask in record.masks.items())
    dense = tiny_net()
    record = twofour.prune(tiny_net(), tiny_task().example_inputs(), permute=False)
    with pytest.raises(InputError, match="is recorded as 2:4 and is not"):
        recorded_masks(dense, record)
    with pytest.raises(InputError, match="which is no parameter of the model"):
        recorded_masks(nn.Linear(4, 4), record)


def test_a_recipe_that_is_no_text_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="is no UTF-8 text; expected a TOML file"):
        load_recipe(str(tmp_path / "r.toml"))
