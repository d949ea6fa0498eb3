"""A part of a network that ONNX Runtime computes on the CPU: its operands travel to the host and back."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from twofour.errors import PlanFormatError, UnsupportedError
from twofour.kernels.host_part import NUMPY, HostPart
from twofour.plan.program import Step, Value, contiguous


class Fallback:
    """A step run by ONNX Runtime; every launch waits for the stream twice."""

    workspace_bytes = 0

    def __init__(self, step: Step, values: Mapping[str, Value], model: bytes, gpu: Any) -> None:
        """Open a session over the step's model.

        Raises:
            MissingExtraError: ONNX Runtime is not installed. PlanFormatError: it refuses the model, or a value is not contiguous.
        """
        self._step, self._gpu = step, gpu
        self._values = {name: values[value] for name, value in step.operands.items()}
        for name, value in self._values.items():
            if value.strides != contiguous(value.shape):
                raise PlanFormatError(f"plan: operand {name} of the fallback {step.name!r} has gaps, expected a contiguous value")
        inputs = [(name, self._values[f"in{i}"].dtype) for i, name in enumerate(step.problem.inputs)]
        outputs = [(name, self._values[f"d{i}"].dtype) for i, name in enumerate(step.problem.outputs)]
        try:
            self._part = HostPart(step.name, model, inputs, outputs)
        except UnsupportedError as error:
            raise PlanFormatError(f"plan: {error}") from error

    def __call__(self, operands: Mapping[str, int], workspace: int, stream: int) -> None:
        """Bring the inputs to the host, run, and bring the outputs back."""
        gpu, arrays = self._gpu, []
        for i in range(len(self._step.problem.inputs)):
            value = self._values[f"in{i}"]
            host = np.empty(value.shape, NUMPY[value.dtype])
            gpu.download(host.ctypes.data, operands[f"in{i}"], host.nbytes, stream)
            gpu.synchronize(stream)
            arrays.append(host)
        try:
            results = self._part.run(arrays)
        except UnsupportedError as error:
            raise UnsupportedError(f"engine: {error}") from error
        for i, result in enumerate(results):
            value = self._values[f"d{i}"]
            if result.shape != value.shape:
                raise PlanFormatError(f"plan: the fallback {self._step.name!r} gave {list(result.shape)}, expected {list(value.shape)}")
            gpu.upload(operands[f"d{i}"], result.ctypes.data, result.nbytes, stream)
            gpu.synchronize(stream)
