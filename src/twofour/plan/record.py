"""The Plan record and its file format.

A plan is one safetensors file. Its metadata holds one entry, `twofour.plan`, a JSON object with `schema`, `backend`, `device`,
`precision`, `sparsity`, `batches`, `inputs`, `outputs` and `about`; its tensors hold the backend's payload. For the backend
`onnxruntime` that is one tensor `onnx` of uint8: the bytes of an ONNX file. For the backend `cuda` the object also holds `programs`,
`kernels` and `needs`, and the tensors are weights, compiled kernels and serialized library plans. docs/plan.md is the specification.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from twofour.errors import InputError, PlanFormatError
from twofour.files import existing_file, written_aside
from twofour.plan.program import Program, Surroundings, read_program

SCHEMA = 1
# NOTE: one entry only. The safetensors library writes several in an order that changes from run to run, and a plan is byte-exact.
KEY = "twofour.plan"
BACKENDS = ("onnxruntime", "cuda")
DEVICES = ("cpu", "cuda")
PRECISIONS = ("fp32", "fp16", "bf16")
SPARSITY = ("auto", "off", "force")
DTYPES = frozenset({"bool", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"})


@dataclass(frozen=True)
class ValueSpec:
    """An input or output: name, NumPy dtype name, shape with None where any size goes (the batch)."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}[{', '.join('batch' if s is None else str(s) for s in self.shape)}]"


@dataclass(frozen=True)
class Plan:
    """An engine on disk: which backend runs it, what goes in and out, and the payload.

    Attributes:
        batches: batch sizes it was tuned for; empty means any.
        programs: what the backend `cuda` does, one a batch size. kernels: family -> digest of the device sources its compiled kernels were
            made from. needs: library -> version its steps were chosen with.
        whole: why the backend `cuda` takes only batches of these sizes; empty where each item is computed by itself.
        about: how it was built (versions, the source's digest, notes), for people and reports.
    """

    backend: str
    device: str
    precision: str
    sparsity: str
    inputs: tuple[ValueSpec, ...]
    outputs: tuple[ValueSpec, ...]
    payload: dict[str, npt.NDArray[Any]] = field(repr=False)
    batches: tuple[int, ...] = ()
    about: dict[str, Any] = field(default_factory=dict, repr=False)
    programs: tuple[Program, ...] = field(default=(), repr=False)
    kernels: dict[str, str] = field(default_factory=dict, repr=False)
    needs: dict[str, str] = field(default_factory=dict, repr=False)
    whole: str = ""

    @property
    def num_bytes(self) -> int:
        """Bytes of the payload."""
        return sum(array.nbytes for array in self.payload.values())

    @property
    def fixed_batches(self) -> tuple[int, ...]:
        """The size of each input's first axis, in order; nothing where one of them is open: such a plan takes any batch."""
        sizes = [value.shape[0] for value in self.inputs if value.shape]
        return () if None in sizes else tuple(size for size in sizes if size is not None)

    def __str__(self) -> str:
        ins, outs = ", ".join(map(str, self.inputs)), ", ".join(map(str, self.outputs))
        return f"Plan({self.backend} on {self.device}, {self.precision}, {ins} -> {outs}, {self.num_bytes:,} bytes)"

    def save(self, path: str | Path) -> None:
        """Write the plan aside and rename it into place.

        Raises:
            InputError: the folder does not exist or cannot be written.
        """
        from safetensors.numpy import save_file

        header: dict[str, Any] = {"schema": SCHEMA}
        for name in ("backend", "device", "precision", "sparsity", "batches", "about"):
            header[name] = getattr(self, name)
        header |= {"inputs": [asdict(v) for v in self.inputs], "outputs": [asdict(v) for v in self.outputs]}
        if self.backend == "cuda":
            header |= {"programs": [p.to_plain() for p in self.programs], "kernels": self.kernels, "needs": self.needs}
            header |= {"whole": self.whole} if self.whole else {}
        with written_aside(path) as aside:
            save_file(self.payload, aside, {KEY: json.dumps(header, sort_keys=True)})

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Return the plan in a file. Nothing in the file is run, and nothing beyond the file's size is allocated.

        Raises:
            PlanFormatError: missing, damaged, not a plan, or of another version.
        """
        from safetensors import SafetensorError, safe_open

        try:
            path = existing_file(path, "plan")
        except InputError as error:
            raise PlanFormatError(str(error)) from error
        try:
            with safe_open(path, "np") as file:
                metadata = file.metadata() or {}
                if KEY not in metadata:
                    raise PlanFormatError(f"{str(path)!r} is a safetensors file but no plan; make one with twofour build")
                payload = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a safetensors file is no mapping
        except (SafetensorError, OSError, ValueError, TypeError) as error:
            raise PlanFormatError(
                one_line(f"plan {str(path)!r} is damaged, or was never one: {error}; make one with twofour build")
            ) from error
        return cls._from_header(metadata[KEY], payload, str(path))

    @classmethod
    def _from_header(cls, text: str, payload: dict[str, npt.NDArray[Any]], where: str) -> "Plan":
        try:
            return cls._read_header(text, payload, where)
        except PlanFormatError as error:
            raise PlanFormatError(one_line(str(error))) from error

    @classmethod
    def _read_header(cls, text: str, payload: dict[str, npt.NDArray[Any]], where: str) -> "Plan":
        try:
            header = json.loads(text)
            schema = header.pop("schema")
            if schema != SCHEMA:
                raise PlanFormatError(f"plan {where!r} has schema {schema!r}, this version reads {SCHEMA}; build it again")
            plan = cls(
                backend=str(header["backend"]),
                device=str(header["device"]),
                precision=str(header["precision"]),
                sparsity=str(header["sparsity"]),
                inputs=tuple(_value(v) for v in header["inputs"]),
                outputs=tuple(_value(v) for v in header["outputs"]),
                payload=payload,
                batches=tuple(_size(b) for b in header["batches"]),
                about=dict(header["about"]),
            )
            if plan.backend == "cuda":
                plan = _with_programs(plan, header)
        except PlanFormatError:
            raise
        except InputError as error:
            raise PlanFormatError(f"plan {where!r} is damaged: {one_line(str(error))}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise PlanFormatError(f"plan {where!r} is damaged: its description cannot be read ({error!r})") from error
        for what, value, known in (
            ("device", plan.device, DEVICES),
            ("precision", plan.precision, PRECISIONS),
            ("sparsity", plan.sparsity, SPARSITY),
        ):
            if value not in known:
                raise PlanFormatError(f"plan {where!r} asks for the {what} {value!r}, this version has {list(known)}; update twofour")
        if plan.backend not in BACKENDS:
            raise PlanFormatError(
                f"plan {where!r} asks for the backend {plan.backend!r}, this version has {list(BACKENDS)}; update twofour"
            )
        if (plan.backend == "cuda") != (plan.device == "cuda") or (plan.backend == "cuda" and plan.precision == "fp32"):
            raise PlanFormatError(
                f"plan {where!r} is damaged: the backend {plan.backend!r} does not run {plan.precision} on the device {plan.device!r}"
            )
        if plan.backend == "onnxruntime" and not (
            set(payload) == {"onnx"} and payload["onnx"].dtype == np.uint8 and payload["onnx"].ndim == 1
        ):
            raise PlanFormatError(f"plan {where!r} is damaged: the onnxruntime backend expects one tensor 'onnx' of uint8")
        return plan


def printable(text: str) -> str:
    """Return `text` with a `?` for each character that a terminal would obey, whatever a file put into it."""
    return "".join(c if c.isprintable() else "?" for c in text)


def one_line(text: str, most: int = 600) -> str:
    """Return a message of bounded length on one line that a terminal shows as it is."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= most else f"{line[:most]} ..."


