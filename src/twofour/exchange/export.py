"""`export`: a torch module → an ONNX file that gives the same outputs and, if the module is 2:4, still is."""

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from twofour.errors import InputError, UnsupportedError, VerificationError
from twofour.exchange.aliases import with_aliases
from twofour.exchange.inspect import Inspection, inspect
from twofour.files import require_suffix, written_aside
from twofour.ort import session
from twofour.pruning import Pruning
from twofour.pruning.capture import exporter_quiet, in_eval_mode
from twofour.pruning.record import PRUNING_KEY
from twofour.sources.user_code import place_of

_OPERATION = re.compile(r"No ONNX function found for <OpOverload\(op='([^']+)'")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Exported:
    """The exported file and what was checked: largest |ONNX − torch| and the tolerance it had to meet, and the 2:4 verdict."""

    path: str
    largest_error: float
    tolerance: float
    inspection: Inspection

    def __str__(self) -> str:
        return f"Exported({self.path}: largest error {self.largest_error:.2e}, allowed {self.tolerance:.2e}; {self.inspection})"


def flattened(value: Any) -> list[Tensor]:
    """Return the tensors in a model's output, depth first."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def rounding_tolerance(single: list[Tensor], double: list[Tensor], dtype: torch.dtype = torch.float32) -> float:
    """Return how far a correct run of the same graph in `dtype` may be from `single`, or from `double`, in absolute terms.

    The error of torch's own float32 run against float64 is one sample of the rounding of such a run. Another order of summation and
    folded norms give another sample; 8 × the first, plus 8 ulp of the largest output for exact cases, bounds it with room.

    Args:
        single: torch's outputs in `dtype`. double: in a precision that rounds far less.
    """
    error = max((float((s.double() - d).abs().max()) for s, d in zip(single, double, strict=True) if s.numel()), default=0.0)
    largest = max((float(d.abs().max()) for d in double if d.numel()), default=0.0)
    return 8 * error + 8 * torch.finfo(dtype).eps * largest


def reference_outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the outputs in float32 and in float64 (on a copy), in eval mode."""
    with in_eval_mode(model), torch.no_grad():
        single = flattened(model(*inputs))
        double_model = copy.deepcopy(model).double()
        double = flattened(double_model(*(x.double() if x.is_floating_point() else x for x in inputs)))
    return single, double


def compare(path: Path, model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[float, float]:
    """Return (largest error of the ONNX file against the module, tolerance) over two batch sizes of random inputs."""
    opened = session(path)
    names = [i.name for i in opened.get_inputs()]
    worst, tolerance = 0.0, 0.0
    generator = torch.Generator().manual_seed(0)
    for batch in (1, 3):
        repeats = [x.repeat(-(-batch // len(x)), *[1] * (x.ndim - 1))[:batch] for x in inputs]
        varied = tuple(x + torch.rand(x.shape, generator=generator) * x.std() if x.is_floating_point() else x for x in repeats)
        single, double = reference_outputs(model, varied)
        results = opened.run(None, dict(zip(names, [x.numpy() for x in varied], strict=True)))
        for result, expected in zip(results, single, strict=True):
            wanted = expected.double().numpy()
            if not np.isfinite(wanted).all():
                raise VerificationError(
                    "export: the module's outputs are not finite, so no file can be checked against them; mend the weights"
                )
            if not np.isfinite(result).all():
                worst = float("inf")
            elif result.size:
                worst = max(worst, float(np.abs(result.astype(np.float64) - wanted).max()))
        tolerance = max(tolerance, rounding_tolerance(single, double))
    return worst, tolerance


def _two_or_more(example_inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A batch of one would be specialised to a constant."""
    return tuple(torch.cat([x, x]) if len(x) == 1 else x for x in example_inputs)


def captured(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """Return the ONNX program of `model` with a dynamic batch, not yet checked.

    Raises:
        UnsupportedError: torch cannot export the model; names the operation, where the exporter does.
    """
    shapes = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs)
    try:
        with in_eval_mode(model), torch.no_grad(), exporter_quiet():
            program = torch.onnx.export(model, inputs, dynamo=True, dynamic_shapes=shapes, verbose=False)
    except Exception as error:
        raise UnsupportedError(f"export: torch.onnx cannot export this model: {_cause(error)}") from error
    assert program is not None
    return program


def _cause(error: BaseException) -> str:
    """Return the operation that an exporter's error names, else the first line of its innermost cause.

    The exporter raises dozens of kinds, wraps each in advice of its own, and colours it.
    """
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:
        chain.append(following)
        following = following.__cause__ or following.__context__
    for link in reversed(chain):
        if found := _OPERATION.search(str(link)):
            return f"it has no ONNX translation of the operation {found[1]}; replace that operation in the model"
    for link in reversed(chain):
        if isinstance(link, GuardOnDataDependentSymNode):
            place = place_of(link)
            return (
                "its path depends on the values of a tensor"
                + (f" at {place}" if place else "")
                + "; compute both paths and choose with torch.where"
            )
    texts = [_COLOUR.sub("", str(link)) for link in reversed(chain)]
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def refuse_unexportable(model: nn.Module, example_inputs: tuple[Tensor, ...]) -> None:
    """Do nothing if `model` can be written as ONNX, whatever its weights.

    Raises:
        UnsupportedError: as `export`.
    """
    captured(model, _two_or_more(example_inputs))


def export(
    model: nn.Module,
    example_inputs: tuple[Tensor, ...],
    path: str | Path,
    *,
    pruning: Pruning | None = None,
) -> Exported:
    """Write `model` as ONNX with a dynamic batch to `path` and return what was checked.

    The file is written aside and takes its place only after its outputs equal the module's (two batch sizes, float32 rounding) and,
    with `pruning`, every layer recorded as pruned is 2:4 in the file too. The record goes into the file's metadata, with the names that
    the exporter gave to weights left dense (shared, transposed, or computed by a parametrisation).

    Args:
        model: on the CPU, float32.
        example_inputs: tensors, first axis the batch.

    Raises:
        UnsupportedError: torch cannot export the model. VerificationError: the file does not reproduce it.
        InputError: the folder does not exist.
    """
    path = Path(path)
    require_suffix(path, ".onnx", "export: path")
    if not path.parent.is_dir():
        raise InputError(f"export: folder {str(path.parent)!r} does not exist; make it first")
    inputs = _two_or_more(example_inputs)
    program = captured(model, inputs)
    if pruning is not None:
        program.model.metadata_props[PRUNING_KEY] = with_aliases(pruning, model, program.model).to_json()
    program.model.producer_name = "twofour"
    with written_aside(path) as aside:
        program.save(aside, external_data=False)
        largest, tolerance = compare(aside, model, inputs)
        if not largest <= tolerance:
            raise VerificationError(
                f"export: {path.name} differs from the module by {largest:.2e}, allowed {tolerance:.2e}; the file is discarded"
            )
        inspection = inspect(aside)
        if pruning is not None and inspection.violations:
            names = [v.name for v in inspection.violations]
            layers = f"{len(names)} layer{'s' if len(names) != 1 else ''}"
            raise VerificationError(f"export: {path.name} is not 2:4 in {layers} (first: {names[:3]}); the file is discarded")
    return Exported(str(path), largest, tolerance, Inspection(str(path), inspection.kind, inspection.weights, inspection.notes))
