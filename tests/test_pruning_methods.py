"""Each method against its paper's definition, written out directly in float64; the order of the layers' output errors; statistics."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from twofour.errors import InputError
from twofour.pattern import Pattern, count_groups
from twofour.pruning import prune
from twofour.pruning.methods import METHODS
from twofour.pruning.methods.alps import solve_on
from twofour.pruning.methods.hessian import cholesky, damped, inverse_factor, output_errors, why_singular
from twofour.pruning.methods.method import Choice, choose
from twofour.pruning.statistics import Part, Statistics, flatten, gather, unflatten

CALIBRATED = [name for name, method in METHODS.items() if method.is_calibrated]
HESSIAN = [name for name, method in METHODS.items() if method.has_hessian]


def correlated(rows: int, columns: int, seed: int) -> Tensor:
    """Inputs whose spectrum falls over two decades and whose channels differ tenfold in scale, float64 `[rows, columns]`."""
    random = torch.Generator().manual_seed(seed)
    mix = (
        torch.randn(columns, columns, generator=random, dtype=torch.float64) * torch.logspace(0, -2, columns, dtype=torch.float64)[:, None]
    )
    x = torch.randn(rows, columns, generator=random, dtype=torch.float64) @ mix
    x += 0.1 * torch.randn(rows, columns, generator=random, dtype=torch.float64)
    return x * torch.logspace(0, 1, columns, dtype=torch.float64)[torch.randperm(columns, generator=random)]


def statistics_of(x: Tensor) -> Statistics:
    statistics = Statistics.zero(x.shape[1], x.device, True)
    statistics.add(x)
    return statistics


def problem(out: int = 24, columns: int = 32, seed: int = 0, rows: int = 256) -> tuple[Tensor, Tensor]:
    weight = torch.randn(out, columns, generator=torch.Generator().manual_seed(seed + 100), dtype=torch.float64)
    return weight, correlated(rows, columns, seed)


def decided(name: str, weight: Tensor, x: Tensor, pattern: str = "2:4") -> Choice:
    return choose(weight, [Part(0, weight.shape[0], statistics_of(x))], METHODS[name], Pattern.parse(pattern))


def result(choice: Choice, weight: Tensor) -> Tensor:
    return choice.weight if choice.weight is not None else weight * choice.mask


def error(name: str, weight: Tensor, x: Tensor) -> float:
    """‖XŴᵀ − XWᵀ‖² / ‖XWᵀ‖² by multiplying."""
    new = result(decided(name, weight, x), weight)
    return float((x @ (new - weight).T).square().sum() / (x @ weight.T).square().sum())


def largest(scores: np.ndarray, n: int = 2, m: int = 4) -> np.ndarray:
    """The n largest of every m by sorting."""
    mask = np.zeros(scores.shape, bool)
    for row, start in itertools.product(range(scores.shape[0]), range(0, scores.shape[1], m)):
        order = sorted(range(m), key=lambda k: -scores[row, start + k])
        mask[row, start + np.array(order[:n])] = True
    return mask


# ---- definitions


@pytest.mark.parametrize("seed", range(3))
def test_wanda_keeps_the_largest_magnitude_times_input_norm(seed: int) -> None:
    weight, x = problem(seed=seed)
    w, inputs = weight.numpy(), x.numpy()
    scores = np.array([[abs(w[i, j]) * np.sqrt((inputs[:, j] ** 2).sum()) for j in range(w.shape[1])] for i in range(w.shape[0])])
    choice = decided("wanda", weight, x)
    assert np.array_equal(choice.mask.numpy(), largest(scores))
    assert choice.weight is None


@pytest.mark.parametrize("seed", range(3))
def test_ria_keeps_the_largest_relative_importance(seed: int) -> None:
    weight, x = problem(seed=seed)
    w, inputs = np.abs(weight.numpy()), x.numpy()
    norms = np.sqrt((inputs**2).sum(0))
    scores = np.empty_like(w)
    for i, j in np.ndindex(*w.shape):
        scores[i, j] = (w[i, j] / w[:, j].sum() + w[i, j] / w[i].sum()) * norms[j] ** 0.5
    assert np.array_equal(decided("ria", weight, x).mask.numpy(), largest(scores))


def obs_by_inverses(weight: np.ndarray, hessian: np.ndarray, n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    """SparseGPT by its formulas: every column has the inverse of H over itself and the later columns computed afresh."""
    w = weight.copy()
    mask = np.ones(w.shape, bool)
    columns = w.shape[1]
    inverses = [np.linalg.inv(hessian[j:, j:]) for j in range(columns)]
    for j in range(columns):
        if j % m == 0:
            scores = np.stack([w[:, j + k] ** 2 / inverses[j + k][0, 0] for k in range(m)], axis=1)
            mask[:, j : j + m] = largest(scores, n, m)
        for i in range(w.shape[0]):
            if not mask[i, j]:
                w[i, j:] -= w[i, j] / inverses[j][0, 0] * inverses[j][0]
                w[i, j] = 0.0
    return w, mask


@pytest.mark.parametrize(("pattern", "columns"), [("2:4", 32), ("1:4", 32), ("4:8", 32), ("2:4", 264)])
def test_sparsegpt_is_the_brain_surgeon_of_the_columns_still_to_come(pattern: str, columns: int) -> None:
    weight, x = problem(out=6, columns=columns, rows=2 * columns)
    hessian = (x.T @ x).numpy()
    hessian += np.eye(columns) * 0.01 * hessian.diagonal().mean()
    parsed = Pattern.parse(pattern)
    expected, mask = obs_by_inverses(weight.numpy(), hessian, parsed.n, parsed.m)
    choice = decided("sparsegpt", weight, x, pattern)
    assert choice.weight is not None
    assert np.array_equal(choice.mask.numpy(), mask)
    # Both solve with H: relative error of at most its condition (below 1e5 with 1 % damping) times 2^-53 a column.
    np.testing.assert_allclose(choice.weight.numpy(), expected, rtol=0, atol=1e5 * columns * 2.0**-53 * float(weight.abs().max()))
    assert not choice.weight[~choice.mask].any()
    only = decided("sparsegpt-mask", weight, x, pattern)
    assert only.weight is None
    assert torch.equal(only.mask, choice.mask)


def alternating(weight: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """The support that ALPS's iteration ends with, each step solved directly."""
    scale = np.sqrt(hessian.diagonal())
    h, dense = hessian / np.outer(scale, scale), weight * scale
    d, v, rho, before = dense.copy(), np.zeros_like(dense), 0.1, None
    for step in range(1, 301):
        w = np.linalg.solve(h + rho * np.eye(len(h)), (dense @ h - v + rho * d).T).T
        mask = largest((w + v / rho) ** 2)
        d = np.where(mask, w + v / rho, 0)
        v = v + rho * (w - d)
        if step % 3 == 0:
            changed = mask.size if before is None else int((mask != before).sum())
            if changed == 0:
                break
            rho *= 1.3 if changed >= 0.1 * mask.sum() else 1.2 if changed >= 0.005 * mask.sum() else 1.1
            before = mask
    return mask