def _strings(value: Any, what: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise InputError(f"{what} is no object of strings")
    return dict(value)


def _with_programs(plan: Plan, header: dict[str, Any]) -> Plan:
    """The plan with its checked programs; a compiled kernel is named after its digest, so that damage is seen."""
    sizes = {name: array.nbytes for name, array in plan.payload.items()}
    specs = [tuple((v.dtype, v.shape) for v in values) for values in (plan.inputs, plan.outputs)]
    around = Surroundings(sizes, specs[0], specs[1])
    if not isinstance(header["programs"], list) or not plan.inputs or not plan.outputs:
        raise InputError("programs is no list, or there are no inputs or outputs")
    programs = tuple(read_program(program, around) for program in header["programs"])
    if not programs or tuple(sorted(p.batch for p in programs)) != tuple(sorted(set(plan.batches))):
        raise InputError(f"programs are for batches {[p.batch for p in programs][:8]}, the plan says {list(plan.batches)[:8]}")
    for name in {step.parts["cubin"] for p in programs for step in p.steps if "cubin" in step.parts}:
        if name != cubin_name(plan.payload[name].tobytes()):
            raise InputError(f"the compiled kernel {name[:80]!r} has another digest than its name says")
    kernels, needs = _strings(header["kernels"], "kernels"), _strings(header["needs"], "needs")
    whole = header.get("whole", "")
    if not isinstance(whole, str):
        raise InputError("whole is no string")
    missing = {step.library for p in programs for step in p.steps} - set(needs) - {"twofour"}
    if missing:
        raise InputError(f"needs lacks the libraries {sorted(missing)} that steps use")
    return replace(plan, programs=programs, kernels=kernels, needs=needs, whole=one_line(whole))


def cubin_name(cubin: bytes) -> str:
    """Return the payload name of a compiled kernel: its digest."""
    return f"cubin.{hashlib.sha256(cubin).hexdigest()}"


def _size(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"size {value!r}")
    return value


def _value(value: Any) -> ValueSpec:
    shape = tuple(None if s is None else _size(s) for s in value["shape"])
    if value["dtype"] not in DTYPES:
        raise ValueError(f"dtype {value['dtype']!r}")
    return ValueSpec(str(value["name"]), str(value["dtype"]), shape)
