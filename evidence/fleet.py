"""Many small networks trained at once on one GPU: each step of each network is one CUDA graph on a stream of its own.

A network this small leaves most of a GPU idle and spends its time on launches. A step is captured once, with its augmentation, its masks
and its learning rate, and replayed; the networks of a fleet take turns on the host and run side by side on the GPU. Without a GPU the same
steps run one after the other.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import twofour

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PAD = 4


@dataclass(frozen=True)
class Recipe:
    """Nesterov SGD with momentum 0.9, one epoch of linear warm-up, cosine to zero; random crops and flips.

    Attributes:
        distill: weight of the dense network's soft labels (temperature 4) in the loss; the rest is cross-entropy.
    """

    epochs: int = 40
    lr: float = 0.1
    weight_decay: float = 1e-4
    batch: int = 128
    distill: float = 0.0

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

    def normalised(self, pixels: Tensor) -> Tensor:
        """Return fp32 channels-last images."""
        return ((pixels.float() / 255 - self.mean) / self.std).to(memory_format=torch.channels_last)

    def plain(self) -> Tensor:
        """Return all images, normalised."""
        return self.normalised(self.padded[:, :, PAD:-PAD, PAD:-PAD])


class Member:
    """One network with its optimizer, its order of the images and its captured step.

    Attributes:
        about: what its row says: variant, seed.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Images,
        recipe: Recipe,
        *,
        seed: int,
        pruning: twofour.Pruning | None = None,
        teacher: nn.Module | None = None,
        about: dict[str, object] | None = None,
    ) -> None:
        device = images.labels.device
        self.model = model.to(device, memory_format=torch.channels_last).train()
        self.images, self.recipe, self.about = images, recipe, about or {}
        self.teacher = teacher.to(device, memory_format=torch.channels_last).eval() if teacher is not None and recipe.distill else None
        self.generator = torch.Generator(device).manual_seed(seed)
        self.steps_an_epoch = len(images) // recipe.batch
        rates = [recipe.lr_of(step, self.steps_an_epoch) for step in range(recipe.epochs * self.steps_an_epoch)]
        self.rates = torch.tensor(rates, device=device)
        on_gpu = device.type == "cuda"
        # A tensor, so that a captured step reads it; only the fused form takes one.
        self.lr = torch.tensor(recipe.lr, device=device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=self.lr, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay, fused=on_gpu
        )
        self.held = twofour.hold(self.model, self.optimizer, pruning) if pruning is not None else None
        n = len(images)
        self.order = torch.zeros(n, dtype=torch.long, device=device)
        self.shift = torch.zeros(2, n, dtype=torch.long, device=device)
        self.flip = torch.zeros(n, dtype=torch.bool, device=device)
        self.step_index = torch.zeros(1, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.in_batch, self.pixel = torch.arange(recipe.batch, device=device), torch.arange(32, device=device)
        self.channel = torch.arange(3, device=device)[None, :, None, None]
        self.loss_sum = torch.zeros((), device=device)
        self.stream = torch.cuda.Stream(device) if on_gpu else None
        self.graph: torch.cuda.CUDAGraph | None = None

    def shuffle(self) -> None:
        """Draw the next epoch's order, crops and flips."""
        n, g = len(self.images), self.generator
        self.order.copy_(torch.randperm(n, generator=g, device=self.order.device))
        self.shift.copy_(torch.randint(0, 2 * PAD + 1, self.shift.shape, generator=g, device=self.order.device))
        self.flip.copy_(torch.rand(n, generator=g, device=self.order.device) < 0.5)
        self.position.zero_()
        self.loss_sum.zero_()

    def batch(self) -> tuple[Tensor, Tensor]:
        """Return the next images, augmented, and their labels."""
        ids = self.order[self.position + self.in_batch]
        rows = self.shift[0, ids][:, None] + self.pixel
        columns = self.shift[1, ids][:, None] + torch.where(self.flip[ids][:, None], 31 - self.pixel, self.pixel)
        pixels = self.images.padded[ids[:, None, None, None], self.channel, rows[:, None, :, None], columns[:, None, None, :]]
        return self.images.normalised(pixels), self.images.labels[ids]

    def step(self) -> None:
        """One training step; everything it reads and writes has a fixed place, so that it can be captured."""
        self.lr.copy_(self.rates[self.step_index][0])
        self.optimizer.zero_grad(set_to_none=True)
        x, labels = self.batch()
        with torch.autocast(x.device.type, torch.bfloat16):
            y = self.model(x).float()
            loss = F.cross_entropy(y, labels)
            if self.teacher is not None:
                with torch.no_grad():
                    soft = (self.teacher(x).float() / 4).log_softmax(1)
                matched = F.kl_div((y / 4).log_softmax(1), soft, log_target=True, reduction="batchmean")
                loss = (1 - self.recipe.distill) * loss + self.recipe.distill * 16 * matched
        loss.backward()
        self.optimizer.step()
        self.loss_sum += loss.detach()
        self.position += self.recipe.batch
        self.step_index += 1

    def capture(self) -> None:
        """Capture the step on this member's own stream; weights, statistics and momentum are as before."""
        if self.stream is None:
            return
        kept = [t.clone() for t in self._changed()]
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(self.stream)
        self.graph = torch.cuda.CUDAGraph()
        # Its own stream: libraries keep one workspace a stream, and members run at the same time.
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.step()
        with torch.no_grad():
            for t, old in zip(self._changed(), kept, strict=True):
                t.copy_(old)
            for state in self.optimizer.state.values():
                state["momentum_buffer"].zero_()
        torch.cuda.synchronize()

    def _changed(self) -> list[Tensor]:
        return [*self.model.parameters(), *self.model.buffers(), self.step_index, self.position, self.loss_sum]

    def advance(self) -> None:
        """Run one step."""
        if self.graph is None:
            self.step()
            return
        with torch.cuda.stream(self.stream):
            self.graph.replay()


@torch.inference_mode()
def accuracy_percent(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return top-1 accuracy in percent, computed in fp32."""
    training = model.training
    model.eval()
    correct = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(1000), labels.split(1000), strict=True))
    model.train(training)
    return 100 * correct / len(labels)


def train_together(members: Sequence[Member], *, say: Callable[[str], None]) -> float:
    """Train all members, which share a recipe's length, to the end; return the seconds it took.

    Raises:
        RuntimeError: a loss is not finite, or a held weight moved.
    """
    started = time.perf_counter()
    for member in members:
        member.shuffle()
        member.capture()
    epochs, steps = members[0].recipe.epochs, members[0].steps_an_epoch
    for epoch in range(epochs):
        for member in members:
            if member.stream is not None:
                torch.cuda.current_stream().wait_stream(member.stream)
            member.shuffle()
            if member.stream is not None:
                member.stream.wait_stream(torch.cuda.current_stream())
        for _ in range(steps):
            for member in members:
                member.advance()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        losses = [float(member.loss_sum) / steps for member in members]
        if not all(map(math.isfinite, losses)):
            raise RuntimeError(f"epoch {epoch + 1}: losses {losses}, expected finite numbers; lower the learning rate")
        left = (time.perf_counter() - started) / (epoch + 1) * (epochs - epoch - 1)
        say(f"epoch {epoch + 1}/{epochs}: mean loss {sum(losses) / len(losses):.4f}, {left:.0f} s left")
    for member in members:
        if member.held is not None:
            member.held.check()
            member.held.remove()
    return time.perf_counter() - started
