"""Checkpoints pruned on disk: values as in memory, everything else byte for byte, stopped runs go on, damage is one sentence."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from twofour.errors import InputError
from twofour.pattern import Pattern
from twofour.pruning import files as files_module
from twofour.pruning import prune_files
from twofour.pruning.files import FIRST_NOT_FINITE, FP8, pruned_piece
from twofour.pruning.magnitude import pattern_mask
from twofour.pruning.shards import FLOAT_BYTES, Entry, write_all

INDEX = "model.safetensors.index.json"


def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def checkpoint(folder: Path) -> Path:
    """Two shards of a small decoder, with an index, a config and weights in another format."""
    folder.mkdir()
    first = {
        "model.embed_tokens.weight": drawn(64, 32),
        "model.layers.0.self_attn.q_proj.weight": drawn(32, 32, seed=1),
        "model.layers.0.self_attn.q_proj.bias": drawn(32, seed=2),
        "model.layers.0.input_layernorm.weight": drawn(32, seed=3),
    }
    second = {
        "model.layers.0.mlp.gate.weight": drawn(4, 32, seed=4),
        "model.layers.0.mlp.experts.0.up_proj.weight": drawn(300, 32, seed=5),
        "lm_head.weight": drawn(64, 32, seed=6),
    }
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    save_file(first, folder / names[0], {"format": "pt", "origin": "a test"})
    save_file(second, folder / names[1], {"format": "pt"})
    placed = {tensor: names[i] for i, tensors in enumerate((first, second)) for tensor in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": placed}))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "pytorch_model.bin").write_bytes(b"dense")
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def header_of(path: Path) -> bytes:
    content = path.read_bytes()
    return content[: 8 + int.from_bytes(content[:8], "little")]


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "2:4 transposable"])
def test_values_are_those_of_memory_and_all_else_is_kept(tmp_path: Path, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "PIECE_BYTES", 1000)  # 15 rows of the 300: many pieces, the last one short
    source, out = checkpoint(tmp_path / "dense"), tmp_path / "pruned"
    before = digests(source)
    seen = []
    pruning = prune_files(source, out, pattern=pattern, progress=lambda name, done, total: seen.append((name, done, total)))
    assert digests(source) == before
    assert {r.name for r in pruning.pruned} == {
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.mlp.experts.0.up_proj.weight",
    }
    assert {r.name: r.reason.split(":")[0].split(" (")[0] for r in pruning.layers if not r.eligible} == {
        "model.embed_tokens.weight": "embedding",
        "model.layers.0.mlp.gate.weight": "router",
        "lm_head.weight": "classifier",
    }
    for path in sorted(source.glob("*.safetensors")):
        assert header_of(out / path.name) == header_of(path)  # names, dtypes, shapes, offsets, metadata
        dense, sparse = load_file(path), load_file(out / path.name)
        for name, weight in dense.items():
            record = next((r for r in pruning.pruned if r.name == name), None)
            if record is None:
                assert torch.equal(sparse[name].view(torch.int16), weight.view(torch.int16))
                continue
            mask = pattern_mask(weight, Pattern.parse(pattern))
            # Bits, so that -0 is not taken for +0.
            assert torch.equal(sparse[name].view(torch.int16), torch.where(mask, weight, 0).view(torch.int16))
            magnitude = weight.double().abs()
            # fp32 sums of up to 500 values a piece.
            assert record.kept_magnitude == pytest.approx(float(magnitude[mask].sum() / magnitude.sum()), rel=500 * 2.0**-24)
    for name in (INDEX, "config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert not (out / "pytorch_model.bin").exists()
    assert pruning.notes == ("not copied: pytorch_model.bin (folders, and weights in other formats, which are still dense)",)
    total = sum(p.stat().st_size for p in source.glob("*.safetensors"))
    assert "FLOPs" not in str(pruning)  # unknown, not zero
    assert seen[-1] == ("model-00002-of-00002.safetensors", total, total)
    assert [s[1] for s in seen] == sorted(s[1] for s in seen)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_floating_format_and_convolutions(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "conv.weight": drawn(8, 12, 3, 3, dtype=dtype),
        "stem.weight": drawn(8, 3, 3, 3, dtype=dtype, seed=1),
        "attention.in_proj_weight": drawn(24, 8, dtype=dtype, seed=2),
        "packed.weight": torch.arange(64, dtype=torch.int32).reshape(8, 8),
        "empty.weight": torch.zeros(0, 8, dtype=dtype),
        "table": drawn(8, 8, dtype=dtype, seed=3),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    pruning = prune_files(tmp_path / "model.safetensors", tmp_path / "out")
    assert {r.name: r.reason for r in pruning.layers} == {
        "conv.weight": "",
        "stem.weight": "3 input channels are not a multiple of 4",
        "attention.in_proj_weight": "",
        "packed.weight": "dtype I32 is not a floating format",
        "empty.weight": "no elements",
        "table": "not a weight by its name",
    }
    sparse = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in tensors.items():
        kept = (
            pattern_mask(weight, Pattern())
            if name in ("conv.weight", "attention.in_proj_weight")
            else torch.ones(weight.shape, dtype=torch.bool)
        )
        expected = torch.where(kept, weight.double(), 0).to(weight.dtype)
        assert torch.equal(sparse[name].view(torch.uint8), expected.view(torch.uint8)), name


FORMATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


@given(st.sampled_from(sorted(FORMATS)), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_pieces_of_any_bits_are_pruned_as_in_memory(name: str, rows: int, groups: int, pixels: int, seed: int) -> None:
    dtype, size = FORMATS[name], FLOAT_BYTES[name]
    shape = (rows, 4 * groups, pixels)
    bits = np.random.default_rng(seed).integers(0, 1 << 8 * size, shape, np.uint64).astype(f"u{size}")
    magnitude = bits & bits.dtype.type((1 << (8 * size - 1)) - 1)
    bits[magnitude >= FIRST_NOT_FINITE[name]] = 0  # everything else: subnormals, both zeros, the largest
    weight = torch.from_numpy(bits.view(np.uint8).reshape(-1).copy()).view(dtype).reshape(shape)
    mask = pattern_mask(weight, Pattern())
    content, kept, total = pruned_piece(bytearray(bits.tobytes()), Entry("x.weight", name, shape, 0, bits.nbytes), Pattern())
    np.testing.assert_array_equal(np.frombuffer(content, bits.dtype).reshape(shape), np.where(mask.numpy(), bits, 0))
    values = weight.double().abs()
    # fp32 sums of up to 180 terms.
    assert total == pytest.approx(float(values.sum()), rel=180 * 2.0**-24)
    assert kept == pytest.approx(float(values[mask].sum()), rel=180 * 2.0**-24)


def test_fp8_tables_and_limits_are_those_of_torch() -> None:
    for name, dtype in (("F8_E4M3", torch.float8_e4m3fn), ("F8_E5M2", torch.float8_e5m2)):
        values = torch.arange(128, dtype=torch.uint8).view(dtype).float()
        finite = torch.isfinite(values).numpy()
        assert np.flatnonzero(~finite)[0] == FIRST_NOT_FINITE[name]
        np.testing.assert_array_equal(FP8[name][finite], values.numpy()[finite])
    for name, dtype, bits in (
        ("F16", torch.float16, torch.int16),
        ("BF16", torch.bfloat16, torch.int16),
        ("F32", torch.float32, torch.int32),
    ):
        assert torch.tensor(float("inf"), dtype=dtype).view(bits).item() == FIRST_NOT_FINITE[name]


def test_globs_take_in_and_leave_out(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "dense")
    pruning = prune_files(source, tmp_path / "out", include=["lm_head"], exclude=["*.q_proj"])
    assert {r.name for r in pruning.pruned} == {"model.layers.0.mlp.experts.0.up_proj.weight", "lm_head.weight"}
    assert next(r.reason for r in pruning.layers if "q_proj" in r.name) == "excluded"
    with pytest.raises(InputError, match=r"exclude '\*\.k_proj' matches no layer"):
        prune_files(source, tmp_path / "other", exclude=["*.k_proj"])


def test_matrices_stored_in_by_out_are_left(tmp_path: Path) -> None:
    tensors = {
        "h.0.attn.c_attn.weight": drawn(8, 24),
        "h.0.attn.c_attn.bias": drawn(24),
        "h.0.attn.c_proj.weight": drawn(8, 8),
        "h.0.attn.c_proj.bias": drawn(8),
        "h.0.extra.weight": drawn(8, 8),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    pruning = prune_files(tmp_path / "model.safetensors", tmp_path / "out")
    assert {r.name: r.reason for r in pruning.layers} == {
        "h.0.attn.c_attn.weight": "stored as [in, out]: its bias has the length of axis 1",
        "h.0.attn.c_proj.weight": "square, and others of the set are stored as [in, out]",
        "h.0.extra.weight": "",
    }


class Stop(Exception):
    pass


def test_a_stopped_run_goes_on_and_ends_as_one_that_was_not(tmp_path: Path) -> None:
    source, out = checkpoint(tmp_path / "dense"), tmp_path / "out"

    def stop(name: str, done: int, total: int) -> None:
        if name.startswith("model-00002"):
            raise Stop

    with pytest.raises(Stop):
        prune_files(source, out, progress=stop)
    first = out / "model-00001-of-00002.safetensors"
    assert sorted(p.name for p in out.glob("*.safetensors")) == [first.name]
    assert not list(out.glob(".*"))
    written = first.stat().st_ino, first.stat().st_mtime_ns
    prune_files(source, out)
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == written
    prune_files(source, tmp_path / "whole")
    for name, digest in digests(tmp_path / "whole").items():
        assert digests(out)[name] == digest
    assert json.loads((out / "twofour.pruning.json").read_text())["complete"] is True


def test_a_finished_shard_that_was_damaged_or_whose_source_changed_is_written_again(tmp_path: Path) -> None:
    source, out = checkpoint(tmp_path / "dense"), tmp_path / "out"
    prune_files(source, out)
    whole = digests(out)
    second = out / "model-00002-of-00002.safetensors"
    content = bytearray(second.read_bytes())
    content[-1] ^= 1
    second.write_bytes(content)
    prune_files(source, out)
    assert digests(out) == whole
    changed = load_file(source / second.name)
    changed["lm_head.weight"] = changed["lm_head.weight"] + 1
    save_file(changed, source / second.name, {"format": "pt"})
    prune_files(source, out)
    assert torch.equal(load_file(second)["lm_head.weight"], changed["lm_head.weight"])


def refused(source: Path, out: Path, message: str, **options: object) -> None:
    """One sentence, the source as it was, and no unfinished file left."""
    before = digests(source) if source.is_dir() else {}
    with pytest.raises(InputError, match=message) as caught:
        prune_files(source, out, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    if source.is_dir():
        assert digests(source) == before
    assert not out.is_dir() or not list(out.glob(".*.part"))


def test_missing_and_damaged_shards_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", tmp_path / "out", r"checkpoint '.*nowhere' does not exist, expected a folder with safetensors files")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path / "out", r"holds no \*\.safetensors file; convert it to safetensors first")
    source = checkpoint(tmp_path / "dense")
    second = source / "model-00002-of-00002.safetensors"
    content = second.read_bytes()
    second.write_bytes(content[:-7])
    refused(source, tmp_path / "out", r"shard '.*00002-of-00002\.safetensors' is damaged, expected a whole safetensors file")
    second.write_bytes(b"\xff" * 32)
    refused(source, tmp_path / "out", r"shard '.*00002-of-00002\.safetensors' is damaged")
    second.write_bytes(b"")
    refused(source, tmp_path / "out", r"shard '.*00002-of-00002\.safetensors' is damaged")
    second.unlink()
    refused(source, tmp_path / "out", r"shard '.*00002-of-00002\.safetensors' is missing, expected every file of the set")
    assert not (tmp_path / "out").exists()
    save_file({"lm_head.weight": drawn(4, 4)}, second)
    refused(
        source, tmp_path / "out", r"shard '.*' lacks 'model\.layers\.0\..*' that the index 'model\.safetensors\.index\.json' places there"
    )
    (source / INDEX).write_text('{"weight_map": {"a": "../other.safetensors"}}')
    refused(source, tmp_path / "out", r"names the shard '\.\./other\.safetensors', expected a file of the same folder")
    (source / INDEX).write_text("[1]")
    refused(source, tmp_path / "out", r"index '.*' is damaged, expected a JSON object with a weight_map")


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    for number, (dtype, value) in enumerate(
        ((torch.bfloat16, float("nan")), (torch.float32, float("-inf")), (torch.float8_e4m3fn, float("nan")))
    ):
        source = tmp_path / f"dense{number}"
        source.mkdir()
        weight = drawn(16, 16).float()
        weight[7, 3] = value
        save_file({"a.weight": drawn(8, 8), "b.weight": weight.to(dtype)}, source / "model.safetensors")
        refused(
            source, tmp_path / f"out{number}", r"tensor 'b\.weight' holds NaN or infinity, expected finite values; load a sound checkpoint"
        )
        assert not (tmp_path / f"out{number}" / "model.safetensors").exists()


def test_a_value_that_is_not_finite_in_a_later_file_leaves_nothing_of_the_call(tmp_path: Path) -> None:
    source, out = checkpoint(tmp_path / "dense"), tmp_path / "out"
    second = source / "model-00002-of-00002.safetensors"
    sound = second.read_bytes()
    tensors = load_file(second)
    tensors["model.layers.0.mlp.experts.0.up_proj.weight"][200, 3] = float("nan")
    save_file(tensors, second, {"format": "pt"})
    refused(source, out, "up_proj.weight' holds NaN or infinity")
    assert not out.exists()
    # What an earlier call finished stays, and so does what it says of it.
    second.write_bytes(sound)
    prune_files(source, out)
    (out / "config.json").unlink()
    earlier = {name: digest for name, digest in digests(out).items() if name.endswith("safetensors")}
    save_file(tensors, second, {"format": "pt"})
    refused(source, out, "up_proj.weight' holds NaN or infinity")
    assert {name: digest for name, digest in digests(out).items() if name.endswith("safetensors")} == earlier
    assert not (out / "config.json").exists()


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "dense"
    source.mkdir()
    for name in ("a", "b"):
        save_file({"x.weight": drawn(8, 8)}, source / f"{name}.safetensors")
    refused(source, tmp_path / "out", r"tensor 'x\.weight' is in 'a\.safetensors' and in 'b\.safetensors', expected it once")
    assert not (tmp_path / "out").exists()


def test_nothing_to_prune_and_unfit_folders_are_refused(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "dense")
    refused(source, source, "is the source itself, expected another folder")
    (tmp_path / "file").write_text("")
    refused(source, tmp_path / "file", "out '.*file' is a file, expected a folder")
    refused(source, tmp_path / "out", "has no tensor that can be 2:4; model.embed_tokens.weight: embedding", exclude=["model.layers.*"])
    other = tmp_path / "other"
    other.mkdir()
    save_file({"x": drawn(4)}, other / "x.safetensors")
    refused(source, other, "already holds 'x.safetensors', expected an empty folder or one begun here")
    prune_files(source, tmp_path / "begun")
    refused(source, tmp_path / "begun", "was begun with options .*; choose another folder", pattern="1:4")
    (tmp_path / "begun" / "twofour.pruning.json").write_text("{")
    refused(source, tmp_path / "begun", "journal '.*' is damaged .*; delete the folder and start again")


FULL = """
import resource, sys
from twofour.errors import InputError
from twofour.pruning import prune_files
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    prune_files(sys.argv[1], sys.argv[2])
except InputError as error:
    print(error)
