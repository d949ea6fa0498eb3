"""Every pruning method on real networks, one-shot: accuracy, seconds and memory; the source of the tables in docs/methods.md.

    python evidence/methods.py FOLDER results/cpu/methods.json

FOLDER is that of evidence/accuracy_oneshot.py, with `minilm/` (all-MiniLM-L6-v2 as config.json, tokenizer and model.fp16.safetensors) and
`stsb/` (STS-B English as csv: sentence, sentence, score) beside it. No training. Each pruning runs in a process of its own, so that its
memory is its own; rows are written as they come, and a second run goes on where the first one ended.
"""

import argparse
import contextlib
import csv
import datetime
import hashlib
import json
import os
import platform
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import torch
from accuracy_oneshot import CifarResNet, accuracy_percent, load, read
from scipy.stats import spearmanr
from torch import Tensor, nn

import twofour
from twofour.errors import MissingExtraError
from twofour.pruning import reestimate_batchnorm
from twofour.pruning.methods import METHODS
from twofour.sources.torchvision_compat import import_torchvision

NETWORKS = {"ResNet-20": "resnet20-12fca82f.th", "MiniLM-L6": "model.fp16.safetensors", "ResNet-56": "resnet56-4bfd9763.th"}
CALIBRATION_BATCHES, CALIBRATION_ITEMS = 8, 250
SEARCH_SECONDS = 20.0
SENTENCES = 1024


class Sampler:
    """Peak resident memory above where it began, in bytes, looked at every 2 ms."""

    def __enter__(self) -> "Sampler":
        process = psutil.Process()
        self.before = self.peak = process.memory_info().rss
        self.done = threading.Event()

        def watch() -> None:
            while not self.done.wait(0.002):
                self.peak = max(self.peak, process.memory_info().rss)

        self.thread = threading.Thread(target=watch)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.thread.join()


def resnet(folder: Path, net: str) -> tuple[nn.Module, tuple[Any, ...], list[Any], Callable[[nn.Module], float], dict[str, Any]]:
    """Return network, example inputs, calibration batches, metric and options of `prune`."""
    model = CifarResNet(int(net.rpartition("-")[2]))
    load(model, folder / "resnet-cifar10" / NETWORKS[net])
    train = read(folder / "cifar10", "tr", 1)[0][: CALIBRATION_BATCHES * CALIBRATION_ITEMS].clone()
    test = read(folder / "cifar10", "te")
    return model.eval(), (train[:2],), list(train.split(CALIBRATION_ITEMS)), lambda m: accuracy_percent(m, *test), {}


def minilm(folder: Path, net: str) -> tuple[nn.Module, tuple[Any, ...], list[Any], Callable[[nn.Module], float], dict[str, Any]]:
    """As `resnet`; all 36 linear layers of the encoder are pruned."""
    from safetensors.torch import load_file

    # A torchvision made for another torch, if one is installed, would keep transformers from importing.
    with contextlib.suppress(MissingExtraError):
        import_torchvision()
    from transformers import AutoTokenizer, BertConfig, BertModel

    tokenizer = AutoTokenizer.from_pretrained(folder / "minilm")
    model = BertModel(BertConfig.from_pretrained(folder / "minilm"), add_pooling_layer=False)
    state = {name: value.float() for name, value in load_file(folder / "minilm" / NETWORKS[net]).items()}
    missing, _ = model.load_state_dict(state, strict=False)
    if missing:
        raise SystemExit(f"{NETWORKS[net]} lacks {missing}")

    def batches(sentences: list[str]) -> list[dict[str, Tensor]]:
        return [dict(tokenizer(sentences[i : i + 32], padding=True, return_tensors="pt")) for i in range(0, len(sentences), 32)]

    @torch.inference_mode()
    def embed(model: nn.Module, sentences: list[str]) -> Tensor:
        model.eval()
        order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
        parts = []
        for batch in batches([sentences[i] for i in order]):
            mask = batch["attention_mask"][..., None]
            mean = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
            parts.append(nn.functional.normalize(mean, dim=1))
        return torch.cat(parts)[torch.tensor(order).argsort()]

    def metric(model: nn.Module) -> float:
        pairs = rows(folder, "test")
        one, other = (embed(model, [pair[i] for pair in pairs]) for i in (0, 1))
        return round(100 * float(spearmanr((one * other).sum(1).numpy(), [float(pair[2]) for pair in pairs]).statistic), 4)

    sentences = [sentence for pair in rows(folder, "train") for sentence in pair[:2]][:SENTENCES]
    calibration = batches(sorted(sentences, key=len))
    example = calibration[-1]
    options = {"include": ["encoder.layer.*"], "exclude": ["embeddings.*"]}
    return model.eval(), (example["input_ids"][:2], example["attention_mask"][:2]), calibration, metric, options


