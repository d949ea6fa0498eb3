"""Record the memory plans of full-size networks: `python evidence/memory_plan.py [NETWORK …]` writes results/cpu/memory-plan.json.

Each network is exported at its own image size, imported for one batch size and lowered in fp16; the row holds every buffer as
[bytes, first step, last step], the planned peak and the most bytes alive at one step.
"""

import argparse
import datetime
import hashlib
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from twofour.builder import lower, memory
from twofour.sources import resolve_model

NETWORKS = {
    "torchvision:resnet50": 224,
    "torchvision:resnext101_32x8d": 224,
    "torchvision:wide_resnet50_2": 224,
    "torchvision:mobilenet_v2": 224,
    "torchvision:efficientnet_b0": 224,
    "torchvision:regnet_y_16gf": 224,
    "torchvision:densenet121": 224,
    "torchvision:convnext_base": 224,
    "torchvision:vit_b_16": 224,
    "timm:mixer_b16_224": 224,
    "torchvision:inception_v3": 299,
    "torchvision:deeplabv3_resnet50": 224,
}
ROOT = Path(__file__).parent.parent


class _First(torch.nn.Module):
    """A network's first output: segmentation networks give a dictionary."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.net(x)
        return next(iter(y.values())) if isinstance(y, dict) else y


def made(name: str) -> torch.nn.Module:
    """Return the network without weights of its own."""
    if name == "torchvision:deeplabv3_resnet50":
        from torchvision.models.segmentation import deeplabv3_resnet50

        return _First(deeplabv3_resnet50(weights=None, weights_backbone=None).eval())
    return resolve_model(name).make(1000).eval()


def measured(name: str, size: int, batch: int) -> dict[str, Any]:
    """Return the row of one network."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        path = Path(folder) / "net.onnx"
        shapes = ({0: torch.export.Dim.DYNAMIC},)
        program = torch.onnx.export(made(name), (torch.zeros(2, 3, size, size),), dynamo=True, dynamic_shapes=shapes, verbose=False)
        program.save(path, external_data=False)
        lowered = lower.Front(path).lower(batch, "fp16")
    buffers = lowered.buffers()
    plan = memory.plan_memory(buffers)
    steps = [[b.num_bytes, b.first, b.last] for b in buffers]
    row = {"net": name, "batch": batch, "precision": "fp16", "size": size, "calls": len(lowered.calls)}
    return {**row, "peak_bytes": plan.peak_bytes, "bound_bytes": plan.bound_bytes, "buffers": steps}


def main() -> None:
    """Measure the networks named on the command line, all by default, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", metavar="NETWORK")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "cpu" / "memory-plan.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measured(name, NETWORKS.get(name, 224), arguments.batch) for name in arguments.networks or NETWORKS]
    digest = hashlib.sha256(Path(memory.__file__).read_bytes()).hexdigest()[:16]
    machine = {"torch": torch.__version__}
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    result = {"schema": 1, "kind": "memory-plan", "machine": machine, "date": date, "command": "python evidence/memory_plan.py"}
    text = json.dumps({**result, "sources_digest": digest, "rows": rows})
    arguments.out.write_text(text.replace('{"net"', '\n{"net"') + "\n")


if __name__ == "__main__":
    main()
