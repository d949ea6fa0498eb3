"""Whole networks through the engine on one Hopper GPU: dense, 2:4, and torch.compile beside them, timed in turn by one protocol.

    python evidence/engine.py results/nvidia-h200/engine.json [--nets resnet50 …] [--batches 256 …] [--precisions fp16 bf16]
        [--work DIR] [--timing-cache FILE] [--minutes N] [--shard i/n] [--no-peer] [--retry-failed]

Networks have random weights from a fixed seed; batch-norm statistics are measured on one batch of random images, so that activations are
alive. The pruned copy is pruned by magnitude without reordering, and its statistics are measured anew. Both are exported to ONNX
(checked against torch in float64) and built: the dense one without 2:4 kernels, the pruned one with them where they are faster.
torch.compile gets the dense network in half precision, channels_last, batch-norm folded by torch's own pass, CUDA graphs
(`reduce-overhead`), and its input in half precision and channels_last already; the engine's passes begin with NCHW float32.

Times are `twofour measure`'s: back to back once the clock has settled, all variants in turn, burst and single calls beside; energy over
windows of at least 5 s. Agreement is against torch in float32 (TF32 off) on a fresh batch: the largest error over the largest output,
and the share of equal top-1 classes; beside it the error of torch's own eager run in half precision.

Each network and batch size is measured in a process of its own and its rows are written at once. A second run keeps rows of the same
kernel sources and library versions, failed ones included unless `--retry-failed`; plans and ONNX files are kept in `--work`. No step
begins after `--minutes`; the longest (a first build) takes about two. Shards of one file may run at the same time, a GPU each
(`CUDA_VISIBLE_DEVICES`); each has a timing cache of its own, named after the shard. `--prepare` only makes the networks and their ONNX
files, which needs no GPU.
"""

import argparse
import copy
import datetime
import gc
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine_rows
import torch
from engine_rows import NETWORKS, OFF, PEER, SPARSE, Group
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import twofour
from twofour.builder.tactics.versions import installed
from twofour.files import write_text, written_aside
from twofour.kernels.launchable import sources_digests
from twofour.plan import Plan
from twofour.pruning import reestimate_batchnorm
from twofour.pruning.calibration import tracked_norms
from twofour.sources import resolve_model

RECIPE = 1  # raised when networks are made another way
SIDE, CLASSES, CALIBRATION_IMAGES = 224, 1000, 32
STEMS = {OFF: "dense", SPARSE: "sparse"}
ASKED = {OFF: "off", SPARSE: "auto"}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
LIBRARIES = (
    *("torch", "torchvision", "timm", "onnx", "cuda-bindings", "nvidia-cuda-nvrtc", "nvmath-python", "nvidia-cublas"),
    *("nvidia-cusparselt-cu13", "nvidia-cudnn-frontend", "nvidia-cudnn-cu13"),
)
GROUP_S = 240.0  # taken for a group while none has been measured


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def versions() -> dict[str, str]:
    """Return the versions of the libraries that a row rests on; empty where one is absent."""
    return installed(LIBRARIES)


class TimeIsUp(Exception):
    """No further step may begin."""


@dataclass(frozen=True)
class Run:
    """What the groups of one call share. Times are seconds since 1970, because groups run in processes of their own."""

    out: Path
    work: Path
    cache: Path
    command: str
    begin: float
    end: float | None

    def step(self, what: str) -> None:
        """Say what begins, and the time left.

        Raises:
            TimeIsUp: there is none.
        """
        now = time.time()
        left = "" if self.end is None else f", {max(0.0, self.end - now):.0f} s left"
        if self.end is not None and now > self.end:
            raise TimeIsUp
        say(f"[{now - self.begin:5.0f} s{left}] {what}")

    def folder(self, net: str) -> Path:
        """Return where a network's files are kept."""
        return self.work / NETWORKS[net][0].replace(":", "-")


