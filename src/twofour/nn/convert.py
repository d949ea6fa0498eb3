"""A whole model: which linear layers become `Linear24`, decided by measured time, and for each that stays dense why."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twofour.errors import InputError, nearest
from twofour.kernels.gemm import Config, Epilogue, Problem, why_not
from twofour.nn import launch
from twofour.nn.linear import Linear24, TrainableLinear24, read_extra_state
from twofour.nn.packing import NAME_OF, oddity, violation
from twofour.pruning.capture import in_eval_mode

if TYPE_CHECKING:
    from twofour.builder.tactics import Tactic

logger = logging.getLogger(__name__)
MOST_SIZES = 4  # token counts timed a layer, the most frequent first
CHECKED_TOKENS = 512
LIBRARIES = ("twofour", "cublaslt")


@dataclass(frozen=True)
class LayerConversion:
    """One linear layer of the model.

    Attributes:
        reason: why it stayed dense; of a converted layer what the choice rests on.
        tokens: token counts of its calls on the example inputs. sparse_us, dense_us: microseconds of all of them together, None if not
            timed.
    """

    name: str
    shape: tuple[int, int]
    converted: bool
    reason: str
    tokens: tuple[int, ...] = ()
    sparse_us: float | None = None
    dense_us: float | None = None

    def __str__(self) -> str:
        times = "" if self.sparse_us is None or self.dense_us is None else f"; 2:4 {self.sparse_us:.1f} us, dense {self.dense_us:.1f} us"
        return f"{self.name} [{self.shape[0]}, {self.shape[1]}]: {'2:4' if self.converted else 'dense'}, {self.reason}{times}"


@dataclass(frozen=True)
class Conversion:
    """What `convert` did, one record a linear layer in the order of the model."""

    layers: tuple[LayerConversion, ...]

    @property
    def converted(self) -> tuple[LayerConversion, ...]:
        """The layers that are now 2:4."""
        return tuple(layer for layer in self.layers if layer.converted)

    @property
    def dense(self) -> tuple[LayerConversion, ...]:
        """The layers that stayed dense."""
        return tuple(layer for layer in self.layers if not layer.converted)

    def __str__(self) -> str:
        head = f"Conversion({len(self.converted)} of {len(self.layers)} linear layers 2:4)"
        return "\n".join([head, *(f"  {layer}" for layer in self.layers)])


def convert(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    dtype: torch.dtype | None = None,
    exclude: Sequence[str] = (),
    timed: bool = True,
    trainable: bool = False,
    cache_folder: Path | None = None,
) -> Conversion:
    """Replace in place every `nn.Linear` of a pruned model that is faster 2:4, and return what was done to each and why.

    On a Hopper GPU with example inputs each layer's products are timed, 2:4 beside cuBLASLt, and it stays dense unless 2:4 is faster.
    Without example inputs, with `timed=False` or on a CPU every layer that can be is converted. Each new layer is compared with the old
    one before it takes its place.

    Args:
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments of `model`.
        dtype: bfloat16 or float16 to round the weights to; needed for a fp32 model, which then runs under autocast.
        exclude: glob patterns of layer names that stay dense.
        trainable: make `TrainableLinear24`, for fine-tuning; the default freezes the weights.
        cache_folder: where measured times are kept; by default the cache of this package.

    Raises:
        InputError: the model is itself a linear layer, the dtype is no 16-bit one, a pattern matches nothing, or the inputs cannot be used.
        MissingExtraError, UnsupportedError: timing is not possible here.
    """
    if isinstance(model, nn.Linear):
        raise InputError("convert: the model is itself an nn.Linear, which cannot be replaced in place; use Linear24.from_linear")
    if not isinstance(model, nn.Module):
        raise InputError(f"convert: the model is a {type(model).__name__}, expected a torch.nn.Module")
    if dtype is not None and dtype not in NAME_OF:
        raise InputError(f"convert: dtype is {dtype}, expected torch.bfloat16 or torch.float16")
    if isinstance(exclude, str):
        raise InputError(f"convert: exclude is {exclude!r}, expected a list of patterns; write [{exclude!r}]")
    places = _places(model)
    excluded = _excluded(exclude, [names[0] for _, names in places])
    tokens = None if example_inputs is None else tokens_of(model, example_inputs)
    holders = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    records = []
    for linear, names in places:
        name, shape = names[0], (linear.out_features, linear.in_features)
        calls = Counter[int]() if tokens is None else tokens.get(linear, Counter())
        counts = tuple(sorted(calls))
        reason = "excluded" if name in excluded else _why_not(model, linear, names, dtype, holders)
        if not reason and tokens is not None and not calls:
            reason = "it did not run on the example inputs"
        if reason:
            records.append(LayerConversion(name, shape, False, reason, counts))
            continue
        record = _decide(linear, name, calls, dtype or linear.weight.dtype, timed, cache_folder)
        if record.converted:
            kind = TrainableLinear24 if trainable else Linear24
            layer = kind.from_linear(linear, dtype=dtype, name=name)
            wrong = disagreement(layer, linear, max(counts, default=CHECKED_TOKENS))
            if wrong:
                record = LayerConversion(name, shape, False, wrong, counts, record.sparse_us, record.dense_us)
            else:
                for place in names:
                    model.set_submodule(place, layer)
        records.append(record)
    return Conversion(tuple(records))


def _places(model: nn.Module) -> list[tuple[nn.Linear, list[str]]]:
    """Each linear layer with all names under which the model holds it."""
    found: dict[nn.Linear, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            found.setdefault(module, []).append(name)
    return list(found.items())


def _excluded(patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        hits = {name for name in names if fnmatchcase(name, pattern)}
        if not hits:
            raise InputError(f"exclude {pattern!r} matches no linear layer of the model{nearest(pattern, names)}")
        found |= hits
    return found


def _why_not(model: nn.Module, linear: nn.Linear, names: Sequence[str], dtype: torch.dtype | None, holders: Counter[int]) -> str:
    """Why this layer cannot be replaced, or an empty string."""
    weight = linear.weight
    if type(linear) is not nn.Linear:
        return f"a {type(linear).__name__}, whose owner may read its weight directly; only plain nn.Linear is replaced"
    parents = [model.get_submodule(name.rpartition(".")[0]) for name in names]
    if any(isinstance(p, nn.TransformerEncoderLayer) for p in parents) and torch.backends.mha.get_fastpath_enabled():
        return "the fused path of nn.TransformerEncoderLayer reads its weight; call torch.backends.mha.set_fastpath_enabled(False) first"
    if linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks:
        return "it has hooks, which would be lost"
    if "forward" in linear.__dict__:
        return "its forward has been replaced by another, which would be lost"
    more = [name for kind in (linear._parameters, linear._buffers, linear._modules) for name in kind if name not in ("weight", "bias")]
    if more:
        return f"it holds {', '.join(more)} too, which would be lost"
    if holders[id(weight)] > 1:
        return "its weight is shared with another layer"
    if weight.is_meta:
        return "its weight is on the meta device"
    if oddity(weight):
        return f"its weight is {oddity(weight)}, not a plain tensor"
    if (dtype or weight.dtype) not in NAME_OF:
        return f"its weight is {weight.dtype}; pass dtype=torch.bfloat16 to round it and run under autocast"
    if weight.numel() == 0:
        return "its weight has no elements"
    where = violation(weight)
    if where:
        return f"not 2:4: {where}"
    if weight.device.type != "cpu":
        return launch.why_not(weight.device) or ""
    return ""


def tokens_of(model: nn.Module, example_inputs: Any) -> dict[nn.Module, Counter[int]]:
    """Return how often each linear layer was called with how many tokens in one forward pass in eval mode.

    Raises:
        InputError: `example_inputs` is no tensor, tuple, list or dict, or the model does not run on it.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, Mapping):
        kwargs = dict(example_inputs)
    elif isinstance(example_inputs, Tensor):
        args = (example_inputs,)
    elif isinstance(example_inputs, (tuple, list)):
        args = tuple(example_inputs)
    else:
        kind = type(example_inputs).__name__
        raise InputError(f"convert: example_inputs is a {kind}, expected a tensor, a tuple of arguments or a dict of keyword arguments")
    found: dict[nn.Module, Counter[int]] = {}

    def record(module: nn.Module, _: Any, output: Any) -> None:
        # A subclass, which is not replaced, may return anything.
        if isinstance(output, Tensor):
            found.setdefault(module, Counter())[prod(output.shape[:-1])] += 1

    handles = [m.register_forward_hook(record) for m in model.modules() if isinstance(m, nn.Linear)]
    try:
        with in_eval_mode(model), torch.no_grad():
            model(*args, **kwargs)
    # A model raises whatever its own code meets on inputs it was not made for.
    except Exception as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"convert: the model does not run on the example inputs, expected inputs that it takes: {cause}") from error
    finally:
        for handle in handles:
            handle.remove()
    return found


