"""Many small networks trained at once on one GPU: all steps of all networks in one CUDA graph, a branch a network.

A network this small leaves most of a GPU idle and spends its time on launches. Forward, loss and gradients are compiled once an
architecture and shared by all networks that have it; the weights reach the compiled code as arguments. Several steps of every network,
with augmentation, masks and learning rate, are captured into one graph, in which each network is a branch of its own. Without a GPU the
same steps run one after the other.
"""

import copy
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import twofour
from twofour.training import sr_ste

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PAD = 4
TEMPERATURE = 4.0
STEPS_A_GRAPH = 8
NEVER = 2**31
SECONDS_A_SAVE = 60.0


class OutOfTimeError(RuntimeError):
    """Training stopped at the end of an epoch, or did not begin, because its time was up; its state was saved."""


@dataclass(frozen=True)
class Recipe:
    """Nesterov SGD with momentum 0.9, one epoch of linear warm-up, cosine to zero; random crops and flips.

    Attributes:
        distill: weight of the dense network's soft labels (temperature 4) in the loss; the rest is cross-entropy.
        method: of pruning, where the 2:4 network starts.
    """

    epochs: int = 40
    lr: float = 0.1
    weight_decay: float = 1e-4
    batch: int = 128
    distill: float = 0.0
    method: str = "magnitude"

    def lr_of(self, step: int, steps_an_epoch: int) -> float:
        """Return the learning rate of a step."""
        total = self.epochs * steps_an_epoch
        warm = min(1.0, (step + 1) / steps_an_epoch)
        return self.lr * warm * 0.5 * (1 + math.cos(math.pi * step / total))


def leave_default_stream() -> None:
    """Put all further work of this thread on a stream of its own, before the first Member is made.

    NOTE: a gradient accumulator made on the default stream would pull that stream into a capture, which CUDA forbids.
    """
    if torch.cuda.is_available():
        torch.cuda.set_stream(torch.cuda.Stream())


class Images:
    """Images as bytes `[n, 3, 40, 40]` with a black border, and labels, on the device."""

    def __init__(self, images: Tensor, labels: Tensor, device: torch.device) -> None:
        """Take uint8 `[n, 3, 32, 32]`."""
        self.padded = F.pad(images.to(device), (PAD,) * 4)
        self.labels = labels.to(device)
        self.mean = torch.tensor(MEAN, device=device).view(3, 1, 1)
        self.std = torch.tensor(STD, device=device).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def plain(self, count: int | None = None) -> Tensor:
        """Return all images or the first so many, normalised."""
        return normalised(self.padded[:count, :, PAD:-PAD, PAD:-PAD], self.mean, self.std)


