"""Every pruning method on real networks, one-shot and briefly retrained: the source of the tables in docs/methods.md.

    python evidence/methods.py FOLDER results/cpu/methods.json --jobs 16
    python evidence/methods.py FOLDER results/cpu/methods.json --jobs 16 --device cuda

FOLDER is that of evidence/accuracy_oneshot.py (of the training images the first sheet is enough), with `minilm/` (all-MiniLM-L6-v2 as
config.json, tokenizer and model.fp16.safetensors) and `stsb/` (STS-B English as csv: sentence, sentence, score) beside it. Each row is
measured in a process of its own, so that its memory is its own and its failure costs no other row; rows are written as they come, each
with the machine that measured it, and a second run goes on where the first one ended. `--device` is where evidence/methods_retrained.py
trains; the rest runs on the CPU.
"""

import argparse
import contextlib
import csv
import datetime
import json
import logging
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import methods_retrained
import psutil
import torch
from accuracy_oneshot import CifarResNet, accuracy_percent, load, read
from methods_rows import NETWORKS, Key, is_current, sources_digest, wanted
from scipy.stats import spearmanr
from torch import Tensor, nn

import twofour
from twofour.errors import MissingExtraError
from twofour.files import write_text
from twofour.pruning import reestimate_batchnorm
from twofour.pruning.methods import METHODS
from twofour.sources.torchvision_compat import import_torchvision

CALIBRATION_BATCHES, CALIBRATION_ITEMS = 8, 250
SEARCH_SECONDS = 20.0
SENTENCES = 1024
log = logging.getLogger("methods")


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


def measure(folder: Path, key: Key, device: str) -> list[dict[str, Any]]:
    """Return one row, or two where there is batch-norm and no retraining: as trained, and re-estimated."""
    torch.set_num_threads(1)
    net, method, permuted, seed = key
    if seed is not None:
        calibration = (CALIBRATION_BATCHES, CALIBRATION_ITEMS)
        return methods_retrained.retrain(folder, net, NETWORKS[net], method, seed, device, calibration)
    model, example, batches, metric, options = (minilm if net == "MiniLM-L6" else resnet)(folder, net)
    texts = net == "MiniLM-L6"
    head = {"net": net, "data": "STS-B test" if texts else "CIFAR-10 test", "seed": None, "metric": "Spearman" if texts else "accuracy"}
    if method == "dense":
        return [{**head, "variant": "dense", "method": "", "permuted": False, "value": metric(model)}]
    permute: bool | float = SEARCH_SECONDS if permuted else False
    given = batches if METHODS[method].is_calibrated else None
    with Sampler() as memory:
        start = time.process_time()
        record = twofour.prune(model, example, method=method, permute=permute, calibration=given, reestimate=False, **options)
        seconds = time.process_time() - start
    errors = [layer.output_error for layer in record.pruned if layer.output_error is not None]
    head |= {"method": method, "permuted": permuted, "cpu_seconds": round(seconds, 2), "peak_bytes": memory.peak - memory.before}
    head |= {"pruning": str(record), "mean_output_error": round(sum(errors) / len(errors), 6) if errors else None}
    found = [{**head, "variant": "2:4 one-shot", "value": metric(model)}]
    if not texts:
        reestimate_batchnorm(model, batches)
        found.append({**head, "variant": "2:4 one-shot, batch-norm re-estimated", "value": metric(model)})
    return found


def apart(measured: Callable[..., list[dict[str, Any]]], *arguments: Any) -> list[dict[str, Any]]:
    """Return what `measured` gives in a process of its own; if that process dies, no other one does."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(measured, *arguments).result()


def measure_all(
    folder: Path, out: Path, keys: list[Key], *, jobs: int, device: str, measured: Callable[..., list[dict[str, Any]]] = measure
) -> list[Key]:
    """Measure the rows that the file lacks, write it after each, and return those that failed."""
    digest, here = sources_digest(), machine()
    done = [row for row in (json.loads(out.read_text())["rows"] if out.is_file() else []) if is_current(row, digest)]
    known = {Key.of(row) for row in done}
    left = [key for key in keys if key not in known]
    place = {key: k for k, key in enumerate(wanted(list(NETWORKS), True, True))}
    # The longest rows should not be the last to begin: the networks from the end, and of each what is retrained, then what is reordered.
    left.sort(key=lambda key: (-list(NETWORKS).index(key.net), key.seed is None, not key.permuted))
    failed = []
    with ThreadPoolExecutor(jobs) as threads:
        futures = {threads.submit(apart, measured, folder, key, device): key for key in left}
        for count, future in enumerate(as_completed(futures), 1):
            try:
                done += [row | {"sources_digest": digest, "machine": here} for row in future.result()]
            # Whatever a row meets, the others are worth having.
            except Exception:
                log.exception("%s failed", futures[future])
                failed.append(futures[future])
                continue
            done.sort(key=lambda row: place.get(Key.of(row), len(place)))
            write(out, done)
            log.info("%d of %d: %s", count, len(left), futures[future])
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--nets", default=",".join(NETWORKS))
    parser.add_argument("--jobs", type=int, default=1, help="rows measured at once, one thread each")
    parser.add_argument("--device", default="cpu", help="where the retrained rows are trained: cpu or cuda")
    parser.add_argument("--no-permuted", action="store_true", help="leave the rows with reordered channels out")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--no-retrained", action="store_true", help="leave the rows with retraining out")
    which.add_argument("--only-retrained", action="store_true", help="leave the rows without retraining out")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    keys = wanted(arguments.nets.split(","), not arguments.no_permuted, not arguments.no_retrained)
    keys = [key for key in keys if key.seed is not None or not arguments.only_retrained]
    failed = measure_all(arguments.folder, arguments.out, keys, jobs=arguments.jobs, device=arguments.device)
    if failed:
        sys.exit(f"{len(failed)} rows failed: {', '.join(map(str, failed))}; the same command tries them again")


def machine() -> dict[str, Any]:
    """Return what a row's seconds depend on; rows of one file may come from several machines."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {"cpu": model, "cores": os.cpu_count(), "torch": torch.__version__}


def write(out: Path, done: list[dict[str, Any]]) -> None:
    """Write the results file; its head names the machine that wrote it last, each row the one that measured it."""
    result = {
        "schema": 1,
        "kind": "methods",
        "machine": {**machine(), "threads": 1, "twofour": twofour.__version__},
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
    write_text(out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
