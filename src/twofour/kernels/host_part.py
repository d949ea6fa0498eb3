"""A part of a network that ONNX Runtime computes on the CPU, on arrays as copies from and to the GPU's memory leave them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from twofour.errors import MissingExtraError, UnsupportedError
from twofour.oracle.pointwise import bf16_bits, bf16_values
from twofour.ort import ERRORS, session

Array = npt.NDArray[Any]
# Element types as NumPy holds them: bf16 as its bits.
NUMPY: dict[str, Any] = {"fp16": np.float16, "bf16": np.uint16, "fp32": np.float32, "int64": np.int64, "int32": np.int32, "int8": np.int8}
NUMPY |= {"uint8": np.uint8, "bool": np.bool_}


class HostPart:
    """A session over the part's model. Safe from several threads."""

    def __init__(self, name: str, model: bytes, inputs: Sequence[tuple[str, str]], outputs: Sequence[tuple[str, str]]) -> None:
        """Open the session.

        Args:
            name: of the step, for errors. inputs, outputs: (the model's name, element type in memory), in the order of the operands.

        Raises:
            MissingExtraError: ONNX Runtime is not installed. UnsupportedError: it refuses the model.
        """
        self._name, self._inputs, self._outputs = name, inputs, outputs
        try:
            self._session = session(model, severity=ERRORS)
        except ImportError as e:
            raise MissingExtraError(f"step {name!r} runs on the CPU and needs onnxruntime ({e}); pip install onnxruntime") from e
        except Exception as error:
            # ONNX Runtime raises its own kinds for a bad model; they share no public base.
            raise UnsupportedError(f"ONNX Runtime refuses the fallback {name!r}: {str(error).splitlines()[0]}") from error
        self._single = {i.name for i in self._session.get_inputs() if i.type == "tensor(float)"}

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        """Return the outputs of the inputs, both as memory holds them, contiguous.

        Raises:
            UnsupportedError: ONNX Runtime fails on these values.
        """
        feeds = {}
        for (name, dtype), array in zip(self._inputs, arrays, strict=True):
            values = bf16_values(array) if dtype == "bf16" else array
            feeds[name] = values.astype(np.float32) if name in self._single else values
        try:
            results = self._session.run([name for name, _ in self._outputs], feeds)
        except Exception as error:
            # ONNX Runtime raises its own kinds here too.
            raise UnsupportedError(f"ONNX Runtime failed in {self._name!r}: {str(error).splitlines()[0]}") from error
        kinds = [dtype for _, dtype in self._outputs]
        held = [bf16_bits(y) if dtype == "bf16" else y.astype(NUMPY[dtype]) for y, dtype in zip(results, kinds, strict=True)]
        return [np.asarray(y, order="C") for y in held]