def normalised(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return fp32 channels-last images."""
    return ((pixels.float() / 255 - mean) / std).to(memory_format=torch.channels_last)


@dataclass
class Feed:
    """The images of an epoch in order, each with its crop and flip, and where training stands. Every tensor keeps its place."""

    images: Images
    rates: Tensor
    batch: int
    generator: torch.Generator

    def __post_init__(self) -> None:
        n, device = len(self.images), self.images.labels.device
        self.order = torch.zeros(n, dtype=torch.long, device=device)
        self.shift = torch.zeros(2, n, dtype=torch.long, device=device)
        self.flip = torch.zeros(n, dtype=torch.bool, device=device)
        self.step_index = torch.zeros(1, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.in_batch, self.pixel = torch.arange(self.batch, device=device), torch.arange(32, device=device)
        self.channel = torch.arange(3, device=device)[None, :, None, None]
        # A tensor, so that a captured step reads it; only the fused optimizer takes one.
        self.lr = self.rates[0].clone()

    def shuffle(self) -> None:
        """Draw the next epoch's order, crops and flips."""
        n, g, device = len(self.images), self.generator, self.order.device
        self.order.copy_(torch.randperm(n, generator=g, device=device))
        self.shift.copy_(torch.randint(0, 2 * PAD + 1, self.shift.shape, generator=g, device=device))
        self.flip.copy_(torch.rand(n, generator=g, device=device) < 0.5)
        self.position.zero_()

    def tensors(self) -> tuple[Tensor, ...]:
        """Return what `next_batch` takes."""
        i = self.images
        where = (self.order, self.shift, self.flip, self.position, self.in_batch, self.pixel, self.channel)
        return (i.padded, i.labels, i.mean, i.std, *where, self.rates, self.step_index, self.lr)


def next_batch(
    padded: Tensor,
    labels: Tensor,
    mean: Tensor,
    std: Tensor,
    order: Tensor,
    shift: Tensor,
    flip: Tensor,
    position: Tensor,
    in_batch: Tensor,
    pixel: Tensor,
    channel: Tensor,
    rates: Tensor,
    step_index: Tensor,
    lr: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the next images, augmented, and their labels; set the learning rate and move on by one step."""
    ids = order[position + in_batch]
    rows = shift[0, ids][:, None] + pixel
    columns = shift[1, ids][:, None] + torch.where(flip[ids][:, None], 31 - pixel, pixel)
    pixels = padded[ids[:, None, None, None], channel, rows[:, None, :, None], columns[:, None, None, :]]
    lr.copy_(rates[step_index][0])
    position.add_(len(in_batch))
    step_index.add_(1)
    return normalised(pixels, mean, std), labels[ids]


class Program:
    """Batches, loss and outputs of one architecture, for all networks that have it.

    Compiled, a second network of the architecture compiles nothing: parameters and buffers are arguments.

    Attributes:
        bf16: whether convolutions and linear layers run in bf16, as under autocast.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        compiled: bool,
        regions: tuple[type[nn.Module], ...] = (),
        backend: str = "inductor",
        bf16: bool = torch.cuda.is_available(),
    ) -> None:
        """Take a network of the architecture; its values do not matter.

        Args:
            regions: compile modules of these classes one by one, alike ones once, instead of the whole: compiling takes seconds at
                any depth.
        """
        self.training, self.inference = copy.deepcopy(model).train(), copy.deepcopy(model).eval()
        self.bf16 = bf16
        self.next_batch: Callable[..., tuple[Tensor, Tensor]] = next_batch
        self.loss: Callable[..., Tensor] = self._loss
        self.logits: Callable[..., Tensor] = self._logits
        if not compiled:
            return
        if self.bf16 and torch.cuda.is_available():
            from narrow import use_narrow  # Triton is there where CUDA is

            for network in (self.training, self.inference):
                use_narrow(network)
        # One code object serves all architectures, batch sizes and modes: the default of 8 is soon used up.
        torch._dynamo.config.recompile_limit = 256
        torch._dynamo.config.accumulated_recompile_limit = 4096
        how: dict[str, Any] = {"dynamic": False, "fullgraph": True, "backend": backend}
        self.next_batch = torch.compile(next_batch, **how)
        if regions:
            for network in (self.training, self.inference):
                for module in network.modules():
                    if isinstance(module, regions):
                        module.compile(**how)
        else:
            self.loss, self.logits = torch.compile(self._loss, **how), torch.compile(self._logits, **how)

    def _loss(
        self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, labels: Tensor, soft: Tensor | None, distill: Tensor
    ) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            y = functional_call(self.training, (parameters, buffers), (x,)).float()
            loss = F.cross_entropy(y, labels)
            if soft is None:
                return loss
            mine, theirs = (y / TEMPERATURE).log_softmax(1), (soft / TEMPERATURE).log_softmax(1)
            matched = F.kl_div(mine, theirs, log_target=True, reduction="batchmean")
            return (1 - distill) * loss + distill * TEMPERATURE**2 * matched

    @torch.no_grad()
    def _logits(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            return functional_call(self.inference, (parameters, buffers), (x,)).float()  # type: ignore[no-any-return]


class Member:
    """One network with its optimizer and its order of the images.

    Attributes:
        about: what its row says: variant, seed.
    """

    def __init__(
        self,
        model: nn.Module,
        program: Program,
        images: Images,
        recipe: Recipe,
        *,
        seed: int,
        pruning: twofour.Pruning | None = None,
        recomputed: bool = False,
        teacher: nn.Module | None = None,
        about: dict[str, Any] | None = None,
    ) -> None:
        """Take a network on any device.

        Args:
            pruning: its masks are held.
            recomputed: only their names count: the masks follow the dense weights, every few steps (SR-STE).
        """
        device = images.labels.device
        self.model = model.to(device, memory_format=torch.channels_last).train()
        self.program, self.recipe, self.about = program, recipe, about or {}
        self.steps_an_epoch = len(images) // recipe.batch
        rates = [recipe.lr_of(step, self.steps_an_epoch) for step in range(recipe.epochs * self.steps_an_epoch)]
        self.feed = Feed(images, torch.tensor(rates, device=device), recipe.batch, torch.Generator(device).manual_seed(seed))
        on_gpu = device.type == "cuda"
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=self.feed.lr, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay, fused=on_gpu
        )
        self.held = twofour.hold(self.model, self.optimizer, pruning) if pruning is not None and not recomputed else None
        self.scratch = sr_ste(self.model, self.optimizer, pruning.masks, every=NEVER) if pruning is not None and recomputed else None
        self.parameters, self.buffers = dict(self.model.named_parameters()), dict(self.model.named_buffers())
        # What autocast would cast to bf16 at each use, cast once a step by one launch for all of them.
        self.wide = [p for p in self.parameters.values() if p.ndim > 1]
        dtype = torch.bfloat16 if program.bf16 else torch.float32
        self.narrow = [p.detach().to(dtype, copy=True).requires_grad_() for p in self.wide]
        for p in self.parameters.values():
            p.grad = torch.zeros_like(p)
            self.optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        replaced = dict(zip(map(id, self.wide), self.narrow, strict=True))
        self.leaves: dict[str, Tensor] = {name: replaced.get(id(p), p) for name, p in self.parameters.items()}
        self.distill = torch.tensor(recipe.distill, device=device)
        self.teacher: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None
        if teacher is not None and recipe.distill:
            teacher = teacher.to(device, memory_format=torch.channels_last)
            weights = {name: p.detach().to(dtype if p.ndim > 1 else p.dtype) for name, p in teacher.named_parameters()}
            self.teacher = weights, dict(teacher.named_buffers())
        self.loss_sum = torch.zeros((), device=device)
        self.stream: Any = torch.cuda.Stream(device) if on_gpu else None

    def step(self) -> None:
        """One training step; everything it reads and writes has a fixed place, so that it can be captured."""
        x, labels = self.program.next_batch(*self.feed.tensors())
        with torch.no_grad():
            torch._foreach_copy_(self.narrow, self.wide)
        soft = self.program.logits(*self.teacher, x) if self.teacher is not None else None
        loss = self.program.loss(self.leaves, self.buffers, x, labels, soft, self.distill)
        gradients = torch.autograd.grad(loss, list(self.leaves.values()))
        torch._foreach_copy_([p.grad for p in self.parameters.values()], list(gradients))
        self.optimizer.step()
        self.loss_sum += loss.detach()

    def changed(self) -> list[Tensor]:
        """Return all that steps change."""
        momenta = [self.optimizer.state[p]["momentum_buffer"] for p in self.parameters.values()]
        own = [self.feed.step_index, self.feed.position, self.loss_sum]
        scratch = [] if self.scratch is None else [*self.scratch.dense.values(), *self.scratch.masks.values()]
        return [*self.parameters.values(), *self.buffers.values(), *momenta, *own, *scratch]

    def recompute(self) -> None:
        """Let the masks follow the dense weights, if they do; a captured step goes on reading them where they were."""
        if self.scratch is None:
            return
        placed = dict(self.scratch.masks)
        self.scratch.recompute()
        for name, mask in placed.items():
            mask.copy_(self.scratch.masks[name])
            self.scratch.masks[name] = mask
        self.scratch.apply()

    def finish(self) -> None:
        """Check that held weights are zero and let go.

        Raises:
            twofour.errors.VerificationError: a held weight moved.
        """
        if self.held is not None:
            self.held.check()
            self.held.remove()
        if self.scratch is not None:
            self.scratch.remove()

    def warm_up(self) -> None:
        """Let libraries and compilers choose and allocate what they need; every value is as before."""
        kept = [t.clone() for t in self.changed()]
        for _ in range(3):
            self.step()
        with torch.no_grad():
            for t, old in zip(self.changed(), kept, strict=True):
                t.copy_(old)


def capture(members: Sequence[Member], steps: int, pool: Any = None) -> torch.cuda.CUDAGraph:
    """Return a graph of that many steps of every member; each is a branch on its own stream.

    Args:
        pool: memory of another graph, which never runs at the same time; nothing in it outlives a replay.

    NOTE: libraries keep one workspace a stream, so members that run at the same time need streams of their own already in the capture.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        trunk = torch.cuda.current_stream()
        # All branches leave the trunk before the first one joins it again: a later one would begin where the joined one ends.
        for member in members:
            member.stream.wait_stream(trunk)
        for member in members:
            with torch.cuda.stream(member.stream):
                for _ in range(steps):
                    member.step()
        for member in members:
            trunk.wait_stream(member.stream)
    return graph


class Fleet:
    """Members that share the length of a recipe, and on a GPU the graphs of their steps.

    Attributes:
        epoch: how many are behind it.
        seconds: that these took, those of earlier processes included.
    """

    def __init__(self, members: Sequence[Member], steps_a_graph: int = STEPS_A_GRAPH) -> None:
        self.members, self.steps_a_graph, self.epoch, self.seconds = list(members), steps_a_graph, 0, 0.0
        self.epochs, self.steps_an_epoch = members[0].recipe.epochs, members[0].steps_an_epoch
        if any((m.recipe.epochs, m.steps_an_epoch) != (self.epochs, self.steps_an_epoch) for m in members):
            raise ValueError("the members of a fleet differ in epochs or steps an epoch, expected the same")
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def prepare(self) -> None:
        """Shuffle, warm up and capture."""
        for member in self.members:
            member.feed.shuffle()
            member.feed.generator.manual_seed(member.feed.generator.initial_seed())
            if member.stream is None:
                continue
            member.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(member.stream):
                member.warm_up()
            torch.cuda.current_stream().wait_stream(member.stream)
        if self.members[0].stream is not None:
            pool = None
            for n in sorted({min(self.steps_a_graph, self.steps_an_epoch), 1}, reverse=True):
                self.graphs[n] = capture(self.members, n, pool)
                pool = self.graphs[n].pool()
            torch.cuda.synchronize()

    def advance(self, steps: int) -> None:
        """Run that many steps of every member; masks that are not held are recomputed before every `steps_a_graph` of them."""
        while steps:
            n = min(self.steps_a_graph, steps)
            for member in self.members:
                member.recompute()
            if n in self.graphs:
                self.graphs[n].replay()
            else:
                for _ in range(n):
                    self.one_step()
            steps -= n

    def one_step(self) -> None:
        """Run one step of every member."""
        if self.graphs:
            self.graphs[1].replay()
            return
        for member in self.members:
            member.step()

    def run_epoch(self) -> list[float]:
        """Train every member for one epoch and return their mean losses.

        Raises:
            RuntimeError: a loss is not finite.
        """
        for member in self.members:
            member.feed.shuffle()
            member.loss_sum.zero_()
        self.advance(self.steps_an_epoch)
        self.epoch += 1
        losses: list[float] = (torch.stack([m.loss_sum for m in self.members]) / self.steps_an_epoch).tolist()
        if not all(map(math.isfinite, losses)):
            raise RuntimeError(f"epoch {self.epoch}: losses {losses}, expected finite numbers; lower the learning rate")
        return losses

    def save(self, path: Path) -> None:
        """Write all that training goes on from."""
        state = {
            "epoch": self.epoch,
            "seconds": self.seconds,
            "about": repr([(m.about, m.recipe) for m in self.members]),
            "tensors": [[t.cpu() for t in m.changed()] for m in self.members],
            "generators": [m.feed.generator.get_state() for m in self.members],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}.tmp")  # another process may be at the same
        torch.save(state, aside)
        aside.replace(path)

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote; call it after `prepare`.

        Raises:
            ValueError: it is of other members.
        """
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["about"] != repr([(m.about, m.recipe) for m in self.members]):
            raise ValueError(f"{path} is of other networks, expected those of this run; remove it")
        self.epoch, self.seconds = state["epoch"], state["seconds"]
        with torch.no_grad():
            for member, tensors, generator in zip(self.members, state["tensors"], state["generators"], strict=True):
                member.feed.generator.set_state(generator)
                for t, saved in zip(member.changed(), tensors, strict=True):
                    t.copy_(saved)


@torch.inference_mode()
def accuracy_percent(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return top-1 accuracy in percent, computed in fp32."""
    training = model.training
    model.eval()
    with torch.backends.cudnn.flags(enabled=True, benchmark=torch.backends.cudnn.benchmark, allow_tf32=False):
        correct = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(1000), labels.split(1000), strict=True))
    model.train(training)
    return 100 * correct / len(labels)


def train_together(
    members: Sequence[Member], *, say: Callable[[str], None], saved: Path | None = None, until: float = math.inf
) -> tuple[float, float]:
    """Train all members, which share a recipe's length, to the end; return the seconds of training and those of preparation.

    The seconds of training are those of all processes that worked on it.

    Args:
        saved: where state is kept every minute, when time is up and at the end, and gone on from if it is there; whoever has recorded
            what came out removes it.
        until: `time.monotonic()` at which no further epoch begins.

    Raises:
        OutOfTimeError: time is up; the state was saved.
        RuntimeError: a loss is not finite.
        twofour.errors.VerificationError: a held weight moved.
    """
    started = time.monotonic()
    if started > until:
        raise OutOfTimeError("time was up before training began")
    fleet = Fleet(members)
    fleet.prepare()
    prepared = last_saved = time.monotonic()
    if saved is not None and saved.exists():
        fleet.load(saved)
    first, before = fleet.epoch, fleet.seconds
    while fleet.epoch < fleet.epochs:
        now = time.monotonic()
        an_epoch = (now - prepared) / (fleet.epoch - first) if fleet.epoch > first else 0.0
        is_over = now + an_epoch > until
        if saved is not None and (is_over or now - last_saved > SECONDS_A_SAVE):
            fleet.save(saved)
            last_saved = now
        if is_over:
            raise OutOfTimeError(f"time is up after epoch {fleet.epoch} of {fleet.epochs}")
        losses = fleet.run_epoch()
        fleet.seconds = before + time.monotonic() - prepared
        left = (time.monotonic() - prepared) / (fleet.epoch - first) * (fleet.epochs - fleet.epoch)
        say(f"epoch {fleet.epoch}/{fleet.epochs}: mean loss {sum(losses) / len(losses):.4f}, {left:.0f} s left")
    if saved is not None:
        fleet.save(saved)
    for member in members:
        member.finish()
    return fleet.seconds, prepared - started