def images(count: int, seed: int) -> Tensor:
    """Return standard-normal images."""
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def make_network(net: str) -> nn.Module:
    """Return a network with random weights whose activations are alive.

    A matrix of zeros (some heads start so) is drawn anew, and a layer scale near zero becomes 0.1, or whole blocks would not count.
    """
    torch.manual_seed(0)
    model = resolve_model(NETWORKS[net][0]).make(CLASSES).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=0.02)
            elif "scale" in name.rpartition(".")[2] and parameter.abs().max() < 1e-3:
                parameter.fill_(0.1)
    return model


def calibrate(model: nn.Module) -> None:
    """Measure the batch-norm statistics on one batch, where there are any."""
    if tracked_norms(model):
        reestimate_batchnorm(model, [images(CALIBRATION_IMAGES, seed=1)])


def prepare(net: str, folder: Path, threads: int) -> None:
    """Write a network's dense and pruned weights and ONNX files, and last `ready.json`."""
    torch.set_num_threads(threads)
    folder.mkdir(parents=True, exist_ok=True)
    dense = make_network(net)
    calibrate(dense)
    sparse = copy.deepcopy(dense)
    example = (images(2, seed=2),)
    pruning = twofour.prune(sparse, example, permute=False, reestimate=False)
    calibrate(sparse)
    for stem, model, record in (("dense", dense, None), ("sparse", sparse, pruning)):
        with written_aside(folder / f"{stem}.safetensors") as aside:
            save_file({name: value.contiguous().clone() for name, value in model.state_dict().items()}, aside)
        twofour.export(model, example, folder / f"{stem}.onnx", pruning=record)
    write_text(folder / "ready.json", json.dumps({**recipe(), "pruned_layers": len(pruning.masks)}) + "\n")


def recipe() -> dict[str, Any]:
    """Return what a prepared network must have been made by to be used again."""
    return {"recipe": RECIPE, "torch": torch.__version__, "twofour": twofour.__version__}


def is_ready(folder: Path) -> bool:
    """Return whether a network was prepared by this recipe and these libraries."""
    path = folder / "ready.json"
    return path.is_file() and recipe().items() <= json.loads(path.read_text(encoding="utf-8")).items()


def restored(net: str, folder: Path, stem: str) -> nn.Module:
    """Return the module that an ONNX file was made from, on the GPU in float32."""
    model = resolve_model(NETWORKS[net][0]).make(CLASSES).eval()
    model.load_state_dict(load_file(folder / f"{stem}.safetensors"))
    return model.cuda()


def built(run: Run, group: Group, variant: str, machine: dict[str, Any]) -> dict[str, Any]:
    """Build one engine, first and again from the timing cache, and return what a row says of it; a plan built before is kept.

    `build_first_s` counts only what the timing cache did not hold: `layers_timed` of the network's distinct layers.
    """
    path = run.folder(group.net) / f"b{group.batch}-{group.precision}-{STEMS[variant]}.plan"
    record = path.with_suffix(".json")
    made_by = {"sources": sources_digests(), "versions": versions(), "gpu": machine["gpu"], **recipe()}
    if path.is_file() and record.is_file():
        kept: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        if kept.pop("made_by") == made_by:
            return {**kept, "path": str(path)}
    timed: list[int] = []

    def build() -> tuple[Plan, float]:
        timed.clear()
        begin = time.perf_counter()
        plan = twofour.build(
            run.folder(group.net) / f"{STEMS[variant]}.onnx",
            batch=(group.batch,),
            precision=group.precision,
            sparsity=ASKED[variant],
            device="cuda",
            timing_cache=run.cache,
            progress=lambda done, total, layer: timed.append(total),
        )
        return plan, time.perf_counter() - begin

    run.step(f"{group}, {variant}: build")
    plan, first = build()
    layers_timed = timed[0] if timed else 0
    plan.save(path)
    _, cached = build()
    (report,) = plan.about["builds"]
    found = {
        "build_first_s": first if layers_timed else None,
        "layers_timed": layers_timed,
        "build_cached_s": cached,
        "layers": len(report["layers"]),
        "layers_24": sum(layer["sparse"] for layer in report["layers"]),
        "layers_eligible": sum(layer["eligible"] for layer in report["layers"]),
        "layers_total_us": report["total_us"],
        "peak_bytes": report["peak_bytes"],
        "bound_bytes": report["bound_bytes"],
        "plan_bytes": path.stat().st_size,
    }
    write_text(record, json.dumps({**found, "made_by": made_by}) + "\n")
    return {**found, "path": str(path)}


