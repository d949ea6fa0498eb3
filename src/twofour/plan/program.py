"""What a GPU plan does for one batch size: values, where they lie, and the steps that fill them. Specified in docs/plan.md.

A Program read from a file has been checked whole: every step's operands exist, have the element type its Problem names, lie inside their
memory with the alignment the launch needs, and nothing but the arena and the outputs is written.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from twofour.errors import InputError
from twofour.kernels import families
from twofour.kernels.families import FAMILIES, OURS, WORKSPACE_CAP
from twofour.kernels.operands import DTYPE_BYTES, MAX_DIM, MAX_ELEMS, Footprint
from twofour.kernels.records import from_plain, to_plain

PLACES = ("arena", "weights", "input", "output")
ALIGN = 256  # bytes: values in the arena start at multiples of 16, the arena itself and each payload tensor at multiples of this
MAX_ARENA_BYTES = 1 << 40
MAX_AXES = 16
FALLBACK = "fallback"
NAMES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "int64": "int64", "int32": "int32", "int8": "int8", "uint8": "uint8"}
NAMES |= {"bool": "bool"}  # a plan's inputs and outputs carry NumPy's names; float64 and others are not computed with on the GPU


@dataclass(frozen=True)
class Value:
    """An array a step reads or writes.

    Attributes:
        dtype: fp16, bf16, fp32, int64, int32, int8, uint8 or bool. shape, strides: in elements.
        where: "arena" at byte `offset`; "weights": in the payload tensor `tensor` at byte `offset`; "input", "output": the plan's
            `index`-th, contiguous.
    """

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    where: str
    offset: int = 0
    tensor: str | None = None
    index: int | None = None

    @property
    def elements(self) -> int:
        """Elements from the first to behind the last one."""
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))

    @property
    def num_bytes(self) -> int:
        """Bytes from the first to behind the last element."""
        return self.elements * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Fallback:
    """A part that ONNX Runtime computes on the CPU: the model's input and output names, in the order of operands in0, in1, …, d0, d1, …"""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """One launch.

    Attributes:
        name: of the ONNX node it came from. family, library: who computes it.
        problem: the family's Problem (or Fallback). config: our kernels' Config, else None.
        algorithm: number of a library's algorithm, where it has them.
        operands: operand name -> value name. parts: payload tensors read by the host: "cubin" (our kernel), "graph" (a serialised cuDNN
            plan), "model" (ONNX bytes of a fallback).
    """

    name: str
    family: str
    library: str
    problem: Any
    config: Any
    algorithm: int | None
    operands: dict[str, str]
    parts: dict[str, str]


@dataclass(frozen=True)
class Program:
    """Everything the engine does for one batch size.

    Attributes:
        arena_bytes: memory of all activations. workspace_bytes: scratch that every step may use, one after the other.
    """

    batch: int
    arena_bytes: int
    workspace_bytes: int
    values: dict[str, Value]
    steps: tuple[Step, ...]

    def to_plain(self) -> dict[str, Any]:
        """Return the program as JSON values."""
        values = {name: {k: v for k, v in to_plain(value).items() if v is not None} for name, value in self.values.items()}
        steps = [
            {
                "name": s.name,
                "family": s.family,
                "library": s.library,
                "problem": to_plain(s.problem),
                "config": to_plain(s.config),
                "algorithm": s.algorithm,
                "operands": dict(s.operands),
                "parts": dict(s.parts),
            }
            for s in self.steps
        ]
        sizes = {"batch": self.batch, "arena_bytes": self.arena_bytes, "workspace_bytes": self.workspace_bytes}
        return {**sizes, "values": values, "steps": steps}

    def libraries(self) -> set[str]:
        """Return the libraries the steps need."""
        return {step.library for step in self.steps}


def step_footprints(step: Step, values: Mapping[str, Value]) -> dict[str, Footprint]:
    """Return what a step touches, by operand name; a fallback touches its values whole."""
    if step.family != FALLBACK:
        return families.footprints(step.family, step.library, step.problem)
    names = [f"in{i}" for i in range(len(step.problem.inputs))] + [f"d{i}" for i in range(len(step.problem.outputs))]
    found = {}
    for name in names:
        value = values.get(step.operands.get(name, ""))
        if value is not None:
            found[name] = Footprint(value.dtype, value.elements, 1, writes=name.startswith("d"))
        else:
            found[name] = Footprint("uint8", 0, 1)
    return found


@dataclass(frozen=True)
class Surroundings:
    """What a program is checked against: bytes of each payload tensor, and (dtype, shape) of the plan's inputs and outputs, None: batch."""

    payload_bytes: Mapping[str, int]
    inputs: tuple[tuple[str, tuple[int | None, ...]], ...]
    outputs: tuple[tuple[str, tuple[int | None, ...]], ...]


