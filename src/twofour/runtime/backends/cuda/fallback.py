"""A part of a network that ONNX Runtime computes on the CPU: its operands travel to the host and back."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from twofour.errors import MissingExtraError, PlanFormatError, UnsupportedError
from twofour.oracle.pointwise import bf16_bits, bf16_values
from twofour.plan.program import Step, Value, contiguous

_NUMPY: dict[str, Any] = {"fp16": np.float16, "bf16": np.uint16, "fp32": np.float32, "int64": np.int64, "int32": np.int32, "int8": np.int8}
_NUMPY |= {"uint8": np.uint8, "bool": np.bool_}


class Fallback:
    """A step run by ONNX Runtime; every launch waits for the stream twice."""

    workspace_bytes = 0

    def __init__(self, step: Step, values: Mapping[str, Value], model: bytes, gpu: Any) -> None:
        """Open a session over the step's model.

        Raises:
            MissingExtraError: ONNX Runtime is not installed. PlanFormatError: it refuses the model, or a value is not contiguous.
        """
        try:
            import onnxruntime
        except ImportError as e:
            raise MissingExtraError(f"step {step.name!r} runs on the CPU and needs onnxruntime ({e}); pip install onnxruntime") from e
        self._step, self._gpu = step, gpu
        self._values = {name: values[value] for name, value in step.operands.items()}
        for name, value in self._values.items():
            if value.strides != contiguous(value.shape):
                raise PlanFormatError(f"plan: operand {name} of the fallback {step.name!r} has gaps, expected a contiguous value")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            # ONNX Runtime raises its own kinds for a bad model; they share no public base.
            raise PlanFormatError(f"plan: ONNX Runtime refuses the fallback {step.name!r}: {str(error).splitlines()[0]}") from error

    def __call__(self, operands: Mapping[str, int], workspace: int, stream: int) -> None:
        """Bring the inputs to the host, run, and bring the outputs back."""
        problem, gpu = self._step.problem, self._gpu
        feeds, wanted = {}, {i.name: i.type for i in self._session.get_inputs()}
        for i, name in enumerate(problem.inputs):
            value = self._values[f"in{i}"]
            host = np.empty(value.shape, _NUMPY[value.dtype])
            gpu.download(host.ctypes.data, operands[f"in{i}"], host.nbytes, stream)
            gpu.synchronize(stream)
            array = bf16_values(host) if value.dtype == "bf16" else host
            feeds[name] = array.astype(np.float32) if wanted.get(name) == "tensor(float)" else array
        try:
            results = self._session.run(list(problem.outputs), feeds)
        except Exception as error:
            # ONNX Runtime raises its own kinds here too.
            raise UnsupportedError(f"engine: ONNX Runtime failed in {self._step.name!r}: {str(error).splitlines()[0]}") from error
        for i, result in enumerate(results):
            value = self._values[f"d{i}"]
            if tuple(result.shape) != value.shape:
                raise PlanFormatError(f"plan: the fallback {self._step.name!r} gave {list(result.shape)}, expected {list(value.shape)}")
            host = bf16_bits(result) if value.dtype == "bf16" else result.astype(_NUMPY[value.dtype])
            host = np.ascontiguousarray(host)
            gpu.upload(operands[f"d{i}"], host.ctypes.data, host.nbytes, stream)
            gpu.synchronize(stream)