@pytest.mark.parametrize("seed", range(3))
def test_alps_is_the_alternating_iteration_and_then_least_squares(seed: int) -> None:
    weight, x = problem(seed=seed)
    hessian = (x.T @ x).numpy()
    hessian += np.eye(len(hessian)) * 0.01 * hessian.diagonal().mean()
    choice = decided("alps", weight, x)
    assert choice.weight is not None
    assert np.array_equal(choice.mask.numpy(), alternating(weight.numpy(), hessian))
    for i, kept in enumerate(choice.mask.numpy()):
        exact = np.linalg.solve(hessian[np.ix_(kept, kept)], hessian[kept] @ weight[i].numpy())
        # Thirty steps of conjugate gradients on 16 unknowns; what is left is far below what the mask costs.
        np.testing.assert_allclose(choice.weight[i].numpy()[kept], exact, rtol=0, atol=1e-6 * float(weight.abs().max()))


def test_conjugate_gradients_end_at_the_solution() -> None:
    weight, x = problem(out=3, columns=8)
    hessian = damped(statistics_of(x))
    hessian = hessian / hessian.diagonal().sqrt() / hessian.diagonal().sqrt()[:, None]
    mask = torch.tensor([[True, True, False, False] * 2] * 3)
    solved = solve_on(mask, weight * mask, weight @ hessian, hessian)
    exact = torch.linalg.solve(hessian[mask[0]][:, mask[0]], (weight @ hessian)[:, mask[0]].T).T
    torch.testing.assert_close(solved[:, mask[0]], exact, rtol=1e-10, atol=1e-10)


