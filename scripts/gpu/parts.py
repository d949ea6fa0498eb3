"""What is tested and measured on GPUs: a line a command, with what it needs and how long it takes, and the schedule of them.

Seconds are those on two H200 with 32 cores. Commands run in the copied code, where `results` and `kept` are those of the output folder and
`runs` is for what need not be kept. In a command `{gpu}` is the name of the machine's folder in `results`, `{minutes}` what is left for
steps of up to 50 s each, `{part}` and `{cores}` the part's own, `{index}` its GPU, `{data}` and
`{wheels}` folders.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTEST = "python3 -m pytest -o addopts= -q -p no:cacheprovider --durations 8 --record kept/{part}.json"
RECORDED = ("kept/{part}.json", "results/{gpu}/{part}.json")
NETWORKS = {
    # Network: what the package resolves; seconds to prepare on five cores; seconds of its rows, with torch.compile's for four of them.
    "ResNet-50": ("torchvision:resnet50", 50, 330),
    "ResNeXt-101_32x8d": ("torchvision:resnext101_32x8d", 100, 190),
    "ViT-B/16": ("timm:vit_base_patch16_224", 55, 170),
    "MLP-Mixer-B/16": ("timm:mixer_b16_224", 50, 130),
    "WideResNet-50-2": ("torchvision:wide_resnet50_2", 55, 250),
    "RegNetY-16GF": ("torchvision:regnet_y_16gf", 80, 220),
    "MobileNetV2": ("torchvision:mobilenet_v2", 40, 230),
    "EfficientNet-B0": ("torchvision:efficientnet_b0", 45, 265),
    "ConvNeXt-B": ("torchvision:convnext_base", 60, 205),
    "DenseNet-121": ("torchvision:densenet121", 60, 420),
}
GRAPHS = sorted(path.name.removesuffix(".onnx.gz") for path in (ROOT / "tests" / "graphs").iterdir())


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        seconds: expected. limit: after so many it is told to stop.
        cores: its own, on which it is pinned. gpus: how many it sees.
        quiet: its times or its assertions on times count, so its GPUs are its own and no other work is on any GPU.
        least: it keeps what it has done and goes on in another call, so it begins where only so many seconds are left.
        after: parts that have ended before, where they are asked for.
        data: folders of `--data` it reads.
        makes: a file without which it is not done.
        publish: (from, to) where its result counts only once it has passed.
        own_tree: a fresh copy of the code is its own, with the results as recorded.
    """

    name: str
    command: str
    seconds: int
    limit: int
    cores: int
    gpus: int = 1
    quiet: bool = False
    least: int | None = None
    after: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    makes: str | None = None
    publish: tuple[str, str] | None = None
    own_tree: bool = False
    threads: int = 2

    @property
    def needed_s(self) -> int:
        """Seconds that must be left for it to begin."""
        return self.seconds if self.least is None else self.least

    def files(self) -> list[str]:
        """Return the files of the project that the command names."""
        return [word for word in shlex.split(self.command) if word.startswith(("tests/", "evidence/", "benchmarks/", "scripts/"))]


def suite(name: str, files: str, workers: int, seconds: int, *, gpus: int = 1, quiet: bool = False) -> Part:
    """Return a run of GPU tests, recorded once all passed."""
    spread = f"-n {workers}" if workers > 1 else ""
    paths = " ".join(f"tests/{file}.py" for file in files.split())
    command = f"{PYTEST} -m gpu {spread} {paths}"
    return Part(f"tests-{name}", command, seconds, 2 * seconds + 60, max(4, 2 * workers), gpus, quiet, publish=RECORDED)


def sanitizer(tool: str, file: str, seconds: int, after: str) -> Part:
    """Return a run of the small launches under one tool.

    The tool looks for its process for 10 s unless told otherwise, which torch takes to load, and then waits for ever. Memcheck would also
    count what libraries ask the driver for and it lacks (`cuGetProcAddress` of functions newer than itself).
    """
    calls = " --report-api-errors no" if tool == "memcheck" else ""
    checker = f"compute-sanitizer --tool {tool}{calls} --error-exitcode 9"
    command = (
        f"env PYTORCH_NO_CUDA_MEMORY_CACHING=1 {checker} --launch-timeout 180 --target-processes all"
        " python3 -m pytest -o addopts= -q -m gpu -p no:cacheprovider -p no:xdist -s"
        f" --record kept/{{part}}.json --under '{checker}' tests/test_{file}_gpu.py -k memory_checker"
    )
    return Part(f"{tool}-{file}", command, seconds, 300, 3, after=(after,), publish=RECORDED)


