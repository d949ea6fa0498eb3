"""Which kernel computes a convolution or its gradients fastest on this GPU: all checked against float64, timed, the winner written down."""

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from triton.errors import TritonError

log = logging.getLogger("kernel_choices")
BATCH = 512
Operands = tuple[Tensor, Tensor, Tensor]  # the gradient of the output, the input, the weight
Candidate = tuple[str, tuple[int, ...], Callable[[Tensor, Tensor, Tensor], Tensor]]


@dataclass(frozen=True)
class Case:
    """A convolution that networks have.

    Attributes:
        name: what tells it from others of its kinds in the choices.
        about: what its rows say: channels, size.
        operands: by number of images.
        candidates: kind, configuration and call of every kernel; an empty configuration is cuDNN.
        exact: what a kind is in float64.
    """

    name: str
    about: dict[str, int]
    operands: Callable[[int], Operands]
    candidates: Callable[[], Iterator[Candidate]]
    exact: Callable[[str, Operands], Tensor]


@cache
def choices() -> dict[str, list[int]]:
    """Return the configuration to use by kind and name: of what this GPU was measured to be faster with than cuDNN."""
    path = os.environ.get("NARROW_CHOICES", "")
    return json.loads(Path(path).read_text(encoding="utf-8"))["choices"] if path and Path(path).exists() else {}


def last(x: Tensor) -> Tensor:
    """Return the values, channels last."""
    return x.contiguous(memory_format=torch.channels_last)


def library_conv(x: Tensor, weight: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
    """Return the 3×3 convolution, padding 1, as cuDNN computes it."""
    return F.conv2d(x, weight, stride=stride, padding=1, groups=groups)


def library_gradients(
    above: Tensor, x: Tensor, weight: Tensor, which: list[bool], stride: int = 1, groups: int = 1
) -> tuple[Tensor, Tensor]:
    """Return the gradients of input and weight as cuDNN computes them, those that `which` asks for."""
    found = torch.ops.aten.convolution_backward(
        above, x, weight, None, [stride] * 2, [1, 1], [1, 1], False, [0, 0], groups, [*which, False]
    )
    return found[0], found[1]


def random_operands(above: tuple[int, ...], x: tuple[int, ...], weight: tuple[int, ...], device: str = "cuda") -> Operands:
    """Return a gradient above, an input and a weight of these shapes, bf16, channels last."""
    g = torch.Generator(device).manual_seed(0)
    made = [last(torch.randn(shape, generator=g, device=device).to(torch.bfloat16)) for shape in (above, x, weight)]
    return made[0], made[1], made[2]


def distance(found: Tensor, exact: Tensor) -> float:
    """Return ‖found − exact‖ / ‖exact‖."""
    return float((found.double() - exact).norm() / exact.norm())


def microseconds(call: Callable[[], Tensor], calls: int = 10, replays: int = 10) -> float:
    """Return the median time of a call, within a graph."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end) / calls)
    return sorted(times)[replays // 2]


def measure(cases: Iterable[Case], out: Path) -> None:
    """Check and time every candidate of every case; write all rows, and the configurations that are right and faster than cuDNN."""
    torch.backends.cudnn.benchmark = True
    rows: list[dict[str, Any]] = []
    chosen: dict[str, list[int]] = {}
    for case in cases:
        # Three images leave a part of a tile at the end.
        small, medium, large = (case.operands(batch) for batch in (3, 64, BATCH))
        best: dict[str, float] = {}
        exact: dict[str, list[Tensor]] = {}
        for kind, configuration, call in case.candidates():
            if kind not in exact:
                exact[kind] = [case.exact(kind, some) for some in (small, medium)]
            try:
                # bf16 results round at 2^-9; a part that is missing or doubled is far above that.
                worst = max(distance(call(*some), right) for some, right in zip((small, medium), exact[kind], strict=True))
                took = microseconds(lambda call=call, large=large: call(*large))  # type: ignore[misc]
            except (RuntimeError, TritonError) as e:  # one configuration that does not fit costs no other
                log.warning("%s, %s, %s: %.200r", kind, case.name, configuration, e)
                continue
            rows.append({"kind": kind, **case.about, "configuration": configuration, "us": took, "error": worst})
            log.info("%s, %s, %s: %.1f us, error %.1e", kind, case.name, configuration or "cuDNN", took, worst)
            if worst < 2**-8 and took < best.get(kind, float("inf")):
                best[kind], chosen[f"{kind} {case.name}"] = took, list(configuration)
    value = {"gpu": torch.cuda.get_device_name(), "batch": BATCH, "rows": rows, "choices": {k: v for k, v in chosen.items() if v}}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