# ---- the order of the issue


@pytest.mark.parametrize("seed", range(6))
def test_the_output_error_falls_from_magnitude_to_reconstruction(seed: int) -> None:
    """At 128 inputs; in layers half as wide Wanda's mask and SparseGPT's without update lie within 4 % of each other, either first."""
    weight, x = problem(128, 128, seed, rows=1024)
    weight, x = weight.float(), x.float()
    errors = {name: error(name, weight, x) for name in METHODS}
    assert errors["magnitude"] > errors["wanda"] >= errors["sparsegpt-mask"] > errors["sparsegpt"] > errors["alps"], errors
    assert errors["ria"] < errors["magnitude"]


@pytest.mark.parametrize("columns", [32, 128])
@pytest.mark.parametrize("seed", range(3))
def test_updates_and_then_reconstruction_lie_below_every_mask_where_channels_have_one_scale(columns: int, seed: int) -> None:
    """Correlated by random mixing, or from neighbour to neighbour; the masks alone come in any order there."""
    random = torch.Generator().manual_seed(seed)
    white = torch.randn(4 * columns, columns, generator=random)
    mixed = white @ torch.randn(columns, columns, generator=random)
    near = 0.9 ** (torch.arange(columns)[:, None] - torch.arange(columns)).abs()
    weight = torch.randn(24, columns, generator=random)
    for x in (mixed, white @ torch.linalg.cholesky(near).T):
        errors = {name: error(name, weight, x) for name in METHODS}
        masks = [value for name, value in errors.items() if name not in ("sparsegpt", "alps")]
        assert min(masks) > errors["sparsegpt"] > errors["alps"], errors


@pytest.mark.parametrize("name", HESSIAN)
def test_the_recorded_output_error_is_that_of_multiplying(name: str) -> None:
    weight, x = problem()
    recorded = decided(name, weight, x).output_error
    assert recorded == pytest.approx(error(name, weight, x), rel=1e-9)


def test_orthogonal_inputs_of_one_norm_leave_nothing_to_compensate() -> None:
    weight, _ = problem()
    x = torch.eye(32, dtype=torch.float64).repeat(2, 1)
    for name in ("wanda", "sparsegpt", "sparsegpt-mask"):
        choice = decided(name, weight, x)
        assert torch.equal(choice.mask, decided("magnitude", weight, x).mask), name
        torch.testing.assert_close(result(choice, weight), weight * choice.mask, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "2:4 transposable"])
@pytest.mark.parametrize("name", CALIBRATED)
def test_every_method_obeys_every_pattern(name: str, pattern: str) -> None:
    weight, x = problem()
    choice = decided(name, weight, x, pattern)
    new = result(choice, weight)
    parsed = Pattern.parse(pattern)
    assert count_groups(new.numpy(), 1, parsed.n, parsed.m).is_24
    assert not parsed.transposable or count_groups(new.numpy(), 0).is_24
    assert torch.equal(new != 0, choice.mask)
    assert not torch.signbit(new[~choice.mask]).any() or choice.weight is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CALIBRATED)
def test_every_method_takes_every_format_and_keeps_it(name: str, dtype: torch.dtype) -> None:
    weight, x = problem()
    choice = decided(name, weight.to(dtype), x.float())
    assert choice.weight is None or choice.weight.dtype == dtype
    exact = decided(name, weight.to(dtype).double(), x)
    # The same values judged in float32: only near ties may fall otherwise.
    assert float((choice.mask == exact.mask).float().mean()) > 0.99


