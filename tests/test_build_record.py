"""The build report: what was tried, what won and why, in JSON, in the terminal and as a page; and `build` up to the GPU."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import onnx
import pytest
from click.testing import CliRunner
from graphs import imported, network
from plan_samples import plan
from rich.console import Console

import twofour
from twofour.builder import BuildRecord, passes
from twofour.builder.gpu import prepare
from twofour.builder.gpus import GPUS
from twofour.builder.lower import Lowered, lower
from twofour.builder.memory import plan_memory
from twofour.builder.record import Timed, build_record, roofline_us, why_winner
from twofour.cli.group import twofour as command_line
from twofour.cli.tables import print_build
from twofour.errors import InputError, UnsupportedError
from twofour.files import require_writable
from twofour.report.build_page import render_build


@pytest.fixture(scope="module")
def lowered() -> Lowered:
    return lower(passes.prepare(imported(network("resnet"), 4), "fp16"), 4, "fp16")


@pytest.fixture(scope="module")
def record(lowered: Lowered) -> BuildRecord:
    timed: list[Timed | None] = []
    for number, call in enumerate(lowered.calls):
        if call.family == "gemm":
            timed.append(
                Timed("twofour:2:4:128", {"twofour:2:4:128": 4.0, "cublaslt:0": 5.0}, {"cusparselt": "needs tokens by 8"}, sparse=True)
            )
        elif number == 3:
            timed.append(None)
        else:
            timed.append(Timed("cudnn", {"cudnn": 6.0}, {}))
    return build_record("net.onnx", lowered, plan_memory(lowered.buffers()), timed, GPUS["H200"])


def test_shares_add_up_and_the_roofline_is_never_beaten_by_definition(lowered: Lowered, record: BuildRecord) -> None:
    timed = [layer for layer in record.layers if layer.us is not None]
    assert sum(layer.share or 0.0 for layer in timed) == pytest.approx(1.0)
    assert record.total_us == pytest.approx(sum(layer.us or 0.0 for layer in timed))
    assert len(timed) == len(record.layers) - 1
    for call, layer in zip(lowered.calls, record.layers, strict=True):
        assert layer.roofline_us == roofline_us(call, GPUS["H200"], sparse=layer.sparse)
        assert layer.us is None or layer.over_roofline == pytest.approx(layer.us / layer.roofline_us)
    assert record.peak_bytes >= record.bound_bytes > 0


def test_the_reason_is_the_gain_or_why_there_is_none(record: BuildRecord) -> None:
    gemm = next(layer for layer in record.layers if layer.family == "gemm")
    assert why_winner(gemm) == "2:4, 1.25× the best dense"
    grouped = next(layer for layer in record.layers if layer.why_not_24.startswith("grouped"))
    assert why_winner(grouped) == "grouped convolution (2 groups)"


def test_a_record_survives_json(record: BuildRecord) -> None:
    text = json.dumps(record.to_json())
    assert BuildRecord.from_json(text) == record
    with pytest.raises(InputError, match="build record is damaged"):
        BuildRecord.from_json("{}")
    with pytest.raises(InputError, match="build record has another schema, this version reads 1"):
        BuildRecord.from_json(text.replace('"schema": 1', '"schema": 2'))


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("layers", 3, "it.layers is 3, expected a list"),
        ("us", "fast", "it.layers.us is 'fast', expected float"),
        ("us", 1e999, "it holds a number outside of 0 to 9223372036854775807"),
        ("share", float("nan"), "it holds a number outside of 0 to"),
        ("flops", -1, "it holds a number outside of 0 to"),
        ("candidates", {"cudnn": "fast"}, "it.layers.candidates.cudnn is 'fast', expected float"),
        ("left_out", ["cudnn"], r"it.layers.left_out is \['cudnn'\], expected an object"),
        ("winner", None, "it.layers.winner is None, expected str"),
    ],
)
def test_a_damaged_record_is_refused_in_one_sentence(field: str, value: object, why: str, record: BuildRecord) -> None:
    data = json.loads(json.dumps(record.to_json()))
    (data if field == "layers" else data["layers"][1])[field] = value
    with pytest.raises(InputError, match=rf"^build record is damaged \({why}.*\); build again$"):
        BuildRecord.from_json(json.dumps(data))


def test_control_characters_of_a_record_stay_out_of_terminal_and_page(record: BuildRecord) -> None:
    data = json.loads(json.dumps(record.to_json()))
    data["model"], data["layers"][0]["name"] = "\x1b[2Jnet", "a\x1b]0;title\x07\x9b1m b\ud800\uffff"
    data["layers"][1]["left_out"] = {"cudnn\x00": "first line\nsecond"}
    read = BuildRecord.from_json(json.dumps(data))
    assert (read.model, read.layers[0].name) == ("?[2Jnet", "a?]0;title??1m b??")
    assert read.layers[1].left_out == {"cudnn?": "first line\nsecond"}
    assert "a?]0;title??1m b" in render_build(read)


def test_a_record_written_before_copies_were_timed_is_read(record: BuildRecord) -> None:
    data = json.loads(json.dumps(record.to_json()))
    for layer in data["layers"]:
        del layer["copy_us"]
    assert BuildRecord.from_json(json.dumps(data)) == record


def test_the_terminal_table_has_candidates_and_reasons(record: BuildRecord) -> None:
    console = Console(width=500, record=True)
    print_build(record, console)
    text = console.export_text()
    assert "twofour:2:4:128 4.0; cublaslt:0 5.0; cusparselt: needs tokens by 8" in text
    assert "grouped convolution (2 groups)" in text
    assert "above the most alive at one step" in text
    assert f"{len(record.layers)} layers" in text


def test_the_page_shows_every_layer_and_a_chart(record: BuildRecord) -> None:
    page = render_build(record)
    assert page.startswith("<!doctype html>")
    assert page.count("<svg") == 2
    assert all(layer.shape in page for layer in record.layers)
    assert "grouped convolution (2 groups)" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    # A plan keeps its objects sorted by name: what is shown does not depend on that.
    assert page == render_build(BuildRecord.from_json(json.dumps(record.to_json(), sort_keys=True)))
    hostile = build_hostile(record)
    assert "<script>alert" not in render_build(hostile)


def build_hostile(record: BuildRecord) -> BuildRecord:
    data = record.to_json()
    data["model"] = "<script>alert(1)</script>"
    data["layers"][0]["name"] = "<script>alert(2)</script>"
    return BuildRecord.from_json(json.dumps({**data, "schema": 1}))


def test_a_build_for_the_gpu_needs_one(tmp_path: Path) -> None:
    path, out = tmp_path / "net.onnx", tmp_path / "net.plan"
    onnx.save(network("mobilenet_v2"), path)
    arguments = ["build", str(path), "-o", str(out), "--device", "cuda", "--batch", "1,4", "--precision", "fp16", "--sparsity", "auto"]
    with patch("twofour.builder.gpu.capability", side_effect=UnsupportedError("no NVIDIA driver was found")):
        result = CliRunner().invoke(
            command_line, [*arguments, "--tactics", "ours", "--timing-cache", str(tmp_path / "cache"), "--fallback"]
        )
    assert isinstance(result.exception, UnsupportedError)
    assert "device 'cuda' times every tactic on the GPU, and none can be used here (no NVIDIA driver was found)" in str(result.exception)
    assert "predict with twofour estimate" in str(result.exception)
    assert not out.exists()


def test_what_a_build_needs_no_gpu_for_is_ready(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(network("mobilenet_v2"), path)
    ready = prepare(path, (4, 1, 4), "bf16", False)
    assert [one.batch for one in ready.lowered] == [1, 4]
    assert all(plan.peak_bytes == plan.bound_bytes for plan in ready.memory)


def test_options_of_the_other_device_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(network("mobilenet_v2"), path)
    with pytest.raises(InputError, match="fallback is for device 'cuda', the device is 'cpu'; leave it out"):
        twofour.build(path, fallback=True)
    with pytest.raises(InputError, match=r"tactics 'mine' is unknown, expected one of \['all', 'ours'\]"):
        twofour.build(path, device="cuda", tactics="mine", precision="fp16")
    with pytest.raises(InputError, match=r"precision 'fp32' is not one of the GPU engine's, expected one of \['fp16', 'bf16'\]"):
        twofour.build(path, device="cuda", precision="fp32")


def test_a_gpu_build_is_in_half_precision_unless_told(tmp_path: Path) -> None:
    with patch("twofour.builder.build.build_gpu") as made:
        twofour.build(tmp_path / "net.onnx", device="cuda:1")
    assert made.call_args.kwargs["precision"] == "fp16"
    onnx.save(network("mobilenet_v2"), tmp_path / "net.onnx")
    assert twofour.build(tmp_path / "net.onnx").precision == "fp32"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["-o", "."], "file '.' cannot be written: it is a folder; name a file"),
        (["-o", "none/net.plan"], "file 'none/net.plan' cannot be written: its folder does not exist; make it first"),
        (["-o", "a.plan", "--report", "none/a.html"], "file 'none/a.html' cannot be written: its folder does not exist; make it first"),
        (["-o", "a.plan", "--timing-cache", "."], "file '.' cannot be written: it is a folder; name a file"),
        (["-o", "a.plan", "--report", "net.onnx"], "output 'net.onnx' is the input, expected another name; nothing is overwritten"),
        (["-o", "a.plan", "--report", "./a.plan"], "--report and --timing-cache are files of their own, expected different names"),
    ],
)
def test_what_cannot_be_written_is_said_before_anything_is_timed(
    arguments: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.onnx").write_bytes(b"model")
    with patch("twofour.builder.build", side_effect=AssertionError("the build began")):
        result = CliRunner().invoke(command_line, ["build", "net.onnx", "--device", "cuda", *arguments])
    assert isinstance(result.exception, InputError)
    assert sentence in str(result.exception)
    assert Path("net.onnx").read_bytes() == b"model"


def test_a_folder_that_cannot_be_written_to_is_said(tmp_path: Path) -> None:
    with (
        patch("twofour.files.os.access", return_value=False),
        pytest.raises(InputError, match="its folder is not writable; choose another"),
    ):
        require_writable(tmp_path / "net.plan")


def test_the_command_prints_every_batch_size_and_writes_its_page(tmp_path: Path, record: BuildRecord) -> None:
    about = {"builds": [record.to_json(), {**record.to_json(), "batch": 9}], "sparse_kernels": True, "note": "the accuracy is gone"}
    made = SimpleNamespace(about=about, whole="", save=lambda path: Path(path).write_text("plan"), __str__=lambda: "plan")
    arguments = ["build", "net.onnx", "-o", str(tmp_path / "net.plan"), "--device", "cuda", "--precision", "fp16"]
    with patch("twofour.builder.build", return_value=made):
        result = CliRunner().invoke(command_line, [*arguments, "--report", str(tmp_path / "page.html")], catch_exceptions=False)
    assert result.exit_code == 0
    assert result.output.count(record.layers[0].name) >= 2
    assert "the accuracy is gone" in result.output
    assert [Path(line).name for line in result.output.splitlines()[-3:-1]] == [f"page-{record.batch}.html", "page-9.html"]
    assert sorted(p.name for p in tmp_path.glob("*.html")) == sorted([f"page-{record.batch}.html", "page-9.html"])


def test_a_build_prints_its_report_as_json(tmp_path: Path, record: BuildRecord) -> None:
    about = {"builds": [record.to_json()], "sparse_kernels": True, "note": "the accuracy is gone"}
    made = SimpleNamespace(about=about, whole="", save=lambda path: None)
    arguments = ["build", "net.onnx", "-o", str(tmp_path / "p"), "--device", "cuda", "--json"]
    with patch("twofour.builder.build", return_value=made):
        result = CliRunner().invoke(command_line, arguments, catch_exceptions=False)
    assert json.loads(result.stdout) == json.loads(json.dumps([record.to_json()]))
    assert result.stderr == "the accuracy is gone\n"
    refused = CliRunner().invoke(command_line, [*arguments[:4], "--json"])
    assert "build: --json shows what was timed on a GPU, expected --device cuda; leave it out" in str(refused.exception)


@pytest.fixture
def plan_file(tmp_path: Path, record: BuildRecord, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plan for the batch sizes 4 and 9 in the current folder."""
    monkeypatch.chdir(tmp_path)
    replace(plan(), about={"builds": [record.to_json(), {**record.to_json(), "batch": 9}]}).save("net.plan")
    return Path("net.plan")