def networks() -> list[Part]:
    """Return, for each network of the rows, a part that prepares it on the CPU and one that measures."""
    found = []
    for net, (spec, prepare_s, rows_s) in NETWORKS.items():
        name, folder = net.replace("/", "-"), f"runs/engine/{spec.replace(':', '-')}"
        common = f"--nets {net} --work runs/engine"
        prepare = f"python3 evidence/engine.py runs/none.json {common} --prepare"
        rows = f"python3 evidence/engine.py results/{{gpu}}/engine.json {common} --timing-cache kept/timings-{{index}}.json --retry-failed"
        rows += " --minutes {minutes}"
        made = f"{folder}/ready.json"
        found.append(Part(f"prepare-{name}", prepare, prepare_s, 450, 5, 0, makes=made))
        found.append(Part(f"rows-{name}", rows, rows_s, 560, 10, quiet=True, least=100, after=(f"prepare-{name}",), threads=4))
    return found


PARTS = [
    suite("runtime", "test_runtime_gpu", 1, 30, quiet=True),
    suite("methods", "test_permutation_gpu test_pruning_methods_gpu test_pruning_magnitude test_training_gpu", 1, 75, quiet=True),
    suite("two-gpus", "test_nn_gpu test_engine_two_gpus", 1, 110, gpus=2, quiet=True),
    # What of these needs one GPU only, where there is no second.
    suite("nn", "test_nn_gpu", 1, 50),
    suite("gemm", "test_gemm_gpu", 4, 130),
    suite("plain", "test_plain_gpu test_grouped_gpu test_depthwise_gpu", 4, 240),
    suite("engine", "test_engine_gpu", 4, 280),
    suite("budget", "test_report_budget", 1, 70),
    suite("narrow", "test_evidence_narrow_gpu test_evidence_depthwise_gpu", 1, 200),
    suite("compress", "test_compress_gpu", 1, 170),
    # The pictures need Chromium, which a GPU machine seldom has.
    Part(
        "tests-cpu-suite",
        "python3 -m pytest -q -n {cores} -p no:cacheprovider --ignore tests/test_report_page.py --record kept/{part}.json tests",
        200, 450, 10, 0, publish=RECORDED, own_tree=True, threads=1,
    ),
    # One tool at a time, after the tests that leave the kernels compiled.
    sanitizer("memcheck", "gemm", 35, "tests-gemm"),
    sanitizer("memcheck", "grouped", 25, "memcheck-gemm"),
    sanitizer("memcheck", "depthwise", 30, "memcheck-grouped"),
    sanitizer("memcheck", "plain", 30, "memcheck-depthwise"),
    sanitizer("racecheck", "gemm", 70, "memcheck-plain"),
    sanitizer("racecheck", "grouped", 25, "racecheck-gemm"),
    sanitizer("racecheck", "depthwise", 25, "racecheck-grouped"),
    sanitizer("racecheck", "plain", 25, "racecheck-depthwise"),
    Part(
        "agreement",
        "python3 evidence/engine_agreement.py {data} results/{gpu}/engine-agreement.json --timing-cache kept/timings-agreement.json",
        380, 560, 6, least=120, data=("cifar10", "resnet-cifar10"),
    ),
    Part("soak-plan", "python3 scripts/gpu/soak_plan.py kept/soak.plan", 75, 240, 6, makes="kept/soak.plan", threads=4),
    *(
        Part(
            f"soak-{number}",
            "python3 benchmarks/engine_soak.py kept/soak.plan --minutes 30 --part 5.1 --pause 4 --json results/{gpu}/engine-soak.json",
            335, 420, 2, after=("soak-plan",),
        )
        for number in range(1, 7)
    ),
    Part("shapes", "python3 scripts/gpu/shapes.py runs/shapes", 5, 60, 1, 0, makes="runs/shapes/val"),
    Part(
        "compress-resnet50",
        "python3 -m twofour compress torchvision:resnet50 --data imagefolder:runs/shapes --recipe finetune --epochs 3 --device cuda"
        " --out kept/compress-resnet50 --overwrite",
        330, 540, 6, after=("shapes",), threads=4,
    ),
    Part("demo", "bash scripts/gpu/demo.sh {wheels}", 220, 480, 4, own_tree=True),
    Part("mutations", "python3 tests/attacks/plan_mutations.py --count 1000000 --jobs {cores} --seed 2 --record kept/plan-mutations.json",
         190, 500, 6, 0, publish=("kept/plan-mutations.json", "results/{gpu}/plan-mutations.json"), threads=1),
    Part(
        "mutations-networks",
        "python3 tests/attacks/plan_mutations.py --count 96000 --jobs {cores} --seed 2 --record kept/plan-mutations.json"
        f" --networks {' '.join(GRAPHS)}",
        220, 540, 8, 0, after=("mutations",), publish=("kept/plan-mutations.json", "results/{gpu}/plan-mutations.json"), threads=1,
    ),
    *networks(),
    Part("products", "python3 -m twofour measure gemm --dtype fp16 --dtype bf16 --out results/{gpu}/gemm.json", 520, 560, 4, quiet=True,
         least=90),
    Part("conv-grouped", "python3 benchmarks/grouped.py --json results/{gpu}/conv.json", 110, 300, 4, quiet=True),
    Part("conv-depthwise", "python3 benchmarks/depthwise.py --json results/{gpu}/conv.json", 120, 300, 4, quiet=True),
    Part("profile", "bash scripts/gpu/ncu.sh kept fp16", 150, 330, 4, quiet=True),
    Part("nn-call-time", "python3 benchmarks/nn_call_time.py --json results/{gpu}/nn-call-time.json", 40, 180, 4, quiet=True),
    Part(
        "methods-resnets",
        "python3 evidence/methods.py {data} results/cpu/methods.json --nets ResNet-20,ResNet-32,ResNet-44,ResNet-56"
        " --jobs {cores} --device cuda",
        540, 560, 12, least=200, data=("cifar10", "resnet-cifar10"), threads=1,
    ),
    Part(
        "methods-retrained",
        "python3 evidence/methods.py {data} results/cpu/methods.json --only-retrained --jobs {cores} --device cuda",
        120, 300, 3, data=("cifar10", "resnet-cifar10"), threads=1,
    ),
    Part(
        "methods-minilm", "python3 evidence/methods.py {data} results/cpu/methods.json --nets MiniLM-L6 --jobs {cores} --device cuda",
        380, 560, 8, least=200, after=("methods-resnets",), data=("minilm", "stsb"), threads=1,
    ),
    Part("oneshot", "python3 evidence/accuracy_oneshot.py {data} results/cpu/accuracy-oneshot.json", 300, 540, 4, 0,
         data=("cifar10", "resnet-cifar10"), threads=4),
    Part("oneshot-permuted", "python3 evidence/accuracy_oneshot.py {data} results/cpu/accuracy-oneshot-permuted.json --permute",
         340, 540, 4, 0, data=("cifar10", "resnet-cifar10"), threads=4),
    Part("blocks-memory", "python3 evidence/blocks_memory.py results/{gpu}/blocks-memory.json --device cuda --layers 3",
         60, 240, 4, threads=4),
    Part("narrow", "python3 evidence/narrow.py kept/narrow.json", 150, 400, 4, quiet=True),
    Part(
        "accuracy",
        "env NARROW_CHOICES=kept/narrow.json python3 evidence/run_all.py {data} results/{gpu} --kept kept/evidence --minutes {minutes}",
        540, 560, 8, least=150, after=("narrow",), threads=4,
        data=("cifar10", "resnet-cifar10", "minilm", "stsb", "glue-sst2", "mrpc", "sick"),
    ),
]  # fmt: skip
BY_NAME = {part.name: part for part in PARTS}


