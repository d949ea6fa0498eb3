"""Plans for NVIDIA GPUs: needs the driver and the libraries that the plan names; neither torch nor onnx."""

from twofour.runtime.backends.cuda.backend import CudaBackend

__all__ = ["CudaBackend"]