def _decide(linear: nn.Linear, name: str, calls: Counter[int], dtype: torch.dtype, timed: bool, folder: Path | None) -> LayerConversion:
    shape, device = (linear.out_features, linear.in_features), linear.weight.device
    counts = tuple(sorted(calls))
    if not timed:
        return LayerConversion(name, shape, True, "not timed: timed=False", counts)
    if not launch.runs_on(device):
        return LayerConversion(name, shape, True, f"not timed: {launch.why_not(device)}", counts)
    if not calls:
        return LayerConversion(name, shape, True, "not timed: no example inputs", counts)
    index = torch.cuda.current_device() if device.index is None else device.index
    totals = [0.0, 0.0]
    for tokens, number in calls.most_common(MOST_SIZES):
        if tokens == 0:
            continue
        problem = launch.problem_of(tokens, *shape, dtype, linear.bias is not None)
        sparse_us, dense_us, why = measured(problem, index, folder)
        if why:
            return LayerConversion(name, shape, False, f"{why} at {tokens} tokens", counts)
        totals[0] += number * sparse_us
        totals[1] += number * dense_us
    faster = totals[0] < totals[1]
    return LayerConversion(name, shape, faster, "faster than dense" if faster else "dense is as fast or faster", counts, *totals)


def measured(problem: Problem, device: int, folder: Path | None) -> tuple[float, float, str]:
    """Return (microseconds of our best 2:4 kernel, of the best dense one, why there is no figure); our best is used from now on.

    Dense is cuBLASLt, which `nn.Linear` runs on; where it is missing, our own dense kernel. The product is timed without its bias, which
    the libraries' tactics do not take, among the configs that can also add it.
    """
    from twofour.builder.tactics import choose, tactics
    from twofour.jit.driver import num_sms

    plain = replace(problem, epilogue=Epilogue())
    with torch.cuda.device(device):
        choice = choose(plain, device=device, libraries=LIBRARIES, cache_folder=folder)
        times, left_out = dict(choice.times_us), dict(choice.left_out)
        known = tactics(plain, num_sms(device), libraries=LIBRARIES)
        sparse = _legal(known, times, problem)
        if not sparse and problem != plain:
            choice = choose(problem, device=device, libraries=LIBRARIES, cache_folder=folder)
            left_out |= choice.left_out
            sparse = _legal(tactics(problem, num_sms(device), libraries=LIBRARIES), choice.times_us, problem)
    timed = [t for t in known if str(t) in times]
    dense = [times[str(t)] for t in timed if t.library == "cublaslt"] or [times[str(t)] for t in timed if not t.sparse]
    if not sparse or not dense:
        why = "; ".join(f"{tactic}: {reason}" for tactic, reason in left_out.items())
        return 0.0, 0.0, f"no {'2:4' if not sparse else 'dense'} kernel was timed ({why})"
    best_us, config = min(sparse, key=lambda pair: pair[0])
    launch.use_config(problem, device, config)
    return best_us, min(dense), ""


