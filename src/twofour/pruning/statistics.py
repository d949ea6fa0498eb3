"""What the inputs of a layer look like over calibration batches: squared norms of its columns, or the whole XᵀX.

A weight is seen as a matrix `[out, columns]` (see `flatten`), and X holds one row for every time the layer multiplies it: a token of a
linear layer, an output pixel of a convolution. Rows are never kept, only their sums, so calibration data of any length streams through.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from twofour.errors import InputError
from twofour.pruning.calibration import device_of, leaf_hooks, run_batch
from twofour.pruning.capture import CONVOLUTIONS, in_eval_mode

# Up to this many columns XᵀX is summed in float64; above, in the precision of its products, which halves the largest buffer there is.
FLOAT64_UP_TO = 4096
# A convolution's input is unfolded for so many elements at a time.
UNFOLDED_ELEMS = 1 << 24
# The norm of a column over n rows is known to about 1/√(2n): 12 % at this many.
FEWEST_ROWS = 32

QKV = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass
class Statistics:
    """Sums over the rows x of the input matrix X `[rows, columns]`.

    Attributes:
        rows: number of rows.
        squares: Σ x², `[columns]`, float64.
        hessian: XᵀX, `[columns, columns]`, float64 up to 4,096 columns, else float32; None where only squares were asked for.
        rounding: how far an entry of `hessian` may be off, over the norms of its two columns: see `rounding_of`.
    """

    rows: int
    squares: Tensor
    hessian: Tensor | None = None
    rounding: float = 0.0

    @classmethod
    def zero(cls, columns: int, device: torch.device, hessian: bool) -> "Statistics":
        """Return the sums over no rows."""
        dtype = torch.float64 if columns <= FLOAT64_UP_TO else torch.float32
        matrix = torch.zeros(columns, columns, dtype=dtype, device=device) if hessian else None
        return cls(0, torch.zeros(columns, dtype=torch.float64, device=device), matrix)

    def add(self, x: Tensor) -> None:
        """Add the rows of `x` `[rows, columns]`, fp64 or fp32."""
        self.rows += x.shape[0]
        if self.hessian is None:
            self.squares += x.square().sum(0, dtype=torch.float64)
            return
        # A forward under autocast would multiply in its half precision.
        with torch.autocast(x.device.type, enabled=False):
            if self.hessian.dtype == x.dtype:
                self.hessian.addmm_(x.T, x)
                summed = self.rows
            else:
                self.hessian += x.T @ x
                summed = x.shape[0]
        self.rounding = max(self.rounding, rounding_of(summed, x.dtype))
        self.squares.copy_(self.hessian.diagonal())

    def add_squares(self, squares: Tensor, rows: int) -> None:
        """Add sums over `rows` rows, where XᵀX is not wanted; `squares` `[columns]`."""
        self.rows += rows
        self.squares += squares

    def norms(self) -> Tensor:
        """Return ‖X_j‖₂ of every column, `[columns]`."""
        return self.squares.sqrt()

    def clone(self) -> "Statistics":
        """Return a copy that shares nothing."""
        return Statistics(self.rows, self.squares.clone(), None if self.hessian is None else self.hessian.clone(), self.rounding)


def rounding_of(terms: int, dtype: torch.dtype) -> float:
    """Return √n · eps, what rounding leaves of a sum of n products in `dtype`, over the norms of both factors.

    Rounded one after another to nearest, with eps/2 at most each time, n terms of one sign are off by √n · eps/6 in standard deviation,
    so this is six of those; sums in blocks or of mixed signs are closer. The bound for certain, n · eps/2, is of no use: it is above 1 %
    from 170,000 rows of float32 on.

    Source: Higham and Mary 2019, "A New Approach to Probabilistic Rounding Error Analysis", SIAM J. Sci. Comput. 41(5), section 2.
    """
    return float(terms**0.5 * torch.finfo(dtype).eps)


@dataclass
class Part:
    """Rows `start:stop` of a weight and the statistics of what they multiply: all of it, or a third of a stacked attention projection."""

    start: int
    stop: int
    statistics: Statistics


def flatten(weight: Tensor) -> Tensor:
    """Return `[out, in, *kernel]` as `[out, positions · in]`, so that the channels of one kernel position are consecutive."""
    return weight.movedim(1, -1).reshape(weight.shape[0], -1)


def unflatten(matrix: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Return the weight `[out, in, *kernel]` of `shape` that `flatten` turned into `matrix`."""
    return matrix.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous()