def rows(folder: Path, split: str) -> list[list[str]]:
    """Return the pairs of sentences with their score."""
    with (folder / "stsb" / f"stsb-en-{split}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def measure(folder: Path, net: str, method: str, permuted: bool) -> list[dict[str, Any]]:
    """Return one row, or two where there is batch-norm: as trained, and re-estimated."""
    torch.set_num_threads(1)
    model, example, calibration, metric, options = (minilm if net == "MiniLM-L6" else resnet)(folder, net)
    texts = net == "MiniLM-L6"
    head = {"net": net, "data": "STS-B test" if texts else "CIFAR-10 test", "seed": None, "metric": "Spearman" if texts else "accuracy"}
    if method == "dense":
        return [{**head, "variant": "dense", "method": "", "permuted": False, "value": metric(model)}]
    permute: bool | float = SEARCH_SECONDS if permuted else False
    given = calibration if METHODS[method].is_calibrated else None
    with Sampler() as memory:
        start = time.process_time()
        record = twofour.prune(model, example, method=method, permute=permute, calibration=given, reestimate=False, **options)
        seconds = time.process_time() - start
    errors = [layer.output_error for layer in record.pruned if layer.output_error is not None]
    head |= {"method": method, "permuted": permuted, "cpu_seconds": round(seconds, 2), "peak_bytes": memory.peak - memory.before}
    head |= {"pruning": str(record), "mean_output_error": round(sum(errors) / len(errors), 6) if errors else None}
    found = [{**head, "variant": "2:4 one-shot", "value": metric(model)}]
    if not texts:
        reestimate_batchnorm(model, calibration)
        found.append({**head, "variant": "2:4 one-shot, batch-norm re-estimated", "value": metric(model)})
    return found


def sources_digest() -> str:
    """Return a digest of the code that chooses masks and values."""
    root = Path(twofour.__file__).parent
    chosen = ("statistics", "decide", "magnitude", "eligibility", "calibration")
    files = sorted([*root.glob("pattern/*.py"), *root.glob("pruning/methods/*.py"), *(root / f"pruning/{name}.py" for name in chosen)])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--nets", default=",".join(NETWORKS))
    parser.add_argument("--jobs", type=int, default=1, help="rows measured at once, one thread each")
    parser.add_argument("--no-permuted", action="store_true", help="leave the rows with reordered channels out")
    arguments = parser.parse_args()
    result: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {"rows": []}
    digest = sources_digest()
    done = [row for row in result["rows"] if row.get("sources_digest") == digest]
    wanted = [("dense", False), *((m, False) for m in METHODS), *(() if arguments.no_permuted else ((m, True) for m in METHODS))]
    nets = arguments.nets.split(",")
    keys = {(row["net"], row["method"] or "dense", row["permuted"]) for row in done}
    left = [(net, method, permuted) for net in nets for method, permuted in wanted if (net, method, permuted) not in keys]
    place = {key: k for k, key in enumerate((net, method, permuted) for net in NETWORKS for method, permuted in wanted)}
    # A process for each row, so that the memory of one is not another's.
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        for future in as_completed([pool.submit(measure, arguments.folder, *key) for key in left]):
            done += [row | {"sources_digest": digest} for row in future.result()]
            done.sort(key=lambda row: place.get((row["net"], row["method"] or "dense", row["permuted"]), len(place)))
            write(arguments.out, done)


def write(out: Path, done: list[dict[str, Any]]) -> None:
    """Write the results file."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    result = {
        "schema": 1,
        "kind": "methods",
        "machine": {"cpu": model, "cores": os.cpu_count(), "threads": 1, "torch": torch.__version__, "twofour": twofour.__version__},
        "date": datetime.date.today().isoformat(),
        "command": f"python evidence/methods.py FOLDER {out}",
        "calibration": {
            "ResNet": f"{CALIBRATION_BATCHES} batches of {CALIBRATION_ITEMS}, the first training images, no augmentation",
            "MiniLM": f"the first {SENTENCES} training sentences of STS-B in batches of 32 by length",
            "search_seconds": SEARCH_SECONDS,
        },
        "rows": done,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
