"""Models and data that the command line names: each kind read once for real, each refusal one sentence."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from twofour.errors import InputError, MissingExtraError
from twofour.sources import load_weights, resolve_model, resolve_task
from twofour.sources.images import CIFAR_RECORD_BYTES, MEAN, STD


def write_images(root: Path, classes: tuple[str, ...] = ("cat", "dog"), splits: tuple[str, ...] = ("train", "val"), each: int = 3) -> None:
    rng = np.random.default_rng(0)
    for split in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(each):
                Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8)).save(root / split / name / f"{i}.png")


def test_an_image_folder_is_read_resized_and_normalised(tmp_path: Path) -> None:
    write_images(tmp_path)
    Image.fromarray(np.full((300, 500, 3), 255, np.uint8)).save(tmp_path / "train" / "cat" / "0.png")
    task = resolve_task(f"imagefolder:{tmp_path}")
    assert (task.num_classes, len(task.train), len(task.validation)) == (2, 6, 6)  # type: ignore[arg-type]
    white, label = task.train[0]
    assert label == 0
    assert white.shape == (3, 224, 224)
    expected = (1 - torch.tensor(MEAN)) / torch.tensor(STD)
    assert torch.allclose(white.mean((1, 2)), expected, atol=1e-6)
    assert task.example_inputs()[0].shape == (2, 3, 224, 224)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "has no folder 'train', expected train/CLASS/image.jpg"),
        (lambda root: write_images(root, ("cat",)), r"has one class \('cat'\), expected at least two folders, one a class"),
        (lambda root: (root / "train").mkdir() or (root / "val").mkdir(), r"train' has no classes, expected at least two folders"),
        (lambda root: write_images(root) or (root / "train" / "runs").mkdir(), r"train': class 'runs' holds no images; fill or remove its"),
        (lambda root: root.rmdir(), r"image folder '.*' does not exist; name a folder with train/CLASS/image.jpg and val/CLASS/"),
        (lambda root: root.rmdir() or root.write_text(""), r"image folder '.*' is a file; name a folder with train/CLASS/image.jpg"),
        (lambda root: write_images(root, each=0), "holds no images, expected one folder a class"),
        (lambda root: (write_images(root), write_images(root, ("emu",), ("val",))), r"has classes that train has not: \['emu'\]"),
    ],
)
def test_an_image_folder_that_cannot_be_used_says_why(tmp_path: Path, make, message: str) -> None:  # type: ignore[no-untyped-def]
    make(tmp_path)
    with pytest.raises(InputError, match=message):
        resolve_task(f"imagefolder:{tmp_path}")


def test_a_truncated_image_is_named_when_it_is_reached(tmp_path: Path) -> None:
    write_images(tmp_path)
    path = tmp_path / "train" / "cat" / "1.png"
    path.write_bytes(path.read_bytes()[:60])
    task = resolve_task(f"imagefolder:{tmp_path}")
    with pytest.raises(InputError, match=r"image '.*cat/1.png' cannot be read"):
        task.train[1]


def cifar_files(root: Path, label: int = 3, size: int = CIFAR_RECORD_BYTES * 2) -> None:
    data = np.arange(size, dtype=np.uint64).astype(np.uint8)
    data[::CIFAR_RECORD_BYTES] = label
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        data.tofile(root / name)


def test_cifar_binary_files_are_read_channel_by_channel(tmp_path: Path) -> None:
    cifar_files(tmp_path)
    task = resolve_task(f"cifar10:{tmp_path}")
    image, label = task.train[0]
    assert (len(task.train), len(task.validation), int(label)) == (10, 2, 3)  # type: ignore[arg-type]
    # The first record's bytes after the label are 1, 2, 3, …: the red plane row by row.
    assert image[0, 0, 0] == pytest.approx((1 / 255 - MEAN[0]) / STD[0], abs=1e-6)
    assert image[1, 0, 0] == pytest.approx(((1 + 1024) % 256 / 255 - MEAN[1]) / STD[1], abs=1e-6)


def test_damaged_cifar_files_say_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data_batch_1.bin' does not exist; expected the binary version"):
        resolve_task(f"cifar10:{tmp_path}")
    cifar_files(tmp_path, size=CIFAR_RECORD_BYTES + 5)
    with pytest.raises(InputError, match="expected a multiple of 3073"):
        resolve_task(f"cifar10:{tmp_path}")
    cifar_files(tmp_path, label=77)
    with pytest.raises(InputError, match="has a label above 9"):
        resolve_task(f"cifar10:{tmp_path}")


OWN = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from twofour.sources import Task

def net(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, num_classes))

def data():
    x = torch.randn(64, 16)
    return TensorDataset(x, (x[:, 0] > 0).long()), TensorDataset(x, (x[:, 0] > 0).long())

def nothing(): return 3
def empty(): return [], []
def broken(): raise RuntimeError("no disk")
"""


