"""ONNX Runtime on the CPU: runs everywhere, has no sparse kernel."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from twofour.errors import MissingExtraError, PlanFormatError, UnsupportedError
from twofour.ort import ERRORS, session
from twofour.plan import Plan

Array = npt.NDArray[Any]


def described(name: str, shape: Sequence[Any]) -> str:
    """Return `name[shape]` with every symbolic size as `batch`."""
    return f"{name}[{', '.join(str(size) if isinstance(size, int) else 'batch' for size in shape)}]"


class OnnxRuntimeBackend:
    """An ONNX Runtime session over the plan's ONNX bytes."""

    def __init__(self, plan: Plan, num_threads: int | None = None) -> None:
        self._plan, self._num_threads = plan, num_threads
        self._session = self._make_session()
        self._output_names = [spec.name for spec in plan.outputs]
        for kind, specs, values in (
            ("input", plan.inputs, self._session.get_inputs()),
            ("output", plan.outputs, self._session.get_outputs()),
        ):
            said, found = [described(s.name, s.shape) for s in specs], [described(v.name, v.shape) for v in values]
            if said != found:
                raise PlanFormatError(f"plan: it describes the {kind}s {said}, the model inside has {found}; build it again")

    def _make_session(self, profile_prefix: str | None = None) -> Any:
        model = self._plan.payload["onnx"].tobytes()
        try:
            return session(model, severity=ERRORS, threads=self._num_threads, profile_prefix=profile_prefix)
        except ModuleNotFoundError as error:
            raise MissingExtraError("the onnxruntime backend needs onnxruntime; pip install onnxruntime") from error
        except Exception as error:
            # ONNX Runtime raises its own kinds for a bad model; they share no public base.
            first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise PlanFormatError(f"plan: ONNX Runtime refuses the model inside: {first_line}") from error

    def run(self, inputs: list[Array]) -> list[Array]:
        """Return the outputs in the plan's order.

        Raises:
            UnsupportedError: ONNX Runtime cannot run the model on these inputs.
        """
        feeds = {spec.name: array for spec, array in zip(self._plan.inputs, inputs, strict=True)}
        try:
            return [np.asarray(output) for output in self._session.run(self._output_names, feeds)]
        except Exception as error:
            # ONNX Runtime raises its own kinds here too.
            raise UnsupportedError(f"engine: ONNX Runtime failed: {str(error).splitlines()[0]}") from error

    def profile(self, inputs: list[Array], num_runs: int) -> list[tuple[str, str, float]]:
        """Return (node, operation, median microseconds of a run) as ONNX Runtime's profiler saw them, slowest first."""
        feeds = {spec.name: array for spec, array in zip(self._plan.inputs, inputs, strict=True)}
        with tempfile.TemporaryDirectory() as folder:
            session = self._make_session(str(Path(folder) / "profile"))
            for _ in range(num_runs):
                session.run(self._output_names, feeds)
            events = json.loads(Path(session.end_profiling()).read_text())
        taken: dict[tuple[str, str], list[float]] = {}
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                key = (event["name"].removesuffix("_kernel_time"), event["args"]["op_name"])
                taken.setdefault(key, []).append(event["dur"])
        return sorted(((node, op, float(median(times))) for (node, op), times in taken.items()), key=lambda row: -row[2])
