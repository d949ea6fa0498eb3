"""Export reproduces the module; inspect tells the truth about any file, and agrees with the public tool."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import twofour
from twofour.errors import InputError, UnsupportedError, VerificationError
from twofour.pattern import select
from twofour.pruning import Pruning
from twofour.sources import Task


def test_the_file_gives_the_modules_outputs_at_other_batch_sizes(sparse_onnx: Path, pruned_net: tuple[nn.Module, Pruning]) -> None:
    engine = twofour.load(twofour.build(sparse_onnx))
    for batch in (1, 2, 7):
        x = torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            single, double = pruned_net[0](x), pruned_net[0].double()(x.double())
            pruned_net[0].float()
        error = float((engine(x).double() - double).abs().max())
        assert error <= export_rounding(single, double)


def export_rounding(single: Tensor, double: Tensor) -> float:
    from twofour.exchange.export import rounding_tolerance

    return rounding_tolerance([single], [double])


def test_the_record_travels_and_layers_left_dense_pass(sparse_onnx: Path) -> None:
    inspection = twofour.inspect(sparse_onnx)
    assert inspection.is_24
    by_name = {w.name: w for w in inspection.weights}
    assert by_name["classifier.weight"].eligible
    assert not by_name["classifier.weight"].required
    assert not by_name["classifier.weight"].is_24
    assert "classifier" in by_name["classifier.weight"].reason


def test_a_file_without_a_record_counts_every_eligible_weight(sparse_onnx: Path, tmp_path: Path) -> None:
    model = onnx.load(sparse_onnx)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    inspection = twofour.inspect(tmp_path / "foreign.onnx")
    assert not inspection.is_24
    assert [w.name for w in inspection.violations] == ["classifier.weight"]
    assert inspection.notes == ("no pruning record: every eligible weight counts",)


def test_a_pruned_layer_that_is_dense_in_the_file_is_caught_and_the_file_discarded(
    pruned_net: tuple[nn.Module, Pruning], digits: Task, tmp_path: Path
) -> None:
    model, record = pruned_net
    nn.init.normal_(model.stages[1].conv1.weight)  # type: ignore[union-attr, index, arg-type]
    with pytest.raises(VerificationError, match=r"bad.onnx is not 2:4 in 1 layer \(first: \['stages.1.conv1.weight'\]\)"):
        twofour.export(model, digits.example_inputs(), tmp_path / "bad.onnx", pruning=record)
    assert not list(tmp_path.iterdir())


def test_a_file_that_differs_from_the_module_is_discarded(
    pruned_net: tuple[nn.Module, Pruning], digits: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["twofour.exchange.export"]
    real = module.reference_outputs  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "reference_outputs", lambda m, x: ([v + 1e-3 for v in real(m, x)[0]], [v + 1e-3 for v in real(m, x)[1]]))
    with pytest.raises(VerificationError, match=r"bad.onnx differs from the module by 1\.0.e-03, allowed"):
        twofour.export(pruned_net[0], digits.example_inputs(), tmp_path / "bad.onnx")
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_exported_is_one_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(UnsupportedError, match=r"torch\.onnx cannot export this model: its path depends on the values of") as caught:
        twofour.export(Branching(), (torch.ones(2, 4),), tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)
    assert re.search(r"at line \d+ of '.*test_exchange.py', in forward; compute both paths and choose with torch.where$", str(caught.value))
    assert capfd.readouterr() == ("", "")
    with pytest.raises(InputError, match=r"folder '.*missing' does not exist; make it first"):
        twofour.export(nn.Linear(4, 4), (torch.ones(2, 4),), tmp_path / "missing" / "m.onnx")


def graph_with(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], inputs: dict[str, list[int | str]]) -> onnx.ModelProto:
    outputs = [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    initializers = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    return helper.make_model(helper.make_graph(nodes, "g", infos, outputs, initializers), opset_imports=[helper.make_opsetid("", 20)])


def sparse(shape: tuple[int, ...], axis: int) -> np.ndarray:
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return np.where(select(weight, axis), weight, 0)


def test_the_reduction_axis_is_found_through_transposes_and_either_operand(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "plain"], ["a"]),
        helper.make_node("Transpose", ["turned"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["a", "t"], ["b"]),
        helper.make_node("Gemm", ["b", "gemm"], ["c"], transB=1),
        helper.make_node("Gemm", ["left", "c"], ["d"], transA=1),
    ]
    weights = {"plain": sparse((8, 12), 0), "turned": sparse((16, 12), 1), "gemm": sparse((20, 16), 1), "left": sparse((8, 4), 0)}
    onnx.save(graph_with(nodes, weights, {"x": [8, 8]}), tmp_path / "m.onnx")
    inspection = twofour.inspect(tmp_path / "m.onnx")
    assert {w.name: (w.axis, w.is_24) for w in inspection.weights} == {
        "plain": (0, True),
        "turned": (1, True),
        "gemm": (1, True),
        "left": (0, True),
    }


def test_reasons_against_a_convolution(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "depthwise"], ["a"], group=8),
        helper.make_node("Conv", ["a", "grouped"], ["b"], group=2),
        helper.make_node("ConvTranspose", ["b", "up"], ["c"]),
        helper.make_node("Conv", ["c", "odd"], ["d"]),
    ]
    rng = np.random.default_rng(0)
    shapes = {"depthwise": (8, 1, 1, 1), "grouped": (8, 4, 1, 1), "up": (8, 6, 1, 1), "odd": (4, 6, 1, 1)}
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    onnx.save(graph_with(nodes, weights, {"x": [1, 8, 4, 4]}), tmp_path / "m.onnx")
    reasons = {w.name: w.reason for w in twofour.inspect(tmp_path / "m.onnx").weights}
    assert reasons == {
        "depthwise": "depthwise convolution",
        "grouped": "grouped convolution (2 groups)",
        "up": "transposed convolution",
        "odd": "6 input channels are not a multiple of 4",
    }


def test_every_tensor_the_public_tool_names_gets_the_same_verdict(sparse_onnx: Path, digits: Task, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed.onnx"
    nodes = [
        helper.make_node("MatMul", ["x", "sparse"], ["a"]),
        helper.make_node("MatMul", ["a", "dense"], ["b"]),
        helper.make_node("Gemm", ["b", "wrong_axis"], ["c"], transB=1),
    ]
    weights = {"sparse": sparse((16, 16), 0), "dense": np.ones((16, 16), np.float32), "wrong_axis": sparse((16, 16), 0)}
    onnx.save(graph_with(nodes, weights, {"x": [4, 16]}), mixed)
    for path in (sparse_onnx, mixed):
        tool = [sys.executable, "-c", "from polygraphy.tools import main; main()", "inspect", "sparsity", str(path)]
        log = subprocess.run(tool, capture_output=True, text=True, check=True)
        named = {name: kind == "sparse" for kind, name in re.findall(r"Found (sparse|non-sparse) tensor: (\S+)", log.stdout + log.stderr)}
        ours = {w.name: w.is_24 for w in twofour.inspect(path).weights}
        assert len(named) >= 3, log.stdout
        assert len(set(named.values())) == 2, log.stdout
        assert {name: ours[name] for name in named} == named


def test_safetensors_are_inspected_with_and_without_a_record(pruned_net: tuple[nn.Module, Pruning], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from twofour.training import Checkpoint

    model, record = pruned_net
    Checkpoint.of(model, "accuracy", 1.0, pruning=record).save(tmp_path / "ours.safetensors")
    assert twofour.inspect(tmp_path / "ours.safetensors").is_24
    save_file(model.state_dict(), tmp_path / "foreign.safetensors")
    foreign = twofour.inspect(tmp_path / "foreign.safetensors")
    assert [w.name for w in foreign.violations] == ["classifier.weight"]
    save_file({"a.weight": torch.tensor(sparse((8, 8), 1)).to(torch.float8_e4m3fn)}, tmp_path / "fp8.safetensors")
    assert twofour.inspect(tmp_path / "fp8.safetensors").is_24


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.onnx", None, "inspect: file .* does not exist"),
        ("empty.onnx", b"", "holds no ONNX graph"),
        ("junk.onnx", b"\xff" * 40, "is not a readable ONNX file"),
        ("junk.safetensors", b"\xff" * 40, "is not a readable safetensors file"),
        ("junk.plan", b"junk", "is no .onnx, no .safetensors and no plan"),
    ],
)
def test_unreadable_files_get_one_sentence(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        twofour.inspect(tmp_path / name)


def test_an_output_that_is_not_finite_is_never_verified(
    pruned_net: tuple[nn.Module, Pruning], digits: Task, tmp_path: Path, sparse_onnx: Path
) -> None:
    from twofour.exchange.export import compare

    model, _ = pruned_net
    broken = onnx.load(sparse_onnx)
    bias = next(i for i in broken.graph.initializer if i.name == "classifier.bias")
    bias.CopyFrom(numpy_helper.from_array(np.full(10, np.nan, np.float32), bias.name))
    onnx.save(broken, tmp_path / "broken.onnx")
    error, tolerance = compare(tmp_path / "broken.onnx", model, digits.example_inputs())
    assert not error <= tolerance
    with torch.no_grad():
        model.classifier.bias[0] = float("nan")  # type: ignore[union-attr, index, operator]
    with pytest.raises(VerificationError, match="the module's outputs are not finite"):
        twofour.export(model, digits.example_inputs(), tmp_path / "nan.onnx")
    assert not (tmp_path / "nan.onnx").exists()


def external_model(folder: Path, location: str) -> Path:
    """A model whose one weight lies in the file `location`, as the model says."""
    model = graph_with([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": sparse((16, 16), 0)}, {"x": [4, 16]})
    onnx.save(model, folder / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    loaded = onnx.load(folder / "m.onnx", load_external_data=False)
    next(e for e in loaded.graph.initializer[0].external_data if e.key == "location").value = location
    (folder / "m.onnx").write_bytes(loaded.SerializeToString())
    return folder / "m.onnx"


def test_external_data_beside_the_model_is_read(tmp_path: Path) -> None:
    assert twofour.inspect(external_model(tmp_path, "w.bin")).is_24


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/hostname", "link/secret.bin"])
def test_external_data_outside_the_models_folder_is_never_read(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret.bin").write_bytes(b"s" * 4096)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(InputError, match=r"tensor 'w' lies in .*, expected a file in the model's own folder"):
        twofour.build(external_model(folder, location))


def test_external_data_that_is_missing_or_short_is_one_sentence(tmp_path: Path) -> None:
    path = external_model(tmp_path, "w.bin")
    (tmp_path / "w.bin").write_bytes(b"short")
    with pytest.raises(InputError, match="is not a readable ONNX file"):
        twofour.inspect(path)
    (tmp_path / "w.bin").unlink()
    with pytest.raises(InputError, match=r"external data of .*w.bin' does not exist"):
        twofour.inspect(path)


def test_export_wants_the_onnx_suffix(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"m.bin' does not end with .onnx; name it '.*m.onnx'"):
        twofour.export(nn.Linear(4, 4), (torch.ones(2, 4),), tmp_path / "m.bin")


class TiedHead(nn.Module):
    """An embedding whose weight is the head's too; with tokens on an axis of their own, the exporter transposes and renames weights."""

    def __init__(self, *, has_tokens: bool) -> None:
        super().__init__()
        self.has_tokens = has_tokens
        self.embedding = nn.Embedding(64, 32)
        self.hidden = nn.Linear(32, 32)
        self.normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))
        self.head = nn.Linear(32, 64, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        x = x if self.has_tokens else x.mean(1)
        return self.head(self.normed(self.hidden(x).relu()).relu())


@pytest.mark.parametrize("has_tokens", [False, True])
def test_a_dense_weight_is_known_under_the_name_the_exporter_gives_it(tmp_path: Path, has_tokens: bool) -> None:
    torch.manual_seed(0)
    model = TiedHead(has_tokens=has_tokens).eval()
    inputs = (torch.randint(0, 64, (2, 5)),)
    record = twofour.prune(model, inputs, permute=False)
    assert [layer.name for layer in record.pruned] == ["hidden.weight"]
    exported = twofour.export(model, inputs, tmp_path / "m.onnx", pruning=record)
    assert exported.inspection.is_24
    # A later look at the file alone says the same.
    weights = twofour.inspect(tmp_path / "m.onnx").weights
    assert [w.shape for w in weights if w.required] == [(32, 32)]
    assert sorted(w.reason.split(":")[0] for w in weights if not w.required) == [
        "its weight is computed by a parametrisation; remove the parametrisation first",
        "shared with another layer",
    ]


def test_a_pruned_layer_that_is_dense_again_is_refused_under_any_name(tmp_path: Path) -> None:
    model = TiedHead(has_tokens=True).eval()
    inputs = (torch.randint(0, 64, (2, 5)),)
    record = twofour.prune(model, inputs, permute=False)
    with torch.no_grad():
        model.hidden.weight.fill_(0.01)
    with pytest.raises(VerificationError, match=r"export: m\.onnx is not 2:4 in 1 layer "):
        twofour.export(model, inputs, tmp_path / "m.onnx", pruning=record)
    assert not (tmp_path / "m.onnx").exists()
