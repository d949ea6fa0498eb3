"""When a proof fails: which reorderings are to blame, and at which operation the network first differs from what the analysis foretold."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from twofour.pruning.permutation.analysis import Analysis, walk
from twofour.pruning.permutation.apply import Reordering, apply_, moves_of
from twofour.pruning.permutation.capture import Capture, Inputs, quiet, set_mode
from twofour.pruning.permutation.labels import Ints, Value
from twofour.pruning.permutation.proof import one_format, redraw, tensors_of, widened


def culprits(found: Sequence[Reordering], passes: Callable[[Sequence[Reordering]], bool]) -> list[Reordering]:
    """Those reorderings that fail the proof by themselves, found by halving."""
    if not found or passes(found):
        return []
    if len(found) == 1:
        return list(found)
    middle = len(found) // 2
    return culprits(found[:middle], passes) + culprits(found[middle:], passes)


def foretold(value: torch.Tensor, label: Value, order: Ints) -> torch.Tensor:
    """The value in the order that its factors foretell for a reordering of atoms."""
    for factor in label.factors:
        where = {(int(a), int(t)): k for k, (a, t) in enumerate(zip(factor.atom.ravel(), factor.tag.ravel(), strict=True))}
        index = [where[(int(order[a]), int(t))] for a, t in zip(factor.atom.ravel(), factor.tag.ravel(), strict=True)]
        ahead = [a for a in range(value.ndim) if a not in factor.axes]
        front = value.permute(*factor.axes, *ahead)
        shape = front.shape
        flat = front.reshape(len(index), -1)[torch.tensor(index, device=value.device)]
        back = [(*factor.axes, *ahead).index(a) for a in range(value.ndim)]
        value = flat.reshape(shape).permute(back)
    return value


def first_wrong(model: nn.Module, inputs: Inputs, captures: Sequence[Capture], analysis: Analysis, order: Ints) -> str:
    """The first operation whose result differs from its foretold reordering, on redrawn parameters in float64."""
    taken = captures[0]
    batch = taken.batches[0]
    labels = walk(analysis, taken, batch)
    twin = widened(model)
    double = inputs.map(lambda t: t.double() if t.is_floating_point() else t).resized(batch)
    with quiet(twin):
        set_mode(twin, "eval")
        redraw(twin)
        before = _Watch(taken, twin, double).values
        apply_(tensors_of(twin), moves_of(analysis.held, order))
        after = _Watch(taken, twin, double).values
    for node in taken.program.graph.nodes:
        old, new, label = before.get(node.name), after.get(node.name), labels.get(node.name)
        if node.op != "call_function" or old is None or new is None or not isinstance(label, Value) or old.shape != label.shape:
            continue
        expected = foretold(old, label, order)
        scale = float(old.abs().max()) if old.numel() else 0.0
        if scale and float((expected - new).abs().max()) > 1e-9 * scale:
            return f"{node.name} ({node.target})"
    return "no single operation of the evaluation graph"


class _Watch(fx.Interpreter):
    """Runs a captured graph on a model's tensors and keeps every floating result."""

    def __init__(self, taken: Capture, model: nn.Module, inputs: Inputs) -> None:
        super().__init__(taken.program.graph_module)
        self.values: dict[str, torch.Tensor] = {}
        signature = taken.program.graph_signature
        named = tensors_of(model)
        by_input = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        constants = taken.program.constants
        lifted = signature.inputs_to_lifted_tensor_constants
        leaves = iter(inputs.leaves())
        arguments: list[Any] = []
        for node in taken.program.graph.nodes:
            if node.op == "placeholder":
                if node.name in by_input:
                    arguments.append(named[by_input[node.name]])
                elif node.name in lifted:
                    arguments.append(constants[lifted[node.name]])
                else:
                    arguments.append(next(leaves, None))
        with one_format():
            self.run(*arguments)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            self.values[n.name] = result.detach().clone()
        return result