def _legal(known: "Sequence[Tactic]", times_us: Mapping[str, float], problem: Problem) -> list[tuple[float, Config]]:
    """Time and config of each timed 2:4 kernel of ours that can compute `problem`."""
    ours = [(t.config, times_us[str(t)]) for t in known if t.sparse and t.library == "twofour" and str(t) in times_us]
    return [(us, config) for config, us in ours if config is not None and why_not(problem, config) is None]


def disagreement(layer: nn.Module, linear: nn.Linear, tokens: int) -> str:
    """Return how `layer` differs from `linear` on random inputs by more than rounding, or an empty string.

    Limit: `eps |s| + (inputs + 8) 2^-22 (|x| . |W|^T + |b|)` with s the float64 result on the rounded weight: one rounding of the output,
    and fp32 sums of any order, whose terms tensor cores may cut instead of round.
    """
    dtype = layer.dtype if isinstance(layer, Linear24) else layer.compute_dtype
    assert isinstance(dtype, torch.dtype)
    device, inputs = linear.weight.device, linear.in_features
    with torch.no_grad():
        generator = torch.Generator(device).manual_seed(0)
        x = torch.randn(min(max(tokens, 1), CHECKED_TOKENS), inputs, device=device, generator=generator).to(dtype)
        found = layer(x).double()
        weight = linear.weight.to(dtype).double()
        bias = None if linear.bias is None else linear.bias.to(dtype).double()
        expected = F.linear(x.double(), weight, bias)
        size = F.linear(x.double().abs(), weight.abs(), None if bias is None else bias.abs())
        limit = torch.finfo(dtype).eps * expected.abs() + (inputs + 8) * 2.0**-22 * size + torch.finfo(dtype).smallest_normal
        # Written so that a NaN on one side alone counts as different.
        bad = ~((found - expected).abs() <= limit) & ~(found.to(dtype) == expected.to(dtype)) & ~(found.isnan() & expected.isnan())
    if not bool(bad.any()):
        return ""
    token, row = (int(i) for i in bad.nonzero()[0])
    got, want = float(found[token, row]), float(expected[token, row])
    return f"its 2:4 form computes {got:.6g} instead of {want:.6g} at token {token}, output {row}"


