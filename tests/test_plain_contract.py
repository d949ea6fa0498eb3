"""The contracts of the plain families, convolution and attention: pure functions, checked by emulating their index arithmetic."""

import itertools
import re
import struct
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofour.errors import InputError
from twofour.kernels import attention, conv, families, matmul, pointwise, pool, reduce
from twofour.kernels.loading import divisor
from twofour.kernels.operands import vector_elems
from twofour.kernels.pointwise.contract import ARITY, MAX_AXES, MAX_INPUTS, TILE, collapse, footprints, span
from twofour.kernels.pointwise.launch import _SIZES, pack_sizes
from twofour.kernels.pointwise.source import encode, float_bits
from twofour.kernels.pool.contract import nearest_pixel
from twofour.oracle import conv as oracle_conv
from twofour.oracle import pool as oracle_pool
from twofour.oracle.pointwise import OPERATIONS

Operand = pointwise.Operand


@st.composite
def problems(draw: Any) -> pointwise.Problem:
    """Random shapes up to five axes; operands with axes permuted, broadcast, and gaps."""
    rank = draw(st.integers(1, 5))
    shape = tuple(draw(st.sampled_from((1, 2, 3, 4, 8, 16, 33, 40))) for _ in range(rank))

    def strides(may_broadcast: bool) -> tuple[int, ...]:
        order, found, step = draw(st.permutations(range(rank))), [0] * rank, 1
        for axis in reversed(order):
            if may_broadcast and draw(st.booleans()) and draw(st.booleans()):
                continue
            found[axis] = step
            step = step * shape[axis] + draw(st.sampled_from((0, 0, 0, 8)))
        return tuple(found)

    dtypes = st.sampled_from(("fp16", "bf16", "fp32", "int64", "uint8"))
    inputs = tuple(Operand(draw(dtypes), strides(True), draw(st.sampled_from((2, 8, 16)))) for _ in range(draw(st.integers(1, 3))))
    program = (("neg", ("in", 0)),) if draw(st.booleans()) else ()
    return pointwise.Problem(shape, inputs, draw(dtypes), strides(False), program, draw(st.sampled_from((2, 16))))


def unpacked(
    problem: pointwise.Problem, launch: pointwise.Launch
) -> tuple[np.ndarray, tuple[int, ...], tuple[tuple[int, int], ...], int, int]:
    """What the kernel gets: strides [7, 8], shape, divisors, turn_size, last_size."""
    numbers = _SIZES.unpack(pack_sizes(problem, launch))
    assert numbers[0] == launch.groups
    rows = (MAX_INPUTS + 1) * MAX_AXES
    strides = np.array(numbers[1 : 1 + rows]).reshape(MAX_INPUTS + 1, MAX_AXES)
    shape = numbers[1 + rows : 1 + rows + MAX_AXES]
    turn_size, last_size = numbers[1 + rows + MAX_AXES : 3 + rows + MAX_AXES]
    divisors = numbers[3 + rows + MAX_AXES :]
    return strides, shape, tuple(zip(divisors[::2], divisors[1::2], strict=True)), turn_size, last_size


def located(group: int, rank: int, shape: tuple[int, ...], divisors: tuple[tuple[int, int], ...]) -> list[int]:
    """`locate` of pointwise.cuh, with its multiplications and shifts."""
    place = [0] * rank
    for axis in range(rank - 1, 0, -1):
        multiplier, shift = divisors[axis]
        rest = group * multiplier >> shift
        place[axis] = group - rest * shape[axis]
        group = rest
    place[0] = group
    return place


