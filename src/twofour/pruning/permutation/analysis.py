"""Walks captured graphs with the rules and collects, for all of them, what a reordering must respect."""

import inspect
import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from twofour.pruning.permutation.align import elementwise
from twofour.pruning.permutation.capture import Capture
from twofour.pruning.permutation.labels import Factor, Ints, Ledger, Value
from twofour.pruning.permutation.rules import RULES, Rule


class SizeUnknown(Exception):
    """A value of the captured graph has a size that only its data tell."""


# Nodes that compute no tensor: sizes, their arithmetic, and checks of metadata.
_SILENT = {"aten._assert_tensor_metadata", "aten.sym_constrain_range_for_size", "aten._assert_scalar", "aten.sym_constrain_range"}


@dataclass
class Held:
    """A parameter or buffer: its tensor, all its names, and the atoms of each axis."""

    tensor: torch.Tensor
    names: list[str]
    atoms: list[Ints]

    @property
    def value(self) -> Value:
        factors = (Factor((k,), a, a * 0) for k, a in enumerate(self.atoms) if a.size)
        return Value(tuple(self.tensor.shape), tuple(factors))


@dataclass
class Analysis:
    """The ledger of all captures, over the atoms of a model's parameters and buffers."""

    ledger: Ledger
    held: list[Held]
    by_name: dict[str, Held] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)


def hold_tensors(model: nn.Module, ledger: Ledger) -> list[Held]:
    """Every parameter and buffer once, with all its names; tensors that share memory in part are frozen."""
    found: dict[int, Held] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        if id(tensor) in found:
            found[id(tensor)].names.append(name)
        else:
            # An axis of one place has no order and needs no atom.
            found[id(tensor)] = Held(tensor, [name], [ledger.atoms(size if size > 1 else 0) for size in tensor.shape])
    ledger.operation = "a buffer that is not saved with the model"
    unsaved = {id(m._buffers[n]) for m in model.modules() for n in m._non_persistent_buffers_set if m._buffers.get(n) is not None}
    for key in unsaved & set(found):
        ledger.freeze(found[key].value)
    ledger.operation = "memory shared by tensors"
    owners: dict[int, Held] = {}
    for held in found.values():
        if held.tensor.numel() == 0 or held.tensor.is_meta:
            continue
        start = held.tensor.untyped_storage().data_ptr()
        if any(step == 0 and size > 1 for step, size in zip(held.tensor.stride(), held.tensor.shape, strict=True)):
            ledger.freeze(held.value)
        if start in owners:
            ledger.freeze(held.value)
            ledger.freeze(owners[start].value)
        owners.setdefault(start, held)
    return list(found.values())