def _under_all_names(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with each tensor that the model holds under several names under all of them, if it is there under one."""
    whole = dict(state_dict)
    names: dict[int, list[str]] = {}
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            names.setdefault(id(tensor), []).append(name)
    for group in names.values():
        known = next((state_dict[name] for name in group if name in state_dict), None)
        if known is not None:
            whole |= {name: known for name in group if name not in whole}
    return whole


def restore(model: nn.Module, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """Return `model` with the layers that are packed in `state_dict` replaced by `Linear24`, and the state loaded, strictly.

    A layer that the model holds under several names stays one. What is on the meta device takes the tensors of the state. Where the state
    does not fit, the model keeps its layers; as with `load_state_dict`, others that fit may have been loaded.

    `safetensors.torch.load_file` of what `save_file(model.state_dict(), path)` wrote gives such a state, and of what `save_model` wrote,
    which keeps one name of each tensor.

    Raises:
        InputError: a packed layer's name is no `nn.Linear` or `Linear24` of the model, or its size differs; the state is no mapping.
    """
    if not isinstance(state_dict, Mapping):
        kind = type(state_dict).__name__
        raise InputError(f"restore: the state is a {kind}, expected names and tensors; load a file with safetensors.torch.load_file")
    places, made = dict(_places(model)), dict[nn.Linear, Linear24]()
    for key in state_dict:
        name, _, last = key.rpartition(".")
        if last != "packed" or f"{name}._extra_state" not in state_dict:
            continue
        try:
            old = model.get_submodule(name)
        except AttributeError as e:
            raise InputError(f"{name}: the state holds a packed layer of this name, the model none; build the same model") from e
        if isinstance(old, Linear24):
            continue
        if not isinstance(old, nn.Linear):
            raise InputError(f"{name}: the state holds a packed linear layer, the model a {type(old).__name__}; build the same model")
        dtype, rows, inputs = read_extra_state(state_dict[f"{name}._extra_state"], name)
        if (rows, inputs) != (old.out_features, old.in_features):
            raise InputError(f"{name}: the state holds a weight [{rows}, {inputs}], the model [{old.out_features}, {old.in_features}]")
        if old not in made:
            made[old] = Linear24(inputs, rows, f"{name}.bias" in state_dict, old.weight.device, dtype).train(old.training)
    try:
        for old, layer in made.items():
            for place in places[old]:
                model.set_submodule(place, layer)
        model.load_state_dict(_under_all_names(model, state_dict), assign=any(t.is_meta for t in (*model.parameters(), *model.buffers())))
    except BaseException as e:
        for old in made:
            for place in places[old]:
                model.set_submodule(place, old)
        if isinstance(e, RuntimeError):
            raise InputError(f"restore: the state does not fit the model: {' '.join(str(e).split())}; build the same model") from e
        raise
    return model
