"""Random networks: nothing changes; every rule is needed; a wrong rule is seen. What the theory promises, on its smallest cases."""

import random
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from twofour.pruning.permutation import rules, rules_views
from twofour.pruning.permutation.analysis import Analysis, analyse, operation_of
from twofour.pruning.permutation.capture import Capture, Inputs, capture
from twofour.pruning.permutation.labels import Factor, Ledger, Value, fix_axes, pair, reshape, simplify, within
from twofour.pruning.permutation.pieces import IMAGE, TOKENS
from twofour.pruning.permutation.spaces import derive
from twofour.pruning.permutation.trial import Network, Several, shuffle, trial

CHUNKS, NETWORKS = 10, 500


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_five_hundred_random_networks_stay_as_they_are(chunk: int) -> None:
    outcome = trial(NETWORKS // CHUNKS, seed=chunk)
    assert not outcome.failures
    assert outcome.networks == NETWORKS // CHUNKS
    assert outcome.permuted >= 0.6 * outcome.networks


def alone(name: str) -> Network:
    """The smallest network that shows a piece at work."""
    return Network(["convolution", name, "convolution"], []) if name in IMAGE else Network(["convolution"], ["feed_forward", name])


def freedom(analysis: Analysis, count: int) -> list[int]:
    """For each network, how many places of its parameters can move."""
    free = np.zeros(analysis.ledger.num_atoms, bool)
    for orbit in derive(analysis.ledger).orbits:
        free[orbit.atoms] = True
    places = [0] * count
    for held in analysis.held:
        places[int(held.names[0].split(".")[1])] += sum(int(free[atoms].sum()) for atoms in held.atoms)
    return places


BUNDLE = 6


@pytest.fixture(scope="module")
def captured() -> list[tuple[list[str], Several, list[Capture]]]:
    """Every piece, captured, a few to a graph; training where evaluation does not show the operation."""
    names = [*IMAGE, *TOKENS]
    result = []
    example = Inputs.of(torch.randn(2, 3, 8, 8))
    needs_training = {"batch_norm", "dropouts", "stochastic_depth", "feed_forward", "instance_norm", "sync_batch_norm"}
    order = sorted(names, key=lambda n: n not in needs_training)
    for start in range(0, len(order), BUNDLE):
        part = order[start : start + BUNDLE]
        torch.manual_seed(start)
        model = Several([alone(name) for name in part])
        train = bool(needs_training & set(part))
        captures, reason = capture(model, example, ("eval", "train") if train else ("eval",), open_batch=train)
        assert reason is None
        result.append((part, model, captures))
    return result


@pytest.mark.slow
@pytest.mark.xdist_group("pieces")
def test_deleting_any_rule_costs_freedom(captured: list[tuple[list[str], Several, list[Capture]]], monkeypatch: pytest.MonkeyPatch) -> None:
    bundles_of = defaultdict(list)
    before = []
    for number, (_, model, captures) in enumerate(captured):
        before.append(freedom(analyse(model, captures), len(model.networks)))
        for name in {operation_of(node) for c in captures for node in c.program.graph.nodes if node.op == "call_function"}:
            bundles_of[name].append(number)
    unnoticed = []
    for name in sorted(rules.RULES):
        with monkeypatch.context() as patch:
            patch.delitem(rules.RULES, name)
            # The bundles with the fewest uses of other rules first would be no quicker: the first that loses freedom settles it.
            for number in bundles_of[name]:
                _, model, captures = captured[number]
                if sum(freedom(analyse(model, captures), len(model.networks))) < sum(before[number]):
                    break
            else:
                unnoticed.append(name)
    assert not unnoticed


def loose_reshape(ledger: Ledger, x: Value, *rest: Any, shape: tuple[int, ...] = ()) -> Value:
    """Keeps labels only where an axis keeps its size, by position from the end."""
    factors = []
    for f in x.factors:
        to = tuple(a - x.ndim + len(shape) for a in f.axes)
        if all(t >= 0 and shape[t] == x.shape[a] for t, a in zip(to, f.axes, strict=True)):
            factors.append(Factor(to, f.atom, f.tag))
    return Value(shape, tuple(factors))


def first_only(ledger: Ledger, x: Value, *rest: Any, **options: Any) -> Any:
    """Claims that only the first operand matters."""
    results = options.get("results", 1)
    return x if results == 1 else (x,) * results


def first_only_with_results(ledger: Ledger, x: Value, *rest: Any, results: int = 1) -> Any:
    return x if results == 1 else (x, *[Value((x.shape[1],))] * (results - 1))


def sorted_cat(ledger: Ledger, parts: Any, axis: int = 0) -> Value:
    return rules.RULES_ORIGINAL["aten.cat"](ledger, list(parts)[::-1], axis)  # type: ignore[attr-defined]


def from_the_start(ledger: Ledger, x: Value, axis: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Value:
    """Claims that every slice begins at the first place."""
    return rules_views._take(x, axis, slice(0, len(range(*slice(start, end, step).indices(x.shape[axis])))))


WRONG = {
    "aten.group_norm": (first_only, "group_norm"),
    "aten.layer_norm": (first_only, "feed_forward"),
    "aten.instance_norm": (first_only, "instance_norm"),
    "aten._native_batch_norm_legit_no_training": (first_only_with_results, "batch_norm"),
    "aten.prelu": (first_only, "prelu"),
    "aten.add": (first_only, "residual"),
    "aten.mul": (first_only, "layer_scale"),
    "aten.view": (loose_reshape, "shuffle_by_views"),
    "aten.glu": (lambda ledger, x, axis=-1: rules_views._split(ledger, x, x.shape[x.axis(axis)] // 2, axis)[0], "gated_linear_unit"),
    "aten.cat": (sorted_cat, "dense_block"),
    "aten.sort": (lambda ledger, x, *rest, **options: (x, x), "sorted_channels"),
    "aten.slice": (from_the_start, "halves"),
}


@pytest.mark.parametrize("name", sorted(WRONG))
def test_a_corrupted_rule_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule, piece = WRONG[name]
    torch.manual_seed(0)
    network = alone(piece)
    monkeypatch.setattr(rules, "RULES_ORIGINAL", dict(rules.RULES), raising=False)
    assert not shuffle([network], 0, thorough=False)[0].failures
    monkeypatch.setitem(rules.RULES, name, rule)
    try:
        outcome, moved = shuffle([network], 0, thorough=False)
    except (ValueError, IndexError, AttributeError):
        return
    assert outcome.failures or len(moved[0]) == 0


def test_the_trial_is_the_same_for_a_seed() -> None:
    rng = [random.Random(7), random.Random(7)]
    first, second = ([rng_.choice(list(IMAGE)) for _ in range(5)] for rng_ in rng)
    assert first == second
    one, two = trial(3, seed=11, together=3), trial(3, seed=11, together=3)
    assert (one.permuted, one.failures) == (two.permuted, two.failures)


def labelled(ledger: Ledger, *shape: int) -> Value:
    factors = tuple(Factor((k,), ledger.atoms(size), np.zeros(size, np.int64)) for k, size in enumerate(shape))
    value = Value(shape, factors)
    ledger.register(value)
    return value


def orbit_sizes(ledger: Ledger) -> list[int]:
    return sorted(o.size for o in derive(ledger).orbits)


def test_free_channels_may_all_trade_places() -> None:
    ledger = Ledger()
    labelled(ledger, 8)
    assert orbit_sizes(ledger) == [8]


def test_a_slice_parts_channels_and_a_joint_value_holds_them() -> None:
    ledger = Ledger()
    x = labelled(ledger, 8)
    ledger.register(rules.RULES["aten.slice"](ledger, x, 0, 0, 3))
    assert orbit_sizes(ledger) == [3, 5]


def test_two_values_added_move_together() -> None:
    ledger = Ledger()
    rules.RULES["aten.add"](ledger, labelled(ledger, 6), labelled(ledger, 6))
    (orbit,) = derive(ledger).orbits
    assert orbit.atoms.shape == (6, 2)


def test_adding_a_turned_copy_freezes() -> None:
    ledger = Ledger()
    x = labelled(ledger, 6)
    rules.RULES["aten.add"](ledger, x, rules.RULES["aten.roll"](ledger, x, 1, 0))
    assert orbit_sizes(ledger) == []


def test_a_value_in_a_fixed_order_freezes_what_it_meets() -> None:
    ledger = Ledger(operation="the test")
    x = labelled(ledger, 6)
    rules.RULES["aten.add"](ledger, x, Value((6,)))
    spaces = derive(ledger)
    assert not spaces.orbits
    assert spaces.reason(x.factors[0].atom) == "the test"


def test_flattening_keeps_channels_and_numbers_pixels() -> None:
    ledger = Ledger()
    x = Value((2, 3, 4), (Factor((1,), ledger.atoms(3), np.zeros(3, np.int64)),))
    flat = reshape(ledger, x, (2, 12))
    (factor,) = flat.factors
    assert factor.axes == (1,)
    assert factor.atom.tolist() == np.repeat(x.factors[0].atom, 4).tolist()
    assert len(set(zip(factor.atom.tolist(), factor.tag.tolist(), strict=True))) == 12
    (again,) = reshape(ledger, flat, (2, 3, 4)).factors
    assert again.axes == (1,)
    assert again.atom.tolist() == x.factors[0].atom.tolist()


def test_heads_keep_their_channels_apart() -> None:
    ledger = Ledger()
    x = labelled(ledger, 12)
    heads = reshape(ledger, x, (3, 4))
    ledger.register(heads)
    assert orbit_sizes(ledger) == [12]
    within(ledger, heads, [1])
    assert orbit_sizes(ledger) == [4, 4, 4]


def test_pixel_shuffle_moves_four_channels_as_one() -> None:
    ledger = Ledger()
    x = labelled(ledger, 1, 12, 2, 2)
    x = fix_axes(ledger, x, [0, 2, 3])
    y = rules.RULES["aten.pixel_shuffle"](ledger, x, 2, shape=(1, 3, 4, 4))
    ledger.register(y)
    assert [o.atoms.shape for o in derive(ledger).orbits] == [(3, 4)]


def test_integers_of_several_keys_tell_exactly_the_different_ones() -> None:
    rng = np.random.default_rng(0)
    keys = [rng.integers(0, 5, 200), rng.integers(0, 1 << 40, 200), rng.integers(0, 3, 200)]
    joined = pair(*keys)
    rows = list(zip(*(k.tolist() for k in keys), strict=True))
    assert len(set(joined.tolist())) == len(set(rows))


def test_an_axis_that_says_nothing_is_dropped() -> None:
    atom = np.repeat(np.arange(1, 4)[:, None], 2, 1)
    told = simplify(Factor((1, 2), atom, np.tile([0, 1], (3, 1))))
    assert told is not None
    assert told.axes == (1,)
    # With equal tags the steps could be exchanged: the axis is not said to keep its order.
    kept = simplify(Factor((1, 2), atom, np.zeros((3, 2), np.int64)))
    assert kept is not None
    assert kept.axes == (1, 2)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
