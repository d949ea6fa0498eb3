"""A run that is stopped at any moment goes on and ends with the weights of one that never was, bit for bit."""

import json
import multiprocessing
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import resume_worker
import torch
from resume_worker import RECIPE, SmallNet, run, small_task
from torch import Tensor, nn

import twofour
from twofour.compress import Compression, compress, folder
from twofour.compress.events import EpochFinished, EpochsRestored, Event
from twofour.errors import InputError, TrainingError
from twofour.report import Report
from twofour.sources import ArrayDataset, Task
from twofour.training import Checkpoint, Recipe
from twofour.training.state import Training, epochs_done

NUM_KILLS = 20


def weights_of(out: Path) -> dict[str, Tensor]:
    return {f"{stem}/{k}": v for stem in ("dense", "sparse") for k, v in Checkpoint.load(out / f"{stem}.safetensors").state.items()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Compression:
    """A small run that nothing stopped."""
    done: Compression = run(tmp_path_factory.mktemp("whole") / "run")
    return done


class Stop(BaseException):
    """What a test stops a run with, as Ctrl-C would."""


def stopping_at(count: int) -> Any:
    """A listener that stops the run at its `count`-th finished epoch."""
    seen = []

    def listen(event: Event) -> None:
        if isinstance(event, EpochFinished):
            seen.append(event)
            if len(seen) == count:
                raise Stop

    return listen


def test_a_run_killed_at_twenty_random_moments_ends_with_the_same_weights(
    tmp_path: Path, whole: Compression, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The fork server finds the module that it imports in advance by the environment alone.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    monkeypatch.setenv("TWOFOUR_TEST_WARM", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["resume_worker"])

    def start(out: Path) -> Any:
        process = context.Process(target=resume_worker.main, args=(str(out),))
        process.start()
        return process

    expected = weights_of(whole.out)
    # Half of what the run took with all its imports; most processes are killed early, a few get as far as the last stages.
    life = sum(whole.report.stage_seconds.values()) / 2
    moments = random.Random(0)
    kills, chain = [], 0
    while len(kills) < NUM_KILLS:
        chain += 1
        out = tmp_path / f"chain{chain}"
        while True:
            process = start(out)
            if len(kills) < NUM_KILLS:
                process.join(moments.random() ** 4 * life)
            else:
                process.join(120)
            if process.exitcode is not None:
                assert process.exitcode == 0, (chain, kills)
                break
            process.kill()
            process.join()
            state = sorted(p.name for p in (out / "state").iterdir()) if (out / "state").is_dir() else []
            kills.append(state[-1] if state else "before")
        assert_same(weights_of(out), expected)
        assert not [p.name for p in out.iterdir() if p.name.startswith(".") or p.name == "state"]


def test_a_run_stopped_in_each_training_goes_on_behind_its_last_epoch(tmp_path: Path, whole: Compression) -> None:
    out, stops = tmp_path / "run", (1, 7, 5)
    for count in stops:
        with pytest.raises(Stop):
            run(out, listener=stopping_at(count))
    events: list[Event] = []
    done = run(out, listener=events.append)
    assert_same(weights_of(done.out), weights_of(whole.out))
    assert sum(event.done for event in events if isinstance(event, EpochsRestored)) == sum(stops)
    assert sum(isinstance(event, EpochFinished) for event in events) == 3 * RECIPE.epochs - sum(stops)
    assert done.report.accuracy == whole.report.accuracy
    assert [[e.loss for e in row.epochs] for row in done.report.training] == [[e.loss for e in row.epochs] for row in whole.report.training]


def test_a_finished_run_is_only_read(tmp_path: Path, whole: Compression) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in whole.out.iterdir()}
    assert run(whole.out).report == whole.report == Report.load(whole.out / "report.json")
    assert {p.name: p.stat().st_mtime_ns for p in whole.out.iterdir()} == before


def test_a_finished_run_whose_files_are_gone_or_altered_says_so(tmp_path: Path, whole: Compression) -> None:
    out = tmp_path / "copy"
    shutil.copytree(whole.out, out)
    assert run(out).report == whole.report
    (out / "model.plan").write_bytes((out / "model.plan").read_bytes() + b"x")
    with pytest.raises(InputError, match=r"file '.*model.plan' of the finished run is not what the run wrote; give --overwrite"):
        run(out)
    (out / "model.plan").unlink()
    with pytest.raises(InputError, match=r"file '.*model.plan' of the finished run is missing; give --overwrite"):
        run(out)


def test_a_failure_before_anything_was_finished_leaves_the_log_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: Any, *batch: Any) -> Tensor:
        raise InputError("an item cannot be read")

    monkeypatch.setattr(Task, "loss_of", failing)
    out = tmp_path / "run"
    with pytest.raises(InputError, match="an item cannot be read"):
        run(out)
    assert {p.name for p in out.iterdir()} <= {"log.txt", ".lock"}