class Compiled:
    """torch.compile where `measure_gpu` expects an engine: passes of one batch put on its stream."""

    def __init__(self, model: nn.Module, x: Tensor, precision: str) -> None:
        """Fold, convert and compile; `x`: float32 images on the GPU."""
        dtype = DTYPES[precision]
        self.plan = SimpleNamespace(precision=precision, sparsity="off")
        self.how = "channels_last, mode reduce-overhead"
        model = copy.deepcopy(model)
        if tracked_norms(model):
            model, self.how = folded(model), f"batch-norm folded by torch.fx, {self.how}"
        self._x = x.to(dtype).contiguous(memory_format=torch.channels_last)
        # NOTE: without the mark every call would first copy the input into the CUDA graph's own memory.
        torch._dynamo.mark_static_address(self._x)
        self._call = torch.compile(model.to(dtype).to(memory_format=torch.channels_last), mode="reduce-overhead")
        self._streams: dict[int, Any] = {}

    def __call__(self) -> Tensor:
        """Return the output of one pass."""
        with torch.no_grad():
            found: Tensor = self._call(self._x)
        return found

    def passes(self, batch: int, sets: int = 2) -> Callable[[int], None]:
        """Return what puts a pass on a stream, warmed up."""

        def put(stream: int) -> None:
            if stream not in self._streams:
                self._streams[stream] = torch.cuda.ExternalStream(stream)
            with torch.cuda.stream(self._streams[stream]):
                self()

        return put


def folded(model: nn.Module) -> nn.Module:
    """Return the model with batch norms behind convolutions folded into them, by torch's own pass."""
    from torch.fx.experimental.optimization import fuse

    found: nn.Module = fuse(model)
    return found


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Return max |found − wanted| / max |wanted|."""
    return float((found.float() - wanted).abs().max() / wanted.abs().max())


def agreement(found: Tensor, wanted: Tensor, torch_half: Tensor) -> dict[str, Any]:
    """Return how an output stands to torch's in float32, beside torch's own in half precision."""
    same = [(y.argmax(1) == wanted.argmax(1)).double().mean().item() for y in (found, torch_half)]
    errors = [relative_error(y, wanted) for y in (found, torch_half)]
    return {"error": errors[0], "torch_error": errors[1], "top1": same[0], "torch_top1": same[1], "items": len(wanted)}


@torch.no_grad()
def references(group: Group, folder: Path, stem: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return torch's outputs in float32 and, eagerly and channels_last, in half precision."""
    model = restored(group.net, folder, stem)
    wanted = model(x)
    half = model.to(DTYPES[group.precision]).to(memory_format=torch.channels_last)
    return wanted, half(x.to(DTYPES[group.precision]).contiguous(memory_format=torch.channels_last)).float()


