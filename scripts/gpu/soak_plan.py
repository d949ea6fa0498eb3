"""The plan that is soaked: a MobileNetV2 of random weights, pruned to 2:4, for 64-pixel images: `python scripts/gpu/soak_plan.py FILE`.

Small, so that a soak leaves room for other work. The ONNX file is what the exporter gives, not compared with the module as `twofour.export`
does: a soak asks whether results stay the same, not whether they are right. `--device cpu` is for a trial.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

import twofour
from twofour.builder.build import build
from twofour.exchange.export import captured
from twofour.sources import resolve_model

BATCHES = (1, 32)


def network() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Return the dense network and inputs for it."""
    torch.manual_seed(0)
    return resolve_model("torchvision:mobilenet_v2").make(100).eval(), (torch.randn(2, 3, 64, 64),)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    model, inputs = network()
    twofour.prune(model, inputs, permute=False, reestimate=False)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "mobilenet_v2.onnx"
        captured(model, inputs).save(file, external_data=False)
        precision = "fp16" if options.device == "cuda" else "fp32"
        build(file, batch=BATCHES, precision=precision, device=options.device).save(options.out)


if __name__ == "__main__":
    main()
