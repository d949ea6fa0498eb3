"""One-shot 2:4 accuracy with and without re-estimated batch-norm statistics: ResNet-20 and ResNet-56 on the 10,000 test images of CIFAR-10.

    python evidence/accuracy_oneshot.py FOLDER results/cpu/accuracy-oneshot.json

FOLDER holds `cifar10/` (the images as 32×32 tiles of lossless sheets, labels as .npy) and `resnet-cifar10/` (the networks that
github.com/akamaster/pytorch_resnet_cifar10 trained, as torch state dicts). No training, no random numbers: a run repeats exactly.
"""

import argparse
import datetime
import hashlib
import json
import platform
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import twofour

CALIBRATION_BATCHES, CALIBRATION_ITEMS = 40, 250


class Block(nn.Module):
    """Two 3×3 convolutions; a shortcut that takes every second pixel and pads the channels with zeros on both sides.

    Source: He et al. 2015, arXiv 1512.03385, section 4.2, option A.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.stride, self.added = stride, channels_out - channels_in

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return torch.relu(y + nn.functional.pad(shortcut, (0, 0, 0, 0, self.added // 2, self.added - self.added // 2)))


class CifarResNet(nn.Module):
    """6n + 2 layers in three stages of 16, 32 and 64 channels."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(blocks)))
        self.layer2 = nn.Sequential(Block(16, 32, 2), *(Block(32, 32, 1) for _ in range(blocks - 1)))
        self.layer3 = nn.Sequential(Block(32, 64, 2), *(Block(64, 64, 1) for _ in range(blocks - 1)))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))  # type: ignore[no-any-return]


def read(folder: Path, split: str, num_sheets: int | None = None) -> tuple[Tensor, Tensor]:
    """Return normalised images `[n, 3, 32, 32]` and labels `[n]`, of the first sheets of 2,500 or of all."""
    sheets = [np.asarray(Image.open(path)) for path in sorted(folder.glob(f"{split}_*.webp"))[:num_sheets]]
    tiles = [s.reshape(50, 32, 50, 32, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32) for s in sheets]
    images = torch.from_numpy(np.concatenate(tiles)).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return (images - mean) / std, torch.from_numpy(np.load(folder / f"labels_{split}.npy").astype(np.int64))[: len(images)]


def load(model: nn.Module, path: Path) -> None:
    """Fill the model; the files are older than torch's count of batches, which inference does not use."""
    loaded = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    state = {name.removeprefix("module."): value for name, value in loaded.items()}
    missing, surplus = model.load_state_dict(state, strict=False)
    if surplus or any(not name.endswith("num_batches_tracked") for name in missing):
        raise SystemExit(f"{path} does not fit: missing {missing}, surplus {surplus}")


@torch.inference_mode()
def accuracy_percent(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return top-1 accuracy in percent."""
    model.eval()
    outputs = torch.cat([model(part) for part in images.split(500)])
    return round(100 * float((outputs.argmax(1) == labels).double().mean()), 4)


def sources_digest() -> str:
    """Return a digest of the code that chooses masks and statistics."""
    root = Path(twofour.__file__).parent
    files = sorted([*root.glob("pattern/*.py"), *root.glob("pruning/*.py")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--permute", action="store_true", help="reorder channels first")
    arguments = parser.parse_args()
    test, train = read(arguments.folder / "cifar10", "te"), read(arguments.folder / "cifar10", "tr")[0]
    # The classes are interleaved, so any stretch of the training images holds all of them.
    needed = CALIBRATION_BATCHES * CALIBRATION_ITEMS
    if len(train) < needed:
        raise SystemExit(f"{arguments.folder / 'cifar10'} holds {len(train):,} training images, expected {needed:,} or more; add tr_*.webp")
    calibration = list(train[:needed].split(CALIBRATION_ITEMS))
    rows = []
    for depth, weights in ((20, "resnet20-12fca82f.th"), (56, "resnet56-4bfd9763.th")):
        for variant in ("dense", "2:4 one-shot", "2:4 one-shot, batch-norm re-estimated"):
            model = CifarResNet(depth)
            load(model, arguments.folder / "resnet-cifar10" / weights)
            note = ""
            if variant != "dense":
                batches = calibration if "re-estimated" in variant else None
                note = str(twofour.prune(model, (test[0][:2],), permute=arguments.permute, calibration=batches))
                variant += ", permuted" if arguments.permute else ""
            value = accuracy_percent(model, *test)
            rows.append(
                {"net": f"ResNet-{depth}", "data": "CIFAR-10 test", "seed": None, "variant": variant, "metric": "accuracy", "value": value}
                | ({"pruning": note} if note else {})
            )
    result = {
        "schema": 1,
        "kind": "accuracy",
        "machine": {"cpu": platform.machine(), "torch": torch.__version__, "twofour": twofour.__version__},
        "date": datetime.date.today().isoformat(),
        "command": f"python evidence/accuracy_oneshot.py FOLDER {arguments.out}{' --permute' if arguments.permute else ''}",
        "calibration": {"batches": CALIBRATION_BATCHES, "items": CALIBRATION_ITEMS, "split": "train, first images, no augmentation"},
        "sources_digest": sources_digest(),
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