def sentence(error: BaseException) -> str:
    """Return an error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def measure_group(run: Run, group: Group, variants: tuple[str, ...]) -> None:
    """Build, compare and measure the variants of one group, in turn, and write their rows.

    Raises:
        TimeIsUp: a step would begin too late; what was built is kept.
    """
    from twofour.report.gpu import measure_gpu
    from twofour.timing.gpu import Stopwatch

    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = True  # the peer's convolutions are the fastest that torch can find
    watch, folder = Stopwatch(), run.folder(group.net)
    machine = watch.meter.machine()
    x = images(group.batch, seed=3).cuda()
    contenders: dict[str, Any] = {}
    facts: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    outputs: dict[str, tuple[Tensor, Tensor]] = {}
    for variant in variants:
        try:
            if variant == PEER:
                run.step(f"{group}, {variant}: compile")
                begin = time.perf_counter()
                contenders[variant] = peer = Compiled(restored(group.net, folder, "dense"), x, group.precision)
                for _ in range(3):
                    peer.passes(group.batch)(int(watch.stream))
                watch.synchronize()
                facts[variant] = {"how": peer.how, "compile_s": time.perf_counter() - begin}
                found = peer().float()
            else:
                facts[variant] = built(run, group, variant, machine)
                run.step(f"{group}, {variant}: load and compare")
                begin = time.perf_counter()
                contenders[variant] = engine = twofour.load(facts[variant].pop("path"))
                found = engine(x)
                torch.cuda.synchronize()
                facts[variant]["load_s"] = time.perf_counter() - begin
            stem = STEMS.get(variant, "dense")
            if stem not in outputs:
                outputs[stem] = references(group, folder, stem, x)
            facts[variant]["agreement"] = agreement(found, *outputs[stem])
        except TimeIsUp:
            raise
        except Exception as error:  # noqa: BLE001 - whatever one way to run raises is its row's; the others go on
            contenders.pop(variant, None)
            failed[variant] = sentence(error)
            say(f"        {group}, {variant} FAILED: {failed[variant]}")
    gc.collect()
    torch.cuda.empty_cache()
    head = {"net": group.net, "batch": group.batch, "precision": group.precision}
    rows = [{**head, "variant": variant, **failed_row(machine, text)} for variant, text in failed.items()]
    if contenders:
        run.step(f"{group}: measure {', '.join(contenders)}")
        for found in measure_gpu(contenders, batch=(group.batch,), watch=watch):
            row = {**head, "variant": found.name, **common(machine), "ms": found.gpu_ms, **found.to_json(), **facts[found.name]}
            rows.append({name: value for name, value in row.items() if name not in ("name", "sparsity", "gpu_ms")})
            say(f"        {group}, {found}")
    engine_rows.add(run.out, head_of(run, machine), rows)


def common(machine: dict[str, Any]) -> dict[str, Any]:
    """Return what every row carries: the machine, the versions, the kernels' sources, the date."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {**machine, "versions": versions(), "sources": sources_digests(), "date": now}


def failed_row(machine: dict[str, Any], text: str) -> dict[str, Any]:
    """Return the rest of a row that could not be measured."""
    return {**common(machine), "error": text}


def head_of(run: Run, machine: dict[str, Any]) -> dict[str, Any]:
    """Return the head of the results file."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"machine": {**machine, "libraries": versions()}, "date": now, "command": run.command}


def in_child(work: Callable[..., None], *arguments: Any) -> None:
    """Run `work` in a process of its own; if that process dies, this one does not."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        pool.submit(work, *arguments).result()


