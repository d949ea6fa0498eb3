"""Reports as a run would write them: three seeds of a small network, and a network of many layers."""

import math
import random

from twofour.report.record import (
    AccuracyRow,
    Agreement,
    Check,
    Environment,
    EpochRow,
    LayerRow,
    MemoryRow,
    ProfileRow,
    Report,
    SizeRow,
    SpeedRow,
    TrainingRow,
)

STATEMENT = (
    "ONNX Runtime has no 2:4 kernel on the CPU: both engines run the same dense arithmetic, so no gain in speed, size or memory "
    "is claimed from sparsity here."
)
LAST = {"dense": 98.9, "2:4": 99.1, "dense + same training": 99.2}


def curve(variant: str, seed: int, epochs: int, noise: random.Random) -> TrainingRow:
    """A training whose loss falls and whose metric rises to the variant's level."""
    start = 2.3 if variant == "dense" else 0.72
    rows = []
    for number in range(1, epochs + 1):
        t = number / epochs
        loss = 0.52 + (start - 0.52) * math.exp(-4.2 * t) + noise.gauss(0, 0.004)
        metric = LAST[variant] - (60 if variant == "dense" else 4.5) * math.exp(-7 * t) + noise.gauss(0, 0.12)
        rows.append(EpochRow(number=number, loss=loss, metric=metric, lr=3e-3 * (1 - t), seconds=0.31 + noise.random() / 50))
    return TrainingRow(variant=variant, seed=seed, epochs=rows)


def small_layers() -> list[LayerRow]:
    shapes = {
        "stem.weight": ("Conv2d", [32, 1, 3, 3], 36864, "1 input channels are not a multiple of 4"),
        "stage1.conv.weight": ("Conv2d", [64, 32, 3, 3], 2359296, ""),
        "stage2.conv.weight": ("Conv2d", [64, 64, 3, 3], 1179648, ""),
        "stage3.depthwise.weight": ("Conv2d", [64, 1, 3, 3], 18432, "depthwise convolution"),
        "stage3.conv.weight": ("Conv2d", [128, 64, 3, 3], 589824, ""),
        "hidden.weight": ("Linear", [128, 128], 32768, ""),
        "head.weight": ("Linear", [10, 128], 2560, "classifier: the last linear before an output (by default; --include takes it in)"),
    }
    rows = []
    for index, (name, (kind, shape, flops, reason)) in enumerate(shapes.items()):
        kept = None if reason else 0.801 + 0.013 * index
        rows.append(
            LayerRow(
                name=name,
                kind=kind,
                shape=shape,
                parameters=math.prod(shape),
                flops=flops,
                eligible=not reason,
                reason=reason,
                kept_magnitude=kept,
                permuted="",
            )
        )
    return rows


def many_layers(count: int) -> list[LayerRow]:
    """The bottlenecks of a deep residual network, with depthwise convolutions and an embedding among them."""
    noise = random.Random(5)
    rows = []
    for index in range(count):
        stage = 4 * index // count
        width, pixels = 64 << stage, (56 >> stage) ** 2
        kernel = (1, 3, 1)[index % 3]
        shape = [width * (4 if index % 3 == 2 else 1), width, kernel, kernel]
        reason, kind, permuted = "", "Conv2d", "yes" if index % 2 else "no: its input feeds a concatenation"
        if index == 0:
            shape, pixels, reason = [64, 3, 7, 7], 112**2, "first convolution (by default; --include takes it in)"
        elif index % 17 == 5:
            shape, reason = [width, 1, 3, 3], "depthwise convolution"
        elif index == count - 1:
            shape, pixels, kind, reason = [1000, 2048], 1, "Linear", "classifier: the last linear before an output (by default)"
        flops: int | None = 2 * math.prod(shape) * pixels
        if index == count // 2:
            kind, shape, flops, reason = "Embedding", [30522, 768], None, "embedding: rows are looked up, not multiplied"
        rows.append(
            LayerRow(
                name=f"layer{stage + 1}.{index // 3}.conv{index % 3 + 1}.weight",
                kind=kind,
                shape=shape,
                parameters=math.prod(shape),
                flops=flops,
                eligible=not reason,
                reason=reason,
                kept_magnitude=None if reason else 0.78 + 0.1 * noise.random(),
                permuted="" if reason else permuted,
            )
        )
    return rows


def speed(batch: int, variant: str, median: float, n: int) -> SpeedRow:
    return SpeedRow(
        variant=variant,
        backend="onnxruntime",
        batch=batch,
        n=n,
        median_ms=median,
        p50_ms=median,
        p90_ms=median * 1.137,
        p99_ms=median * 1.419,
        spread=0.163 if variant == "dense" else 0.171,
        items_per_s=1000 * batch / median,
    )


