"""Host memory of torch tensors as NumPy arrays, without importing torch."""

from typing import Any

import numpy as np
import numpy.typing as npt

from twofour.errors import InputError
from twofour.plan import ValueSpec


def host_array(tensor: Any, spec: ValueSpec) -> npt.NDArray[Any]:
    """Return the values of a torch tensor in host memory, the tensor's own where it lies there.

    Raises:
        InputError: NumPy has no such type (bfloat16) or layout (sparse).
    """
    try:
        return np.asarray(tensor.detach().cpu().numpy())
    except (TypeError, RuntimeError) as error:
        kind = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
        raise InputError(f"engine: input {spec.name!r} is {kind} in {tensor.layout}, expected {spec} in torch.strided") from error
