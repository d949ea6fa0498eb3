"""cuDNN's convolutions with a fused bias, residual and activation; where it fuses none, a plain one and our pointwise kernel behind it.

A grouped convolution may also run group by group: for groups of tens of channels cuDNN 9 knows no channels-last kernel on Hopper and
copies both images to another layout first.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from twofour.errors import InputError
from twofour.kernels.conv.contract import Problem
from twofour.kernels.cudnn import Graph, Handle, output, tensor
from twofour.kernels.operands import DTYPE_BYTES
from twofour.kernels.pointwise.contract import Instruction, Operand
from twofour.kernels.pointwise.contract import Problem as PointwiseProblem
from twofour.kernels.pointwise.launch import Pointwise

WORKSPACE_BYTES = 960 << 20  # room for an image in another layout
# Forms, added to an algorithm's number: the epilogue is a launch of its own; each group is a launch of its own.
UNFUSED, BY_GROUP = 1 << 12, 1 << 13
_FORMS = UNFUSED | BY_GROUP
STEP = 8  # channels: a group's slice of a pixel begins at a multiple of 16 bytes
_X, _WEIGHT, _BIAS, _RESIDUAL, _Y = 1, 2, 3, 4, 5


def why_not(problem: Problem) -> str | None:
    """Return why cuDNN cannot compute `problem`, or None when it may; it may still list no plan."""
    if problem.inputs // problem.groups % 2 and problem.groups > 1 and problem.inputs != problem.groups:
        return f"cudnn has no 16-bit grouped convolution of {problem.inputs // problem.groups} channels a group"
    return None


def is_fusible(problem: Problem) -> bool:
    """Return whether the epilogue can be part of the graph."""
    return problem.epilogue.activation != "hardswish"


def epilogue_problem(problem: Problem) -> PointwiseProblem | None:
    """Return the pointwise step that adds bias and residual to Y in place and activates it; None where there is nothing to do."""
    e = problem.epilogue
    if not (e.bias or e.residual) and e.activation == "none":
        return None
    shape = (problem.pixels, problem.outputs)
    y = (problem.y_pitch or problem.outputs, 1)
    align = 16 if y[0] % 8 == 0 else 2
    inputs = [Operand(problem.dtype, y, align)]
    program: list[Instruction] = []
    last: tuple[str, int] = ("in", 0)
    for wanted, operand in (
        (e.bias, Operand(problem.dtype, (0, 1))),
        (e.residual, Operand(problem.dtype, (problem.residual_pitch or problem.outputs, 1), align)),
    ):
        if wanted:
            inputs.append(operand)
            program.append(("add", last, ("in", len(inputs) - 1)))
            last = ("t", len(program) - 1)
    if e.activation == "relu6":
        program.append(("clip", last, ("c", 0.0), ("c", 6.0)))
    elif e.activation != "none":
        program.append((e.activation, last))
    return PointwiseProblem(shape, tuple(inputs), problem.dtype, y, tuple(program), align)


def one_group(problem: Problem) -> Problem | None:
    """Return the convolution of one group as a slice of the images; None where there is one group or its slices are not aligned."""
    p = problem
    depth, width = p.inputs // p.groups, p.outputs // p.groups
    if p.groups == 1 or depth % STEP or width % STEP:
        return None
    residual = (p.residual_pitch or p.outputs) if p.epilogue.residual else None
    image = replace(p, inputs=depth, outputs=width, groups=1)
    return replace(image, x_pitch=p.x_pitch or p.inputs, y_pitch=p.y_pitch or p.outputs, residual_pitch=residual)


def _graph(problem: Problem, form: int, handle: Handle) -> Graph:
    """Return the graph of a form, without a plan.

    Raises:
        InputError: the problem has no such form.
    """
    fused = not form & UNFUSED
    if fused and not is_fusible(problem):
        raise InputError(f"cudnn cannot fuse {problem.epilogue.activation!r}; add UNFUSED to the algorithm")
    part = one_group(problem) if form & BY_GROUP else problem
    if part is None:
        raise InputError(f"cudnn cannot compute {problem} group by group: expected groups of multiples of {STEP} channels")
    return Graph(problem, problem.dtype, partial(_describe, part, fused), handle, WORKSPACE_BYTES)


class CudnnConv:
    """A convolution by one of cuDNN's plans. Weight KRSC, bias of X's type. Launches of one handle follow one another."""

    def __init__(
        self, problem: Problem, algorithm: int = 0, *, handle: Handle | None = None, device: int = 0, graph: bytes | None = None
    ) -> None:
        """Build plan `algorithm` (plus `UNFUSED`: with the epilogue apart; plus `BY_GROUP`: group by group), or read it from `graph`.

        Raises:
            InputError: `why_not(problem)` has a reason. MissingExtraError: the frontend or cuDNN is missing.
            UnsupportedError: cuDNN has no such plan.
        """
        reason = why_not(problem)
        if reason is not None:
            raise InputError(f"cudnn cannot compute {problem}: {reason}")
        form = algorithm & _FORMS
        self.problem, self.fused = problem, not form & UNFUSED
        self.launches = problem.groups if form & BY_GROUP else 1
        # NOTE: launches of several threads through one handle are ordered by its lock.
        self.handle = handle or Handle(device)
        self._graph = _graph(problem, form, self.handle)
        if graph is None:
            self._graph.build(algorithm - form)
        else:
            self._graph.read(graph)
        after = None if self.fused else epilogue_problem(problem)
        self._after = None if after is None else Pointwise(after, device=device)

    @property
    def workspace_bytes(self) -> int:
        """Bytes of scratch a call needs."""
        return self._graph.workspace_bytes

    def serialized(self) -> bytes:
        """Return the built plan as bytes."""
        return self._graph.serialized()

    def __call__(self, x: int, weight: int, d: int, *, bias: int = 0, residual: int = 0, workspace: int = 0, stream: int = 0) -> None:
        """Launch on device addresses.

        Raises:
            InputError: an address is missing.
        """
        p, e = self.problem, self.problem.epilogue
        if not (x and weight and d) or (e.bias and not bias) or (e.residual and not residual) or (self.workspace_bytes and not workspace):
            raise InputError(
                f"addresses x={x:#x}, weight={weight:#x}, d={d:#x}, bias={bias:#x}, residual={residual:#x}, workspace={workspace:#x}: "
                "expected device memory for everything the problem uses"
            )
        size = DTYPE_BYTES[p.dtype]
        depth, width, weights = (size * n // self.launches for n in (p.inputs, p.outputs, p.weight_elems))
        for group in range(self.launches):
            addresses = {_X: x + group * depth, _WEIGHT: weight + group * weights, _Y: d + group * width}
            if self.fused and e.bias:
                addresses[_BIAS] = bias + group * width
            if self.fused and e.residual:
                addresses[_RESIDUAL] = residual + group * width
            self._graph.launch(addresses, workspace, stream)
        if self._after is not None:
            extra = [address for address, wanted in ((bias, e.bias), (residual, e.residual)) if wanted]
            self._after([d, *extra], d, stream=stream)


def _describe(p: Problem, fused: bool, graph: Any, module: Any) -> None:
    e = p.epilogue
    out = (p.batch, p.outputs, p.out_height, p.out_width)
    depth = p.inputs // p.groups
    x = tensor(graph, module, _X, p.dtype, (p.batch, p.inputs, p.height, p.width), p.x_strides())
    area = p.kernel[0] * p.kernel[1]
    weight_strides = (area * depth, 1, p.kernel[1] * depth, depth)
    weight = tensor(graph, module, _WEIGHT, p.dtype, (p.outputs, depth, *p.kernel), weight_strides)
    real = module.data_type.FLOAT
    y = graph.conv_fprop(
        image=x,
        weight=weight,
        pre_padding=list(p.pads[:2]),
        post_padding=list(p.pads[2:]),
        stride=list(p.strides),
        dilation=list(p.dilations),
        compute_data_type=real,
        name="convolution",
    )
    if fused and e.bias:
        bias = tensor(graph, module, _BIAS, p.dtype, (1, p.outputs, 1, 1), (p.outputs, 1, p.outputs, p.outputs))
        y = graph.add(a=y, b=bias, compute_data_type=real, name="bias")
    if fused and e.residual:
        residual = tensor(graph, module, _RESIDUAL, p.dtype, out, p.residual_strides())
        y = graph.add(a=y, b=residual, compute_data_type=real, name="residual")
    if fused:
        y = activate(graph, y, e.activation, real)
    output(y, module, _Y, p.dtype, out, p.y_strides())


def activate(graph: Any, y: Any, activation: str, real: Any) -> Any:
    """Add `activation` to a cuDNN graph behind `y`."""
    if activation == "none":
        return y
    if activation == "relu6":
        return graph.relu(input=y, lower_clip=0.0, upper_clip=6.0, compute_data_type=real)
    name = {"gelu_tanh": "gelu_approx_tanh", "silu": "swish"}.get(activation, activation)
    return getattr(graph, name)(input=y, compute_data_type=real)


def num_plans(problem: Problem, handle: Handle, form: int = 0) -> int:
    """Return how many plans cuDNN lists for a form of `problem`.

    Raises:
        UnsupportedError: none.
    """
    return _graph(problem, form, handle).num_plans()