def taps(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Iterator[Tensor]:
    """Give, for every kernel position in the order of `flatten`, what it multiplies: views of the padded input, `[items, in, *pixels]`."""
    dims = len(module.kernel_size)
    x = x if x.ndim == dims + 2 else x.unsqueeze(0)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = nn.functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    axes = list(zip(module.kernel_size, module.dilation, module.stride, x.shape[2:], strict=True))
    sizes = [(length - dilation * (kernel - 1) - 1) // stride + 1 for kernel, dilation, stride, length in axes]
    for offset in product(*(range(kernel) for kernel in module.kernel_size)):
        window = [
            slice(at * dilation, at * dilation + stride * (size - 1) + 1, stride)
            for at, (_, dilation, stride, _), size in zip(offset, axes, sizes, strict=True)
        ]
        yield x[(slice(None), slice(None), *window)]


def unfolded(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Iterator[Tensor]:
    """Give the input of a convolution as matrices `[items · output pixels, positions · in]`, columns in the order of `flatten`."""
    x = x if x.ndim == len(module.kernel_size) + 2 else x.unsqueeze(0)
    # As many output pixels as input pixels at most, unless the padding is large; the limit is a guide, not a bound.
    per_item = x.shape[1:].numel() * int(torch.Size(module.kernel_size).numel())
    for items in torch.split(x, max(1, UNFOLDED_ELEMS // max(per_item, 1))):
        yield torch.cat([tap.movedim(1, -1).reshape(-1, x.shape[1]) for tap in taps(module, items)], 1)


@dataclass
class Collector:
    """Sums of the inputs of the wanted weights while its hooks are on a model.

    Attributes:
        parts: parameter's id → parts of that weight.
        current: the weight whose layer, or the module without children, that began to run last; empty before the first.
        prefix: stands before the names of modules.
    """

    wanted: Mapping[int, str]
    hessian: bool
    parts: dict[int, list[Part]] = field(default_factory=dict)
    current: str = ""
    prefix: str = ""
    _inside: bool = False

    def hooks(self, model: nn.Module) -> list[Any]:
        """Put the hooks on every module that holds a wanted weight, and on those that only tell where a pass is; return their handles."""
        layers = {m for m in model.modules() if isinstance(m, (*CONVOLUTIONS, nn.Linear)) and id(m.weight) in self.wanted}
        handles = leaf_hooks(model, self._reach, layers)
        for module in model.modules():
            if module in layers:
                handles.append(module.register_forward_pre_hook(self._layer, with_kwargs=True))
            elif isinstance(module, nn.MultiheadAttention) and any(id(p) in self.wanted for p in module.parameters()):
                handles.append(module.register_forward_pre_hook(self._attention, with_kwargs=True))
        return handles

    def _reach(self, name: str) -> None:
        if not self._inside:
            self.current = self.prefix + name

    def add(self, weight: Tensor, x: Tensor, start: int = 0, stop: int | None = None) -> None:
        """Add the rows of `x` to those of `weight[start:stop]`."""
        statistics = self._of(weight, x.shape[1], x.device, start, weight.shape[0] if stop is None else stop)
        statistics.add(x if x.dtype == torch.float64 else x.float())
        self._refuse_not_finite(weight, statistics)

    def _of(self, weight: Tensor, columns: int, device: torch.device, start: int, stop: int) -> Statistics:
        parts = self.parts.setdefault(id(weight), [])
        part = next((p for p in parts if (p.start, p.stop) == (start, stop)), None)
        if part is None:
            part = Part(start, stop, Statistics.zero(columns, device, self.hessian))
            parts.append(part)
        return part.statistics

    def _refuse_not_finite(self, weight: Tensor, statistics: Statistics) -> None:
        if not bool(torch.isfinite(statistics.squares).all()):
            name = self.wanted[id(weight)]
            raise InputError(f"the input of layer {name!r} holds NaN or infinity, expected finite values; check the data")

    def _convolution(self, module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> None:
        """Add a convolution's input; without XᵀX the kernel positions are summed one by one, never unfolded."""
        weight = module.weight
        if self.hessian:
            for rows in unfolded(module, x):
                self.add(weight, rows)
            return
        squares, pixels = [], 0
        for tap in taps(module, x if x.dtype == torch.float64 else x.float()):
            squares.append(tap.square().sum([0, *range(2, tap.ndim)], dtype=torch.float64))
            pixels = tap.numel() // tap.shape[1]
        statistics = self._of(weight, weight.numel() // weight.shape[0], x.device, 0, weight.shape[0])
        statistics.add_squares(torch.cat(squares), pixels)
        self._refuse_not_finite(weight, statistics)

    def _layer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add a layer's input; one of a wrong size is left to the layer itself, which says what is wrong."""
        weight: Any = module.weight
        self.current = self.wanted[id(weight)]
        x: Tensor = (args[0] if args else kwargs["input"]).detach()
        if isinstance(module, CONVOLUTIONS) and x.shape[-1 - len(module.kernel_size)] == weight.shape[1]:
            self._convolution(module, x)
        elif isinstance(module, nn.Linear) and x.shape[-1] == weight.shape[1]:
            self.add(weight, x.reshape(-1, x.shape[-1]))

    def _attention(self, module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._inside:
            return
        query, key, value = (*args[:3], *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))
        sources = [s.detach().reshape(-1, s.shape[-1]) for s in (query, key, value)]
        stacked: Any = module.in_proj_weight
        if stacked is not None and id(stacked) in self.wanted:
            self.current = self.wanted[id(stacked)]
            self._stacked(stacked, sources, shared=query is key is value)
        for name, source in zip(QKV, sources, strict=True):
            weight: Any = getattr(module, name)
            if weight is not None and id(weight) in self.wanted:
                self.current = self.wanted[id(weight)]
                self.add(weight, source)
        out: Any = module.out_proj.weight
        if id(out) in self.wanted:
            self.current = self.wanted[id(out)]
            self.add(out, self._before_projection(module, args, kwargs))

    def _stacked(self, weight: Tensor, sources: list[Tensor], shared: bool) -> None:
        """Add to a stacked projection: one part while query, key and value are one tensor, three parts from when they are not."""
        parts = self.parts.get(id(weight), [])
        if shared and len(parts) <= 1:
            self.add(weight, sources[0])
            return
        width = weight.shape[0] // 3
        bounds = [(i * width, (i + 1) * width) for i in range(3)]
        if len(parts) == 1:
            self.parts[id(weight)] = [Part(*b, parts[0].statistics.clone()) for b in bounds]
        for source, (start, stop) in zip(sources, bounds, strict=True):
            self.add(weight, source, start, stop)

    def _before_projection(self, module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return what the output projection multiplies: the attention run once more with the projection replaced by the identity."""
        weight = module.out_proj.weight
        changed = {"out_proj.weight": torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)}
        if module.out_proj.bias is not None:
            changed["out_proj.bias"] = torch.zeros_like(module.out_proj.bias)
        self._inside = True
        try:
            mixed: Tensor = functional_call(module, changed, args, kwargs)[0]
        finally:
            self._inside = False
        return mixed.reshape(-1, mixed.shape[-1])


@contextmanager
def collecting(model: nn.Module, names: Iterable[str], hessian: bool) -> Iterator[Collector]:
    """Run the body in eval mode without gradients, with a Collector on the weights `names` of `model`."""
    parameters = dict(model.named_parameters())
    collector = Collector({id(parameters[name]): name for name in names}, hessian)
    # The fused attention path of an encoder layer skips its submodules, and with them their hooks.
    fastpath = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, fastpath)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(in_eval_mode(model))
        stack.enter_context(torch.no_grad())
        for handle in collector.hooks(model):
            stack.callback(handle.remove)
        yield collector


def refuse_unreached(collector: Collector) -> None:
    """Raise InputError for a weight that the batches did not reach, or reached with too few rows."""
    for key, name in collector.wanted.items():
        rows = min((part.statistics.rows for part in collector.parts.get(key, [])), default=0)
        if not rows:
            raise InputError(f"calibration never reaches layer {name!r}, expected batches that use it; give such batches, or exclude it")
        if rows < FEWEST_ROWS:
            raise InputError(
                f"calibration reaches layer {name!r} with {rows} rows (tokens or pixels), expected {FEWEST_ROWS} or more; give more batches"
            )


def gather(
    model: nn.Module,
    names: Iterable[str],
    batches: Iterable[Any],
    num_inputs: int = 1,
    *,
    hessian: bool,
    expected: str = "",
    progress: Callable[[int], None] | None = None,
) -> dict[str, list[Part]]:
    """Return the statistics of the inputs of the weights `names` over `batches`; the model is not changed.

    Args:
        batches: as of `reestimate_batchnorm`.
        hessian: whether XᵀX is wanted, or only the squares.
        expected: the shapes of inputs known to work, for the message.
        progress: called after each batch with how many are done.

    Raises:
        InputError: no batch, one that the model cannot run or that holds NaN, a layer never reached or with too few rows, no memory.
    """
    count = 0
    device = device_of(model)
    with collecting(model, names, hessian) as collector:
        for batch in batches:
            count += 1
            collector.current = ""
            run_batch(model, batch, num_inputs, device, count, expected=expected, where=lambda: collector.current)
            if progress is not None:
                progress(count)
    if not count:
        raise InputError("calibration holds no batch, expected at least one; pass a list or a DataLoader that is not used up")
    refuse_unreached(collector)
    return {name: collector.parts[key] for key, name in collector.wanted.items()}