def reached(problem: pointwise.Problem, config: pointwise.Config) -> dict[int, tuple[int, ...]]:
    """Output offset -> input offsets, as the kernel's iterations touch them."""
    launch = pointwise.derive(problem, config)
    strides, shape, divisors, turn_size, last_size = unpacked(problem, launch)
    rank, count = len(launch.shape), len(problem.inputs)
    rows = [*range(count), MAX_INPUTS]
    found: dict[int, tuple[int, ...]] = {}
    for group in range(launch.groups):
        place = located(group, rank, shape, divisors)
        if config.kernel == "tiled":
            place[launch.turn_axis] *= TILE
            place[-1] *= TILE
        bases = [sum(p * int(s) for p, s in zip(place, strides[row], strict=False)) for row in rows]
        if config.kernel == "tiled":
            for r in range(min(TILE, turn_size - place[launch.turn_axis])):
                for c in range(min(TILE, last_size - place[-1])):
                    at = [
                        b + r * int(strides[row][launch.turn_axis]) + c * int(strides[row][rank - 1])
                        for b, row in zip(bases, rows, strict=True)
                    ]
                    assert at[-1] not in found
                    found[at[-1]] = tuple(at[:-1])
        else:
            for element in range(config.vector):
                at = [b + (0 if launch.spread >> i & 1 else element) for i, b in enumerate(bases[:-1])]
                assert bases[-1] + element not in found
                found[bases[-1] + element] = tuple(at)
    return found


@settings(max_examples=60, deadline=None)
@given(problems())
def test_the_kernels_iterations_touch_what_the_problem_says(problem: pointwise.Problem) -> None:
    wanted = {}
    if problem.num_elems > 4000:
        return
    for index in itertools.product(*(range(n) for n in problem.shape)):
        offset = lambda strides, index=index: sum(i * s for i, s in zip(index, strides, strict=True))  # noqa: E731
        wanted[offset(problem.out_strides)] = tuple(offset(o.strides) for o in problem.inputs)
    for config in pointwise.candidates(problem):
        assert reached(problem, config) == wanted


@settings(max_examples=60, deadline=None)
@given(problems())
def test_vector_moves_are_aligned_and_inside(problem: pointwise.Problem) -> None:
    from twofour.kernels.operands import DTYPE_BYTES

    for config in pointwise.candidates(problem):
        launch = pointwise.derive(problem, config)
        touched = footprints(problem)
        for number, (dtype, align, row) in enumerate(
            [(o.dtype, o.align, launch.strides[i]) for i, o in enumerate(problem.inputs)]
            + [(problem.out_dtype, problem.out_align, launch.strides[-1])]
        ):
            width = 1 if launch.spread >> number & 1 and number < len(problem.inputs) else config.vector
            step = min(16, width * DTYPE_BYTES[dtype])
            if config.kernel == "vector" and width > 1:
                assert align % step == 0
                assert all(s * DTYPE_BYTES[dtype] % step == 0 for s in row)
            name = f"in{number}" if number < len(problem.inputs) else "d"
            last = span(launch.shape, row) - 1 + width if config.kernel == "vector" else touched[name].elements
            assert last <= touched[name].elements


def test_axes_merge_as_far_as_all_operands_allow() -> None:
    whole = pointwise.copy((2, 3, 4, 8), (96, 32, 8, 1), "fp16", (96, 32, 8, 1))
    assert collapse(whole).shape == (192,)
    channels = pointwise.Problem((2, 3, 4, 8), (Operand("fp16", (96, 32, 8, 1)), Operand("fp16", (0, 0, 0, 1))), "fp16", (96, 32, 8, 1))
    assert collapse(channels).shape == (24, 8)
    to_nhwc = pointwise.copy((2, 3, 5, 7), (105, 35, 7, 1), "fp32", (105, 1, 21, 3))
    assert collapse(to_nhwc) == pointwise.contract.Collapsed((2, 35, 3), ((105, 1, 35), (105, 3, 1)))
    assert collapse(pointwise.copy((1, 1), (5, 7), "fp16", (3, 9))).shape == (1,)


def test_tall_turns_use_the_tiled_kernel_and_narrow_ones_do_not() -> None:
    wide = pointwise.copy((64, 196, 768), (196 * 768, 1, 196), "fp16", (196 * 768, 768, 1))
    assert pointwise.default(wide) == pointwise.Config("tiled", 1, 1)
    assert pointwise.default(pointwise.copy((2, 50176, 3), (150528, 1, 50176), "fp32", (150528, 3, 1), "fp16")).kernel == "vector"


