"""How far `twofour estimate` is from whole networks that were measured: predictions beside the rows of results/GPU/engine.json.

    python evidence/estimate_networks.py results/nvidia-h200/engine.json results/cpu/estimate-networks.json [--work DIR]
        [--layers results/nvidia-h200/conv.json]

Needs no GPU. The dense networks of evidence/engine.py are exported to `--work`, where they are not there already; predictions take the
channels and sizes only, so untrained ones serve. `estimate.NETWORKS_ERROR` states what comes out and is printed; a test compares them.
With `--layers` the grouped and depthwise layers measured there are compared too (estimate_layers.py).
"""

import argparse
import datetime
import json
import os
import platform
import sys
from pathlib import Path

import engine
import torch
from engine_rows import NETWORKS, OFF, SPARSE, read
from estimate_layers import report

import twofour
from twofour.builder.estimate import estimate, networks_error
from twofour.builder.gpus import GPUS
from twofour.files import write_text


def main() -> None:
    """Predict and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("measured", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs") / "engine")
    parser.add_argument("--layers", type=Path)
    a = parser.parse_args()
    times = {(r["net"], r["batch"], r["precision"], r["variant"]): r for r in read(a.measured)["rows"] if "error" not in r}
    rows = []
    for net, batch, precision, variant in times:
        if variant != OFF or (net, batch, precision, SPARSE) not in times:
            continue
        off, sparse = (times[net, batch, precision, v] for v in (OFF, SPARSE))
        gpu = next(name for name in GPUS if name in off["gpu"].split())
        folder = a.work / NETWORKS[net][0].replace(":", "-")
        path = folder / "dense.onnx"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            twofour.export(engine.make_network(net), (engine.images(2, seed=2),), path)
        (found,) = estimate(path, gpus=[gpu], batch=[batch], precision=precision)
        predicted = [found.dense_us / 1e3, found.sparse_us / 1e3]
        head = {"net": net, "batch": batch, "precision": precision, "gpu": gpu}
        rows.append({**head, "predicted_ms": predicted, "measured_ms": [off["ms"], sparse["ms"]]})
        sys.stdout.write(f"{net} batch {batch}: dense, 2:4 predicted {predicted}, measured {rows[-1]['measured_ms']}\n")
    sys.stdout.write(f"NETWORKS_ERROR = {networks_error(rows)}\n")
    for text in report(a.layers, (256, 64)) if a.layers else ():
        sys.stdout.write(text + "\n")
    head = {
        "schema": 1,
        "kind": "estimate networks",
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__},
        "date": datetime.date.today().isoformat(),
        "command": f"python evidence/estimate_networks.py {a.measured} {a.out}",
    }
    write_text(a.out, json.dumps({**head, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
