"""The rows of results/cpu/methods.json: which there should be, and which of them are of the code and the recipe of today."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import methods_retrained

import twofour
from twofour.pruning.methods import METHODS

NETWORKS = {
    "ResNet-20": "resnet20-12fca82f.th",
    "ResNet-32": "resnet32-d509ac18.th",
    "ResNet-44": "resnet44-014dd654.th",
    "ResNet-56": "resnet56-4bfd9763.th",
    "MiniLM-L6": "model.fp16.safetensors",
}


class Key(NamedTuple):
    """Which row: `seed` is that of a retraining, None one-shot; `method` is "dense" for the network as it is."""

    net: str
    method: str
    permuted: bool = False
    seed: int | None = None

    @classmethod
    def of(cls, row: dict[str, Any]) -> "Key":
        """Return the key of a row."""
        return cls(row["net"], row["method"] or "dense", row["permuted"], row["seed"])


def wanted(nets: list[str], permuted: bool, retrained: bool) -> list[Key]:
    """Return the rows in the order of the file."""
    keys = []
    for net in nets:
        keys += [Key(net, "dense"), *(Key(net, method, order) for order in (False, True)[: 1 + permuted] for method in METHODS)]
        if retrained and net in methods_retrained.NETWORKS:
            keys += [Key(net, m, seed=seed) for m in methods_retrained.METHODS for seed in range(methods_retrained.SEEDS)]
    return keys


def sources_digest() -> str:
    """Return a digest of the code that chooses masks and values; how a weight is packed for a kernel afterwards is not of it."""
    root = Path(twofour.__file__).parent
    chosen = ("statistics", "decide", "magnitude", "eligibility", "calibration")
    pattern = [file for file in root.glob("pattern/*.py") if not file.name.startswith("pack_")]
    files = sorted([*pattern, *root.glob("pruning/methods/*.py"), *(root / f"pruning/{name}.py" for name in chosen)])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def is_current(row: dict[str, Any], digest: str) -> bool:
    """Whether a row was measured with the code and the recipe of today."""
    return row.get("sources_digest") == digest and (
        row["seed"] is None or row["recipe"] == methods_retrained.told(methods_retrained.RECIPE)
    )