def _loose_tensors(model: nn.Module) -> list[torch.Tensor]:
    """Tensors that modules hold as plain attributes, also in lists, tuples, sets and dictionaries; not the parameters and buffers."""
    own = {id(t) for t in (*model.parameters(), *model.buffers())}
    plain = [value for m in model.modules() for key, value in vars(m).items() if key not in ("_parameters", "_buffers", "_modules")]
    found: list[torch.Tensor] = []
    seen: set[int] = set()
    while plain:
        value = plain.pop()
        if isinstance(value, torch.Tensor):
            found += [value] if id(value) not in own else []
        elif isinstance(value, dict | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            plain += value.values() if isinstance(value, dict) else value
    return found


def _freeze_shared(ledger: Ledger, held: Iterable[Held], loose: Iterable[torch.Tensor]) -> None:
    """Freeze what shares memory with a tensor that would not be known to have moved with it."""
    owners: dict[int, list[Held]] = {}
    for h in held:
        if h.tensor.numel() and not h.tensor.is_meta:
            owners.setdefault(h.tensor.untyped_storage().data_ptr(), []).append(h)
    for tensor in loose:
        try:
            start = tensor.untyped_storage().data_ptr()
        except (RuntimeError, NotImplementedError):  # a tensor without memory of its own: fake, sparse
            continue
        for h in owners.get(start, []):
            ledger.freeze(h.value)


def analyse(model: nn.Module, captures: Iterable[Capture]) -> Analysis:
    """What every capture, read at each of its batch sizes, asks of a reordering."""
    ledger = Ledger()
    analysis = Analysis(ledger, hold_tensors(model, ledger))
    analysis.by_name = {name: held for held in analysis.held for name in held.names}
    for held in analysis.held:
        ledger.register(held.value)
    for taken in captures:
        for batch in taken.batches:
            walk(analysis, taken, batch)
        ledger.operation = "memory shared with a tensor that is no parameter or buffer"
        _freeze_shared(ledger, analysis.held, [t for t in taken.program.constants.values() if isinstance(t, torch.Tensor)])
    ledger.operation = "memory shared with a tensor that is no parameter or buffer"
    _freeze_shared(ledger, analysis.held, _loose_tensors(model))
    ledger.operation = "no capture reaches it"
    for held in analysis.held:
        if held.names[0] not in analysis.used:
            ledger.freeze(held.value)
    return analysis


def walk(analysis: Analysis, taken: Capture, batch: int) -> dict[str, Any]:
    """Apply the rules to every node of one capture; returns the value of each node by name."""
    ledger, program = analysis.ledger, taken.program
    sizes = _sizes(taken, batch)
    specs = {s.arg.name: s for s in program.graph_signature.input_specs if hasattr(s.arg, "name")}
    environment: dict[str, Any] = {}
    fixed_by: dict[str, str] = {}
    for node in program.graph.nodes:
        ledger.operation = _place(node, taken.mode, fixed_by)
        if node.op == "placeholder":
            environment[node.name] = _placeholder(analysis, node, specs.get(node.name), sizes)
        elif node.op == "output":
            _outputs(analysis, program, environment, taken.mode)
        else:
            try:
                result = _apply(ledger, node, environment, sizes)
            except SizeUnknown:
                raise SizeUnknown(f"{ledger.operation} works on a size that only the data tell") from None
            environment[node.name] = result
            for value in pytree.tree_leaves(result, is_leaf=lambda v: isinstance(v, Value)):
                if isinstance(value, Value):
                    ledger.register(value)
        _trace_order(node, environment, fixed_by, taken.mode)
    return environment


def _place(node: fx.Node, mode: str, fixed_by: dict[str, str]) -> str:
    """How a promise of this node is told: its operation, and what put its operands into a fixed order."""
    after = next((fixed_by[n.name] for n in node.all_input_nodes if n.name in fixed_by), "")
    return f"{node.name} ({operation_of(node)}) in {mode}" + (f", fed by {after}" if after else "")


def _trace_order(node: fx.Node, environment: dict[str, Any], fixed_by: dict[str, str], mode: str) -> None:
    """Remember which operation, or input, a value without any channel order comes from."""
    result = environment.get(node.name)
    values = [v for v in pytree.tree_leaves(result, is_leaf=lambda v: isinstance(v, Value)) if isinstance(v, Value)]
    if not values or any(v.factors or not v.shape for v in values):
        return
    if node.op == "placeholder":
        fixed_by[node.name] = f"input {node.name}"
    else:
        # An operand that already has no channel order, and is no index, is what put the result into one.
        operands = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor) and n.meta["val"].is_floating_point()]
        inherited = [fixed_by[n.name] for n in operands if n.name in fixed_by]
        fixed_by[node.name] = inherited[0] if inherited else f"{node.name} ({operation_of(node)})"


def _sizes(taken: Capture, batch: int) -> Any:
    """A function from a possibly symbolic size to its value at this batch."""
    symbols: dict[Any, int] = {}
    for node in taken.program.graph.nodes if taken.symbolic else ():
        if node.op == "placeholder" and isinstance(value := node.meta.get("val"), torch.Tensor):
            for size in value.shape:
                if isinstance(size, torch.SymInt):
                    for symbol in size.node.expr.free_symbols:
                        symbols[symbol] = batch

    def concrete(size: Any) -> Any:
        if isinstance(size, torch.SymInt):
            value = size.node.expr.subs(symbols)
            if getattr(value, "free_symbols", None):
                raise SizeUnknown
            return int(value)
        if isinstance(size, torch.SymFloat | torch.SymBool):
            return size.node.expr.subs(symbols)
        return size

    return concrete


