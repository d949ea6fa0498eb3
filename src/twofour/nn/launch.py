"""From a PyTorch tensor to a launched kernel with as little work a call as possible.

What a product needs besides addresses is prepared once per shape, dtype and GPU and remembered. A call then looks up the preparation,
allocates the output and launches on the current stream.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from twofour.jit import driver
from twofour.kernels.gemm import Config, Epilogue, Problem
from twofour.kernels.gemm.contract import FLAG_BYTES
from twofour.kernels.gemm.launch import Gemm
from twofour.nn.packing import NAME_OF

logger = logging.getLogger(__name__)
MOST_PREPARED = 4096  # shapes remembered; the one prepared first goes first


@dataclass(frozen=True, slots=True)
class Ready:
    """A product of one shape, ready to launch.

    Attributes:
        enqueue: `Gemm.enqueue` of its size. workspace_bytes: what a launch needs.
        like: one element seen in the output's shape; allocating like it is the cheapest allocation there is.
    """

    enqueue: Callable[..., None]
    workspace_bytes: int
    like: Tensor
    device: int


Key = tuple[int, int, int, torch.dtype, bool, int]
Shape = tuple[torch.Size, int, int, torch.dtype, bool, int]
_prepared: OrderedDict[Key, Gemm] = OrderedDict()
_ready: OrderedDict[Shape, Ready] = OrderedDict()
_configs: dict[tuple[Problem, int], Config] = {}
_workspaces: dict[tuple[int, int], Tensor] = {}
_lock = threading.Lock()
_thread = threading.local()


@cache
def why_not(device: torch.device) -> str | None:
    """Return why our kernels cannot run on `device`, or None when they can."""
    if device.type != "cuda":
        return f"{device.type} has no sparse tensor cores, expected an NVIDIA GPU of compute capability 9.0"
    if torch.version.hip is not None:
        return "this PyTorch drives AMD GPUs, expected an NVIDIA GPU of compute capability 9.0"
    found = torch.cuda.get_device_capability(device)
    if found != (9, 0):
        return f"GPU {device.index or 0} has compute capability {found[0]}.{found[1]}, expected 9.0 (Hopper)"
    return None


@cache
def runs_on(device: torch.device) -> bool:
    """Return whether our kernels run on `device`; says once in the log when a GPU computes with the unpacked weight instead."""
    reason = why_not(device)
    if reason is not None and device.type != "cpu":
        logger.warning("2:4 layers compute with the unpacked weight: %s", reason)
    return reason is None


def problem_of(tokens: int, rows: int, inputs: int, dtype: torch.dtype, has_bias: bool) -> Problem:
    """Return the Problem of a linear layer; outputs and inputs rounded up to whole eights, which packing pads with zeros."""
    name = NAME_OF[dtype]
    return Problem(tokens, rows + -rows % 8, inputs + -inputs % 8, name, name, True, Epilogue(bias=has_bias))


def use_config(problem: Problem, device: int, config: Config) -> None:
    """Compute `problem` on GPU `device` with `config` from now on in this process, instead of the modelled default."""
    with _lock:
        _configs[problem, device] = config
        _prepared.clear()
        _ready.clear()


def prepare(key: Key) -> Gemm:
    """Return the launch of a size, compiling the kernel on first use.

    Raises:
        MissingExtraError: cuda.bindings or NVRTC is missing. UnsupportedError: no driver.
    """
    tokens, rows, inputs, dtype, has_bias, device = key
    problem = problem_of(tokens, rows, inputs, dtype, has_bias)
    gemm = Gemm(problem, _configs.get((problem, device)), device=device)
    with _lock:
        _prepared[key] = gemm
        while len(_prepared) > MOST_PREPARED:
            _prepared.popitem(last=False)
    return gemm


def make_ready(x: Tensor, rows: int, inputs: int, has_bias: bool) -> Ready:
    """Return and remember what launches a product of x's shape; `rows` and `inputs` are multiples of eight, x is not empty."""
    device, tokens = x.get_device(), x.numel() // inputs
    key = (tokens, rows, inputs, x.dtype, has_bias, device)
    gemm = _prepared.get(key) or prepare(key)
    with torch.inference_mode(False):
        like = torch.empty(1, dtype=x.dtype, device=x.device).expand(*x.shape[:-1], rows)
    found = Ready(gemm.enqueue, gemm.workspace_bytes, like, device)
    with _lock:
        _ready[x.shape, rows, inputs, x.dtype, not has_bias, device] = found
        while len(_ready) > MOST_PREPARED:
            _ready.popitem(last=False)
    return found


