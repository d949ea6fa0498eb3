"""CUDA source and options to a loaded function, with a cache on disk; knows no operation."""

from twofour.jit.cache import Cache, default_cache
from twofour.jit.compiler import ARCH, Compiled, compile_source
from twofour.jit.source import Source, digest, flatten, strip_comments

__all__ = ["ARCH", "Cache", "Compiled", "Source", "compile_source", "default_cache", "digest", "flatten", "strip_comments"]