def prepare_all(run: Run, nets: list[str]) -> dict[str, str]:
    """Prepare networks side by side on the CPU, and return why some could not be."""
    cores = len(os.sched_getaffinity(0))
    threads = max(1, min(8, cores // max(1, len(nets))))
    failed: dict[str, str] = {}
    with ProcessPoolExecutor(max(1, cores // threads), get_context("spawn")) as pool:
        asked = {net: pool.submit(prepare, net, run.folder(net), threads) for net in nets}
        for net, future in asked.items():
            try:
                future.result()
            except Exception as error:  # noqa: BLE001 - recorded as the network's
                failed[net] = sentence(error)
            try:
                run.step(f"{net}: {failed.get(net, 'prepared')}")
            except TimeIsUp:
                pool.shutdown(cancel_futures=True)
                raise
    return failed


def measure_all(run: Run, todo: dict[Group, tuple[str, ...]]) -> None:
    """Measure the groups one after the other; one that fails is recorded and does not stop the others.

    Raises:
        TimeIsUp: before all are done.
    """
    nets = list(dict.fromkeys(group.net for group in todo))
    if unready := [net for net in nets if not is_ready(run.folder(net))]:
        run.step(f"prepare {', '.join(unready)}")
        unprepared = prepare_all(run, unready)
    else:
        unprepared = {}
    took: list[float] = []
    for number, (group, variants) in enumerate(todo.items()):
        expected = sum(took) / len(took) if took else GROUP_S
        run.step(f"{group} ({number + 1} of {len(todo)}): {', '.join(variants)}; all done in about {expected * (len(todo) - number):.0f} s")
        begin = time.monotonic()
        try:
            if group.net in unprepared:
                raise RuntimeError(unprepared[group.net])
            in_child(measure_group, run, group, variants)
        except TimeIsUp:
            raise
        except Exception as error:  # noqa: BLE001 - recorded as the group's
            text = unprepared.get(group.net) or sentence(error)
            say(f"        {group} FAILED: {text}")
            head = {"net": group.net, "batch": group.batch, "precision": group.precision}
            # The child may have ended the GPU's context: what is known of the machine without it must do.
            machine = json.loads(run.work.joinpath("machine.json").read_text(encoding="utf-8"))
            rows = [{**head, "variant": variant, **failed_row(machine, text)} for variant in variants]
            engine_rows.add(run.out, head_of(run, machine), rows)
        took.append(time.monotonic() - begin)


def note_machine(path: Path) -> None:
    """Write which GPU this is; in a process of its own, so that the caller never holds a context.

    Raises:
        UnsupportedError, MissingExtraError: there is none that can be used.
    """
    from twofour.builder.gpu import require_gpu
    from twofour.timing.gpu import Meter

    require_gpu()
    write_text(path, json.dumps(Meter().machine()) + "\n")


def command_of(options: argparse.Namespace) -> str:
    """Return the command that measures the same, but for `--nets` (`engine_rows.add`): without folders, and how it was cut into parts."""
    words = ["python", "evidence/engine.py", options.out.name]
    for name in ("batches", "precisions"):
        chosen = getattr(options, name)
        if chosen and chosen != ["fp16"]:
            words += [f"--{name}", *map(str, chosen)]
    return shlex.join(words + ["--no-peer"] * options.no_peer)


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--nets", nargs="*", default=[], help="all by default")
    parser.add_argument("--batches", nargs="*", type=int, default=[], help="each network's own by default")
    parser.add_argument("--precisions", nargs="*", choices=list(DTYPES), default=["fp16"])
    parser.add_argument("--work", type=Path, default=Path("runs") / "engine", help="where networks and plans are kept")
    parser.add_argument("--timing-cache", type=Path, help="by default in --work")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--shard", default="1/1", metavar="I/N")
    parser.add_argument("--prepare", action="store_true", help="only make the networks")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--retry-failed", action="store_true")
    options = parser.parse_args()
    shard = engine_rows.parse_shard(options.shard)
    groups = engine_rows.groups(options.nets, options.batches, options.precisions, shard)
    cache = options.timing_cache or options.work / "timing-cache.json"
    if shard[1] > 1:
        cache = cache.with_stem(f"{cache.stem}-{shard[0]}-of-{shard[1]}")
    begin = time.time()
    end = None if options.minutes is None else begin + 60 * options.minutes
    run = Run(options.out, options.work, cache, command_of(options), begin, end)
    if options.prepare:
        unready = [net for net in dict.fromkeys(group.net for group in groups) if not is_ready(run.folder(net))]
        sys.exit("\n".join(prepare_all(run, unready).values()) or None)
    rows, sources, installed = engine_rows.read(run.out)["rows"], sources_digests(), versions()
    asked = {"peer": not options.no_peer, "retry_failed": options.retry_failed}
    wanted = {group: engine_rows.missing(group, rows, sources, installed, **asked) for group in groups}
    todo = {group: variants for group, variants in wanted.items() if variants}
    say(f"{len(groups) - len(todo)} of {len(groups)} groups are measured already")
    if todo:
        run.work.mkdir(parents=True, exist_ok=True)
        in_child(note_machine, run.work / "machine.json")
    try:
        measure_all(run, todo)
    except TimeIsUp:
        say("the time is up and rows are missing: call the same command again")
        sys.exit(3)
    for entry in engine_rows.summary(engine_rows.read(run.out)["rows"]):
        say(json.dumps(entry, ensure_ascii=False))


if __name__ == "__main__":
    main()
