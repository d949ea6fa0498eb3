"""Shared: small trained things, made once a worker."""

import contextlib
import copy
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch import nn

import twofour
from twofour.compress import Compression, compress
from twofour.errors import MissingExtraError
from twofour.report import Report
from twofour.sources import Task, resolve_model, resolve_task
from twofour.sources.torchvision_compat import import_torchvision

pytest_plugins = ["recording"]

torch.set_num_threads(1)
# A torchvision made for another torch, if one is installed, must not break the libraries that import it.
with contextlib.suppress(MissingExtraError):
    import_torchvision()


@pytest.fixture(scope="session")
def digits() -> Task:
    return resolve_task("digits")


@pytest.fixture(scope="session")
def short_run(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Compression:
    """A whole compress of two epochs and two seeds, made once for all workers."""
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent
    out = shared / "short_run"
    with FileLock(shared / "short_run.lock"):
        if not (out / "report.html").is_file():
            command = "twofour compress demo --data digits"
            compress("demo", "digits", out=out, epochs=2, seeds=2, permute=False, measure_seconds=0.3, overwrite=True, command=command)
    return Compression(Report.load(out / "report.json"), out)


@pytest.fixture
def demo_net() -> nn.Module:
    torch.manual_seed(0)
    return resolve_model("demo").make(10)


@pytest.fixture(scope="session")
def _pruned(digits: Task) -> tuple[nn.Module, twofour.Pruning]:
    torch.manual_seed(0)
    model = resolve_model("demo").make(10).eval()
    return model, twofour.prune(model, digits.example_inputs(), permute=False)


@pytest.fixture
def pruned_net(_pruned: tuple[nn.Module, twofour.Pruning]) -> tuple[nn.Module, twofour.Pruning]:
    return copy.deepcopy(_pruned[0]), _pruned[1]


@pytest.fixture(scope="session")
def sparse_onnx(_pruned: tuple[nn.Module, twofour.Pruning], digits: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "sparse.onnx"
    twofour.export(_pruned[0], digits.example_inputs(), path, pruning=_pruned[1])
    return path
