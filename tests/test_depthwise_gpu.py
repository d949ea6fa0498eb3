"""Depthwise convolutions on a Hopper GPU against float64 (`pytest -m gpu`).

Tolerance: half a unit of the output's type, and roundings of fp32 at the sum of the magnitudes: one a product and addend of `walk`; on
tensor cores, which cut what they add to the largest term's last bit, four a product. Activations of 16-bit outputs may lose `FAST` more.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from test_plain_gpu import DTYPE, EPS, FAST, TINY, draw, run
from torch.nn import functional as F

from twofour.errors import InputError, UnsupportedError
from twofour.jit.cache import fill_cache
from twofour.kernels import conv, depthwise
from twofour.kernels.depthwise.contract import bands, footprints, walks
from twofour.kernels.launchable import kernel_source, launchable
from twofour.oracle.conv import conv as oracle_conv

pytestmark = pytest.mark.gpu
Config, Epilogue, Problem = depthwise.Config, conv.Epilogue, depthwise.Problem
ACTIVATIONS = {
    "none": lambda y: y,
    "relu": F.relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
    "hardswish": F.hardswish,
}


def problem(batch: int, height: int, width: int, channels: int, kernel: tuple[int, int], stride: int = 1, **more: Any) -> Problem:
    (kh, kw), pads = kernel, more.pop("pads", None)
    more = {"pads": ((kh - 1) // 2, (kw - 1) // 2, kh // 2, kw // 2) if pads is None else pads, "strides": (stride, stride), **more}
    return Problem(batch, height, width, channels, channels, kernel, groups=channels, **more)


def image(flat: torch.Tensor, batch: int, height: int, width: int, channels: int, pitch: int | None) -> torch.Tensor:
    """NHWC memory as NCHW."""
    step = pitch or channels
    return torch.as_strided(flat, (batch, channels, height, width), (height * width * step, 1, width * step, step))


def operands_of(p: Problem, seed: int = 0) -> dict[str, torch.Tensor]:
    found = {name: draw(f.dtype, f.elements, seed + i) for i, (name, f) in enumerate(footprints(p).items()) if name != "d"}
    found["weight"] *= (p.kernel[0] * p.kernel[1]) ** -0.5
    return found


def exact_of(p: Problem, operands: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The result in float64, NCHW, and the sum of the magnitudes that are added up for it."""
    x = image(operands["x"], p.batch, p.height, p.width, p.inputs, p.x_pitch).double()
    weight = operands["weight"].view(*p.kernel, p.inputs).permute(2, 0, 1)[:, None].double()
    top, left, bottom, right = p.pads
    y, size = (
        F.conv2d(F.pad(t, (left, right, top, bottom)), w, None, p.strides, 0, 1, p.groups)
        for t, w in ((x, weight), (x.abs(), weight.abs()))
    )
    if "bias" in operands:
        y, size = (t + b.double()[:, None, None] for t, b in ((y, operands["bias"]), (size, operands["bias"].abs())))
    if "residual" in operands:
        residual = image(operands["residual"], p.batch, p.out_height, p.out_width, p.outputs, p.residual_pitch).double()
        y, size = y + residual, size + residual.abs()
    return ACTIVATIONS[p.epilogue.activation](y), size


def compare(p: Problem, config: Config, found: torch.Tensor, exact: torch.Tensor, size: torch.Tensor) -> None:
    taps = p.kernel[0] * p.kernel[1]
    steps = (4 if config.kernel == "band" else 1) * taps + 4
    fast = FAST * (1 + exact.abs()) if p.epilogue.activation in ("sigmoid", "gelu", "gelu_tanh", "silu") else 0.0
    # The slope of an activation is at most 1.5.
    bound = EPS[p.dtype] * exact.abs() + TINY[p.dtype] + 1.5 * steps * 2.0**-24 * size + fast
    error = (found.double() - exact).abs()
    if not bool((error <= bound).all()):
        at = tuple(int(i) for i in torch.nonzero(~(error <= bound))[0])
        wrong = int((~(error <= bound)).sum())
        raise AssertionError(f"{config}: {wrong} of {error.numel()} wrong, first at NCHW {list(at)}: got {found[at]}, expected {exact[at]}")


def check(p: Problem, configs: Sequence[Config]) -> None:
    """Every config gives the result, twice the same bits, and writes nothing between or behind the pixels (77 is the poison)."""
    operands = operands_of(p)
    exact, size = exact_of(p, operands)
    assert configs
    for config in configs:
        flat = run("depthwise", "twofour", p, operands, config)
        compare(p, config, image(flat, p.batch, p.out_height, p.out_width, p.outputs, p.y_pitch), exact, size)
        if p.y_pitch:
            pixels = F.pad(flat, (0, p.y_pitch - p.outputs)).view(-1, p.y_pitch)
            assert (pixels[:-1, p.outputs :] == 77).all(), f"{config} wrote between the pixels"


