"""What a user's own code raises, at any moment of a run, is one sentence and exit code 2; the traceback is in the log and with --debug."""

import json
import re
import signal
from pathlib import Path

import pytest

from twofour.cli import main
from twofour.errors import UserCodeError
from twofour.sources import resolve_model, resolve_task
from twofour.sources.files import call_function
from twofour.training import evaluate

# Each factory gives a task or a network of which one part breaks.
OWN = """
import os, signal, sys
import torch
from torch import nn
from twofour.sources import ArrayDataset, Metric, Task

def data(metric=None, loss=None, train=None):
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    y = (x.sum(1) > 0).long()
    plain = Metric("agreement", lambda outputs, targets: 100 * float((outputs.argmax(1) == targets).float().mean()))
    return Task("own", train or ArrayDataset(x, y), ArrayDataset(x, y), 2, metric=metric or plain, loss=loss)

def whole():
    return data()

def broken_metric():
    def f1(outputs, targets):
        raise KeyError("recall")
    return data(Metric("f1", f1))

def nan_metric():
    return data(Metric("f1", lambda outputs, targets: float("nan")))

def late_nan_metric():
    calls = []
    def f1(outputs, targets):
        calls.append(1)
        return 0.5 if len(calls) < 3 else torch.tensor(float("inf"))
    return data(Metric("f1", f1))

def broken_loss():
    def loss(outputs, targets, smoothing):
        raise ValueError("no such reduction")
    return data(loss=loss)

def wide_loss():
    return data(loss=lambda outputs, targets, smoothing: outputs)

def leaving_loss():
    def loss(outputs, targets, smoothing):
        sys.exit(0)
    return data(loss=loss)

class Leaving(torch.utils.data.Dataset):
    def __len__(self):
        return 32
    def __getitem__(self, index):
        sys.exit(0)

def leaving_items():
    return data(train=Leaving())

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.first, self.hidden, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, classes)

    def forward(self, x):
        return self.last(torch.relu(self.hidden(torch.relu(self.first(x)))))

class OnlyEval(Net):
    def forward(self, x):
        y = super().forward(x)
        if self.training:
            raise RuntimeError("not written yet")
        return y

class OnlyForward(Net):
    def forward(self, x):
        y = super().forward(x)
        if self.training:
            y.register_hook(self.gradient)
        return y

    def gradient(self, value):
        raise RuntimeError("no gradient")

def net(num_classes):
    return Net(num_classes)

def only_eval(num_classes):
    return OnlyEval(num_classes)

def only_forward(num_classes):
    return OnlyForward(num_classes)

class Lazy(torch.utils.data.Dataset):
    # Items that nothing but loading shows.

    def __init__(self, x, y):
        self.x, self.y = x, y
    def __len__(self):
        return len(self.x)
    def __getitem__(self, index):
        return self.x[index], self.y[index]

x, y = torch.randn(32, 8, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 2

def with_label(label):
    wrong = y.clone()
    wrong[20] = label
    return wrong

def with_value(value):
    wrong = x.clone()
    wrong[20, 3] = value
    return wrong

Pair = torch.utils.data.TensorDataset
Arrays = ArrayDataset
late_label = lambda: Task("own", Arrays(x, y), Arrays(x, with_label(7)), 2)
late_training_label = lambda: Task("own", Pair(x, with_label(-100)), Pair(x, y), 2)
late_label_of_a_part = lambda: Task("own", Pair(x, y), torch.utils.data.Subset(Pair(x, with_label(7)), range(10, 32)), 2)
nan_input = lambda: (Pair(x, y), Pair(with_value(float("nan")), y))
infinite_training_input = lambda: Task("own", Arrays((with_value(float("inf")),), y), Arrays((x,), y), 2)
no_training_items = lambda: Task("own", Arrays(x[:0], y[:0]), Arrays(x, y), 2)
one_class = lambda: (Pair(x, 0 * y), Pair(x, 0 * y))
one_class_of_many = lambda: Task("own", Pair(x, 0 * y), Pair(x, y), 2)
task_of_one_class = lambda: Task("own", Lazy(x, 0 * y), Lazy(x, 0 * y), 1)
class_of_validation = lambda: (Pair(x, y), Pair(x, with_label(7)))
lazy_label = lambda: Task("own", Lazy(x, y), Lazy(x, with_label(7)), 2)
lazy_nan = lambda: Task("own", Lazy(x, y), Lazy(with_value(float("nan")), y), 2)

class NanIsMissing(Net):
    def forward(self, x):
        return super().forward(torch.nan_to_num(x))

def nan_is_missing(num_classes):
    return NanIsMissing(num_classes)

def leaves():
    sys.exit(0)

def interrupts():
    raise KeyboardInterrupt

def is_interrupted():
    os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    Path("r.toml").write_text('epochs = 2\nbatch = 16\n[optimizer]\nname = "adam"\nlr = 1e-3\n')
    return tmp_path


def compress(model: str, data: str, *options: str, before: tuple[str, ...] = ()) -> int:
    with pytest.raises(SystemExit) as stop:
        main([*before, "compress", f"own.py:{model}", "--data", f"own.py:{data}", "--recipe", "r.toml", "--out", "run", *options])
    return int(stop.value.code or 0)


IN_TRAINING = "train, prune, retrain: seed 0, dense, epoch 1: "
PLACE = r" \(line \d+ of '.*own\.py', in {}\); mend it, --debug shows the traceback"


@pytest.mark.parametrize(
    ("model", "data", "sentence"),
    [
        ("only_eval", "whole", r"the model's forward raised RuntimeError: not written yet" + PLACE.format("forward")),
        ("only_forward", "whole", r"the backward pass raised RuntimeError: no gradient" + PLACE.format("gradient")),
        ("net", "broken_metric", r"the metric 'f1' of data 'own' raised KeyError: 'recall'" + PLACE.format("f1")),
        ("net", "broken_loss", r"the loss of data 'own' raised ValueError: no such reduction" + PLACE.format("loss")),
        ("net", "leaving_loss", r"the loss of data 'own' raised SystemExit: 0" + PLACE.format("loss")),
        ("net", "wide_loss", r"the loss of data 'own' returned a tensor \[16, 2\], expected a tensor of one element"),
        ("net", "nan_metric", r"the metric 'f1' of data 'own' is nan on 32 validation items, expected a finite number; mend"),
    ],
)
def test_what_breaks_in_training_is_one_sentence_an_event_and_a_traceback_in_the_log(
    own: Path, capsys: pytest.CaptureFixture[str], model: str, data: str, sentence: str
) -> None:
    assert compress(model, data, "--json") == 2
    told = capsys.readouterr()
    assert len(told.err.splitlines()) == 1
    assert told.err.startswith(f"twofour: {IN_TRAINING}")
    assert re.search(sentence, told.err), told.err
    last = json.loads(told.out.splitlines()[-1])
    assert (last["event"], f"twofour: {last['message']}") == ("failed", told.err.strip())
    assert "Traceback" in (own / "run" / "log.txt").read_text()


def test_a_metric_that_turns_infinite_later_names_the_stage(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compress("net", "late_nan_metric") == 2
    assert "train, prune, retrain: the metric 'f1' of data 'own' is inf on 32" in capsys.readouterr().err


def test_items_that_leave_do_not_end_the_run_with_their_code(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compress("net", "leaving_items") == 2
    assert "a batch cannot be loaded: SystemExit: 0; mend the data set" in capsys.readouterr().err


NOT_FINITE = "the input holds NaN or infinity, and so does the model's output for it, expected finite values; mend or remove the item"
NO_OUTPUT = "does not fit the model's 2 outputs, expected 0 to 1; mend the labels or num_classes"
CLASSES = "expected at least two classes; mend the labels, or"


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ("late_label", f"data 'own', validation item 20: label 7 {NO_OUTPUT}"),
        ("late_training_label", f"data 'own', training item 20: label -100 {NO_OUTPUT}"),
        ("late_label_of_a_part", f"data 'own', validation item 10: label 7 {NO_OUTPUT}"),
        ("nan_input", f"data 'own.py:nan_input', validation item 20: {NOT_FINITE}"),
        ("infinite_training_input", f"data 'own', training item 20: {NOT_FINITE}"),
        ("no_training_items", "data 'own' has no training items, expected at least one"),
        ("one_class", f"function 'own.py:one_class': all 32 training items are of class 0, {CLASSES} return a Task with a loss of its own"),
        ("one_class_of_many", f"data 'own': all 32 training items are of class 0, {CLASSES} give a Task with a loss of its own"),
        ("task_of_one_class", "data 'own' have one class, expected at least two; give a Task with a loss of its own for anything else"),
        (
            "class_of_validation",
            "function 'own.py:class_of_validation': validation item 20 is of class 7, which no training item is of (such classes: [7]); "
            "mend the labels, or return a Task with num_classes",
        ),
    ],
)
def test_one_wrong_item_anywhere_in_memory_is_named_before_anything_is_written(
    own: Path, capsys: pytest.CaptureFixture[str], data: str, sentence: str
) -> None:
    assert compress("net", data) == 2
    assert capsys.readouterr().err == f"twofour: {sentence}\n"
    assert not (own / "run").exists()


@pytest.mark.parametrize(("data", "sentence"), [("lazy_label", f"label 7 {NO_OUTPUT}"), ("lazy_nan", NOT_FINITE)])
def test_one_wrong_item_that_only_loading_shows_is_named_after_the_first_epoch(
    own: Path, capsys: pytest.CaptureFixture[str], data: str, sentence: str
) -> None:
    assert compress("net", data) == 2
    assert capsys.readouterr().err.strip().endswith(f"data 'own', validation item 20: {sentence}")
    assert [file.name for file in (own / "run").iterdir()] == ["log.txt"]


def test_a_model_that_expects_nan_for_a_missing_value_may_have_it(own: Path) -> None:
    task, model = resolve_task("own.py:nan_input"), resolve_model("own.py:nan_is_missing").make(2)
    task.refuse_unfit(model)
    assert 0 <= evaluate(model, task) <= 100


def test_debug_shows_the_users_own_line(own: Path) -> None:
    with pytest.raises(UserCodeError) as caught:
        main(["--debug", "compress", "own.py:net", "--data", "own.py:broken_metric", "--recipe", "r.toml", "--out", "run"])
    causes = [caught.value]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)  # type: ignore[arg-type]
    assert isinstance(causes[-1], KeyError)


@pytest.mark.parametrize(("name", "kind"), [("leaves", "SystemExit: 0"), ("interrupts", "KeyboardInterrupt")])
def test_a_factory_that_leaves_or_interrupts_is_one_sentence(own: Path, capsys: pytest.CaptureFixture[str], name: str, kind: str) -> None:
    assert compress(name, "whole") == 2
    assert f"function 'own.py:{name}' failed: {kind} (line " in capsys.readouterr().err
    assert compress("net", name) == 2
    assert f"function 'own.py:{name}' failed: {kind} (line " in capsys.readouterr().err


def test_ctrl_c_in_a_factory_is_still_ctrl_c(own: Path) -> None:
    # A shell starts what runs in the background with Ctrl-C ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            call_function("own.py:is_interrupted")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