def read_program(data: Any, around: Surroundings) -> Program:
    """Return the checked Program of JSON values `data`.

    Raises:
        InputError: anything in it is missing, of another kind, out of its bounds, or at odds with the rest.
    """
    if not isinstance(data, dict) or set(data) != {"batch", "arena_bytes", "workspace_bytes", "values", "steps"}:
        raise InputError("a program is no object with batch, arena_bytes, workspace_bytes, values and steps")
    batch = _whole(data["batch"], 1, MAX_DIM, "batch")
    where = f"program of batch {batch}"
    arena_bytes = _whole(data["arena_bytes"], 0, MAX_ARENA_BYTES, f"{where}: arena_bytes")
    workspace_bytes = _whole(data["workspace_bytes"], 0, WORKSPACE_CAP, f"{where}: workspace_bytes")
    if not isinstance(data["values"], dict) or not isinstance(data["steps"], list):
        raise InputError(f"{where}: values is no object or steps is no list")
    values = {name: from_plain(Value, value, f"{where}: value {name[:80]!r}") for name, value in data["values"].items()}
    for name, value in values.items():
        _check_value(value, f"{where}: value {name[:80]!r}", batch, arena_bytes, around)
    used = max((v.offset + v.num_bytes for v in values.values() if v.where == "arena"), default=0)
    if arena_bytes > -(-used // ALIGN) * ALIGN:
        raise InputError(f"{where}: arena_bytes is {arena_bytes}, its values end at {used}")
    steps = tuple(_read_step(step, f"{where}: step {i}", values, around) for i, step in enumerate(data["steps"]))
    written = {index for step in steps for index in _outputs_of(step, values)}
    if lost := sorted(set(range(len(around.outputs))) - written):
        raise InputError(f"{where}: no step writes output {lost[0]}")
    return Program(batch, arena_bytes, workspace_bytes, values, steps)


def _outputs_of(step: Step, values: Mapping[str, Value]) -> set[int]:
    """Return the numbers of the plan's outputs that a step writes."""
    written = (values[step.operands[name]] for name, touched in step_footprints(step, values).items() if touched.writes)
    return {value.index for value in written if value.where == "output" and value.index is not None}


def _whole(value: Any, least: int, most: int, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        shown = repr(value) if not isinstance(value, int) or abs(value) < 2**128 else "too large"
        raise InputError(f"{where} is {shown[:60]}, expected a whole number from {least} to {most}")
    return value


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a row-major array."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def _check_value(value: Value, where: str, batch: int, arena_bytes: int, around: Surroundings) -> None:
    if value.dtype not in DTYPE_BYTES or value.where not in PLACES:
        raise InputError(f"{where}: dtype {value.dtype[:20]!r} or place {value.where[:20]!r} is unknown")
    if len(value.shape) != len(value.strides) or len(value.shape) > MAX_AXES:
        raise InputError(f"{where}: {len(value.shape)} sizes and {len(value.strides)} strides, expected as many, at most {MAX_AXES}")
    for size, stride in zip(value.shape, value.strides, strict=True):
        _whole(size, 1, MAX_DIM, f"{where}: a size")
        _whole(stride, 0, MAX_ELEMS, f"{where}: a stride")
    _whole(value.offset, 0, MAX_ARENA_BYTES, f"{where}: offset")
    if value.offset % DTYPE_BYTES[value.dtype]:
        raise InputError(f"{where}: offset {value.offset} is no multiple of an element")
    if (value.where == "weights") != (value.tensor is not None) or (value.where in ("input", "output")) != (value.index is not None):
        raise InputError(
            f"{where}: the place {value.where!r} needs {'its tensor or index' if value.where != 'arena' else 'an offset only'}"
        )
    if value.where == "arena" and value.offset + value.num_bytes > arena_bytes:
        raise InputError(f"{where} ends at byte {value.offset + value.num_bytes}, the arena has {arena_bytes}")
    if value.tensor is not None:
        held = around.payload_bytes.get(value.tensor)
        if held is None or value.offset + value.num_bytes > held:
            raise InputError(f"{where} needs {value.offset + value.num_bytes} bytes of the tensor {value.tensor[:80]!r}, which has {held}")
    if value.index is not None:
        specs = around.inputs if value.where == "input" else around.outputs
        _whole(value.index, 0, len(specs) - 1, f"{where}: index")
        name, shape = specs[value.index]
        wanted = tuple(batch if size is None else size for size in shape)
        if NAMES.get(name) != value.dtype or wanted != value.shape or value.strides != contiguous(value.shape) or value.offset:
            raise InputError(f"{where} is {value.dtype}{list(value.shape)}, the plan's {value.where} is {name}{list(wanted)}, contiguous")


STEP_FIELDS = {"name", "family", "library", "problem", "config", "algorithm", "operands", "parts"}


def _read_step(data: Any, where: str, values: dict[str, Value], around: Surroundings) -> Step:
    if not isinstance(data, dict) or set(data) != STEP_FIELDS:
        raise InputError(f"{where} is no object with {', '.join(sorted(STEP_FIELDS))}")
    for field in ("name", "family", "library"):
        if not isinstance(data[field], str):
            raise InputError(f"{where}: {field} is no string")
    for field in ("operands", "parts"):
        if not isinstance(data[field], dict) or not all(isinstance(v, str) for v in data[field].values()):
            raise InputError(f"{where}: {field} is no object of strings")
    family, library, algorithm = data["family"], data["library"], data["algorithm"]
    if algorithm is not None:
        _whole(algorithm, 0, 2**16, f"{where}: algorithm")
    if family == FALLBACK:
        problem: Any = from_plain(Fallback, data["problem"], f"{where}: problem")
        config = None
        if library != "onnxruntime" or data["config"] is not None:
            raise InputError(f"{where}: a fallback is run by onnxruntime without a config")
    else:
        if family not in FAMILIES:
            raise InputError(f"{where}: family {family[:20]!r} is not one of {', '.join(FAMILIES)}, {FALLBACK}")
        problem = families.read_problem(family, data["problem"], f"{where}: problem")
        config = families.read_config(family, data["config"], f"{where}: config")
        reason = families.why_not(family, library, problem, config)
        if reason is not None:
            raise InputError(f"{where}: {library[:20]} cannot compute it: {reason}")
    step = Step(data["name"], family, library, problem, config, algorithm, data["operands"], data["parts"])
    _check_parts(step, where, around)
    _check_operands(step, where, values)
    return step


def _check_parts(step: Step, where: str, around: Surroundings) -> None:
    allowed = {OURS: {"cubin"}, "cudnn": {"graph"}, "onnxruntime": {"model"}}.get(step.library, set())
    needed = allowed - {"cubin"}
    if not needed <= set(step.parts) <= allowed:
        raise InputError(f"{where}: parts are {sorted(step.parts)[:3]}, {step.library} takes {sorted(allowed)}")
    for part, tensor in step.parts.items():
        if tensor not in around.payload_bytes:
            raise InputError(f"{where}: its {part} is the tensor {tensor[:80]!r}, which the plan lacks")


def _check_operands(step: Step, where: str, values: dict[str, Value]) -> None:
    wanted = step_footprints(step, values)
    if set(wanted) != set(step.operands):
        raise InputError(f"{where}: operands are {sorted(step.operands)[:8]}, expected {sorted(wanted)}")
    for name, footprint in wanted.items():
        value = values.get(step.operands[name])
        if value is None:
            raise InputError(f"{where}: operand {name} is the value {step.operands[name][:80]!r}, which is not listed")
        if value.dtype != footprint.dtype or value.num_bytes < footprint.num_bytes:
            raise InputError(
                f"{where}: operand {name} is {value.dtype} of {value.elements} elements, "
                f"the problem needs {footprint.dtype} of {footprint.elements}"
            )
        if value.offset % footprint.align:
            raise InputError(f"{where}: operand {name} lies at byte {value.offset}, the launch needs multiples of {footprint.align}")
        if footprint.writes and value.where not in ("arena", "output"):
            raise InputError(f"{where}: operand {name} would be written, but lies in the {value.where}")
