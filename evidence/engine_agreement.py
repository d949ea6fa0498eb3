"""Do GPU engines predict what torch predicts in float32? ResNet-20, 32, 44 and 56 on the 10,000 test images of CIFAR-10.

    python evidence/engine_agreement.py FOLDER results/nvidia-h200/engine-agreement.json

FOLDER as in `accuracy_oneshot.py`; of the training images its first sheet is enough. Each network dense and pruned to 2:4 with its
batch-norm re-estimated, in fp16 and bf16; a row holds how many of the predicted classes agree, and both accuracies. A row is written as
soon as it is there; a second run keeps those of the same kernels, torch, machine and images.
"""

import argparse
import copy
import datetime
import json
import logging
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accuracy_oneshot import CifarResNet, load, read
from torch import Tensor, nn

import twofour
from twofour.builder.build import build
from twofour.exchange.export import export
from twofour.files import write_text
from twofour.kernels.launchable import sources_digests

log = logging.getLogger("engine_agreement")
BATCH = 1000


@torch.inference_mode()
def classes(call: Any, images: Tensor) -> Tensor:
    """Return the predicted class of every image."""
    return torch.cat([call(part).argmax(1).cpu() for part in images.split(BATCH)])


def row(
    name: str, variant: str, model: nn.Module, precision: str, images: Tensor, labels: Tensor, folder: Path, device: str, cache: Path
) -> dict[str, Any]:
    """Return what came of one engine; `build_seconds` counts only what the timing cache did not hold."""
    file = folder / "model.onnx"
    export(model, (images[:2].cpu(),), file)
    started = time.perf_counter()
    sparsity, kept = "auto" if variant == "2:4" else "off", cache if device.startswith("cuda") else None
    plan = build(file, batch=(BATCH,), precision=precision, sparsity=sparsity, device=device, timing_cache=kept)
    seconds = time.perf_counter() - started
    plan.save(folder / "model.plan")
    engine = twofour.load(folder / "model.plan")
    wanted = classes(model.to(images.device), images)
    found = classes(engine if images.is_cuda else lambda x: torch.as_tensor(engine(x)), images)
    layers = [layer for record in plan.about.get("builds", []) for layer in record["layers"]]
    return {
        "net": name,
        "variant": variant,
        "precision": precision,
        "images": len(images),
        "agreement_percent": round(100 * float((wanted == found).double().mean()), 4),
        "torch_fp32_percent": round(100 * float((wanted == labels).double().mean()), 4),
        "engine_percent": round(100 * float((found == labels).double().mean()), 4),
        "sparse_layers": sum(bool(layer["sparse"]) for layer in layers),
        "build_seconds": round(seconds, 1),
    }


def kept(path: Path, machine: dict[str, Any], images: int) -> list[dict[str, Any]]:
    """Return the rows of a file that need not be measured again."""
    value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if (value.get("machine"), value.get("sources_digests")) != (machine, sources_digests()):
        return []
    return [row for row in value["rows"] if row["images"] == images]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--depths", type=int, nargs="+", default=[20, 32, 44, 56])
    parser.add_argument("--precisions", nargs="+", default=["fp16", "bf16"])
    parser.add_argument("--device", default="cuda", help="of the engines")
    parser.add_argument("--timing-cache", type=Path, default=Path("runs") / "agreement-timing-cache.json", help="the networks share layers")
    parser.add_argument("--images", type=int, help="only the first, for a trial of the script")
    a = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    images, labels = (t[: a.images] for t in read(a.folder / "cifar10", "te"))
    calibration = read(a.folder / "cifar10", "tr", 1)[0][: a.images].split(250)
    where = "cuda" if a.device.startswith("cuda") else "cpu"
    gpu = torch.cuda.get_device_name() if where == "cuda" else None
    machine = {"gpu": gpu, "torch": torch.__version__, "twofour": twofour.__version__}
    rows = kept(a.out, machine, len(images))
    known = {(row["net"], row["variant"], row["precision"]) for row in rows}
    for depth in a.depths:
        name = f"ResNet-{depth}"
        if all((name, variant, precision) in known for variant in ("dense", "2:4") for precision in a.precisions):
            continue
        dense = CifarResNet(depth).eval()
        load(dense, next((a.folder / "resnet-cifar10").glob(f"resnet{depth}-*.th")))
        pruned = copy.deepcopy(dense)
        twofour.prune(pruned, (images[:2],), permute=False, calibration=calibration)
        for variant, model in (("dense", dense), ("2:4", pruned.eval())):
            for precision in a.precisions:
                if (name, variant, precision) in known:
                    continue
                with TemporaryDirectory() as folder:
                    copied = copy.deepcopy(model)
                    made = row(name, variant, copied, precision, images.to(where), labels, Path(folder), a.device, a.timing_cache)
                rows.append(made)
                log.info("%s", made)
                value = {
                    "schema": 1,
                    "kind": "engine agreement",
                    "machine": machine,
                    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                    "command": "python evidence/engine_agreement.py FOLDER results/nvidia-h200/engine-agreement.json",
                    "sources_digests": sources_digests(),
                    "rows": rows,
                }
                a.out.parent.mkdir(parents=True, exist_ok=True)
                write_text(a.out, json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    main()