def test_the_users_own_file_gives_model_and_data_and_runs_whole(tmp_path: Path) -> None:
    from twofour.compress import compress
    from twofour.training import Recipe

    file = tmp_path / "own.py"
    file.write_text(OWN)
    assert isinstance(resolve_model(f"{file}:net").make(5), nn.Module)
    assert resolve_task(f"{file}:data").num_classes == 2
    done = compress(
        f"{file}:net", f"{file}:data", out=tmp_path / "run", recipe=Recipe(epochs=2, batch=16), permute=False, measure_seconds=0.05
    )
    assert all(check.passed for check in done.report.checks if check.name != "accuracy kept")
    assert [layer.name for layer in done.report.layers if layer.eligible] == ["1", "3"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{file}:nett", r"has no function 'nett', it has \['broken'.*did you mean 'net'\?|has no function 'nett', it has .*'net'"),
        ("{file}:nothing", "returned int, expected a torch.nn.Module"),
        ("{file}:broken", "failed: RuntimeError: no disk"),
        ("none.py:net", "file 'none.py' of 'none.py:net' does not exist"),
    ],
)
def test_a_users_model_that_cannot_be_used_says_why(tmp_path: Path, spec: str, message: str) -> None:
    (tmp_path / "own.py").write_text(OWN)
    with pytest.raises(InputError, match=message):
        resolve_model(spec.format(file=tmp_path / "own.py")).make(2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", r"returned int, expected a twofour.sources.Task or a pair \(train, validation\)"),
        ("empty", "returned 0 training and 0 validation items"),
    ],
)
def test_users_data_that_cannot_be_used_says_why(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "own.py").write_text(OWN)
    with pytest.raises(InputError, match=message):
        resolve_task(f"{tmp_path / 'own.py'}:{name}")
    (tmp_path / "bad.py").write_text("1 / 0")
    with pytest.raises(InputError, match="cannot be run: ZeroDivisionError"):
        resolve_task(f"{tmp_path / 'bad.py'}:{name}")


def test_zoos_that_are_not_installed_or_do_not_have_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    for spec in ("timm:resnet18", "torchvision:resnet18"):
        with pytest.raises(MissingExtraError, match="pip install"):
            resolve_model(spec)
    with pytest.raises(InputError, match=r"model 'torchvison:resnet18' is unknown, expected one of .*did you mean"):
        resolve_model("torchvison:resnet18")


def test_weights_of_another_shape_name_the_first_difference(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = nn.Linear(4, 4)
    save_file({"weight": torch.ones(4, 8), "bias": torch.ones(4)}, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"'weight' has shape \[4, 8\], the model expects \[4, 4\]"):
        load_weights(model, tmp_path / "w.safetensors")
    torch.save({"state_dict": {"module.weight": torch.ones(4, 4), "module.bias": torch.zeros(4)}}, tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt")
    assert bool((model.weight == 1).all())


def test_a_checkpoint_without_batch_counts_is_read(tmp_path: Path) -> None:
    model = nn.BatchNorm1d(3)
    state = {name: torch.full_like(value, 2.0) for name, value in model.state_dict().items() if name != "num_batches_tracked"}
    torch.save(state, tmp_path / "old.pt")
    load_weights(model, tmp_path / "old.pt")
    assert model.running_mean is not None
    assert model.running_mean.tolist() == [2.0] * 3


TORCHVISION = """
import pathlib, sys
package = pathlib.Path(sys.argv[1]) / "torchvision"
package.mkdir()
(package / "__init__.py").write_text(sys.argv[2])
sys.path.insert(0, sys.argv[1])
sys.modules.pop("torchvision", None)
from twofour.sources.torchvision_compat import import_torchvision
assert import_torchvision().ready
assert import_torchvision().ready
"""
# What the two kinds of installation do when they are imported: the compiled part declares the operators, or the Python part misses them.
COMPILED = "import torch; torch.library.define('torchvision::nms', '(Tensor a) -> Tensor'); ready = True"
FOREIGN = """
import torch
torch.library.register_fake("torchvision::nms")(lambda *a: None)
torch._C._dispatch_has_kernel_for_dispatch_key("torchvision::nms", "Meta")
ready = True
"""


@pytest.mark.parametrize("source", [COMPILED, FOREIGN], ids=["its own torch", "another torch"])
def test_torchvision_imports_beside_its_own_torch_and_beside_another(tmp_path: Path, source: str) -> None:
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", TORCHVISION, str(tmp_path), source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_users_file_may_import_torchvision_beside_another_torch(tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    file.write_text("import torch\nfrom torchvision import transforms\n\ndef net():\n    return torch.nn.Linear(4, 2)\n")
    program = f"from twofour.sources.files import call_function; print(call_function({f'{file}:net'!r}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("Linear("), done.stderr
