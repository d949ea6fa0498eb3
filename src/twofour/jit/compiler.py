"""NVRTC through cuda.core: needs no GPU and no toolkit, gives the cubin and what ptxas reported about it."""

import io
import re
from dataclasses import dataclass

from twofour.errors import MissingExtraError, UnsupportedError
from twofour.jit.source import Source

ARCH = "sm_90a"
_SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SERIALIZED = re.compile(r"C75(?:0[89]|1\d)|serializ", re.IGNORECASE)


@dataclass(frozen=True)
class Compiled:
    """A cubin and ptxas' report of it."""

    cubin: bytes
    report: str

    @property
    def registers(self) -> int:
        """Registers a thread at launch."""
        match = _REGISTERS.search(self.report)
        return int(match.group(1)) if match else 0

    @property
    def complaints(self) -> list[str]:
        """Lines of the report that cost speed: spills, stack frames, serialised `wgmma`, ignored `setmaxnreg`."""
        bad = []
        for line in self.report.splitlines():
            spill = _SPILL.search(line)
            if (spill and any(int(n) for n in spill.groups())) or _SERIALIZED.search(line):
                bad.append(line.strip())
        return bad


def compiler_version() -> str:
    """Return NVRTC's version, like `13.0`.

    Raises:
        MissingExtraError: cuda.core, cuda.bindings or NVRTC is not installed.
    """
    try:
        from cuda.bindings import nvrtc

        error, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as e:
        raise MissingExtraError(f"compiling kernels needs NVRTC, which could not be loaded ({e}); pip install 'twofour[cuda]'") from e
    if int(error) != 0:
        raise MissingExtraError(f"NVRTC answered error {int(error)} when asked for its version; pip install 'twofour[cuda]'")
    return f"{major}.{minor}"


def compile_source(source: Source, arch: str = ARCH, options: tuple[str, ...] = ()) -> Compiled:
    """Return the cubin of `source` for `arch`. Touches no GPU and no file.

    Raises:
        MissingExtraError: NVRTC is not installed.
        UnsupportedError: the compiler refused the source; the message holds its first error.
    """
    compiler_version()
    from cuda.core import Program, ProgramOptions
    from cuda.core._utils.cuda_utils import CUDAError

    log = io.StringIO()
    program_options = ProgramOptions(name=source.name, arch=arch, std="c++17", ptxas_options=["-v", *options])
    try:
        program = Program(source.text, "c++", program_options)
        try:
            cubin = bytes(program.compile("cubin", logs=log).code)
        finally:
            program.close()
    except (RuntimeError, CUDAError) as e:
        first = next((line for line in f"{e}\n{log.getvalue()}".splitlines() if ": error:" in line), str(e).splitlines()[0])
        raise UnsupportedError(f"kernel {source.name} did not compile for {arch} with NVRTC {compiler_version()}: {first.strip()}") from e
    return Compiled(cubin, log.getvalue())