# ---- singular


def test_a_singular_hessian_is_damped_and_said_so() -> None:
    weight, x = problem(columns=64, rows=40)
    assert decided("sparsegpt", weight, x).notes == ("Hessian singular (40 rows for 64 columns), damped by 1 % of its mean diagonal",)
    assert decided("alps", weight, x).notes == decided("sparsegpt", weight, x).notes
    x = correlated(256, 64, 0)
    x[:, 5] = 0
    choice = decided("sparsegpt", weight, x)
    assert choice.notes == ("Hessian singular (1 of 64 inputs are always zero), damped by 1 % of its mean diagonal",)
    assert decided("sparsegpt", weight, correlated(256, 64, 0)).notes == ()


COMBINED = "some inputs are linear combinations of others to within rounding"
DEPENDENT: dict[str, Callable[[Tensor], Tensor]] = {
    "repeated": lambda x: x[:, 9],
    "repeated at another scale": lambda x: -3.7e-3 * x[:, 9],
    "sum of two": lambda x: x[:, 9] + x[:, 60],
    "mean of all": lambda x: x[:, [k for k in range(64) if k != 30]].mean(1),
}
# (format of the inputs, format of the sums)
PRECISIONS = [(torch.float64, torch.float64), (torch.float32, torch.float64), (torch.float32, torch.float32)]


def summed(x: Tensor, sums: torch.dtype, rows: int) -> Statistics:
    columns = x.shape[1]
    statistics = Statistics(0, x.new_zeros(columns, dtype=torch.float64), x.new_zeros(columns, columns, dtype=sums))
    for part in x.split(rows):
        statistics.add(part)
    return statistics


def rescaled(x: Tensor, seed: int) -> Tensor:
    """Channels that differ a millionfold."""
    random = torch.Generator().manual_seed(seed)
    return x * torch.logspace(-3, 3, x.shape[1], dtype=torch.float64)[torch.randperm(x.shape[1], generator=random)]


@pytest.mark.parametrize(("dtype", "sums"), PRECISIONS)
@pytest.mark.parametrize("how", DEPENDENT)
def test_inputs_that_are_combinations_of_others_are_said(how: str, dtype: torch.dtype, sums: torch.dtype) -> None:
    for seed, rows, scale in itertools.product(range(4), (512, 100), (rescaled, lambda x, _: x)):
        x = scale(correlated(512, 64, seed), seed).to(dtype)
        x[:, 30] = DEPENDENT[how](x)
        assert why_singular(summed(x, sums, rows)) == COMBINED, (seed, rows)


@pytest.mark.parametrize(("dtype", "sums"), PRECISIONS)
def test_nothing_is_said_of_inputs_that_rounding_leaves_apart(dtype: torch.dtype, sums: torch.dtype) -> None:
    """Random widths, rows and batches; XᵀX of a condition up to about 1,000, then channels that differ a millionfold."""
    for seed in range(60):
        random = torch.Generator().manual_seed(seed)
        columns = int(torch.randint(4, 130, (), generator=random))
        rows = columns * int(torch.randint(4, 20, (), generator=random))
        turn = torch.linalg.qr(torch.randn(columns, columns, generator=random, dtype=torch.float64)).Q
        x = torch.randn(rows, columns, generator=random, dtype=torch.float64) * torch.logspace(0, -1, columns, dtype=torch.float64) @ turn
        x = x.relu() if seed % 3 == 0 else x
        x = rescaled(x, seed) if seed % 2 else x
        assert why_singular(summed(x.to(dtype), sums, 37 if seed % 4 == 0 else rows)) == "", seed


