"""Where numbers were taken, and what is installed (`twofour doctor`)."""

import importlib.metadata
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from twofour.report.record import Environment

LIBRARIES = ("twofour", "torch", "numpy", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "numba", "safetensors", "scikit-learn")
# Package -> (what it is for, the pip line that brings it).
OPTIONAL = {
    "cuda-core": ("kernels compiled at run time, GPU launches", "pip install 'twofour[cuda]'"),
    "nvidia-cuda-nvrtc": ("the run-time compiler", "pip install 'twofour[cuda]'"),
    "nvidia-ml-py": ("GPU clocks, power and energy", "pip install 'twofour[cuda]'"),
    "nvmath-python": ("cuBLASLt and cuSPARSELt as tactics", "pip install 'twofour[peers]'"),
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
        import torch

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
    found = []
    onnxruntime = version_of("onnxruntime")
    if onnxruntime:
        found.append(Backend("onnxruntime", True, f"{onnxruntime}, CPU; no sparse kernels"))
    else:
        found.append(Backend("onnxruntime", False, "pip install onnxruntime"))
    return found