def _shapes(node: fx.Node, sizes: Any) -> Any:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return tuple(sizes(s) for s in value.shape)
    if isinstance(value, tuple | list):
        return tuple(tuple(sizes(s) for s in v.shape) if isinstance(v, torch.Tensor) else () for v in value)
    return None


def operation_of(node: fx.Node) -> str:
    """`namespace.name` of a node's operation, without its overload."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._schema.name.split('::')[-1]}"
    return getattr(target, "__name__", str(target))


def _placeholder(analysis: Analysis, node: fx.Node, spec: Any, sizes: Any) -> Any:
    shape = _shapes(node, sizes)
    if shape is None:
        return None
    if spec is not None and spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target in analysis.by_name:
        held = analysis.by_name[spec.target]
        if node.users:
            analysis.used |= set(held.names)
        return held.value
    return Value(shape)


def _apply(ledger: Ledger, node: fx.Node, environment: dict[str, Any], sizes: Any) -> Any:
    if node.op == "get_attr":
        shape = _shapes(node, sizes)
        return None if shape is None else Value(shape)

    def resolve(argument: Any) -> Any:
        if not isinstance(argument, fx.Node):
            return sizes(argument)
        found = environment.get(argument.name)
        return sizes(argument.meta.get("val")) if found is None else found

    args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), resolve)
    if node.target is operator.getitem:
        results: Any = args[0]
        number: Any = args[1]
        return results[number] if isinstance(results, tuple | list) else None
    shapes = _shapes(node, sizes)
    name = operation_of(node)
    if shapes is None and not isinstance(node.meta.get("val"), tuple | list):
        if name not in _SILENT and node.meta.get("val") is None:
            _stop(ledger, args, kwargs)
        return None
    rule = RULES.get(name)
    if rule is not None:
        extra = {"shape": shapes, "results": len(shapes) if isinstance(node.meta["val"], tuple | list) else 1}
        try:
            return rule(ledger, *args, **{k: v for k, v in extra.items() if k in _accepts(rule)}, **_options(rule, kwargs))
        except (TypeError, ValueError, IndexError, AttributeError, KeyError):
            # Arguments in a form the rule does not know: what it has written only forbids more, and the operation stops as an unknown one.
            pass
    _stop(ledger, args, kwargs)
    if isinstance(node.meta["val"], tuple | list):
        return tuple(Value(s) for s in shapes)
    return Value(shapes)


def _stop(ledger: Ledger, args: Any, kwargs: Any) -> None:
    """An operation without a rule: nothing that reaches it moves."""
    for value in pytree.tree_leaves((args, kwargs), is_leaf=lambda v: isinstance(v, Value)):
        if isinstance(value, Value):
            ledger.freeze(value)


@cache
def _accepts(rule: Rule) -> frozenset[str]:
    return frozenset(inspect.signature(rule).parameters)


def _options(rule: Rule, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of the operation that the rule reads; numbers and dtypes it ignores are dropped, tensors never are."""
    takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(rule).parameters.values())
    return {k: v for k, v in kwargs.items() if takes_any or k in _accepts(rule) or isinstance(v, Value)}


def _outputs(analysis: Analysis, program: Any, environment: dict[str, Any], mode: str) -> None:
    """Outputs keep their order; a buffer that is written is reordered as the buffer that is read."""
    ledger = analysis.ledger
    for spec in program.graph_signature.output_specs:
        value = environment.get(getattr(spec.arg, "name", ""))
        if not isinstance(value, Value):
            continue
        if spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION) and spec.target in analysis.by_name:
            ledger.operation = f"the update of {spec.target} in {mode}"
            elementwise(ledger, [analysis.by_name[spec.target].value, value])
        else:
            ledger.operation = f"an output of the model ({spec.arg.name}) in {mode}"
            ledger.freeze(value)
