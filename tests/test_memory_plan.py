"""The memory plan: nothing alive together overlaps, the peak meets the bound on real networks, the same input gives the same plan."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofour.builder.memory import ALIGN_BYTES, Buffer, lower_bound, plan_memory

RECORDED = Path(__file__).parent.parent / "results" / "cpu" / "memory-plan.json"


@st.composite
def lifetimes(draw: st.DrawFn) -> list[Buffer]:
    count = draw(st.integers(0, 24))
    found = []
    for index in range(count):
        first = draw(st.integers(0, 20))
        found.append(Buffer(f"b{index}", draw(st.integers(1, 5000)), first, first + draw(st.integers(0, 12))))
    return found


@settings(max_examples=150, deadline=None, derandomize=True)
@given(buffers=lifetimes())
def test_buffers_alive_together_never_overlap(buffers: list[Buffer]) -> None:
    plan = plan_memory(buffers)
    assert set(plan.offsets) == {b.name for b in buffers}
    assert all(offset % ALIGN_BYTES == 0 for offset in plan.offsets.values())
    for i, a in enumerate(buffers):
        for b in buffers[i + 1 :]:
            if a.first <= b.last and b.first <= a.last:
                low, high = plan.offsets[a.name], plan.offsets[b.name]
                assert low + a.num_bytes <= high or high + b.num_bytes <= low, (a, b)
    assert plan.bound_bytes <= plan.peak_bytes <= sum(-(-b.num_bytes // ALIGN_BYTES) * ALIGN_BYTES for b in buffers)
    assert plan == plan_memory(buffers)


def test_the_bound_is_the_most_alive_at_one_step() -> None:
    assert lower_bound([Buffer("a", 256, 0, 1), Buffer("b", 300, 1, 2), Buffer("c", 256, 2, 2)]) == 768
    assert lower_bound([]) == 0


def test_a_chain_needs_two_buffers_at_a_time() -> None:
    plan = plan_memory([Buffer(f"b{i}", 1024, i, i + 1) for i in range(50)])
    assert plan.peak_bytes == 2048
    assert str(plan) == "MemoryPlan(50 buffers in 2,048 bytes, 0.0 % above the most alive at once)"


@pytest.mark.parametrize("row", json.loads(RECORDED.read_text())["rows"], ids=lambda row: row["net"])
def test_the_peak_of_full_size_networks_is_within_a_tenth_of_the_bound(row: dict[str, object]) -> None:
    buffers = [Buffer(str(index), *numbers) for index, numbers in enumerate(row["buffers"])]  # type: ignore[call-overload, misc, var-annotated, arg-type]
    plan = plan_memory(buffers)
    assert plan.peak_bytes <= 1.1 * plan.bound_bytes
    assert (plan.peak_bytes, plan.bound_bytes) == (row["peak_bytes"], row["bound_bytes"])
