"""The model as a graph and as it ran: which weight comes first, which linear stands last before each output, FLOPs of each layer."""

import contextlib
import io
import logging
import math
import operator
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from twofour.errors import InputError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Execution:
    """What one forward pass showed.

    Attributes:
        order: names of the weights in the order of their first use.
        flops: per weight, 2 × multiply-adds for one item of the batch.
        classifiers: weights of the last linear before each output.
        note: why the graph could not be captured, empty when it was.
    """

    order: tuple[str, ...]
    flops: dict[str, int] = field(default_factory=dict)
    classifiers: frozenset[str] = frozenset()
    note: str = ""


@contextlib.contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Run the body with every module in eval mode, then give each its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def flops_of_call(module: nn.Module, args: tuple[Any, ...], output: Any) -> dict[str, int]:
    """Return 2 × multiply-adds of one call of a convolution, linear or attention module, by the name of its weight."""
    if isinstance(module, (*CONVOLUTIONS, nn.Linear)):
        return {"weight": 2 * output.numel() * math.prod(module.weight.shape[1:])}
    if isinstance(module, nn.MultiheadAttention):
        tokens = [math.prod(a.shape[:-1]) for a in args[:3]]
        if module.in_proj_weight is not None:
            return {"in_proj_weight": 2 * sum(tokens) * module.embed_dim**2, "out_proj.weight": 2 * tokens[0] * module.embed_dim**2}
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        flops = {name: 2 * n * math.prod(getattr(module, name).shape) for name, n in zip(names, tokens, strict=True)}
        return {**flops, "out_proj.weight": 2 * tokens[0] * module.embed_dim**2}
    return {}


def computed_from(module: nn.Module, attribute: str) -> str:
    """Return the name, within `module`, of the largest parameter that a parametrisation computes `attribute` from; "" if there is none.

    Knows `torch.nn.utils.parametrize` and the hooks of the older `weight_norm`, `spectral_norm` and `prune`.
    """
    if attribute in module._parameters:
        return ""
    if parametrize.is_parametrized(module, attribute):
        originals = module.get_submodule(f"parametrizations.{attribute}").named_parameters(recurse=False)
        largest = max(originals, key=lambda named: named[1].numel(), default=None)
        return f"parametrizations.{attribute}.{largest[0]}" if largest else ""
    return next((name for name in (f"{attribute}_v", f"{attribute}_orig") if name in module._parameters), "")


def computed_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights that parametrisations compute, in eval mode, by the name of the largest parameter each is computed from."""
    found: dict[str, Tensor] = {}
    with in_eval_mode(model), torch.no_grad():
        for name, module in model.named_modules():
            source = computed_from(module, "weight")
            if source:
                found[f"{name}.{source}".lstrip(".")] = module.weight.detach()
    return found


def run_once(model: nn.Module, example_inputs: tuple[Any, ...]) -> tuple[list[str], dict[str, int]]:
    """Run the model in eval mode; return weights in order of first use and FLOPs of each for one item."""
    name_of = {id(p): name for name, p in model.named_parameters()}
    order: list[str] = []
    flops: dict[str, int] = {}
    batch = next((x.shape[0] for x in example_inputs if isinstance(x, Tensor) and x.ndim), 1)

    def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        result = output[0] if isinstance(output, tuple) else output
        for attribute, count in flops_of_call(module, args, result).items():
            holder = module.get_submodule(attribute.rpartition(".")[0])
            source = computed_from(holder, attribute.rpartition(".")[2])
            weight = operator.attrgetter(source or attribute)(holder if source else module)
            name = name_of.get(id(weight))
            if name is not None:
                flops[name] = flops.get(name, 0) + count // batch
                if name not in order:
                    order.append(name)

    handles = [m.register_forward_hook(record) for m in model.modules() if isinstance(m, (*CONVOLUTIONS, nn.Linear, nn.MultiheadAttention))]
    # The fused attention path of an encoder layer skips its submodules, and with them their hooks.
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with in_eval_mode(model), torch.no_grad():
            model(*example_inputs)
    # A model raises whatever its own code meets on inputs it was not made for.
    except Exception as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"the model does not run on the example inputs, expected inputs that it takes: {cause}") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for handle in handles:
            handle.remove()
    return order, flops


LINEAR_OPS = frozenset({"aten.linear.default", "aten.addmm.default", "aten.mm.default", "aten.matmul.default"})
CONVOLUTION_OPS = ("aten.conv", "aten.convolution")


def last_linears(program: torch.export.ExportedProgram) -> frozenset[str]:
    """Return, for each output of the graph, the weight of the last linear among its ancestors, unless a convolution follows it."""
    parameter_of = dict(program.graph_signature.inputs_to_parameters)
    position = {node: i for i, node in enumerate(program.graph.nodes)}

    def weights(node: fx.Node) -> list[str]:
        return [parameter_of[a.name] for a in node.args if isinstance(a, fx.Node) and a.name in parameter_of]

    def is_weighted(node: fx.Node) -> bool:
        op = str(node.target)
        return node.op == "call_function" and bool(weights(node)) and (op in LINEAR_OPS or op.startswith(CONVOLUTION_OPS))

    found = set()
    output = next(node for node in program.graph.nodes if node.op == "output")
    for result in output.all_input_nodes:
        ancestors, queue = {result}, [result]
        while queue:
            for parent in queue.pop().all_input_nodes:
                if parent not in ancestors:
                    ancestors.add(parent)
                    queue.append(parent)
        weighted = [node for node in ancestors if is_weighted(node)]
        if weighted:
            last = max(weighted, key=position.__getitem__)
            if str(last.target) in LINEAR_OPS:
                found.add(weights(last)[0])
    return frozenset(found)


@contextlib.contextmanager
def exporter_quiet() -> Iterator[None]:
    """The exporter speaks of its own internals through loggers, warnings and standard error; what concerns the user is raised."""
    names = ("torch.onnx", "onnxscript", "torch.export", "torch.fx.experimental.symbolic_shapes", "onnx_ir")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        # NOTE: where a module branches on a tensor's values, torch.export prints the graph so far on standard error.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def execute(model: nn.Module, example_inputs: tuple[Any, ...], capture: Callable[..., Any] = torch.export.export) -> Execution:
    """Run and capture `model` on `example_inputs`; a model that cannot be captured falls back to the order of execution.

    Then the last linear that ran counts as the classifier, and the note says why.
    """
    order, flops = run_once(model, example_inputs)
    try:
        with in_eval_mode(model), torch.no_grad(), exporter_quiet():
            classifiers = last_linears(capture(model, example_inputs, strict=False))
        note = ""
    except Exception as error:  # noqa: BLE001 - torch.export raises many kinds; each means the same here: no graph
        linears = {name for name, p in model.named_parameters() if p.ndim == 2}
        classifiers = frozenset([name for name in order if name in linears][-1:])
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        note = f"the model cannot be captured as a graph ({reason}); the last linear that ran counts as the classifier"
    return Execution(tuple(order), flops, classifiers, note)