def test_the_report_of_a_plan_is_its_build_report(plan_file: Path, record: BuildRecord) -> None:
    shown = CliRunner().invoke(command_line, ["report", "net.plan"], env={"COLUMNS": "400"}, catch_exceptions=False)
    assert shown.exit_code == 0
    assert shown.output.splitlines()[-2:] == ["net-4.html", "net-9.html"]
    assert shown.output.count("twofour:2:4:128 4.0; cublaslt:0 5.0; cusparselt: needs tokens by 8") >= 2
    assert Path("net-4.html").read_text(encoding="utf-8") == render_build(record)
    printed = CliRunner().invoke(command_line, ["report", "net.plan", "--json", "--out", "other.html"], catch_exceptions=False)
    assert [BuildRecord.from_json(json.dumps(data)) for data in json.loads(printed.output)] == [record, replace(record, batch=9)]
    assert sorted(str(p) for p in Path().glob("*.html")) == ["net-4.html", "net-9.html", "other-4.html", "other-9.html"]


def test_the_page_of_one_batch_size_has_the_plans_name(plan_file: Path, record: BuildRecord) -> None:
    replace(plan(), about={"builds": [record.to_json()]}).save("one")
    shown = CliRunner().invoke(command_line, ["report", "one"], catch_exceptions=False)
    assert shown.output.splitlines()[-1] == "one.html"
    assert Path("one.html").read_text(encoding="utf-8") == render_build(record)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["none.plan"], "plan 'none.plan' does not exist"),
        (["net.plan", "run"], "report: 'net.plan' is a plan, expected it alone; plans are not compared"),
        (["net.plan", "--out", "net.plan"], "report: --out 'net.plan' does not end with .html"),
        (["net.plan", "--out", "none/a.html"], "file 'none/a-4.html' cannot be written: its folder does not exist; make it first"),
        (
            ["cpu.plan"],
            "report: plan 'cpu.plan' was built for 'cpu' and has no build report, expected one that twofour build timed on a GPU",
        ),
        (["old.plan"], "report: plan 'old.plan': build record is damaged (the plan's builds are no list); build again"),
        (["net.onnx"], "plan 'net.onnx' is damaged, or was never one"),
        (["page.html"], "output 'page.html' is the input, expected another name; nothing is overwritten"),
        (["two-9.html", "--out", "two.html"], "output 'two-9.html' is the input, expected another name; nothing is overwritten"),
        ([".", "--json"], "report: --json prints the build report of a plan, expected a plan; the record of a run is its report.json"),
    ],
)
def test_what_has_no_build_report_is_said(arguments: list[str], sentence: str, plan_file: Path, record: BuildRecord) -> None:
    onnx.save(network("mobilenet_v2"), "net.onnx")
    twofour.build("net.onnx").save("cpu.plan")
    replace(plan(), about={"builds": 3}).save("old.plan")
    replace(plan(), about={"builds": [record.to_json()]}).save("page.html")
    Path("two-9.html").write_bytes(plan_file.read_bytes())
    before = {path: path.read_bytes() for path in Path().iterdir()}
    result = CliRunner().invoke(command_line, ["report", *arguments])
    assert isinstance(result.exception, InputError)
    assert sentence in str(result.exception)
    assert {path: path.read_bytes() for path in Path().iterdir()} == before


def test_a_page_of_a_build_for_the_cpu_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(command_line, ["build", "net.onnx", "-o", str(tmp_path / "p"), "--report", "page.html"])
    assert "build: --report shows what was timed on a GPU, expected --device cuda" in str(result.exception)