def test_programs_become_integers() -> None:
    program = (("add", ("in", 1), ("c", 1.5)), ("cast", ("t", 0), ("d", "bf16")), ("clip", ("t", 1), ("c", float("-inf")), ("c", 1e300)))
    assert encode(program) == [
        0,
        0,
        1,
        2,
        float_bits(1.5),
        2,
        0,
        33,
        1,
        0,
        3,
        1,
        2,
        0,
        25,
        1,
        1,
        2,
        float_bits(float("-inf")),
        2,
        0x7F800000,
    ]
    assert struct.pack("<i", float_bits(-0.0)) == struct.pack("<f", -0.0)


def test_the_oracle_has_every_operation() -> None:
    assert set(ARITY) - {"cast"} == set(OPERATIONS)


def test_division_by_multiplication_is_exact() -> None:
    rng = np.random.default_rng(0)
    for value in (1, 2, 3, 7, 49, 224, 50176, 2**30 + 1, 2**31 - 1):
        multiplier, shift = divisor(value)
        assert multiplier < 2**32
        for n in (0, 1, value - 1, value, 2**31 - 1, *rng.integers(0, 2**31, 50).tolist()):
            assert n * multiplier >> shift == n // value


BAD_POINTWISE = [
    ({"inputs": ()}, "has 0 inputs, expected 1 to 6"),
    ({"shape": (0,)}, "axis 0 is 0, expected a whole number from 1"),
    ({"out_dtype": "fp8"}, "out_dtype 'fp8' is not one of .*did you mean"),
    ({"out_strides": (0,)}, "write a place twice"),
    ({"out_strides": (1, 1)}, "expected 1 whole numbers from 0"),
    ({"out_align": 3}, "out_align is 3, expected a power of two"),
    ({"program": (("gelo", ("in", 0)),)}, "operation 'gelo' is unknown; did you mean 'gelu'"),
    ({"program": (("add", ("in", 0)),)}, "add has 1 operands, expected 2"),
    ({"program": (("relu", ("t", 0)),)}, r"operand 0 of relu is \('t', 0\), expected"),
    ({"program": (("cast", ("in", 0), ("c", 1.0)),)}, r"and \('d', dtype\) as the second"),
    ({"program": (("neg", ("in", 0)),) * 99}, "has 99 instructions, expected at most 48"),
]


@pytest.mark.parametrize(("change", "message"), BAD_POINTWISE)
def test_bad_pointwise_problems_are_one_sentence(change: dict[str, Any], message: str) -> None:
    good = {"shape": (8,), "inputs": (Operand("fp16", (1,)),), "out_dtype": "fp16", "out_strides": (1,), "program": ()}
    with pytest.raises(InputError, match=message):
        pointwise.Problem(**{**good, **change})


def test_configs_that_cannot_run_say_why() -> None:
    p = pointwise.copy((4, 12), (32, 2), "fp16", (12, 1), align=4)
    assert "expected a multiple of 8" in str(pointwise.why_not(p, pointwise.Config()))
    assert "the input 0 has stride 2 along the innermost axis" in str(pointwise.why_not(p, pointwise.Config(vector=4)))
    assert "no input is contiguous" in str(pointwise.why_not(p, pointwise.Config("tiled", 1, 1)))
    odd = pointwise.copy((4, 16), (20, 1), "fp16", (16, 1))
    assert "rows of the input 0 are not aligned to 16 bytes" in str(pointwise.why_not(odd, pointwise.Config()))
    with pytest.raises(InputError, match="cannot compute"):
        pointwise.derive(odd, pointwise.Config())
    assert "expected a multiple of 8" in str(pool.why_not(pool.Problem(1, 8, 8, 12, "max", (2, 2)), pool.Config()))
    sliced = pool.Problem(1, 8, 8, 16, "max", (2, 2), y_pitch=20)
    assert "20 elements apart, expected multiples of 16 bytes" in str(pool.why_not(sliced, pool.Config()))
    assert "inner is 1, expected more than 1" in str(reduce.why_not(reduce.Problem(4, 64, "sum"), reduce.Config("columns")))
    assert "lines of 60 elements" in str(reduce.why_not(reduce.Problem(4, 60, "sum"), reduce.Config()))