def spread(p: Problem) -> list[Config]:
    """Configs of either kernel with least and most rows and some between: every shape of a block, not only the fast ones."""
    found = []
    for group in (*walks(p), *bands(p)):
        legal = [c for c in group if depthwise.why_not(p, c) is None and (c.kernel == "band" or (c.channels, c.columns) in WIDTHS)]
        between = [len(legal) // 2] if legal and legal[0].kernel == "walk" else []
        found += [legal[i] for i in sorted({0, len(legal) - 1, *between})] if legal else []
    return list(dict.fromkeys(found))


def best(p: Problem) -> list[Config]:
    """The candidate believed best of either kernel."""
    return list({c.kernel: c for c in reversed(depthwise.candidates(p))}.values())


WIDTHS = ((2, 1), (2, 7), (4, 2), (4, 4))
SQUARES = ((3, 3), (5, 5), (7, 7))
Case = tuple[Problem, Callable[[Problem], Sequence[Config]]]  # and which configs compute it


def windows() -> list[Case]:
    """Every kind of window and stride, on sides that no strip, chunk or tile divides."""
    found: list[Case] = []
    for kernel in ((1, 1), *SQUARES, (3, 1), (1, 7), (2, 4), (6, 5)):
        for stride in (1, 2, 3):
            p = problem(3, 23, 19, 40, kernel, stride, epilogue=Epilogue("relu6", bias=True))
            other = dataclasses.replace(p, dtype="bf16")
            found += [(p, spread if stride < 3 else best), (other, best)]
    return found


def sizes() -> list[Case]:
    """One pixel to whole images, one to many images, 8 to 1024 channels."""
    found = []
    for kernel in SQUARES:
        for side, channels in (((1, 1), 8), ((2, 65), 24), ((7, 7), 1024), ((14, 14), 512), ((33, 8), 16), ((56, 57), 32)):
            for batch, stride in ((1, 1), (3, 2), (64, 1)):
                p = problem(batch, *side, channels, kernel, stride, epilogue=Epilogue(bias=True))
                found.append((p, best))
    return found


def pads() -> list[Case]:
    """Pads on some sides only, and wider than the window."""
    found = []
    for kernel in ((3, 3), (7, 7)):
        for stride in (1, 2):
            for around in ((0, 0, 0, 0), (4, 0, 0, 3), (0, 5, 6, 0), (9, 8, 7, 11)):
                p = problem(2, 13, 17, 48, kernel, stride, pads=around)
                found.append((p, spread))
    return found


def epilogues() -> list[Case]:
    """Every activation with and without addends."""
    found = []
    for activation in ACTIVATIONS:
        for bias, residual, dtype in ((False, False, "fp16"), (True, False, "bf16"), (True, True, "fp16")):
            p = problem(2, 15, 14, 32, (3, 3), dtype=dtype, epilogue=Epilogue(activation, bias, residual))
            found.append((p, best))
    return found


def slices() -> list[Case]:
    """Images that are slices of the channels of wider ones."""
    found = []
    for kernel in ((3, 3), (5, 5)):
        p = problem(3, 14, 15, 24, kernel, x_pitch=64, y_pitch=40, epilogue=Epilogue("relu", bias=True))
        found.append((p, spread))
        p = dataclasses.replace(p, residual_pitch=32, epilogue=Epilogue("none", True, True))
        found.append((p, best))
    return found


def layers() -> list[Case]:
    """Layers of networks with all that a build would time."""
    found = []
    for kernel, channels, side, stride in (
        *(((3, 3), 144, 56, 1), ((3, 3), 96, 112, 2), ((5, 5), 240, 28, 1)),
        *(((5, 5), 672, 14, 2), ((7, 7), 128, 56, 1), ((7, 7), 512, 14, 1), ((7, 7), 1024, 7, 1)),
    ):
        for batch in (1, 64):
            p = problem(batch, side, side, channels, kernel, stride, epilogue=Epilogue("silu", bias=True))
            found.append((p, depthwise.candidates))
    return found


CASES = {group.__name__: group() for group in (windows, sizes, pads, epilogues, slices, layers)}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The kernels of all cases, several compiled at once; by one worker of several, for all."""
    with FileLock(tmp_path_factory.getbasetemp().parent / "compiling.lock"):
        fill_cache(kernel_source("depthwise", p, c, 132) for cases in CASES.values() for p, configs in cases for c in configs(p))


def named(case: Case) -> str:
    p = case[0]
    return f"{p.batch}x{p.height}x{p.width}x{p.inputs},{p.kernel[0]}x{p.kernel[1]}s{p.strides[0]},{p.epilogue.activation},{p.dtype}"


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("case", [case for cases in CASES.values() for case in cases], ids=named)
def test_each_config_gives_the_result(case: Case) -> None:
    check(case[0], case[1](case[0]))


def test_the_float64_reference_is_the_oracles() -> None:
    p = problem(2, 9, 8, 16, (5, 3), 2, pads=(1, 2, 3, 0), epilogue=Epilogue("silu", True, True))
    operands = operands_of(p)
    x = image(operands["x"], 2, 9, 8, 16, None).permute(0, 2, 3, 1).double().cpu().numpy()
    weight = depthwise.unpack_weight(p, operands["weight"].double().cpu().numpy())
    residual = operands["residual"].view(2, p.out_height, p.out_width, 16).double().cpu().numpy()
    bias = operands["bias"].double().cpu().numpy()
    y = oracle_conv(x, weight, strides=p.strides, pads=p.pads, groups=16, bias=bias, residual=residual, activation="silu")
    assert np.allclose(exact_of(p, operands)[0].permute(0, 2, 3, 1).cpu().numpy(), y, atol=1e-12)


def test_zeros_of_the_window_stay_away_from_infinities() -> None:
    # One infinite pixel: in `walk` it reaches the outputs whose window holds it; on tensor cores those of its line nearby too.
    p = problem(1, 20, 40, 8, (3, 3))
    operands = operands_of(p)
    operands["x"].view(20, 40, 8)[10, 20, 3] = float("inf")
    for config in spread(p):
        bad = ~torch.isfinite(run("depthwise", "twofour", p, operands, config).view(20, 40, 8))
        rows, columns, channels = (sorted({int(i) for i in t}) for t in torch.nonzero(bad).T)
        assert (rows, channels) == ([9, 10, 11], [3])
        assert set(columns) >= {19, 20, 21}
        assert len(columns) == 3 if config.kernel == "walk" else max(columns) - min(columns) < 32


@pytest.mark.parametrize("kernel", ["walk", "band"])
def test_images_beyond_32_bits(kernel: str) -> None:
    # More than 2^31 elements: the last image alone is compared.
    p = problem(41, 1024, 1024, 56, (3, 3), epilogue=Epilogue(bias=True))
    elements = footprints(p)["x"].elements
    assert elements > 2**31
    if torch.cuda.mem_get_info()[0] < 5 * elements:
        raise UnsupportedError(f"this test needs {5 * elements:,} bytes of GPU memory, a GPU of the supported kind has more; free some")
    x, d = torch.zeros(elements, dtype=torch.float16, device="cuda"), torch.full((elements + 64,), 77.0, dtype=torch.float16, device="cuda")
    one = dataclasses.replace(p, batch=1)
    operands = operands_of(one)
    x[-operands["x"].numel() :] = operands["x"]
    exact, size = exact_of(one, operands)
    config = next(c for c in depthwise.candidates(p) if c.kernel == kernel)
    addresses = {"x": x, "d": d, "weight": operands["weight"], "bias": operands["bias"]}
    torch.cuda.synchronize()
    launchable("depthwise", "twofour", p, config)(
        {n: t.data_ptr() for n, t in addresses.items()}, 0, torch.cuda.current_stream().cuda_stream
    )
    torch.cuda.synchronize()
    last = d[elements - operands["x"].numel() : elements]
    compare(one, config, image(last, 1, 1024, 1024, 56, None), exact, size)
    assert (d[elements:] == 77).all()
    first = image(d, 1, 1024, 1024, 56, None)
    assert torch.equal(first, operands["bias"].to(DTYPE["fp16"])[:, None, None].expand_as(first[0])[None])


def test_64_bit_indices_give_the_same_bits() -> None:
    p = problem(3, 23, 19, 40, (3, 3), 2, epilogue=Epilogue("silu", bias=True))
    operands, config = operands_of(p), Config("walk", 2, 4, 3)
    narrow = run("depthwise", "twofour", p, operands, config)

    class Wide:
        """The contract, its launches with 64-bit indices."""

        default = staticmethod(depthwise.default)

        @staticmethod
        def derive(*arguments: Any) -> depthwise.Launch:
            return dataclasses.replace(depthwise.derive(*arguments), wide=True)

    from twofour.kernels.depthwise.launch import Depthwise

    class WideStep(Depthwise):
        contract = Wide

    d = torch.empty_like(narrow)
    addresses = {n: t.data_ptr() for n, t in operands.items()}
    torch.cuda.synchronize()
    WideStep(p, config).on({**addresses, "d": d.data_ptr()}, torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    assert torch.equal(narrow, d)


def test_a_missing_address_is_refused_before_the_launch() -> None:
    p = problem(1, 8, 8, 8, (3, 3), epilogue=Epilogue(bias=True))
    step = launchable("depthwise", "twofour", p, depthwise.default(p))
    with pytest.raises(InputError, match=r"bias=0x0.*expected multiples of 16 bytes for everything the problem uses"):
        step({"x": 256, "weight": 256, "d": 256}, 0, 0)


def test_small_launches_for_the_memory_checker() -> None:
    for kernel, stride in (((3, 3), 1), ((3, 3), 2), ((5, 5), 1), ((7, 7), 2)):
        p = problem(2, 9, 7, 24, kernel, stride, epilogue=Epilogue("relu", bias=True))
        # One config of each kernel.
        check(p, list({config.kernel: config for config in spread(p)}.values()))
