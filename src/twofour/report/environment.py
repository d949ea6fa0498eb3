"""Where numbers were taken, and what is installed (`twofour doctor`)."""

import importlib.metadata
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from twofour.ort import session
from twofour.report.record import Environment

LIBRARIES = ("torch", "numpy", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "numba", "safetensors", "scikit-learn")
# Package -> (what it is for, the pip line that brings it).
OPTIONAL = {
    "cuda-core": ("kernels compiled at run time, GPU launches", "pip install '.[cuda]'  (in the checkout)"),
    "nvidia-cuda-nvrtc": ("the run-time compiler", "pip install '.[cuda]'  (in the checkout)"),
    "nvidia-ml-py": ("GPU clocks, power and energy", "pip install '.[cuda]'  (in the checkout)"),
    "nvmath-python": ("cuBLASLt and cuSPARSELt as tactics", "pip install '.[peers]'  (in the checkout)"),
    "nvidia-cudnn-frontend": ("cuDNN's convolutions and attention as tactics", "pip install '.[cudnn]'  (in the checkout)"),
    "tensorrt": ("TensorRT as a backend", "pip install tensorrt"),
}


def version_of(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """Return the processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def gpu_name() -> str | None:
    """Return the first NVIDIA GPU's name, or None. Asks the driver's own library, so torch is not needed."""
    try:
        import pynvml
    except ModuleNotFoundError:
        try:
            import torch
        except ModuleNotFoundError:
            return None
        return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0)))
    except pynvml.NVMLError:
        return None


def environment() -> Environment:
    """Return the record of this machine."""
    import psutil

    libraries = {name: version for name in LIBRARIES if (version := version_of(name)) is not None}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Environment(
        python=platform.python_version(),
        platform=platform.platform(),
        cpu=cpu_name(),
        cores=cores,
        memory_bytes=psutil.virtual_memory().total,
        gpu=gpu_name(),
        libraries=libraries,
    )


@dataclass(frozen=True)
class Backend:
    """A backend, whether it works here, and what to do if not."""

    name: str
    works: bool
    detail: str


def backends() -> list[Backend]:
    """Return what can run plans on this machine."""
    if version_of("onnxruntime") is None:
        return [Backend("onnxruntime", False, "pip install onnxruntime")]
    try:
        ran = _runs_relu()
    except Exception as error:  # noqa: BLE001 - whatever a broken installation raises is what the user asks about
        return [Backend("onnxruntime", False, f"{type(error).__name__}: {error}")]
    return [
        Backend("onnxruntime", ran, f"{version_of('onnxruntime')}, CPU; no sparse kernels" if ran else "wrong result of a one-node model")
    ]


def _runs_relu() -> bool:
    """Whether ONNX Runtime computes max(x, 0) of two numbers."""
    import numpy as np
    from onnx import TensorProto, helper

    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    found = session(model.SerializeToString()).run(None, {"x": np.array([-1, 2], np.float32)})[0]
    return bool((found == [0, 2]).all())
