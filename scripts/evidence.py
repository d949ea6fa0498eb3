"""Writes tables and plot of docs/evidence.md, the table of docs/recipes.md, four lines of README.md: `python scripts/evidence.py`.

Source: results/*/accuracy*.json.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pages import filled

from twofour.files import write_text

ROOT = Path(__file__).parent.parent
PLOT = ROOT / "docs" / "evidence.svg"
CONTROL = "dense + same training"
METHODS = ("wanda", "ria", "sparsegpt", "alps", "magnitude")
NARROW = 0.2
Row = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """What a row of the table has to reach: points of the metric, against the dense network given the same training.

    `published`: accuracy of the dense network as others published it, which the aim includes. `epochs`: of that length only; None: of any
    that no other goal of the network names. `seeds`: how many it takes. `dense`: what the dense network trained here has to reach first.
    """

    net: str
    data: str
    floor: float
    aim: float
    published: float | None = None
    variant: str = "2:4"
    epochs: int | None = None
    seeds: int = 10
    dense: float = -math.inf


GOALS = (
    Goal("ResNet-20", "CIFAR-10 test", -0.7, -0.1, 91.73),
    Goal("ResNet-20", "CIFAR-10 test", -0.7, -0.1, 91.73, epochs=200),
    Goal("ResNet-32", "CIFAR-10 test", -0.5, -0.1, 92.63),
    Goal("ResNet-44", "CIFAR-10 test", -0.4, -0.1, 93.10),
    Goal("ResNet-56", "CIFAR-10 test", -0.3, -0.1, 93.39),
    Goal("ResNet-18", "CIFAR-10 test", -0.1, 0.0, seeds=3, dense=95.0),
    Goal("MobileNetV2", "CIFAR-10 test", -0.3, -0.1, variant="2:4, permuted", seeds=3),
    Goal("MobileNetV2", "CIFAR-10 test", -0.3, -0.1, seeds=3),
    Goal("MiniLM-L6", "STS-B test", -0.5, -0.2, seeds=3),
    Goal("MiniLM-L6", "SST-2 test (GLUE's dev)", -0.5, -0.2, seeds=3),
)


@dataclass(frozen=True)
class Paired:
    """Differences of two arms, seed by seed: mean and the half-width of its 95 % interval by Student's t.

    half = t(0.975, n − 1) · s / √n; infinite for fewer than two seeds.
    """

    differences: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean difference."""
        return fmean(self.differences)

    @property
    def half(self) -> float:
        """Half-width of the interval."""
        from scipy.stats import t

        n = len(self.differences)
        return float(t.ppf(0.975, n - 1)) * stdev(self.differences) / math.sqrt(n) if n > 1 else math.inf

    def reaches(self, floor: float) -> bool:
        """Whether the interval's upper end reaches the floor and it is narrow enough to say so."""
        return self.mean + self.half >= floor and self.half <= NARROW

    def __str__(self) -> str:
        return f"{signed(self.mean)} ± {self.half:.2f}" if len(self.differences) > 1 else signed(self.mean)


def signed(value: float) -> str:
    """Return a number with its sign."""
    return f"{value:+.2f}".replace("-", "−")


def recorded() -> list[tuple[Path, dict[str, Any]]]:
    """Return the files of accuracy that hold arms and seeds."""
    found = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in sorted((ROOT / "results").glob("*/accuracy*.json"))]
    return [(path, value) for path, value in found if any("experiment" in row for row in value["rows"])]


def rows_of(files: Sequence[tuple[Path, dict[str, Any]]], **wanted: Any) -> list[Row]:
    """Return the rows whose fields are those."""
    rows = [row for _, value in files for row in value["rows"]]
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def paired(rows: Sequence[Row], variant: str, other: str = CONTROL) -> Paired | None:
    """Return the differences of two variants among rows of one recipe, or None where no seed has both."""
    by = {(row["variant"], row["seed"]): row["value"] for row in rows}
    seeds = sorted(seed for name, seed in by if name == variant and seed is not None and (other, seed) in by)
    return Paired(tuple(by[variant, seed] - by[other, seed] for seed in seeds)) if seeds else None