def test_another_runs_folder_is_refused_and_says_what_differs(whole: Compression) -> None:
    for change, told in (
        ({"seed": 5}, r"seed was 0, is 5 now"),
        ({"epochs": 9}, r"recipe.epochs was 6, is 9 now"),
        ({"exclude": ("hidden",)}, r"exclude was \[\], is \['hidden'\] now"),
    ):
        with pytest.raises(InputError, match=rf"holds another run: {told}; give the same arguments or name another --out"):
            run(whole.out, **change)
    with pytest.raises(InputError, match="both overwrite and resume were asked for, expected one of them"):
        run(whole.out, overwrite=True)


def test_a_stopped_run_is_not_overwritten_by_accident_and_files_cut_short_are_cleared(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(Stop):
        run(out, listener=stopping_at(2))
    (out / ".123.dense.onnx").write_bytes(b"half")
    (out / "state" / ".123.seed0-dense.training").write_bytes(b"half")
    with pytest.raises(InputError, match="holds a run that was stopped; go on with --resume, name another --out or give --overwrite"):
        compress("small", "small", out=out, recipe=RECIPE)
    with pytest.raises(Stop):
        run(out, listener=stopping_at(1))
    assert epochs_done(out / "state" / "seed0-dense.training") == 3
    assert not list(out.rglob(".123*"))
    (out / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"holds another run: it has no readable run\.json"):
        run(out)


def test_what_a_killed_writer_of_safetensors_leaves_is_cleared_from_a_run_and_refused_elsewhere(tmp_path: Path) -> None:
    (tmp_path / ".tmpjmEtmC").write_bytes(b"half a file")
    with pytest.raises(InputError, match=r"holds files that no run of twofour wrote \(\.tmpjmEtmC …\)"):
        folder.prepare(tmp_path, {}, resume=True)
    (tmp_path / folder.MARK).touch()
    (tmp_path / folder.ARGUMENTS).write_text(json.dumps({"arguments": {}}))
    assert folder.prepare(tmp_path, {}, resume=True) == "unfinished"
    with folder.only_run_in(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [folder.LOCK, folder.MARK, folder.ARGUMENTS]


def test_a_full_disk_keeps_the_last_good_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    import safetensors.torch

    write, calls = safetensors.torch.save_file, []

    def full(tensors: Any, path: Path, metadata: Any = None) -> None:
        calls.append(path)
        if len(calls) == 4:
            Path(path).write_bytes(b"as much as there was room for")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(tensors, path, metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(InputError, match=r"seed0-dense.training' cannot be written: No space left on device; free some and try again$"):
        run(tmp_path / "run")
    state = tmp_path / "run" / "state"
    assert sorted(p.name for p in state.iterdir()) == ["seconds.json", "seed0-dense.training"]
    assert epochs_done(state / "seed0-dense.training") == 3
    monkeypatch.undo()
    with pytest.raises(Stop):
        run(tmp_path / "run", listener=stopping_at(1))
    assert epochs_done(state / "seed0-dense.training") == 4


def test_a_log_on_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.txt").symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"log.txt' cannot be written: No space left on device"):
        run(tmp_path / "run")


def test_a_loss_that_is_not_finite_keeps_the_last_good_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from twofour.training import loop

    step, calls = loop._Run._step, []

    def breaking(self: Any, *batch: Any) -> Tensor:
        calls.append(1)
        # Six steps an epoch: the third epoch breaks.
        return step(self, *batch) if len(calls) <= 14 else torch.tensor(float("nan"))

    monkeypatch.setattr(loop._Run, "_step", breaking)
    told = (
        r"seed 0, dense: training: the loss of epoch 3 is nan, .*lower the recipe's lr.*; the network after epoch 2 is kept in '.*last-good"
    )
    with pytest.raises(TrainingError, match=told):
        run(tmp_path / "run")
    kept = Checkpoint.load(tmp_path / "run" / "last-good.safetensors")
    assert [epoch.number for epoch in kept.history] == [1, 2]
    SmallNet(2).load_state_dict(kept.state)
    calls[:] = [1] * 15
    with pytest.raises(TrainingError, match=r"the loss of epoch 1 is nan, .*; no epoch was finished, nothing is kept"):
        run(tmp_path / "other")


def tiny(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 2))


class Drawing(torch.utils.data.Dataset[Any]):
    """Items with noise of every global generator, in workers or not."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        import numpy as np

        noise = random.random() + np.random.rand() + torch.rand(8)
        return torch.full((8,), index / 48) + 0.1 * noise, index % 2


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_training_goes_on_from_its_state_whatever_draws_numbers(tmp_path: Path, optimizer: str, workers: int) -> None:
    task = Task("noisy", Drawing(), Drawing(), 2, workers=workers)
    recipe = Recipe.model_validate({"epochs": 3, "batch": 16, "average": 0.5, "optimizer": {"name": optimizer}})
    expected = twofour.train(tiny(), task, recipe)

    def stop(epoch: Any) -> None:
        raise Stop

    for seed in range(2):
        with pytest.raises(Stop):
            twofour.train(tiny(seed), task, recipe, progress=stop, state=tmp_path / "s.training")
    done = twofour.train(tiny(2), task, recipe, state=tmp_path / "s.training")
    assert_same(done.state, expected.state)
    assert [e.loss for e in done.history] == [e.loss for e in expected.history]


def test_the_state_of_another_training_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "s.training"
    task = Task("noisy", Drawing(), Drawing(), 2)
    twofour.train(tiny(), task, Recipe(epochs=1, batch=16), state=state)
    with pytest.raises(InputError, match=r"is of another training: recipe was .*; give the same arguments, or remove the file"):
        twofour.train(tiny(), task, Recipe(epochs=2, batch=16), state=state)
    with pytest.raises(InputError, match=r"does not fit this training: Error\(s\) in loading"):
        twofour.train(nn.Sequential(nn.Linear(8, 2)), task, Recipe(epochs=1, batch=16), state=state)
    masks = {"0.weight": torch.ones(16, 8, dtype=torch.bool)}
    with pytest.raises(InputError, match="holds other masks than the pruning"):
        twofour.train(tiny(), task, Recipe(epochs=1, batch=16), masks=masks, state=state)
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(InputError, match=r"is damaged .*; remove it to train anew"):
        twofour.train(tiny(), task, Recipe(epochs=1, batch=16), state=state)
    with pytest.raises(InputError, match="is damaged"):
        epochs_done(state)


def test_a_state_carries_how_tensors_lie_in_memory(tmp_path: Path) -> None:
    model = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    parts = []
    for _ in range(2):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        parts.append(Training(model, optimizer, schedule, torch.Generator(), {}, {}))
    model(torch.randn(2, 4, 5, 5)).sum().backward()
    parts[0].optimizer.step()
    parts[0].save(tmp_path / "s", [])
    parts[1].load(tmp_path / "s")
    first, second = (part.optimizer.state[model.weight]["momentum_buffer"] for part in parts)
    assert first.stride() == second.stride() != first.contiguous().stride()
    assert torch.equal(first, second)


def test_a_damaged_record_of_a_stage_is_one_sentence_and_a_lost_file_is_made_again(tmp_path: Path, whole: Compression) -> None:
    out = tmp_path / "run"

    class AfterExport(Exception):
        pass

    def listen(event: Event) -> None:
        if getattr(event, "stage", "") == "build":
            raise AfterExport

    with pytest.raises(AfterExport):
        run(out, listener=listen)
    assert json.loads((out / "state" / "export.json").read_text())["files"].keys() == {
        f"{stem}.{end}" for stem in ("dense", "sparse") for end in ("onnx", "safetensors")
    }
    (out / "dense.onnx").unlink()
    (out / "state" / "build.json").write_text("[")
    with pytest.raises(InputError, match=r"record '.*build.json' is damaged .*; give --overwrite to start anew"):
        run(out)
    (out / "state" / "build.json").unlink()
    with pytest.raises(AfterExport):
        run(out, listener=listen)
    assert (out / "dense.onnx").is_file()
    assert_same(weights_of(out), weights_of(whole.out))


def test_an_array_of_several_inputs_is_indexed_together() -> None:
    data = ArrayDataset((torch.arange(6), torch.arange(6) * 2), torch.arange(6))
    inputs, target = data[[1, 3]]
    assert [x.tolist() for x in inputs] == [[1, 3], [2, 6]]
    assert target.tolist() == [1, 3]
    with pytest.raises(ValueError, match="inputs hold"):
        ArrayDataset((torch.arange(6), torch.arange(5)), torch.arange(6))
    assert small_task().example_inputs(40)[0].shape[0] == 40