def begun_with(*beginnings: str) -> tuple[str, ...]:
    """Return the names of parts that begin so."""
    return tuple(part.name for part in PARTS if part.name.startswith(beginnings))


GROUPS = {
    "tests": begun_with("tests-"),
    "sanitizer": begun_with("memcheck-", "racecheck-"),
    "soak": begun_with("soak-"),
    "mutations": begun_with("mutations"),
    "prepare": begun_with("prepare-"),
    "rows": begun_with("prepare-", "rows-"),
    "compress": ("shapes", "compress-resnet50"),
    "conv": begun_with("conv-"),
    "methods": ("blocks-memory", "methods-resnets", "methods-minilm", "oneshot", "oneshot-permuted"),
    "evidence": ("narrow", "accuracy"),
}
# On two GPUs with 32 cores a block takes at most 570 s. What stands first begins first. Quiet parts and others wait for each other, so
# most blocks hold one kind; networks are prepared for the blocks to come where cores are idle.
BLOCKS = {
    "1": "tests-two-gpus tests-runtime tests-methods tests-engine compress agreement tests-plain tests-budget tests-gemm",
    "2": "soak sanitizer demo tests-compress tests-narrow mutations",
    "3": "rows-ResNet-50 rows-ResNeXt-101_32x8d rows-ViT-B-16 rows-MLP-Mixer-B-16 prepare",
    "4": "rows-WideResNet-50-2 rows-RegNetY-16GF rows-ConvNeXt-B rows-MobileNetV2 prepare-DenseNet-121 prepare-EfficientNet-B0",
    "5": "conv profile nn-call-time narrow rows-DenseNet-121 rows-EfficientNet-B0",
    "6": "products tests-cpu-suite oneshot oneshot-permuted",
    "7": "accuracy methods-resnets blocks-memory",
    "8": "methods-minilm methods-retrained",
}


def chosen(names: list[str]) -> list[Part]:
    """Return the parts of a list of parts and groups, each once, with the networks that rows need before them.

    Raises:
        KeyError: a name that is neither.
    """
    found: dict[str, Part] = {}
    for asked in names:
        for name in GROUPS.get(asked, (asked,)):
            part = BY_NAME[name]
            found |= {before: BY_NAME[before] for before in part.after if BY_NAME[before].makes is not None}
            found[name] = part
    return list(found.values())
