"""Other people's networks and data, whole: images and text, models of Transformers, a Task of one's own; each stopped once and resumed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import twofour
from twofour.compress import Compression, compress
from twofour.compress.events import EpochFinished, Event
from twofour.errors import InputError, MissingExtraError, UnsupportedError
from twofour.sources import load_weights, resolve_model, resolve_task
from twofour.training import Recipe
from twofour.training.recipe import parse_recipe

QUICK = parse_recipe("epochs = 1\nbatch = 8\n[optimizer]\nlr = 1e-3", "quick")


def write_images(root: Path, classes: tuple[str, ...] = ("cat", "dog"), each: int = 4, size: int = 40) -> None:
    """Classes that differ in brightness, as JPEG."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for index, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(each):
                pixels = np.clip(rng.normal(60 + 120 * index, 30, (size, size + 8, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.jpg")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    write_images(root)
    return root


BERT = {
    "model_type": "bert",
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}
# Sentences of random words; the class is whether word 7 comes before word 8. One attribute of each item is a mask.
TEXT = """
import torch
from torch import nn
from torch.utils.data import Dataset
from twofour.sources import ArrayDataset, Metric, Task

def words(count, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(9, 60, (count, 12), generator=generator)
    places = torch.stack([torch.randperm(10, generator=generator)[:2] for _ in range(count)])
    rows = torch.arange(count)
    ids[rows, places[:, 0]], ids[rows, places[:, 1]] = 7, 8
    mask = torch.ones_like(ids)
    mask[:, 11] = 0
    return ArrayDataset((ids, mask), (places[:, 0] < places[:, 1]).long())

def text():
    return Task("word order", words(48, 0), words(24, 1), num_classes=2)

class Pairs(Dataset):
    def __init__(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        self.a, self.b = torch.randn(2, count, 8, generator=generator)

    def __len__(self):
        return len(self.a)

    def __getitem__(self, index):
        return {"a": self.a[index], "b": self.b[index], "product": self.a[index] * self.b[index]}

def collate(items):
    a, b, product = (torch.stack([item[key] for item in items]) for key in ("a", "b", "product"))
    return (a, b), product

def products():
    error = Metric("squared error", lambda outputs, targets: float((outputs - targets).square().mean()), direction="lower")
    loss = lambda outputs, targets, smoothing: (outputs - targets).square().mean()
    return Task("products", Pairs(64, 0), Pairs(32, 1), num_classes=8, metric=error, loss=loss, collate=collate)

class Product(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.left, self.right = nn.Linear(8, 32), nn.Linear(8, 32)
        self.mix, self.head = nn.Linear(32, 32), nn.Linear(32, outputs)

    def forward(self, a, b):
        return self.head(torch.relu(self.mix(torch.relu(self.left(a) + self.right(b)))))

def product(num_classes):
    return Product(num_classes)
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's file, and the config of a small BERT beside it."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own.py").write_text(TEXT)
    (folder / "bert").mkdir()
    (folder / "bert" / "config.json").write_text(json.dumps(BERT))
    return folder


class Stop(BaseException):
    """Ctrl-C."""


def stopped_and_resumed(model: str, data: str, out: Path, **options: Any) -> Compression:
    """Stop the run after its second training, then let it finish."""
    seen: list[Event] = []

    def listen(event: Event) -> None:
        seen.append(event)
        if sum(isinstance(e, EpochFinished) for e in seen) == 2 and isinstance(event, EpochFinished):
            raise Stop

    request = {"recipe": QUICK, "permute": False, "measure_seconds": 0.02, "resume": True, **options}
    with pytest.raises(Stop):
        compress(model, data, out=out, listener=listen, **request)
    done = compress(model, data, out=out, **request)
    assert not [check.name for check in done.report.checks if not check.passed and check.name != "accuracy kept"]
    assert twofour.inspect(out / "sparse.onnx").is_24
    assert not (out / "state").exists()
    return done


def test_an_image_network_of_timm_on_a_folder_of_images(images: Path, tmp_path: Path) -> None:
    done = stopped_and_resumed("timm:test_resnet", f"imagefolder@32:{images}", tmp_path / "run", workers=1)
    assert done.report.model == "timm:test_resnet"
    assert any(layer.eligible for layer in done.report.layers)


def test_a_bert_from_a_config_with_two_inputs(own: Path, tmp_path: Path) -> None:
    done = stopped_and_resumed(f"hf:{own / 'bert'}", f"{own / 'own.py'}:text", tmp_path / "run")
    names = {layer.name for layer in done.report.layers if layer.eligible}
    assert "bert.encoder.layer.0.attention.self.query" in names
    engine = twofour.load(tmp_path / "run" / "model.plan")
    assert [(spec.name, spec.dtype) for spec in engine.plan.inputs] == [("input_ids", "int64"), ("attention_mask", "int64")]
    ids, mask = (x.numpy() for x in resolve_task(f"{own / 'own.py'}:text").example_inputs(5))
    assert engine(ids, mask).shape == (5, 2)
    # The files keep the library's own names: it reads them back.
    config = json.loads((own / "bert" / "config.json").read_text())
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "config.json").write_text(json.dumps({**config, "architectures": ["BertForSequenceClassification"]}))
    (tmp_path / "back" / "model.safetensors").write_bytes((tmp_path / "run" / "sparse.safetensors").read_bytes())
    again = resolve_model(f"hf:{tmp_path / 'back'}").make(2).eval()
    with torch.no_grad():
        theirs = again(torch.from_numpy(ids), torch.from_numpy(mask))
    assert torch.allclose(theirs, torch.from_numpy(engine(ids, mask)), atol=1e-5)


def test_a_task_of_ones_own_that_is_no_classification(own: Path, tmp_path: Path) -> None:
    file = own / "own.py"
    done = stopped_and_resumed(f"{file}:product", f"{file}:products", tmp_path / "run")
    assert (done.report.metric, done.report.metric_direction) == ("squared error", "lower")
    assert {row.items for row in done.report.agreement} == {32}
    assert {row.differing_predictions for row in done.report.agreement} == {0}
    file_before = file.read_text()
    try:
        file.write_text(file_before + "\n")
        with pytest.raises(InputError, match=r"holds another run: files\.own\.py was '"):
            compress(f"{file}:product", f"{file}:products", out=tmp_path / "run", recipe=QUICK, permute=False, resume=True)
    finally:
        file.write_text(file_before)


def test_a_folder_of_transformers_starts_from_its_weights_and_a_new_head_where_classes_differ(own: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = resolve_model(f"hf:{own / 'bert'}").make(3)
    source.save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    same, other = (resolve_model(f"hf:{tmp_path / 'saved'}").make(classes) for classes in (3, 5))
    state = source.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in same.state_dict().items())
    assert other.classifier.weight.shape == (5, 16)
    assert torch.equal(other.state_dict()["bert.pooler.dense.weight"], state["bert.pooler.dense.weight"])


VIT = {
    "model_type": "vit",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 16,
}


def test_an_image_classifier_of_transformers_gives_logits(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(VIT))
    for spec in (f"hf:{tmp_path}", f"hf:{tmp_path / 'config.json'}"):
        model = resolve_model(spec).make(7)
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "the folder has no config.json, expected one saved by save_pretrained"),
        ("{", "is neither a folder with config.json nor to be had from the hub"),
        ("{}", "config.json names no model_type, expected the config of a Transformers model"),
        ('{"model_type": "musicgen_melody_decoder"}', "has no image or text classifier in Transformers|is neither a folder"),
        ('{"model_type": "vits"}', "is a vits, which has no image or text classifier in Transformers"),
        ('{"model_type": "bert", "hidden_size": 15, "num_attention_heads": 2}', "cannot be made: .*15"),
    ],
)
def test_a_folder_of_transformers_that_cannot_be_used_says_why(tmp_path: Path, config: str | None, message: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(InputError, match=message):
        resolve_model(f"hf:{tmp_path}").make(2)


def test_transformers_that_are_missing_name_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"models named hf:NAME need Transformers; pip install 'twofour\[hf\]'"):
        resolve_model("hf:bert")


def test_truncated_images_stop_a_run_by_name_and_are_counted_when_skipped(tmp_path: Path) -> None:
    write_images(tmp_path)
    for name in ("train/cat/1.jpg", "val/dog/2.jpg"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:200])
    spec = f"imagefolder@16:{tmp_path}"
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.ReLU(), nn.Linear(8, 2))
    for workers in (0, 1):
        told = r"^image '.*train/cat/1.jpg' cannot be read \(.*runcated.*\); mend or remove it, or give --skip-bad$"
        with pytest.raises(InputError, match=told):
            twofour.train(model, resolve_task(spec, workers=workers), QUICK)
    task = resolve_task(spec, skip_bad=True)
    assert (len(task.train), len(task.validation)) == (7, 7)  # type: ignore[arg-type]
    assert task.notes == (f"2 of 16 images could not be read and were skipped (first: {tmp_path / 'train/cat/1.jpg'})",)
    twofour.train(model, task, QUICK)
    for path in tmp_path.rglob("*.jpg"):
        path.write_bytes(b"no image")
    with pytest.raises(InputError, match="none of 8 images can be read"):
        resolve_task(spec, skip_bad=True)


def test_data_that_break_while_they_are_loaded_are_one_sentence() -> None:
    class Broken(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 16

        def __getitem__(self, index: int) -> Any:
            return {"a": 1}["b"] if index == 9 else (torch.zeros(4), 0)

    from dataclasses import replace

    from twofour.sources import Task

    task = Task("broken", Broken(), Broken(), 2)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    for workers in (0, 1):
        with pytest.raises(InputError, match=r"^data: a batch cannot be loaded: KeyError: 'b'; mend the data set or its collate$"):
            twofour.train(model, replace(task, workers=workers), QUICK)
    with pytest.raises(InputError, match=r"a batch's inputs are .*dict.*, expected a tensor or a tuple of tensors"):
        Task("dicts", Broken(), Broken(), 2, collate=lambda items: ({"x": torch.zeros(2, 4)}, torch.zeros(2))).example_inputs()
    with pytest.raises(InputError, match=r"data 'three': a batch is a tuple of 3, expected \(inputs, targets\)"):
        Task("three", Broken(), Broken(), 2, collate=lambda items: (1, 2, 3)).example_inputs()  # type: ignore[arg-type, return-value]


REFUSED = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from twofour.sources import ArrayDataset, Metric, Task

x, y = torch.randn(32, 8), torch.arange(32) % 2
data = lambda: (TensorDataset(x, y), TensorDataset(x, y))
plain = lambda: (TensorDataset(x), TensorDataset(x))
high = lambda: Task("high", ArrayDataset(x, y + 5), ArrayDataset(x, y), 2)
wide = lambda num_classes: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
narrow = lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
other = lambda: nn.Sequential(nn.Linear(9, 16), nn.Linear(16, 2))
odd = lambda: nn.Sequential(nn.Linear(8, 2))
floats = lambda: (TensorDataset(x, y.float()), TensorDataset(x, y.float()))
column = lambda: (TensorDataset(x, y[:, None]), TensorDataset(x, y[:, None]))
words = lambda: Task("words", [(a, "cat") for a in x], [(a, "cat") for a in x], 2)
unnamed = lambda: Task("unnamed", *data(), 2, metric="accuracy")
upward = lambda: Task("upward", *data(), 2, metric=Metric("error", lambda outputs, targets: 1.0, direction="up"))

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 2)
    def forward(self, x):
        return self.a(x), x

class Special(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 2)
    def forward(self, x):
        return self.b(torch.special.bessel_j0(self.a(x)))

class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 2)
    def forward(self, x):
        return self.b(self.a(x)) if x.sum() > 0 else self.b(self.a(x)) * 2
"""


@pytest.mark.parametrize(
    ("model", "data", "kind", "message"),
    [
        (
            "wide",
            "high",
            InputError,
            r"data 'high', training item 0: label 5 does not fit the model's 3 outputs, expected 0 to 2; mend the labels",
        ),
        ("narrow", "data", InputError, r"the model's outputs are \[2, 1\] for 2 items, data .* have 2 classes; give the model that many"),
        ("other", "data", InputError, r"the model does not take the inputs of data .* \(float32\[2, 8\]\): mat1 and mat2 shapes"),
        ("odd", "data", InputError, r"the model has no layer that can be 2:4: 0.weight: classifier"),
        ("Two", "data", InputError, r"the model returns tuple, expected one tensor; wrap it so that forward returns the logits"),
        ("Special", "data", UnsupportedError, r"no ONNX translation of the operation prims.bessel_j0; replace that operation"),
        ("Branch", "data", UnsupportedError, r"its path depends on the values of a tensor at line \d+ of '.*own.py', in forward; "),
        ("wide", "floats", InputError, r"labels are float32\[2\], expected class numbers int64\[2\]; convert them with \.long\(\)"),
        ("wide", "column", InputError, r"labels are int64\[2, 1\], expected class numbers int64\[2\]; convert them"),
        ("wide", "words", InputError, r"data 'words': a batch's targets are a (list|tuple), expected a tensor; give labels as numbers"),
        ("wide", "unnamed", InputError, r"task 'unnamed': metric is 'accuracy', expected a twofour\.sources\.Metric"),
        ("wide", "upward", InputError, r"metric 'error': direction is 'up', expected 'higher' or 'lower'"),
        ("wide", "plain", InputError, r"an item is no \(input, class\): IndexError: .*; return a Task for anything else"),
    ],
)
def test_what_cannot_end_well_is_refused_before_the_first_training(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], model: str, data: str, kind: type[Exception], message: str
) -> None:
    (tmp_path / "own.py").write_text(REFUSED)
    out, events = tmp_path / "run", []
    with pytest.raises(kind, match=message) as caught:
        compress(f"{tmp_path / 'own.py'}:{model}", f"{tmp_path / 'own.py'}:{data}", out=out, recipe=QUICK, listener=events.append)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""
    assert not [event for event in events if isinstance(event, EpochFinished)]
    assert not out.exists()


def test_weights_of_a_relative_name_it_and_a_head_of_other_classes_is_told_apart(tmp_path: Path) -> None:
    made = {name: resolve_model(f"torchvision:{name}").make(10) for name in ("resnet18", "resnet34")}
    torch.save(made["resnet34"].state_dict(), tmp_path / "w.pt")
    with pytest.raises(
        InputError, match=r": 0 names missing, \d+ not in the model \(first: \['layer1.2.*; they fit 'torchvision:resnet34'$"
    ):
        load_weights(made["resnet18"], tmp_path / "w.pt", spec="torchvision:resnet18")
    with pytest.raises(
        InputError, match=r"'fc.weight' has shape \[10, 512\].*; the file's head has another number of classes than the data, give"
    ):
        load_weights(resolve_model("torchvision:resnet34").make(3), tmp_path / "w.pt", spec="torchvision:resnet34")


def test_networks_that_are_no_classifiers_are_refused_without_fetching_a_backbone(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *args, **options: pytest.fail("weights were fetched"))
    model = resolve_model("torchvision:fcn_resnet50").make(2)
    with pytest.raises(InputError, match="the model returns OrderedDict, expected one tensor; wrap it so that forward returns the logits"):
        resolve_task(f"imagefolder@32:{images}").refuse_unfit(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "imagefolder@big:x"}, r"size 'big' is no positive number of pixels; write imagefolder@224:DIR"),
        ({"skip_bad": True}, r"data 'digits' is no folder of images, expected imagefolder:DIR for skip-bad"),
        ({"workers": -1}, r"-1 workers, expected 0 or more"),
        ({"device": "cuda:7"}, r"device 'cuda:7' is not here: torch sees \d GPUs; use cpu"),
        ({"device": "gpu"}, r"device 'gpu' is unknown, expected cpu, cuda or cuda:N"),
        ({"device": "cpu:3"}, r"device 'cpu:3' is unknown, expected cpu, cuda or cuda:N"),
        ({"device": "cuda:"}, r"device 'cuda:' is unknown, expected cpu, cuda or cuda:N"),
        ({"model": "net.onnx"}, r"model 'net.onnx' is a finished graph, expected a network to train; twofour inspect, build, "),
        (
            {"recipe": parse_recipe("[augmentation]\nflip = true", "r"), "data": "OWN:text"},
            r"needs images \[n, c, h, w\], data 'word order'",
        ),
    ],
)
def test_a_wrong_argument_is_one_sentence_and_writes_nothing(own: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    request = {"model": "demo", "data": "digits", **change}
    model, data = request.pop("model"), request.pop("data").replace("OWN", str(own / "own.py"))
    with pytest.raises(InputError, match=message):
        compress(model, data, out=tmp_path / "run", **request)
    assert not (tmp_path / "run").exists()


def test_crops_keep_their_share_and_stay_inside() -> None:
    from twofour.training.augment import augmented, cropped
    from twofour.training.recipe import AugmentationSection

    # An image whose value is its column shows where each crop begins and how much it spans.
    ramp = torch.linspace(0, 1, 64).expand(500, 1, 64, 64).contiguous()
    made = cropped(ramp, 0.25, torch.Generator().manual_seed(0))
    spans = (made[..., -1] - made[..., 0]).amax((1, 2))
    assert float(made.min()) >= 0
    assert float(made.max()) <= 1
    # The narrowest crop has an area of 1/4 and a ratio of 3/4: its width is √(3/16); bilinear ends lose half a pixel on each side.
    assert (3 / 16) ** 0.5 - 2 / 64 <= float(spans.min()) < float(spans.max()) <= 1
    assert not torch.equal(augmented(ramp, AugmentationSection(crop=0.5), torch.Generator()), ramp)


def test_an_average_of_the_weights_is_evaluated_kept_and_masked() -> None:
    from test_train import tiny_net, tiny_task

    task = tiny_task()
    recipe = Recipe.model_validate({"epochs": 2, "batch": 16, "average": 0.9})
    model = tiny_net()
    record = twofour.prune(model, task.example_inputs(), permute=False)
    followed = twofour.train(model, task, recipe)
    assert all(torch.equal(value, followed.state[name]) for name, value in model.state_dict().items())
    for name, mask in record.masks.items():
        assert not followed.state[name][~mask].any()
    plain_net = tiny_net()
    twofour.prune(plain_net, task.example_inputs(), permute=False)
    plain = twofour.train(plain_net, task, recipe.model_copy(update={"average": 0.0}))
    assert not torch.equal(plain.state["0.weight"], followed.state["0.weight"])
