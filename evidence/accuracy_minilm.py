"""MiniLM pruned to 2:4 and trained on with distillation, beside the dense network given the same training: STS-B and SST-2.

    python evidence/accuracy_minilm.py FOLDER results/GPU/accuracy-stsb.json --task stsb
    python evidence/accuracy_minilm.py FOLDER results/GPU/accuracy-sst2.json --task sst2
    python evidence/accuracy_minilm.py FOLDER results/GPU/accuracy-stsb-recipe.json --task stsb --search --seeds 2

FOLDER as in `methods.py`, with `glue-sst2/`, `mrpc/` and `sick/` beside the others. Both arms start from the same dense weights, see the
same batches in the same order and are pulled towards the same dense network: its hidden states, and its embeddings or logits. STS-B: all
36 linear layers of the encoder, Spearman of the cosine of mean-pooled embeddings; the labels are those of STS-B, the further sentences
for distillation have none. SST-2: a classifier is trained on the dense encoder first. Recipes are chosen on dev, the test split is
reported.
"""

import argparse
import copy
import itertools
import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from arms import CONTROL
from filelock import FileLock, Timeout
from fleet import leave_default_stream
from ledger import Record, add_arguments, best, command_of, deadline, pattern_of, rows_of, shared_over_gpus
from safetensors.torch import load_model, save_model
from scipy.stats import spearmanr
from sentences import PRUNED, Encoder, Tokens, labelled, pairs, published_encoder, unlabelled
from torch import Tensor, nn
from torch.nn import functional as F

import twofour
from twofour.pruning.methods import METHODS

log = logging.getLogger("accuracy_minilm")
SHOWN = ("task", "seeds", "search", "steps", "lr", "batch", "labels", "distill", "method", "images")
TEMPERATURE = 2.0
CALIBRATION_SENTENCES, CALIBRATION_ITEMS = 1024, 32


