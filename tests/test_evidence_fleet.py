"""The fleet of evidence/fleet.py on a CPU: it trains as the plain loop does, compiles an architecture once, goes on where it stopped."""

import contextlib
import copy
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import twofour

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def fleet() -> ModuleType:
    sys.path.insert(0, str(ROOT / "evidence"))
    import fleet as module

    return module


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.linear(torch.relu(self.bn2(self.conv2(x))).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture
def images(fleet: ModuleType) -> object:
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (64, 3, 32, 32), generator=g, dtype=torch.uint8)
    return fleet.Images(pixels, torch.randint(0, 10, (64,), generator=g), torch.device("cpu"))


@pytest.fixture
def pruned() -> tuple[nn.Module, twofour.Pruning]:
    torch.manual_seed(0)
    model = Small()
    return model, twofour.prune(model, (torch.zeros(2, 3, 32, 32),), permute=False)


def augmented(batch: Tensor, shift: Tensor, flip: Tensor) -> Tensor:
    """Crop and flip one image at a time, as the formula says."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    crops = [image[:, r : r + 32, c : c + 32] for image, r, c in zip(batch, *shift.tolist(), strict=True)]
    return torch.stack([((crop.flip(2) if f else crop).float() / 255 - mean) / std for crop, f in zip(crops, flip, strict=True)])


@pytest.mark.parametrize("distill", [0.0, 0.5])
def test_a_member_trains_as_the_plain_loop(
    fleet: ModuleType, images: object, pruned: tuple[nn.Module, twofour.Pruning], distill: float
) -> None:
    model, pruning = pruned
    teacher = Small()
    recipe = fleet.Recipe(epochs=2, batch=16, distill=distill)
    plain = copy.deepcopy(model).train().to(memory_format=torch.channels_last)
    member = fleet.Member(
        copy.deepcopy(model), fleet.Program(model, compiled=False, bf16=True), images, recipe, seed=3, pruning=pruning, teacher=teacher
    )
    optimizer = torch.optim.SGD(plain.parameters(), lr=recipe.lr, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay)
    held = twofour.hold(plain, optimizer, pruning)
    g, step, expected = torch.Generator().manual_seed(3), 0, []
    teacher.eval()
    for _ in range(2):
        order, shift = torch.randperm(64, generator=g), torch.randint(0, 9, (2, 64), generator=g)
        flip = torch.rand(64, generator=g) < 0.5
        for ids in order.split(16):
            total, warm = 8, min(1, (step + 1) / 4)
            optimizer.param_groups[0]["lr"] = recipe.lr * warm * (1 + math.cos(math.pi * step / total)) / 2
            x = augmented(images.padded[ids], shift[:, ids], flip[ids])  # type: ignore[attr-defined]
            with torch.autocast("cpu", torch.bfloat16):
                y = plain(x.to(memory_format=torch.channels_last)).float()
                loss = F.cross_entropy(y, images.labels[ids])  # type: ignore[attr-defined]
                if distill:
                    with torch.no_grad():
                        soft = (teacher(x.to(memory_format=torch.channels_last)).float() / 4).softmax(1)
                    divergence = (soft * (soft.log() - (y / 4).log_softmax(1))).sum(1).mean()
                    loss = (1 - distill) * loss + distill * 16 * divergence
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            expected.append(float(loss.detach()))
            step += 1
    run = fleet.Fleet([member])
    run.prepare()
    losses = [loss for _ in range(2) for loss in run.run_epoch()]
    # bf16 rounds at 2^-8; sums in another order may round another way.
    torch.testing.assert_close(losses, [sum(expected[:4]) / 4, sum(expected[4:]) / 4], rtol=2**-8, atol=0)
    for (name, weight), other in zip(member.model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=2**-6, atol=2**-8, msg=lambda text, name=name: f"{name}: {text}")
    held.check()
    member.held.check()


def test_a_second_network_of_an_architecture_compiles_nothing(
    fleet: ModuleType, images: object, pruned: tuple[nn.Module, twofour.Pruning]
) -> None:
    model, pruning = pruned
    recipe = fleet.Recipe(epochs=1, batch=16, distill=0.5)
    compiled, plain = (fleet.Program(model, compiled=c, backend="aot_eager", bf16=True) for c in (True, False))
    losses = []
    for program in (plain, compiled, compiled):
        dense = len(losses) == 2
        member = fleet.Member(copy.deepcopy(model), program, images, recipe, seed=3, pruning=None if dense else pruning, teacher=model)
        run = fleet.Fleet([member])
        # From the first compiled network on, compiling again is an error.
        with torch._dynamo.config.patch(error_on_recompile=dense):
            run.prepare()
            losses += run.run_epoch()
    torch.testing.assert_close(losses[1], losses[0], rtol=2**-8, atol=0)
    assert losses[2] != losses[1]


def test_training_goes_on_where_time_ran_out(
    fleet: ModuleType, images: object, pruned: tuple[nn.Module, twofour.Pruning], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pruning = pruned
    recipe, program = fleet.Recipe(epochs=3, batch=16), fleet.Program(model, compiled=False)

    def members() -> list[object]:
        kinds = (pruning, None)
        return [fleet.Member(copy.deepcopy(model), program, images, recipe, seed=1, pruning=p, about={"seed": 1}) for p in kinds]

    whole, parts = members(), members()
    fleet.train_together(whole, say=lambda line: None)
    saved = tmp_path / "state"
    monkeypatch.setattr(fleet, "SECONDS_A_SAVE", 0.0)

    def killed(line: str) -> None:
        if line.startswith("epoch 2/3"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fleet.train_together(parts, say=killed, saved=saved)
    state = torch.load(saved, weights_only=True)
    assert state["epoch"] == 1
    said: list[str] = []
    resumed = members()
    seconds, _ = fleet.train_together(resumed, say=said.append, saved=saved)
    assert [line.split(":")[0] for line in said] == ["epoch 2/3", "epoch 3/3"]
    assert seconds > state["seconds"] > 0
    # Until what came out is recorded it can be had again, without a step.
    again = members()
    assert fleet.train_together(again, say=killed, saved=saved)[0] == seconds
    for one, *others in zip(whole, resumed, again, strict=True):
        for a, *found in zip(one.changed(), *(other.changed() for other in others), strict=True):  # type: ignore[attr-defined]
            assert all(torch.equal(a, b) for b in found)


def test_time_that_is_up_saves_and_says_so(
    fleet: ModuleType, images: object, pruned: tuple[nn.Module, twofour.Pruning], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = pruned
    member = fleet.Member(copy.deepcopy(model), fleet.Program(model, compiled=False), images, fleet.Recipe(epochs=3, batch=16), seed=1)
    clock = iter(range(100))
    monkeypatch.setattr(fleet.time, "monotonic", lambda: float(next(clock)))
    # Begun at 0, prepared at 1, an epoch at 2; at 5, after it, the next one, of four seconds, would not end by 8.
    with pytest.raises(fleet.OutOfTimeError, match="time is up after epoch 1 of 3"):
        fleet.train_together([member], say=lambda line: None, saved=tmp_path / "state", until=8.0)
    assert torch.load(tmp_path / "state", weights_only=True)["epoch"] == 1
    monkeypatch.setattr(fleet, "Fleet", None)  # What has no time is not even prepared.
    with pytest.raises(fleet.OutOfTimeError, match="time was up before training began"):
        fleet.train_together([member], say=lambda line: None, saved=tmp_path / "state", until=0.0)


def test_the_branches_of_a_capture_do_not_wait_for_each_other(fleet: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, object]] = []

    class Stream:
        """A stream that knows what must be done before its next launch."""

        def __init__(self) -> None:
            self.before: frozenset[object] = frozenset()

        def wait_stream(self, other: "Stream") -> None:
            self.before |= other.before

    class Member:
        def __init__(self, name: str) -> None:
            self.name, self.stream = name, Stream()

        def step(self) -> None:
            events.append((self.name, self.stream.before))
            self.stream.before |= {self.name}

    trunk = Stream()
    graph = contextlib.nullcontext()
    for name, value in (("CUDAGraph", object), ("graph", lambda *a, **k: graph), ("stream", lambda s: contextlib.nullcontext())):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: trunk)
    fleet.capture([Member("a"), Member("b")], 2)
    assert events == [("a", frozenset()), ("a", {"a"}), ("b", frozenset()), ("b", {"b"})]
    assert trunk.before == {"a", "b"}