@pytest.mark.parametrize(("dtype", "sums"), PRECISIONS)
def test_what_damping_hides_is_no_combination(dtype: torch.dtype, sums: torch.dtype) -> None:
    """An input of which 0.1 % differs from another, ten times less than the damping and a hundred times more than rounding."""
    for seed in range(4):
        x = correlated(512, 64, seed)
        noise = torch.randn(512, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        x[:, 30] = x[:, 9] + 1e-3**0.5 * x[:, 9].std() * noise
        assert why_singular(summed(x.to(dtype), sums, 512)) == "", seed


def without_last_pivot(size: int, seed: int = 0) -> Tensor:
    """A symmetric matrix, float64 `[size, size]`: all its leading minors are positive but the last, which is not by far."""
    random = torch.Generator().manual_seed(seed)
    factor = torch.randn(size, size, generator=random, dtype=torch.float64).tril(-1) / size**0.5 + torch.eye(size, dtype=torch.float64)
    matrix = factor @ factor.T
    # The last pivot is 1.
    matrix[-1, -1] -= 1.25
    return matrix


@pytest.mark.parametrize("left", [float("nan"), 0.0, -0.25], ids=["NaN", "zero", "the pivot"])
def test_a_last_pivot_that_the_library_does_not_complain_of_is_seen(left: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs: nothing but the last diagonal element tells that there is no factor."""
    real = torch.linalg.cholesky_ex

    def silent(matrix: Tensor) -> tuple[Tensor, Tensor]:
        factor, info = real(matrix)
        if int(info) == len(matrix):
            factor[-1, -1], info = left, torch.zeros_like(info)
        return factor, info

    for size in (1, 2, 64, 200):
        matrix = without_last_pivot(size)
        assert int(real(matrix).info) == size
        sound = matrix + 1.25 * torch.eye(size, dtype=torch.float64)
        before = cholesky(sound)
        monkeypatch.setattr(torch.linalg, "cholesky_ex", silent)
        assert cholesky(matrix) is None, size
        after = cholesky(sound)
        assert before is not None
        assert after is not None
        assert torch.equal(before, after)
        if size > 1:
            assert why_singular(Statistics(size, matrix.diagonal().clone(), matrix)) == COMBINED, size
            # The factor begins at the other end.
            factor, notes = inverse_factor(Statistics(size, torch.ones(size), matrix.flip(0, 1)))
            assert bool(torch.isfinite(factor).all())
            assert notes == (f"Hessian singular ({COMBINED}), damped by {damping(matrix)} % of its mean diagonal",), size
        monkeypatch.setattr(torch.linalg, "cholesky_ex", real)


def test_a_failure_that_the_library_tells_is_one_whatever_it_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    told = (torch.eye(4), torch.tensor(3))
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda matrix: told)
    assert cholesky(torch.eye(4)) is None


def damping(matrix: Tensor) -> str:
    """The first of 1, 10 and 100 % of the mean diagonal that outweighs the smallest eigenvalue."""
    least = -float(torch.linalg.eigvalsh(matrix)[0] / matrix.diagonal().mean())
    return next(f"{100 * share:g}" for share in (0.01, 0.1, 1.0) if share > least)


@pytest.mark.parametrize("name", HESSIAN)
def test_what_is_said_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = problem(columns=64)
    x[:, 30] = x[:, 9]
    state = torch.get_rng_state()
    said = decided(name, weight, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert said.notes == (f"Hessian singular ({COMBINED}), damped by 1 % of its mean diagonal",)
    monkeypatch.setattr("twofour.pruning.methods.hessian.has_dependent_inputs", lambda statistics: False)
    silent = decided(name, weight, x)
    assert silent.notes == ()
    assert torch.equal(said.mask, silent.mask)
    assert torch.equal(result(said, weight), result(silent, weight))


@pytest.mark.parametrize("name", CALIBRATED)
def test_inputs_that_are_all_zero_leave_the_magnitude(name: str) -> None:
    weight, _ = problem()
    choice = decided(name, weight, torch.zeros(64, 32, dtype=torch.float64))
    if name not in ("ria", "alps"):
        assert torch.equal(choice.mask, decided("magnitude", weight, torch.zeros(64, 32)).mask)
    assert bool(torch.isfinite(result(choice, weight)).all())


def test_a_hessian_that_damping_cannot_save_is_refused() -> None:
    broken = Statistics(64, torch.ones(8), -torch.ones(8, 8, dtype=torch.float64) + 1.5 * torch.eye(8, dtype=torch.float64))
    with pytest.raises(InputError, match="XᵀX cannot be factored even when damped by its mean diagonal, expected finite inputs"):
        inverse_factor(broken)


def test_more_damping_is_tried_and_told() -> None:
    indefinite = torch.diag(torch.tensor([1.0] * 7 + [-0.05], dtype=torch.float64))
    factor, notes = inverse_factor(Statistics(64, torch.ones(8), indefinite))
    assert bool(torch.isfinite(factor).all())
    assert "damped by 10 % of its mean diagonal" in notes[0]


# ---- statistics

CONVOLUTIONS = [
    nn.Conv2d(8, 4, 3, padding=1),
    nn.Conv2d(8, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
    nn.Conv2d(8, 4, 3, padding="same", padding_mode="reflect"),
    nn.Conv2d(8, 4, 1, stride=2),
    nn.Conv1d(8, 4, 5, padding=2, padding_mode="circular"),
    nn.Conv3d(8, 4, 2, stride=2, padding=1),
]


@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
def test_a_convolution_is_its_unfolded_input_times_its_flat_weight(layer: nn.Module) -> None:
    """Σ over rows of (X Wᵀ)ᵀ(X Wᵀ) = W XᵀX Wᵀ is the Gram matrix of the outputs."""
    model = nn.Sequential(layer).double()
    x = torch.randn(5, 8, *[9] * (layer.weight.ndim - 2), dtype=torch.float64)
    outputs = (model(x) - layer.bias.view(1, -1, *[1] * (x.ndim - 2))).detach().movedim(1, -1).reshape(-1, 4)
    (part,) = gather(model, ["0.weight"], [x[:1], x[1:]], hessian=True)["0.weight"]
    matrix = flatten(layer.weight.detach())
    torch.testing.assert_close(matrix @ part.statistics.hessian @ matrix.T, outputs.T @ outputs, rtol=1e-12, atol=1e-12)
    assert part.statistics.rows == len(outputs)
    squares = gather(model, ["0.weight"], [x], hessian=False)["0.weight"][0].statistics.squares
    torch.testing.assert_close(squares, part.statistics.hessian.diagonal(), rtol=1e-12, atol=1e-12)
    assert torch.equal(unflatten(matrix, layer.weight.shape), layer.weight)


def test_a_convolution_is_pruned_along_its_channels_at_each_kernel_position() -> None:
    weight = torch.randn(8, 16, 3, 3, generator=torch.Generator().manual_seed(0))
    x = correlated(512, 144, 0).float()
    for name in CALIBRATED:
        mask = choose(weight, [Part(0, 8, statistics_of(x))], METHODS[name], Pattern()).mask
        assert count_groups(mask.numpy()).is_24
        assert float(mask.float().mean()) == 0.5


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
def test_a_convolution_is_chosen_by_what_each_kernel_position_sees(name: str) -> None:
    """The whole way through `prune`, against the inputs cut out pixel by pixel; stride, padding and dilation are not alike on both axes."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2))
    model = nn.Sequential(first, second, nn.Flatten(), nn.LazyLinear(3)).double()
    x = torch.randn(6, 3, 9, 9, dtype=torch.float64)
    model(x)
    weight = second.weight.detach().clone().numpy()
    seen = np.pad(first(x).detach().numpy(), ((0, 0), (0, 0), (1, 1), (0, 0)))
    height, width = second(first(x)).shape[2:]
    # Columns: kernel row, kernel column, channel, the last fastest.
    rows = np.array(
        [
            [item[c, 2 * i + a, j + 2 * b] for a in range(3) for b in range(2) for c in range(8)]
            for item in seen
            for i in range(height)
            for j in range(width)
        ]
    )
    matrix = np.array([[w[c, a, b] for a in range(3) for b in range(2) for c in range(8)] for w in weight])
    hessian = rows.T @ rows
    if name == "wanda":
        mask = largest(np.abs(matrix) * np.sqrt(hessian.diagonal()))
        expected = matrix * mask
    else:
        expected, mask = obs_by_inverses(matrix, hessian + np.eye(48) * 0.01 * hessian.diagonal().mean(), 2, 4)
    record = prune(model, (x[:2],), method=name, calibration=[x[:4], x[4:]], permute=False)
    kept, values = record.masks["1.weight"].numpy(), second.weight.detach().numpy()
    for column, (a, b, c) in enumerate(itertools.product(range(3), range(2), range(8))):
        assert np.array_equal(kept[:, c, a, b], mask[:, column]), (a, b, c)
        np.testing.assert_allclose(values[:, c, a, b], expected[:, column], rtol=0, atol=1e5 * 48 * 2.0**-53 * np.abs(matrix).max())


def test_attention_projections_see_query_key_value_and_the_mixed_values() -> None:
    torch.manual_seed(0)

    class Attends(nn.Module):
        def __init__(self, **sizes: int) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **sizes)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.attention(q, key=k, value=v, need_weights=False)[0]

    q, k, v = torch.randn(4, 9, 8), torch.randn(4, 11, 8), torch.randn(4, 11, 8)
    model = Attends().eval()
    names = ["attention.in_proj_weight", "attention.out_proj.weight"]
    parts = gather(model, names, [(q, k, v)], 3, hessian=True)
    assert [(p.start, p.stop) for p in parts[names[0]]] == [(0, 8), (8, 16), (16, 24)]
    for part, source in zip(parts[names[0]], (q, k, v), strict=True):
        rows = source.reshape(-1, 8)
        torch.testing.assert_close(part.statistics.hessian, (rows.T @ rows).double())
    out = model.attention.out_proj
    before = model(q, k, v).detach() - out.bias
    mixed = torch.linalg.solve(out.weight.detach().double(), before.reshape(-1, 8).double().T).T
    torch.testing.assert_close(parts[names[1]][0].statistics.hessian, mixed.T @ mixed, rtol=1e-4, atol=1e-4)
    assert len(gather(model, names, [(q, q, q)], 3, hessian=True)[names[0]]) == 1
    both = gather(model, names, [(q, q, q), (q, k, v)], 3, hessian=False)[names[0]]
    expected = q.double().square().sum((0, 1)) + k.double().square().sum((0, 1))
    torch.testing.assert_close(both[1].statistics.squares, expected, rtol=1e-5, atol=0)
    apart = Attends(kdim=12, vdim=16)
    seen = gather(apart, ["attention.k_proj_weight"], [(q, torch.randn(4, 11, 12), torch.randn(4, 11, 16))], 3, hessian=True)
    assert seen["attention.k_proj_weight"][0].statistics.squares.numel() == 12


def test_statistics_stream_and_a_layer_used_twice_counts_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.a(x).detach() * 0 + x)

    model = Twice()
    x = torch.randn(64, 8)
    one = gather(model, ["a.weight"], [x], hessian=True)["a.weight"][0].statistics
    assert one.rows == 128
    torch.testing.assert_close(one.hessian, (2 * x.T @ x).double(), rtol=1e-5, atol=1e-4)
    many = gather(model, ["a.weight"], x.split(5), hessian=True)["a.weight"][0].statistics
    # Thirteen products of fp32, each of relative rounding below 64 · 2^-24 of the norms.
    torch.testing.assert_close(many.hessian, one.hessian, rtol=0, atol=64 * 2.0**-24 * float(one.squares.max()))


def test_output_errors_are_sums_over_the_rows() -> None:
    weight, x = problem()
    new = weight * decided("magnitude", weight, x).mask
    pair = output_errors(weight, new, statistics_of(x))
    assert pair == pytest.approx((float((x @ (new - weight).T).square().sum()), float((x @ weight.T).square().sum())), rel=1e-9)
