"""The main job, short: every file is there, every number comes from a run, the checks are real."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import twofour
from twofour.compress import Compression, compress
from twofour.compress.events import EpochFinished, Event, StageFinished, StageStarted
from twofour.compress.settings import Settings
from twofour.compress.trainings import Trainings
from twofour.errors import InputError, VerificationError
from twofour.report import Report
from twofour.sources import Task
from twofour.training import Checkpoint, Recipe

FILES = [
    "dense.onnx",
    "dense.safetensors",
    "log.txt",
    "model.plan",
    "report.html",
    "report.json",
    "run.json",
    "sparse.onnx",
    "sparse.safetensors",
]


def test_the_folder_holds_exactly_the_promised_files(short_run: Compression) -> None:
    assert sorted(p.name for p in short_run.out.iterdir()) == FILES


def test_the_files_come_from_the_first_seed_and_carry_the_numbers_of_the_table(short_run: Compression, digits: Task) -> None:
    report = short_run.report
    for variant, stem in (("dense", "dense"), ("2:4", "sparse")):
        checkpoint = Checkpoint.load(short_run.out / f"{stem}.safetensors")
        assert checkpoint.metric == report.accuracy_of(variant).values[0]
        engine = twofour.load(twofour.build(short_run.out / f"{stem}.onnx"))
        images, labels = digits.validation[list(range(360))]
        accuracy = 100 * float((engine(images).argmax(1) == labels).double().mean())
        agreement = next(a for a in report.agreement if a.variant == variant)
        assert accuracy == pytest.approx(agreement.engine_metric)


def test_sparse_is_sparse_and_dense_is_dense(short_run: Compression) -> None:
    for name in ("sparse.onnx", "sparse.safetensors", "model.plan"):
        assert twofour.inspect(short_run.out / name).is_24, name
    for name in ("dense.onnx", "dense.safetensors"):
        assert not twofour.inspect(short_run.out / name).is_24, name


def test_the_report_has_four_variants_over_all_seeds_and_says_what_the_cpu_cannot(short_run: Compression) -> None:
    report = short_run.report
    assert [row.variant for row in report.accuracy] == [
        "dense",
        "2:4 one-shot",
        "2:4 one-shot, batch-norm re-estimated",
        "2:4",
        "dense + same training",
    ]
    assert all(len(row.values) == 2 for row in report.accuracy)
    assert report.seeds == [0, 1]
    assert not report.sparse_kernels
    assert "no 2:4 kernel on a CPU" in report.statement
    assert all(check.passed for check in report.checks if check.name != "accuracy kept")
    assert len(report.training) == 6
    assert {(row.variant, row.batch) for row in report.speed} == {("dense", 1), ("2:4", 1), ("dense", 32), ("2:4", 32)}
    assert all(row.n >= 30 for row in report.speed)
    assert {row.variant for row in report.profile} == {"dense", "2:4"}
    assert sum(row.share for row in report.profile if row.variant == "2:4") == pytest.approx(1)


def test_report_json_reads_back(short_run: Compression, tmp_path: Path) -> None:
    assert Report.load(short_run.out / "report.json") == short_run.report
    text = (short_run.out / "report.json").read_text()
    (tmp_path / "other.json").write_text(text.replace('"schema_version": 1', '"schema_version": 9'))
    with pytest.raises(InputError, match="has schema 9, this version reads 1"):
        Report.load(tmp_path / "other.json")
    (tmp_path / "cut.json").write_text(text[:100])
    with pytest.raises(InputError, match="is damaged: it holds no JSON object"):
        Report.load(tmp_path / "cut.json")
    with pytest.raises(InputError, match="does not exist"):
        Report.load(tmp_path / "none.json")


def test_the_log_tells_every_epoch(short_run: Compression) -> None:
    log = (short_run.out / "log.txt").read_text()
    assert len(re.findall(r"epoch \d+: loss", log)) == 2 * 3 * 2
    assert "Exported(" in log


def test_the_same_seed_gives_the_same_weights(short_run: Compression, tmp_path: Path) -> None:
    again = compress("demo", "digits", out=tmp_path / "again", epochs=2, seed=0, permute=False, measure_seconds=0.05)
    ours, theirs = (Checkpoint.load(folder / "sparse.safetensors").state for folder in (again.out, short_run.out))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_weights_replace_the_dense_training_and_events_come_in_order(short_run: Compression, tmp_path: Path) -> None:
    events: list[Event] = []
    weights = short_run.out / "dense.safetensors"
    done = compress(
        "demo", "digits", out=tmp_path / "run", weights=weights, epochs=1, permute=False, measure_seconds=0.05, listener=events.append
    )
    assert done.report.accuracy_of("dense").values == [short_run.report.accuracy_of("dense").values[0]]
    assert {row.variant for row in done.report.training} == {"2:4", "dense + same training"}
    started = [e.stage for e in events if isinstance(e, StageStarted)]
    assert started == [e.stage for e in events if isinstance(e, StageFinished)]
    assert started == ["train, prune, retrain", "check", "export", "build", "measure", "report"]
    assert sum(isinstance(e, EpochFinished) for e in events) == events[0].steps == 2  # type: ignore[union-attr]


def test_weights_that_come_back_stop_the_run_before_anything_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from twofour.training import loop

    class Loose:
        """A hold that has lost its hooks."""

        def __init__(self, *args: object, **options: object) -> None:
            pass

        def check(self) -> None:
            pass

        def remove(self) -> None:
            pass

    monkeypatch.setattr(loop, "Hold", Loose)
    with pytest.raises(VerificationError, match=r"masks held through training, seed 0: 8 layers, \d+ of the pruned weights are not \+0"):
        compress("demo", "digits", out=tmp_path / "run", epochs=1)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["log.txt", "run.json", "state"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 0}, "expected seed of 0 or more and at least one seed"),
        ({"epochs": 0}, "epochs 0, expected 1 or more"),
        ({"model": "dmeo"}, r"model 'dmeo' is unknown, expected one of \['demo', .*\]; did you mean 'demo'\?"),
        ({"data": "digit"}, r"data 'digit' is unknown, expected one of \['digits', .*\]; did you mean 'digits'\?"),
        ({"recipe": "digitz"}, r"recipe 'digitz' is neither a file nor one of"),
        ({"include": ["nope*"]}, r"include 'nope\*' matches no layer"),
        ({"method": "magic"}, "pruning method 'magic' is unknown"),
        ({"recipe": "distill"}, "the recipe distils from a dense network, expected --weights"),
        ({"weights": "none.safetensors"}, r"weights file 'none.safetensors' does not exist"),
    ],
)
def test_a_wrong_request_writes_nothing(tmp_path: Path, change: dict[str, object], message: str) -> None:
    request: dict[str, object] = {"model": "demo", "data": "digits", **change}
    model, data = str(request.pop("model")), str(request.pop("data"))
    with pytest.raises(InputError, match=message):
        compress(model, data, out=tmp_path / "run", **request)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_an_output_folder_of_something_else_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="holds files that no run of twofour wrote"):
            compress("demo", "digits", out=tmp_path, overwrite=overwrite)
    with pytest.raises(InputError, match="is a file, expected a folder"):
        compress("demo", "digits", out=tmp_path / "thesis.tex")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_weights_that_do_not_fit_name_the_first_differences(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"stem.0.weight": torch.ones(2)}, tmp_path / "few.safetensors")
    with pytest.raises(InputError, match=r"does not fit the model: \d+ names missing \(first: \['classifier.bias'"):
        compress("demo", "digits", out=tmp_path / "run", weights=tmp_path / "few.safetensors")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    with pytest.raises(
        InputError, match=r"neither safetensors \(named .safetensors\) nor a torch state dict of plain tensors; save model\.state_dict"
    ):
        compress("demo", "digits", out=tmp_path / "run", weights=tmp_path / "junk.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(InputError, match=r"holds list, expected tensors by parameter name; save model\.state_dict"):
        compress("demo", "digits", out=tmp_path / "run", weights=tmp_path / "list.pt")


def test_weights_that_are_sparse_or_broken_are_no_dense_network(short_run: Compression, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"are 2:4 already in 8 layers .* expected the dense network, which is also the control"):
        compress("demo", "digits", out=tmp_path / "run", weights=short_run.out / "sparse.safetensors")
    checkpoint = Checkpoint.load(short_run.out / "dense.safetensors")
    checkpoint.state["stages.0.conv1.weight"][0, 0, 0, 0] = float("nan")
    checkpoint.save(tmp_path / "nan.safetensors")
    with pytest.raises(InputError, match=r"hold NaN or infinity in 'stages.0.conv1.weight'"):
        compress("demo", "digits", out=tmp_path / "run", weights=tmp_path / "nan.safetensors")
    assert not (tmp_path / "run").exists()


def test_a_run_in_the_folder_keeps_others_out_and_a_lone_log_does_not(tmp_path: Path) -> None:
    from twofour.compress.folder import clear, only_run_in, prepare

    out = tmp_path / "run"
    assert prepare(out, {}) == "new"
    (out / "log.txt").write_text("a run that ended early")
    assert prepare(out, {}) == "new"
    with only_run_in(out), pytest.raises(InputError, match="is being written by another run"), only_run_in(out):
        pass
    (out / "report.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds a run \(log.txt, report.json …\); name another --out or give --overwrite"):
        prepare(out, {})
    assert prepare(out, {}, overwrite=True) == "new"
    clear(out)
    assert [p.name for p in out.iterdir()] == ["log.txt"]


def test_checks_that_can_fail_are_in_the_report(short_run: Compression) -> None:
    names = [check.name for check in short_run.report.checks]
    assert "engine predicts what torch predicts, 2:4" in names
    assert "accuracy kept" in names


@pytest.mark.parametrize("method", ["magnitude", "alps"])
def test_batch_norm_is_re_estimated_where_that_helps_after_the_method(
    method: str, tmp_path: Path, digits: Task, demo_net: nn.Module
) -> None:
    recipe = Recipe()
    settings = Settings("demo", "digits", tmp_path, recipe=recipe, method=method, permute=False, exclude=("stages.2.*",))
    trainings = Trainings(settings, digits, None, None)  # type: ignore[arg-type]
    dense = Checkpoint.of(demo_net, "accuracy", 0.0)
    pruned = trainings._pruned(recipe, dense)
    moved = not torch.equal(pruned.state["stem.1.running_var"], dense.state["stem.1.running_var"])
    told = "re-estimated on 6 batches" if method == "magnitude" else "left as they are: after alps"
    assert moved == (pruned.reestimated is not None) == (method == "magnitude")
    assert told in pruned.pruning.notes[-1]