"""


def test_a_disk_that_fills_leaves_what_is_finished_and_the_next_run_goes_on(tmp_path: Path) -> None:
    source, out = checkpoint(tmp_path / "dense"), tmp_path / "out"
    before = digests(source)
    # No file may grow beyond 16 kB: the first shard (about 7 kB) fits, the second (about 24 kB) does not.
    run = subprocess.run([sys.executable, "-c", FULL, str(source), str(out), "16000"], capture_output=True, text=True, check=True)
    assert run.stdout.startswith(f"prune_files cannot write {str(out)!r}: File too large; what is finished stays and the same call goes on")
    assert sorted(p.name for p in out.iterdir() if p.suffix != ".json") == ["model-00001-of-00002.safetensors"]
    assert digests(source) == before
    prune_files(source, out)
    prune_files(source, tmp_path / "whole")
    assert digests(out) == digests(tmp_path / "whole")


def test_a_file_cut_in_its_last_piece_is_never_called_finished(tmp_path: Path) -> None:
    source, out = tmp_path / "dense", tmp_path / "out"
    source.mkdir()
    save_file({"a.weight": drawn(256, 64)}, source / "model.safetensors")
    limit = (source / "model.safetensors").stat().st_size - 100
    ignoring = "import signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n" + FULL
    run = subprocess.run([sys.executable, "-c", ignoring, str(source), str(out), str(limit)], capture_output=True, text=True, check=True)
    assert run.stdout.startswith(f"prune_files cannot write {str(out)!r}: File too large; what is finished stays")
    assert not out.is_dir() or not list(out.iterdir())
    prune_files(source, out)
    assert (out / "model.safetensors").stat().st_size == limit + 100


class Grudging:
    """A file that takes at most `most` bytes at a time."""

    name = "grudging"

    def __init__(self, most: int) -> None:
        self.most, self.content = most, b""

    def write(self, content: memoryview) -> int:
        self.content += bytes(content[: self.most])
        return min(self.most, len(content))


def test_short_writes_are_gone_on_with_and_a_file_that_takes_nothing_is_an_error() -> None:
    sink = Grudging(7)
    write_all(sink, bytearray(range(100)))  # type: ignore[arg-type]
    assert sink.content == bytes(range(100))
    with pytest.raises(InputError, match="file 'grudging' takes no more bytes with 9 left, expected room for all"):
        write_all(Grudging(0), b"123456789")  # type: ignore[arg-type]


def test_a_file_of_another_size_than_expected_is_discarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = checkpoint(tmp_path / "dense"), tmp_path / "out"
    monkeypatch.setattr(files_module, "write_all", lambda sink, content: sink.write(content[:-1]))
    refused(source, out, r"file '.*00001-of-00002\.safetensors' got \d+ bytes, expected \d+; it is discarded, free some space")
    assert not list(out.glob("*.safetensors"))


MEMORY = """
import re, sys
import numpy as np
from twofour.pattern import select
from twofour.pruning import prune_files
select(np.ones((1024, 1024), np.uint16))  # the interpreter, torch and the compiled loops are not what is measured
def memory(which):
    return 1024 * int(re.search(which + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from what is resident now
before = memory("VmRSS")
prune_files(sys.argv[1], sys.argv[2])
print(memory("VmHWM") - before)
"""


def test_memory_stays_below_twice_the_largest_tensor(tmp_path: Path) -> None:
    largest = torch.ones(8192, 2048, dtype=torch.bfloat16)  # 32 MiB
    save_file({"a.weight": largest, "b.weight": largest.clone(), "embed.weight": largest.clone()}, tmp_path / "model.safetensors")
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "model.safetensors"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert 0 < int(run.stdout) < 2 * largest.numel() * 2
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("a.weight")[:, :4], torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.bfloat16).expand(8192, 4))
