"""How the two library tactics reach their library: the bare bindings of nvmath-python, imported when used."""

from typing import Any

from twofour.errors import MissingExtraError

CUDA_TYPE = {"bf16": 14, "fp16": 2, "fp32": 0}  # cudaDataType
COMPUTE_32F = 68  # cublasComputeType_t


def import_bindings(name: str, package: str) -> Any:
    """Return the module `nvmath.bindings.<name>`.

    Raises:
        MissingExtraError: nvmath-python is not installed.
    """
    import importlib

    try:
        return importlib.import_module(f"nvmath.bindings.{name}")
    except ImportError as e:
        raise MissingExtraError(
            f"the {package} tactic needs nvmath-python, which could not be imported ({e}); pip install 'twofour[peers]'"
        ) from e