def test_vectors_follow_size_and_alignment() -> None:
    assert [vector_elems(n, 16, "fp16") for n in (8, 12, 6, 7)] == [8, 4, 2, 1]
    assert [vector_elems(16, a, "fp16") for a in (16, 8, 4, 2)] == [8, 4, 2, 1]
    assert vector_elems(16, 16, "fp16", "fp32") == 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pool.Problem(1, 4, 4, 8, "maximum", (2, 2)), "kind 'maximum' is not one of max, average"),
        (lambda: pool.Problem(1, 4, 4, 8, "max", (5, 5)), "a window of 5x5 does not fit 4x4 pixels"),
        (lambda: pool.Problem(1, 4, 4, 8, "max", (2, 2), pads=(2, 0, 0, 0)), "give windows without a pixel along the height"),
        (lambda: pool.Problem(1, 4, 4, 8, "max", (2, 2), x_pitch=4), "x_pitch is 4, expected at least the 8 elements"),
        (lambda: pool.ResizeProblem(1, 4, 4, 8, 8, 8, "cubic"), "kind 'cubic' is not one of nearest, linear"),
        (lambda: pool.ResizeProblem(1, 4, 4, 8, 8, 8, scales=(0.0, 1.0)), "scales are .*, expected positive numbers"),
        (lambda: reduce.Problem(4, 8, "softmax", inner=2), "softmax with inner 2: expected 1"),
        (lambda: reduce.Problem(4, 8, "mean", scale=True), "mean takes no scale or bias"),
        (lambda: reduce.Problem(4, 8, "median"), "kind 'median' is not one of"),
        (lambda: reduce.Problem(4, 8, "layernorm", -1.0), "eps is -1.0"),
        (lambda: conv.Problem(1, 8, 8, 12, 16, groups=8), "groups is 8, expected a divisor of 12 inputs and 16 outputs"),
        (lambda: conv.Problem(1, 2, 2, 8, 8, (3, 3)), "a kernel of 3x3 does not fit 2x2 pixels"),
        (lambda: conv.Problem(1, 2, 2, 8, 8, dtype="fp32"), "dtype 'fp32' is not one of fp16, bf16"),
        (lambda: conv.Epilogue("swish"), "activation 'swish' is not one of none, relu"),
        (lambda: attention.Problem(1, 2, 3, 4, 8, 0.5, causal=True), "causal attention of 3 tokens over 4 keys"),
        (lambda: attention.Problem(1, 2, 3, 3, 8, 0.5, q_strides=(1, 2, 3, 4)), "q_strides are"),
        (lambda: matmul.Problem(2, 3, 4, 5, d_strides=(0, 4, 1)), "matrices that do not overlap"),
        (lambda: matmul.Problem(2, 3, 4, 5, a_strides=(15, 5, 2)), "expected rows or columns of neighbours"),
    ],
)
def test_bad_problems_are_one_sentence(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_a_plain_1x1_convolution_is_a_matrix_product() -> None:
    found = conv.as_gemm(conv.Problem(2, 7, 7, 64, 128, epilogue=conv.Epilogue("relu", bias=True), sparse=True))
    assert found is not None
    assert (found.tokens, found.outputs, found.inputs, found.sparse, found.epilogue.bias) == (98, 128, 64, True, True)
    for other in (
        conv.Problem(2, 7, 7, 64, 128, strides=(2, 2)),
        conv.Problem(2, 7, 7, 64, 128, (3, 3)),
        conv.Problem(2, 7, 7, 64, 128, groups=2),
        conv.Problem(2, 7, 7, 60, 128),
        conv.Problem(2, 7, 7, 64, 128, y_pitch=256),
        conv.Problem(2, 7, 7, 64, 128, epilogue=conv.Epilogue("sigmoid")),
    ):
        assert conv.as_gemm(other) is None


def test_footprints_cover_strided_operands() -> None:
    p = conv.Problem(2, 5, 6, 8, 16, (3, 3), pads=(1, 1, 1, 1), x_pitch=24, epilogue=conv.Epilogue(bias=True, residual=True))
    found = conv.contract.footprints(p)
    assert found["x"].elements == (2 * 5 * 6 - 1) * 24 + 8
    assert found["d"].elements == prod((2, 5, 6, 16))
    assert set(found) == {"x", "weight", "bias", "residual", "d"}
    q = attention.Problem(2, 3, 5, 7, 8, 0.5)
    assert {n: f.elements for n, f in attention.contract.footprints(q).items()} == {"q": 240, "k": 336, "v": 336, "d": 240}


def test_the_oracles_agree_with_torch() -> None:
    import torch
    from torch.nn import functional as F

    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 13, 12, 8))
    t = torch.from_numpy(x).permute(0, 3, 1, 2)
    nhwc = lambda y: y.permute(0, 2, 3, 1).numpy()  # noqa: E731
    w = rng.standard_normal((16, 3, 3, 4))
    y = oracle_conv.conv(x, w, strides=(2, 1), pads=(1, 2, 1, 2), dilations=(1, 2), groups=2, activation="silu")
    theirs = F.silu(F.conv2d(t, torch.from_numpy(w).permute(0, 3, 1, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2))
    assert np.allclose(y, nhwc(theirs), atol=1e-12)
    assert np.array_equal(oracle_pool.pool(x, "max", (3, 3), (2, 2), (1, 1, 1, 1)), nhwc(F.max_pool2d(t, 3, 2, 1)))
    for counted in (False, True):
        ours = oracle_pool.pool(x, "average", (3, 3), (2, 2), (1, 1, 1, 1), count_include_pad=counted, ceil=(0, 1))
        assert np.allclose(ours, nhwc(F.avg_pool2d(t, 3, 2, 1, ceil_mode=True, count_include_pad=counted)), atol=1e-14)
    for corners, mode in ((True, "align_corners"), (False, "half_pixel")):
        theirs = F.interpolate(t, (29, 7), mode="bilinear", align_corners=corners)
        assert np.allclose(oracle_pool.resize(x, 29, 7, "linear", mode), nhwc(theirs), atol=1e-12)
    theirs = F.interpolate(t, (29, 7), mode="nearest")
    assert np.array_equal(oracle_pool.resize(x, 29, 7, "nearest", "asymmetric", "floor"), nhwc(theirs))


def test_nearest_pixels_are_the_oracles() -> None:
    for coordinate, rounding in itertools.product(pool.contract.COORDINATES, pool.contract.ROUNDINGS):
        p = pool.ResizeProblem(1, 9, 9, 1, 25, 4, "nearest", coordinate, rounding)
        x = np.arange(81.0).reshape(1, 9, 9, 1)
        y = oracle_pool.resize(x, 25, 4, "nearest", coordinate, rounding)
        rows, columns = ([nearest_pixel(p, axis, i) for i in range(n)] for axis, n in ((0, 25), (1, 4)))
        assert np.array_equal(y, x[:, rows][:, :, columns])


# What a kernel of a family runs: a function of its parameters alone; of products only the tuned one is launched so.
ENTRY = re.compile(
    r"__forceinline__ void (\w+)\(const \w+Params& p(?:, const TensorMap\* residual = nullptr)?\) \{\n(.*?)\n\}\n", re.DOTALL
)
ENTRIES = {
    **{"gemm": {"gemm_tuned"}, "pointwise": {"pointwise", "pointwise_tiled"}, "pool": {"pool", "resize"}, "grouped": {"grouped"}},
    **{"reduce": {"reduce_rows", "reduce_columns"}, "patches": {"patches"}, "depthwise": {"walk", "band"}},
}


def test_every_kernel_waits_for_the_grid_before_it() -> None:
    # Engines launch our kernels while the one before drains; one that did not wait, with all its threads, would read what is not written
    # yet, and let the next one do so.
    folders = {family.launcher[0] for family in families.FAMILIES.values() if family.launcher is not None} | {"gemm"}
    assert folders == set(ENTRIES)
    for folder, wanted in ENTRIES.items():
        paths = [path for path in (Path(families.__file__).parent / folder).glob("*.cuh") if path.stem != "gemm_naive_16bit"]
        texts = "".join(path.read_text(encoding="utf-8") for path in paths if "pipelined" not in path.stem)
        found = dict(ENTRY.findall(texts))
        assert set(found) == wanted
        for entry, body in found.items():
            before, waits, _ = body.partition("wait_for_earlier_grid();")
            assert waits, entry
            assert not re.search(r"\breturn\b|\bfor \((?!int i = 0; i < \(?T::)", before), entry
