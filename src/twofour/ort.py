"""ONNX Runtime on the CPU, opened in one way wherever it is used."""

from pathlib import Path
from typing import Any

# NOTE: it moves a Pad of zeros into a MaxPool behind it, which pads with minus infinity (1.30).
WRONG_FUSIONS = ["Pad_Fusion"]
WARNINGS, ERRORS, FATAL = 2, 3, 4  # severities; each silences what is below


def session(model: bytes | Path, *, severity: int = WARNINGS, threads: int | None = None, profile_prefix: str | None = None) -> Any:
    """Return an `onnxruntime.InferenceSession` on the CPU of a model's bytes or file.

    Args:
        severity: the least of what it logs. threads: that one operator runs on; None: ONNX Runtime's choice.
        profile_prefix: beginning of the name of the file it writes a profile to; None: it writes none.

    Raises:
        ImportError: ONNX Runtime is not installed. Exception: its own kinds, which share no public base, where it refuses the model.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = severity
    if threads is not None:
        options.intra_op_num_threads = threads
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = profile_prefix
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"], disabled_optimizers=WRONG_FUSIONS)