@dataclass(frozen=True)
class Recipe:
    """AdamW, a tenth of the steps of linear warm-up, cosine to zero; loss = labels · task + distill · (hidden states + outputs).

    Attributes:
        batch: labelled items a step; STS-B adds twice as many sentences without labels.
        method: of pruning, where the 2:4 network starts.
        unseen: no sentence without a label is one of STS-B's dev or test split; so `sentences.unlabelled` gives them.
    """

    steps: int
    lr: float
    batch: int
    labels: float
    distill: float
    method: str = "alps"
    weight_decay: float = 0.01
    unseen: bool = False

    def lr_of(self, step: int) -> float:
        """Return the learning rate of a step."""
        warm = min(1.0, (step + 1) / max(1, self.steps // 10))
        return self.lr * warm * 0.5 * (1 + math.cos(math.pi * step / self.steps))


RECIPES = {
    "stsb": Recipe(steps=1200, lr=2e-4, batch=32, labels=1.0, distill=1.0, unseen=True),
    "sst2": Recipe(steps=1500, lr=1e-4, batch=64, labels=0.5, distill=1.0),
}
DENSE = Recipe(steps=2800, lr=5e-5, batch=64, labels=1.0, distill=0.0)
SEARCH = {"stsb": ((1e-4, 4e-4), (0.0, 1.0), (1.0,)), "sst2": ((5e-5, 2e-4), (0.5,), (0.0, 1.0))}


def orders(num: int, items: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Give batches of indices without end, every index once an epoch."""
    while True:
        for part in torch.randperm(num, generator=generator).split(items):
            if len(part) == items or num < items:
                yield part.tolist()


def example_of(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Return the first two sentences as a model takes them."""
    return tokens.batch(torch.tensor([0, 1], device=tokens.table.device), tokens.length([0, 1]))


def apart(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Return the mean over layers of ‖h − t‖² / ‖t‖² over the tokens that count."""
    parts = []
    for h, t in zip(student[1:], teacher[1:], strict=True):
        counted = mask[..., None]
        parts.append((((h - t).float() ** 2) * counted).sum() / ((t.float() ** 2) * counted).sum())
    return torch.stack(parts).mean()


class StsB:
    """Pairs with scores, and sentences without."""

    num_classes = 0
    metric = "Spearman"

    def __init__(self, folder: Path, device: torch.device, limit: int | None) -> None:
        self.tokens, self.scores = {}, {}
        for split in ("train", "dev", "test"):
            lines = pairs(folder, split)[:limit]
            self.tokens[split] = Tokens(folder, [text for one, other, _ in lines for text in (one, other)], device)
            self.scores[split] = torch.tensor([score for *_, score in lines], device=device)
        # The sentences of the pairs first, then those without a label.
        lines, others = pairs(folder, "train")[:limit], unlabelled(folder)[:limit]
        self.num_others = len(others)
        self.tokens["train"] = Tokens(folder, [text for one, other, _ in lines for text in (one, other)] + others, device)
        self.example = example_of(self.tokens["train"])

    def batches(self, recipe: Recipe, seed: int) -> Iterator[list[int]]:
        """Give indices of sentences without end: pair after pair, then, to distill from, some of those without a label."""
        g = torch.Generator().manual_seed(seed)
        paired, further = orders(len(self.scores["train"]), recipe.batch, g), orders(self.num_others, 2 * recipe.batch, g)
        for chosen, rest in zip(paired, further, strict=True):
            which = [2 * i + k for i in chosen for k in (0, 1)]
            yield which + [2 * len(self.scores["train"]) + i for i in rest] if recipe.distill else which

    def loss(self, model: Encoder, teacher: Encoder, which: Tensor, length: int, recipe: Recipe) -> Tensor:
        """Return the loss of one step."""
        ids, mask = self.tokens["train"].batch(which, length)
        outputs, states = model.with_states(ids, mask)
        chosen = which[: 2 * min(recipe.batch, len(self.scores["train"])) : 2] // 2
        e = F.normalize(outputs[: 2 * len(chosen)].float(), dim=1)
        loss = recipe.labels * F.mse_loss((e[0::2] * e[1::2]).sum(1), self.scores["train"][chosen] / 5)
        if recipe.distill:
            with torch.no_grad():
                theirs, their_states = teacher.with_states(ids, mask)
            turned = 1 - F.cosine_similarity(outputs.float(), theirs.float())
            loss = loss + recipe.distill * (apart(states, their_states, mask) + turned.mean())
        return loss

    def judge(self, model: nn.Module, split: str) -> float:
        """Return Spearman's correlation × 100 of cosines and scores."""
        e = F.normalize(self.tokens[split].outputs(model).float(), dim=1)
        cosine = (e[0::2] * e[1::2]).sum(1)
        return round(100 * float(spearmanr(cosine.cpu().numpy(), self.scores[split].cpu().numpy()).statistic), 4)

    names: ClassVar = {"dev": "STS-B dev", "test": "STS-B test"}


class Sst2:
    """Sentences with one of two labels."""

    num_classes = 2
    metric = "accuracy"

    def __init__(self, folder: Path, device: torch.device, limit: int | None) -> None:
        self.tokens, self.labels = {}, {}
        for split in ("train", "dev", "test"):
            lines = labelled(folder, split)[:limit]
            self.tokens[split] = Tokens(folder, [text for text, _ in lines], device)
            self.labels[split] = torch.tensor([label for _, label in lines], device=device)
        self.example = example_of(self.tokens["train"])

    def batches(self, recipe: Recipe, seed: int) -> Iterator[list[int]]:
        """Give indices of sentences without end."""
        return orders(len(self.labels["train"]), recipe.batch, torch.Generator().manual_seed(seed))

    def loss(self, model: Encoder, teacher: Encoder, which: Tensor, length: int, recipe: Recipe) -> Tensor:
        """Return the loss of one step."""
        ids, mask = self.tokens["train"].batch(which, length)
        y, states = model.with_states(ids, mask)
        y = y.float()
        loss = recipe.labels * F.cross_entropy(y, self.labels["train"][which])
        if recipe.distill:
            with torch.no_grad():
                theirs, their_states = teacher.with_states(ids, mask)
                soft = (theirs.float() / TEMPERATURE).log_softmax(1)
            matched = F.kl_div((y / TEMPERATURE).log_softmax(1), soft, log_target=True, reduction="batchmean")
            loss = loss + recipe.distill * (TEMPERATURE**2 * matched + apart(states, their_states, mask))
        return loss

    def judge(self, model: nn.Module, split: str) -> float:
        """Return the accuracy in percent."""
        right = self.tokens[split].outputs(model).argmax(1) == self.labels[split]
        return round(100 * float(right.double().mean()), 4)

    names: ClassVar = {"dev": "SST-2 held-out training sentences", "test": "SST-2 test (GLUE's dev)"}


class Steps:
    """The steps of one training; on a GPU a graph for each length of a batch, captured when it first comes up."""

    def __init__(self, model: Encoder, teacher: Encoder, task: Any, recipe: Recipe, *, seed: int, sparse: bool) -> None:
        device = task.example[0].device
        self.model, self.teacher, self.task, self.recipe, self.on_gpu = model.train(), teacher, task, recipe, device.type == "cuda"
        self.captured = self.on_gpu and not os.environ.get("EAGER")
        decayed = [p for p in model.parameters() if p.ndim > 1]
        plain = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.rates = torch.tensor([recipe.lr_of(step) for step in range(recipe.steps)], device=device)
        self.lr = self.rates[0].clone()
        # NOTE: without labels the dense control has next to no gradient; a smaller eps would blow its rounding up to whole steps.
        self.optimizer = torch.optim.AdamW(groups, lr=self.lr, eps=1e-6, fused=self.on_gpu, capturable=self.on_gpu)
        self.held = twofour.hold(model, self.optimizer) if sparse else None
        self.batches = [which for _, which in zip(range(recipe.steps), task.batches(recipe, seed), strict=False)]
        self.order = torch.tensor(self.batches).to(device)
        self.which, self.total = self.order[0].clone(), torch.zeros((), device=device)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def step(self, length: int) -> None:
        """One step on the sentences `which`, padded to `length`; all it reads and writes has a fixed place."""
        with torch.autocast(self.which.device.type, torch.bfloat16, enabled=self.on_gpu):
            loss = self.task.loss(self.model, self.teacher, self.which, length, self.recipe)
        # Not `backward`: an accumulator made on another stream would pull that stream into a capture.
        parameters = list(self.model.parameters())
        for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.grad = gradient
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        self.total += loss.detach()

    def capture(self, length: int) -> torch.cuda.CUDAGraph:
        """Return the graph of a step; values are as before."""
        for p in self.model.parameters():
            # What the first step would make, so that all it changes is there to be kept.
            state = self.optimizer.state[p]
            if not state:
                state |= {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        changed = [*self.model.parameters(), *states, self.total]
        kept = [t.detach().clone() for t in changed]
        for _ in range(2):
            self.step(length)
        with torch.no_grad():
            torch._foreach_copy_([t.detach() for t in changed], kept)
        graph = torch.cuda.CUDAGraph()
        first = next(iter(self.graphs.values()), None)
        with torch.cuda.graph(graph, pool=None if first is None else first.pool()):
            self.step(length)
        return graph

    def run(self, index: int) -> None:
        """Run the step of that number."""
        self.which.copy_(self.order[index])
        self.lr.copy_(self.rates[index])
        length = self.task.tokens["train"].length(self.batches[index])
        if not self.captured:
            self.step(length)
            return
        if length not in self.graphs:
            self.graphs[length] = self.capture(length)
        self.graphs[length].replay()


def train(model: Encoder, teacher: Encoder, task: Any, recipe: Recipe, *, seed: int, sparse: bool, until: float = math.inf) -> float:
    """Train in place, `sparse` with its zeros held, and return the seconds.

    Raises:
        TimeoutError: time is up.
        RuntimeError: the loss is not finite.
    """
    started = time.monotonic()
    if started > until:
        raise TimeoutError("time was up before training began")
    torch.manual_seed(seed)
    steps = Steps(model, teacher, task, recipe, seed=seed, sparse=sparse)
    for step in range(recipe.steps):
        steps.run(step)
        if (step + 1) % 200 == 0 or step + 1 == recipe.steps:
            mean = float(steps.total) / (step % 200 + 1)
            steps.total.zero_()
            if not math.isfinite(mean):
                raise RuntimeError(f"step {step + 1}: mean loss {mean}, expected a finite number; lower the learning rate")
            log.info("step %d/%d: mean loss %.4f, %.0f s", step + 1, recipe.steps, mean, time.monotonic() - started)
            if time.monotonic() > until and step + 1 < recipe.steps:
                raise TimeoutError(f"time is up after step {step + 1} of {recipe.steps}")
    if steps.held is not None:
        steps.held.check()
        steps.held.remove()
    for p in model.parameters():
        p.grad = None
    return time.monotonic() - started


def dense_network(task: Any, folder: Path, kept: Path, device: torch.device, steps: int, until: float = math.inf) -> Encoder:
    """Return the published encoder, for SST-2 with a classifier that is trained here once and written to `kept`.

    Raises:
        TimeoutError: time is up, of its training or of waiting for another process that trains it.
    """
    torch.manual_seed(0)
    dropout = 0.1 if task.num_classes else 0.0
    model = published_encoder(folder, num_classes=task.num_classes, dropout=dropout).to(device)
    if task.num_classes:
        kept.mkdir(parents=True, exist_ok=True)
        path = kept / f"minilm-sst2-{len(task.labels['train'])}-sentences-{steps}-steps.safetensors"
        try:
            with FileLock(path.with_suffix(".lock"), timeout=-1 if math.isinf(until) else max(0.0, until - time.monotonic())):
                if not path.exists():
                    log.info("dense: %d steps", steps)
                    train(model, model, task, replace(DENSE, steps=steps), seed=0, sparse=False, until=until)
                    save_model(model, str(path.with_suffix(".tmp")))
                    path.with_suffix(".tmp").replace(path)
        except Timeout as error:
            raise TimeoutError("time is up while another process trains the dense network") from error
        load_model(model, path)
    for module in model.modules():
        # The pull towards the dense network's states asks for the same function of the same input.
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def pruned(dense: Encoder, task: Any, method: str, kept: Path, tag: str) -> Encoder:
    """Return the dense network pruned; written to `kept` by whichever process comes first."""
    kept.mkdir(parents=True, exist_ok=True)
    path = kept / f"minilm-{tag}-{method}.safetensors"
    model = copy.deepcopy(dense).eval()
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            tokens = task.tokens["train"]
            chosen = sorted(range(min(CALIBRATION_SENTENCES, len(tokens))), key=tokens.sizes.__getitem__)
            parts = [chosen[at : at + CALIBRATION_ITEMS] for at in range(0, len(chosen), CALIBRATION_ITEMS)]
            device = task.example[0].device
            calibration = [tokens.batch(torch.tensor(which, device=device), tokens.length(which)) for which in parts]
            batches = calibration if METHODS[method].is_calibrated else None
            model.to(device)
            log.info("%s", twofour.prune(model, task.example, method=method, permute=False, calibration=batches, **PRUNED))
            save_model(model, str(path.with_suffix(".tmp")))
            path.with_suffix(".tmp").replace(path)
    load_model(model, path)
    return model.to(task.example[0].device)


def recipes(search: bool, base: Recipe, task: str) -> list[Recipe]:
    """Return the recipes to try."""
    if not search:
        return [base]
    return [replace(base, lr=lr, labels=labels, distill=distill) for lr, labels, distill in itertools.product(*SEARCH[task])]


def best_of(path: Path, base: Recipe, metric: str) -> Recipe:
    """Return `base` with learning rate and weights of the losses that a search found best on dev (`ledger.best`)."""
    values: dict[tuple[float, ...], list[float]] = {}
    controls: dict[tuple[float, ...], list[float]] = {}
    for row in rows_of(path):
        if row["variant"] in ("2:4", CONTROL) and "test" not in row["data"] and row["metric"] == metric:
            key = tuple(row["recipe"][name] for name in ("lr", "labels", "distill"))
            (values if row["variant"] == "2:4" else controls).setdefault(key, []).append(row["value"])
    if not values:
        raise SystemExit(f"{path} holds no 2:4 row judged on dev, expected those of --search; run it first")
    lr, labels, distill = best(values, controls)
    return replace(base, lr=lr, labels=labels, distill=distill)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, seeds=5)
    parser.add_argument("--task", choices=list(RECIPES), required=True)
    parser.add_argument("--search", action="store_true", help="several recipes, judged on dev only")
    parser.add_argument("--searched", type=Path, help="results of --search whose best learning rate and weights of the losses to take")
    parser.add_argument("--steps", type=int, help="of every training, that of the dense classifier too")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--labels", type=float)
    parser.add_argument("--distill", type=float)
    parser.add_argument("--method", choices=list(METHODS), help="of pruning")
    a = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if shared_over_gpus(a):
        return
    leave_default_stream()
    torch.backends.cuda.enable_cudnn_sdp(False)  # builds a plan for every shape
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    given = {name: getattr(a, name) for name in ("steps", "lr", "batch", "labels", "distill", "method") if getattr(a, name) is not None}
    base = replace(RECIPES[a.task], **given)
    task: Any = (StsB if a.task == "stsb" else Sst2)(a.folder, device, a.images)
    if a.searched is not None:
        base = best_of(a.searched, base, task.metric)
        a.lr, a.labels, a.distill = base.lr, base.labels, base.distill
    record = Record(a.out, command_of("accuracy_minilm.py", a, SHOWN), a.shard)
    splits = ["dev"] if a.search else ["dev", "test"]
    head = {"experiment": "retraining", "net": "MiniLM-L6", "metric": task.metric}
    # Rows of a trial are not those of the whole.
    names = {split: name + ("" if a.images is None else f", first {a.images}, of a trial") for split, name in task.names.items()}

    methods = tuple(dict.fromkeys(("magnitude", base.method)))
    trainings = [
        {"variant": variant, "seed": seed, "recipe": asdict(recipe)}
        for seed in range(a.shard[0], a.seeds, a.shard[1])
        for recipe in recipes(a.search, base, a.task)
        for variant in (CONTROL, "2:4")
    ]
    alone = [{"variant": v, "seed": None, "recipe": None} for v in ("dense", *(f"2:4 one-shot, {method}" for method in methods))]
    if all(record.has({**head, "data": names["dev"], **about}) for about in (*alone, *trainings)):
        log.info("%s: nothing is left to do", a.task)
        return
    try:
        dense = dense_network(task, a.folder, a.kept, device, a.steps or DENSE.steps, deadline(a))
    except TimeoutError as error:
        raise SystemExit(f"dense: {error}; run the same command again to go on") from error
    teacher = copy.deepcopy(dense).eval().requires_grad_(False)
    # Only the dense classifier of SST-2 depends on the steps.
    tag = f"{a.task}-{a.images or 'all'}" + (f"-{a.steps or DENSE.steps}" if task.num_classes else "")
    sparse = {method: pruned(dense, task, method, a.kept, tag) for method in methods}

    def rows(model: nn.Module, **about: Any) -> list[dict[str, Any]]:
        if about["variant"].startswith("2:4"):
            about |= pattern_of(model, [n for n, p in model.named_parameters() if n.startswith("bert.encoder.layer.") and p.ndim == 2])
        return [{**head, "data": names[split], **about, "value": task.judge(model, split)} for split in splits]

    record.add(*rows(dense, variant="dense", seed=None, recipe=None))
    for method, model in sparse.items():
        record.add(*rows(model, variant=f"2:4 one-shot, {method}", seed=None, recipe=None))
    for about in trainings:
        if record.has({**head, "data": names["dev"], **about}):
            continue
        is_sparse = about["variant"] == "2:4"
        recipe = replace(base, **about["recipe"])
        model = copy.deepcopy(sparse[base.method] if is_sparse else dense)
        try:
            seconds = train(model, teacher, task, recipe, seed=about["seed"], sparse=is_sparse, until=deadline(a))
        except TimeoutError as error:
            raise SystemExit(f"{error}; run the same command again to go on") from error
        new = rows(model, **about, gpu_seconds=round(seconds / len(splits) / a.per_gpu, 2))
        record.add(*new)
        told = ", ".join(f"{row['data']} {row['value']:.2f}" for row in new)
        log.info("seed %d %s %s: %s", about["seed"], about["variant"], recipe, told)


if __name__ == "__main__":
    main()