def recipes_of(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the recipes that occur, in order."""
    texts = dict.fromkeys(json.dumps(row["recipe"], sort_keys=True) for row in rows if row["recipe"])
    return [json.loads(text) for text in texts]


def recipe_text(recipe: dict[str, Any], variant: str = "2:4") -> str:
    """Return a recipe in few words; only a variant whose name does not say where it starts starts from the recipe's method."""
    length = f"{recipe['epochs']} epochs" if "epochs" in recipe else f"{recipe['steps']} steps"
    parts = [length, f"batch {recipe['batch']}", f"lr {recipe['lr']:g}"]
    if recipe["distill"]:
        parts.append(f"distillation {recipe['distill']:g}")
    if "labels" in recipe:
        parts.append(f"labels {recipe['labels']:g}")
    if recipe.get("unseen"):
        parts.append("no sentence of dev or test")
    starts = variant != CONTROL and "recomputed" not in variant and not any(name in variant for name in METHODS)
    return ", ".join([*parts, *([f"from {recipe['method']}"] if starts and "method" in recipe else [])])


def spread(rows: Sequence[Row], variant: str) -> str:
    """Return mean ± standard deviation over the seeds of a variant."""
    values = [row["value"] for row in rows if row["variant"] == variant and row["seed"] is not None]
    return "–" if not values else f"{fmean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def mean_of(rows: Sequence[Row], variant: str) -> float:
    """Return the mean over the seeds of a variant."""
    return fmean(row["value"] for row in rows if row["variant"] == variant and row["seed"] is not None)


def alone(rows: Sequence[Row], variant: str) -> str:
    """Return the value of a row without a seed."""
    values = [row["value"] for row in rows if row["variant"] == variant and row["seed"] is None]
    return f"{values[0]:.2f}" if values else "–"


# README.md shows these.
SHOWN = (("ResNet-20", "CIFAR-10 test"), ("ResNet-56", "CIFAR-10 test"), ("ResNet-18", "CIFAR-10 test"), ("MiniLM-L6", "STS-B test"))


def outcome(goal: Goal, found: Paired, rows: Sequence[Row]) -> str:
    """Return what became of a goal, of whose recipe these are the rows."""
    if any(row["value"] < goal.dense for row in rows if row["variant"] == "dense"):
        return f"open: the dense network is below {goal.dense:g}"
    if len(found.differences) < goal.seeds:
        return f"open: {len(found.differences)} of {goal.seeds} seeds"
    if found.half > NARROW:
        return f"open: the interval is wider than ± {NARROW}"
    if not found.reaches(goal.floor):
        return "missed"
    aimed = found.mean + found.half >= goal.aim and mean_of(rows, goal.variant) >= (goal.published or 0.0)
    return "reached, and the aim" if aimed else "reached"


def measured(files: Sequence[tuple[Path, dict[str, Any]]]) -> list[tuple[Goal, list[Row], Paired]]:
    """Return the goals with results: the rows of the recipe, and the differences; a goal once a recipe."""
    found = []
    for goal in GOALS:
        rows = rows_of(files, experiment="retraining", net=goal.net, data=goal.data)
        for recipe in recipes_of(rows):
            # A goal of another length has a row of its own.
            other = {g.epochs for g in GOALS if (g.net, g.data) == (goal.net, goal.data)} - {goal.epochs, None}
            if recipe.get("epochs") in other or goal.epochs not in (None, recipe.get("epochs")):
                continue
            own = [row for row in rows if row["recipe"] == recipe]
            differences = paired(own, goal.variant)
            if differences is not None:
                found.append((goal, [row for row in rows if row["recipe"] in (None, recipe)], differences))
    return found


def name_of(goal: Goal) -> str:
    """Return a goal's name."""
    name = goal.net + (", reordered" if "permuted" in goal.variant else "")
    return f"{name}, {goal.epochs} epochs" if goal.epochs == 200 else name


def summary_table() -> str:
    """Return the table of goals."""
    found = measured(recorded())
    heads = ("network", "data", "dense", "2:4 one-shot", "dense, same training", "2:4, retrained", "difference", "seeds", "floor, aim", "")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for goal, rows, differences in found:
        recipe = next(row["recipe"] for row in rows if row["recipe"])
        notes = ", permuted" if "permuted" in goal.variant else ""
        starts = {method: alone(rows, f"2:4 one-shot, {method}{notes}") for method in ("magnitude", recipe.get("method", "magnitude"))}
        oneshot = ", ".join(f"{value} ({method})" if len(starts) > 1 else value for method, value in starts.items())
        cells = [
            f"{name_of(goal)} ({recipe_text(recipe)})",
            goal.data,
            alone(rows, "dense"),
            oneshot,
            spread(rows, CONTROL),
            spread(rows, goal.variant),
            f"**{differences}**",
            str(len(differences.differences)),
            f"{signed(goal.floor)}, {signed(goal.aim)}",
            outcome(goal, differences, rows),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    missing = [goal for goal in GOALS if goal not in {g for g, *_ in found}]
    if missing:
        lines += ["", "Not measured yet: " + "; ".join(f"{name_of(goal)} ({goal.data})" for goal in missing) + "."]
    return "\n".join(lines if found else lines[-1:])


def short_table() -> str:
    """Return four lines of the table of goals; what is not measured says so.

    Of several recipes the one measured last, since that is what the search chose: the better one on the test set would be chosen by it.
    """
    found = measured(recorded())
    lines = ["| network, data | dense | dense, same training | 2:4, retrained | difference | |", "|---" * 6 + "|"]
    for net, data in SHOWN:
        own = [one for one in found if (one[0].net, one[0].data, one[0].epochs) == (net, data, None)]
        if not own:
            lines.append(f"| {net}, {data} | – | – | – | – | not measured yet |")
            continue
        goal, rows, differences = max(own, key=lambda one: max(row["date"] for row in one[1] if row["recipe"]))
        cells = (alone(rows, "dense"), spread(rows, CONTROL), spread(rows, goal.variant), f"**{differences}**")
        lines.append(f"| {net}, {data} | {' | '.join(cells)} | {outcome(goal, differences, rows)} |")
    return "\n".join(lines)


def choices_table(experiment: str) -> str:
    """Return a table of every arm on the data recipes are chosen by: accuracy, differences to its control and to the first arm."""
    files = recorded()
    blocks = []
    everything = [row for row in rows_of(files, experiment=experiment) if "test" not in row["data"]]
    for net, data in dict.fromkeys((row["net"], row["data"]) for row in everything):
        rows = [row for row in everything if (row["net"], row["data"]) == (net, data)]
        first = recipes_of(rows)[0] if recipes_of(rows) else None
        base = {row["seed"]: row["value"] for row in rows if row["variant"] == "2:4" and row["recipe"] == first}
        lines = [f"**{net}**, {data}; dense {alone(rows, 'dense')}:", ""]
        lines += ["| arm | recipe | one-shot | retrained | against dense, same training | against the first | seeds |", "|---" * 7 + "|"]
        for recipe in recipes_of(rows):
            own = [row for row in rows if row["recipe"] == recipe]
            for variant in dict.fromkeys(row["variant"] for row in own):
                values = {row["seed"]: row["value"] for row in own if row["variant"] == variant}
                common = sorted(values.keys() & base.keys())
                to_first = Paired(tuple(values[s] - base[s] for s in common)) if common and (variant, recipe) != ("2:4", first) else None
                to_control = paired(own, variant) if variant != CONTROL else None
                cells = [
                    variant,
                    recipe_text(recipe, variant),
                    alone(rows, oneshot_of(variant, recipe.get("method", "magnitude"))),
                    spread(own, variant),
                ]
                cells += [str(to_control or "–"), str(to_first or "–"), str(len(values))]
                lines.append(f"| {' | '.join(cells)} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) or "Not measured yet."


def oneshot_of(variant: str, usual: str = "magnitude") -> str:
    """Return the variant before training of a 2:4 arm that begins, where its name says nothing else, from the `usual` method."""
    method = next((name for name in METHODS if name in variant), usual)
    notes = [note for note in ("permuted", "batch-norm re-estimated") if note in variant]
    return "" if variant == CONTROL or "recomputed" in variant else ", ".join([f"2:4 one-shot, {method}", *notes])


def runs_table() -> str:
    """Return each experiment's command, GPU minutes and date."""
    files = recorded()
    if not files:
        return "Nothing is recorded yet."
    lines = ["| results | GPU | GPU minutes | trainings | date | command |", "|---" * 6 + "|"]
    for path, value in files:
        relative = path.relative_to(ROOT).as_posix()
        gpu = value["machine"].get("gpu") or "none"
        # Rows of several commands may lie in one file; one that names none is of the file's.
        for command in dict.fromkeys(row.get("command", value["command"]) for row in value["rows"] if row["recipe"]):
            rows = [row for row in value["rows"] if row.get("command", value["command"]) == command]
            minutes = sum(row.get("gpu_seconds", 0.0) for row in rows) / 60
            trained = len({json.dumps([row[k] for k in ("net", "variant", "seed", "recipe")]) for row in rows if row["recipe"]})
            date = max(row.get("date", value["date"]) for row in rows)[:10]
            lines.append(f"| [{relative}](../{relative}) | {gpu} | {minutes:.1f} | {trained} | {date} | `{command}` |")
    return "\n".join(lines)


def plot_line() -> str:
    """Return the reference to the plot, if there is something to plot."""
    if not measured(recorded()):
        return ""
    return f"![Difference to the dense network given the same training, with its 95 % interval and the floor]({PLOT.name})"


def expect_table() -> str:
    """Return, for who wants to know what to expect, each measured network's recipe, cost and difference."""
    found = measured(recorded())
    if not found:
        return "Not measured yet."
    lines = ["| network | retraining | GPU minutes a training | 2:4 against dense, same training |", "|---" * 4 + "|"]
    for goal, rows, differences in found:
        own = [row for row in rows if row["variant"] == goal.variant and row["recipe"]]
        minutes = fmean(row["gpu_seconds"] for row in own) / 60
        lines.append(f"| {name_of(goal)}, {goal.data} | {recipe_text(own[0]['recipe'])} | {minutes:.2f} | {differences} |")
    return "\n".join(lines)


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "docs/evidence.md": {
        "summary": summary_table,
        "plot": plot_line,
        "recipes": lambda: choices_table("retraining"),
        "ablations": lambda: choices_table("ablations"),
        "runs": runs_table,
    },
    "docs/recipes.md": {"expect": expect_table},
    "README.md": {"accuracy": short_table},
}


def plot_names(found: Sequence[tuple[Goal, list[Row], Paired]]) -> list[str]:
    """Return a name for each, with the learning rate where a goal has several recipes, and the seeds where they are too few."""
    counts = Counter(goal for goal, *_ in found)
    names = []
    for goal, rows, differences in found:
        recipe = next(row["recipe"] for row in rows if row["recipe"])
        rate = f", lr {recipe['lr']:g}{' (no sentence of dev or test)' * bool(recipe.get('unseen'))}" if counts[goal] > 1 else ""
        few = f", {len(differences.differences)} of {goal.seeds} seeds" if len(differences.differences) < goal.seeds else ""
        names.append(f"{name_of(goal)}, {goal.data}{rate}{few}")
    return names


def draw(path: Path) -> None:
    """Draw every measured difference as a dot with its interval, its floor as a tick."""
    found = measured(recorded())
    if not found:
        return
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "twofour", "font.size": 10, "axes.spines.top": False}):
        figure = Figure(figsize=(7.2, 0.42 * len(found) + 1.0), layout="constrained")
        axes = figure.add_subplot()
        for at, (goal, _, differences) in enumerate(found):
            half = differences.half if math.isfinite(differences.half) else 0.0
            axes.errorbar(differences.mean, at, xerr=half, fmt="o", color="#0b6e4f", capsize=3, markersize=5)
            axes.plot([goal.floor], [at], marker="|", color="#c1121f", markersize=14, markeredgewidth=2)
        axes.axvline(0, color="#888888", linewidth=0.8)
        axes.set_yticks(range(len(found)), plot_names(found))
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.set_xlabel("2:4 − dense with the same training, points; red: floor")
        axes.spines["right"].set_visible(False)
        figure.savefig(path, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    draw(PLOT)
    for page_name in TABLES:
        page_path = ROOT / page_name
        write_text(page_path, filled(page_path.read_text(encoding="utf-8"), TABLES[page_name]))