def find_ready(x: Tensor, bias: Tensor | None, rows: int, inputs: int) -> Ready | None:
    """Return what was remembered for a product of x's shape, dtype and GPU, or None."""
    return _ready.get((x.shape, rows, inputs, x.dtype, bias is None, x.get_device()))


def place(device: int) -> torch.device:
    """Return GPU `device`."""
    return torch.device("cuda", device)


def workspace(size: int, device: int, stream: int) -> Tensor:
    """Return device memory for the partial sums of one launch on the current stream; its flags are zero.

    Launches of one stream follow one another and share a workspace. A captured graph gets its own, zeroed each time the graph runs,
    because it may be replayed on any stream.
    """
    if torch.cuda.is_current_stream_capturing():
        own = torch.empty(size, dtype=torch.uint8, device=place(device))
        own[:FLAG_BYTES].zero_()
        return own
    held = _workspaces.get((device, stream))
    if held is None or held.numel() < size:
        held = _workspaces[device, stream] = torch.zeros(size, dtype=torch.uint8, device=place(device))
    return held


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, inputs: int) -> Tensor:
    """Return `x . W^T + bias`, `[..., rows]`, computed by our kernel on x's GPU and current stream.

    Args:
        x: `[..., inputs]`, bf16 or fp16, any strides. packed: of the same dtype and GPU. bias: fp32 `[rows]`.

    Raises:
        MissingExtraError: cuda.bindings or NVRTC is missing. UnsupportedError: no driver, or the launch was refused.
    """
    found = find_ready(x, bias, rows, inputs)
    if found is not None:
        return run(found, x, packed, bias)
    device = x.get_device()
    with torch.cuda.device(device) if device != torch.cuda.current_device() else nullcontext():
        if rows % 8 or inputs % 8 or x.numel() == 0:
            return _uneven(x, packed, bias, rows, inputs)
        return run(make_ready(x, rows, inputs, bias is not None), x, packed, bias)


def run(found: Ready, x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """Return the product that `found` was made for; x has its shape, dtype and GPU, and weight and bias are on that GPU too.

    Raises:
        UnsupportedError: the launch was refused.
    """
    device = found.device
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return run(found, x, packed, bias)
    if not hasattr(_thread, "ready"):
        # A thread in which the runtime has not been used yet has no context for the driver call.
        driver.use_device(device)
        _thread.ready = True
    if not x.is_contiguous():
        x = x.contiguous()
    address = x.data_ptr()
    if address & 15:
        x = x.clone()
        address = x.data_ptr()
    y = torch.empty_like(found.like)
    stream = torch._C._cuda_getCurrentRawStream(device)
    held = workspace(found.workspace_bytes, device, stream) if found.workspace_bytes else None
    found.enqueue(
        address,
        packed.data_ptr(),
        y.data_ptr(),
        0,
        0 if bias is None else bias.data_ptr(),
        0,
        0 if held is None else held.data_ptr(),
        stream,
    )
    return y


def _uneven(x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, inputs: int) -> Tensor:
    """Sizes that are no multiple of eight: pad the activations, drop the outputs of padded rows. No tokens: nothing to launch."""
    if x.numel() == 0:
        return x.new_empty((*x.shape[:-1], rows))
    pad = torch.nn.functional.pad
    if inputs % 8:
        x = pad(x, (0, -inputs % 8))
    if bias is not None:
        bias = pad(bias, (0, -rows % 8))
    y = linear(x, packed, bias, rows + -rows % 8, inputs + -inputs % 8)
    return y[..., :rows].contiguous()