def profile(variant: str, factor: float) -> list[ProfileRow]:
    nodes = {
        "/stem/Conv": ("Conv", 12.1),
        "/stage1/conv/Conv": ("Conv", 101.7),
        "/stage2/conv/Conv": ("Conv", 60.3),
        "/stage3/depthwise/Conv": ("Conv", 9.4),
        "/stage3/conv/Conv": ("Conv", 37.9),
        "/pool/MaxPool": ("MaxPool", 14.2),
        "/pool2/MaxPool": ("MaxPool", 6.7),
        "/hidden/Gemm": ("Gemm", 7.8),
        "/head/Gemm": ("Gemm", 3.3),
        "/Flatten": ("Flatten", 1.2),
    }
    total = sum(us for _, us in nodes.values())
    return [
        ProfileRow(variant=variant, node=node, operation=operation, share=us / total, microseconds=us * factor)
        for node, (operation, us) in nodes.items()
    ]


def checks(failing: bool) -> list[Check]:
    names = {
        "2:4 pattern in the checkpoint": "4 of 4 pruned layers hold at most 2 of 4 at every kernel position",
        "2:4 pattern in sparse.onnx": "4 of 4 pruned layers, 3 recorded as left dense",
        "pruned weights are exactly +0": "68,096 of 68,096",
        "sparse.onnx against torch": "largest error 4.8e-06 at 360 images",
        "predictions of the engine": "0 of 360 differ",
    }
    rows = [Check(name=name, passed=True, detail=detail) for name, detail in names.items()]
    if failing:
        rows[3] = Check(name="sparse.onnx against torch", passed=False, detail="largest error 0.31 at image 17, allowed 1.9e-05")
    return rows


def sample(layers: list[LayerRow] | None = None, *, seeds: int = 3, epochs: int = 12, failing: bool = False) -> Report:
    """A report of `seeds` seeds with `epochs` epochs each."""
    noise = random.Random(1)
    levels = {
        "dense": 98.83,
        "2:4 one-shot": 67.31,
        "2:4 one-shot, batch-norm re-estimated": 92.4,
        "2:4": 99.05,
        "dense + same training": 99.24,
    }
    widths = {"dense": 0.09, "2:4 one-shot": 6.1, "2:4 one-shot, batch-norm re-estimated": 1.2, "2:4": 0.21, "dense + same training": 0.14}
    accuracy = [AccuracyRow(variant=v, values=[noise.gauss(levels[v], widths[v]) for _ in range(seeds)]) for v in levels]
    training = [curve(variant, seed, epochs, noise) for seed in range(seeds) for variant in LAST]
    return Report(
        twofour="0.1.0",
        created="2026-11-22T11:30:12+00:00",
        command="twofour compress demo --data digits --seeds 3 --out runs/digits",
        model="demo",
        data="digits",
        metric="accuracy",
        metric_direction="higher",
        metric_unit="%",
        seeds=list(range(seeds)),
        recipe={
            "epochs": epochs,
            "batch": 64,
            "label_smoothing": 0.1,
            "seed": 0,
            "optimizer": {"name": "adamw", "lr": 3e-3, "weight_decay": 1e-2},
            "schedule": {"name": "onecycle", "warmup": 0.3},
            "augmentation": {"shift": 1},
        },
        method="magnitude",
        backend="onnxruntime",
        sparse_kernels=False,
        statement=STATEMENT,
        environment=Environment(
            python="3.11.7",
            platform="Linux-6.1.0-x86_64-with-glibc2.36",
            cpu="AMD EPYC 7B13",
            cores=2,
            memory_bytes=25_272_127_488,
            gpu=None,
            libraries={"torch": "2.13.0+cpu", "onnx": "1.19.1", "onnxruntime": "1.23.2", "numpy": "2.3.4"},
        ),
        accuracy=accuracy,
        training=training,
        layers=small_layers() if layers is None else layers,
        checks=checks(failing),
        speed=[
            speed(1, "dense", 0.2541, 400),
            speed(1, "2:4", 0.2563, 400),
            speed(64, "dense", 9.874, 120),
            speed(64, "2:4", 9.801, 120),
        ],
        memory=[
            MemoryRow(variant="dense", batch=64, peak_bytes=31_457_280),
            MemoryRow(variant="2:4", batch=64, peak_bytes=31_522_816),
        ],
        sizes=[
            SizeRow(file="dense.safetensors", variant="dense", bytes=612_344),
            SizeRow(file="sparse.safetensors", variant="2:4", bytes=612_344),
            SizeRow(file="dense.onnx", variant="dense", bytes=598_112),
            SizeRow(file="sparse.onnx", variant="2:4", bytes=601_940),
            SizeRow(file="model.plan", variant="2:4", bytes=602_776),
        ],
        profile=profile("dense", 1.0) + profile("2:4", 1.008),
        agreement=[
            Agreement(variant="dense", engine_metric=98.89, torch_metric=98.89, differing_predictions=0, items=360, largest_error=4.1e-6),
            Agreement(variant="2:4", engine_metric=99.17, torch_metric=99.17, differing_predictions=0, items=360, largest_error=4.8e-6),
        ],
        notes=["stem.weight was not reordered: it has one input channel", "files come from seed 0"],
        stage_seconds={"train dense": 11.92, "prune": 0.11, "retrain 2:4": 12.31, "train control": 11.87, "export": 3.42, "measure": 6.71},
    )
