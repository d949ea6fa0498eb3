"""The report's charts as inline SVG: text stays text, and each colour is a variable of the page, so that dark mode and print apply."""

import io
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from twofour.report.record import AccuracyRow, LayerRow, TrainingRow
from twofour.report.summary import OperationShare
from twofour.report.units import FLOP_STEPS, flops_text, share_text, significant, step_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from twofour.builder.record import LayerRecord

# matplotlib wants literal colours: each stands for the page's variable until the SVG is written.
COLOURS = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--line)",
    "#040404": "var(--dense)",
    "#050505": "var(--sparse)",
    "#060606": "var(--control)",
}
INK, MUTED, LINE, DENSE, SPARSE, CONTROL = COLOURS
VARIANT_COLOUR = {"dense": DENSE, "2:4": SPARSE, "dense + same training": CONTROL}
VARIANT_DASHES = {"dense": "-", "2:4": "-", "dense + same training": (0, (4, 2))}
VARIANT_LABEL = {"dense": "dense", "2:4": "2:4", "dense + same training": "control"}

TEXT_PX = 12
# Up to this many layers each gets a bar with its name; more are drawn as thin bars in the network's order.
MOST_NAMED_LAYERS = 30
MOST_OPERATIONS = 8


@contextmanager
def _figure(width: int, height: int) -> Iterator["Figure"]:
    """A figure of the given CSS pixels, drawn with matplotlib's own defaults whatever the user has configured."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": "twofour",
                "font.size": TEXT_PX,
                "figure.facecolor": "none",
                "axes.facecolor": "none",
                "text.color": INK,
                "text.parse_math": False,
                "axes.labelcolor": MUTED,
                "axes.edgecolor": LINE,
                "axes.grid": True,
                "axes.axisbelow": True,
                "axes.formatter.use_mathtext": False,
                "axes.unicode_minus": True,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.labelsize": TEXT_PX,
                "grid.color": LINE,
                "grid.linewidth": 1,
                "xtick.color": LINE,
                "ytick.color": LINE,
                "xtick.labelcolor": MUTED,
                "ytick.labelcolor": MUTED,
            }
        )
        # One inch is 72 user units in the SVG, so that a unit is a CSS pixel at full size.
        yield Figure(figsize=(width / 72, height / 72), dpi=72)


def _svg(figure: "Figure", name: str, label: str, titles: dict[str, str] | None = None) -> str:
    """Return the figure as an SVG element: ids made unique by `name`, colours replaced, hover titles on the groups of `titles`.

    NOTE: matplotlib's style sheet and metadata are dropped; the first would restyle the whole page, the second holds addresses.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.BytesIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for key in list(element.attrib):
            element.set(key.rpartition("}")[2], _restyle(element.attrib.pop(key), name))
    for parent in list(root.iter()):
        for child in [c for c in parent if c.tag in ("metadata", "style")]:
            parent.remove(child)
        identifier = parent.get("id")
        if identifier is not None:
            parent.set("id", f"{name}-{identifier}")
            if titles and identifier in titles:
                title = ElementTree.Element("title")
                title.text = titles[identifier]
                parent.insert(0, title)
    view = root.get("viewBox", "")
    root.attrib.clear()
    root.attrib.update({"viewBox": view, "role": "img", "aria-label": label})
    return ElementTree.tostring(root, encoding="unicode")


def _restyle(value: str, name: str) -> str:
    value = re.sub(r"url\(#", f"url(#{name}-", value)
    value = re.sub(r"^#(?=[A-Za-z])", f"#{name}-", value)
    value = re.sub(r"'DejaVu Sans'[^;]*", "var(--font)", value)
    for literal, variable in COLOURS.items():
        value = value.replace(literal, variable)
    return value


def _apart(positions: Sequence[float], gap: float) -> list[float]:
    """Return the positions moved up as little as a sweep allows, so that neighbours are at least `gap` apart, about the same centre."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    moved = list(positions)
    for before, after in itertools.pairwise(order):
        moved[after] = max(moved[after], moved[before] + gap)
    shift = (sum(moved) - sum(positions)) / len(moved) if moved else 0.0
    return [position - shift for position in moved]


def _shortened(text: str, length: int) -> str:
    """Return the end of a dotted name, which tells layers apart, in at most `length` characters."""
    return text if len(text) <= length else "…" + text[-(length - 1) :]


def _mean_curve(rows: Sequence[TrainingRow], field: str) -> list[float]:
    """Mean over the seeds of each epoch that all of them have."""
    length = min(len(row.epochs) for row in rows)
    return [sum(getattr(row.epochs[i], field) for row in rows) / len(rows) for i in range(length)]


def training_curves(
    training: Sequence[TrainingRow], field: str, axis: str, *, width: int, name: str, one_shot: AccuracyRow | None = None
) -> str:
    """Return one panel: `field` of every epoch, thin a seed, thick their mean, directly labelled.

    The retrainings begin where the dense training ended, at the vertical line where the network was pruned; a cross there
    marks the mean right after pruning. The vertical range is that of the last three quarters of each training.
    """
    from matplotlib.ticker import MaxNLocator

    groups = {v: [row for row in training if row.variant == v and row.epochs] for v in VARIANT_COLOUR}
    groups = {v: rows for v, rows in groups.items() if rows}
    pruned_at = max((row.epochs[-1].number for row in groups.get("dense", [])), default=0)
    with _figure(width, 260) as figure:
        axes = figure.add_axes((48 / width, 40 / 260, 1 - (48 + 60) / width, 1 - (40 + 26) / 260))
        settled: list[float] = []
        ends: list[tuple[str, float, float]] = []
        for variant, rows in groups.items():
            start = 0 if variant == "dense" else pruned_at
            style: dict[str, Any] = {"color": VARIANT_COLOUR[variant], "linestyle": VARIANT_DASHES[variant]}
            for row in rows:
                values = [getattr(epoch, field) for epoch in row.epochs]
                settled += values[len(values) // 4 :]
                if len(rows) > 1:
                    axes.plot([start + e.number for e in row.epochs], values, linewidth=0.8, alpha=0.4, **style)
            mean = _mean_curve(rows, field)
            numbers = [start + e.number for e in rows[0].epochs[: len(mean)]]
            alone = "o" if len(mean) == 1 else ""
            axes.plot(numbers, mean, linewidth=2, marker=alone, **style)
            ends.append((variant, numbers[-1], mean[-1]))
        settled = [value for value in settled if math.isfinite(value)] or [0.0]
        low, high = min(settled), max(settled)
        room = 0.08 * (high - low) or max(abs(high), 1.0) * 0.05
        axes.set_ylim(low - room, high + room)
        if pruned_at and len(groups) > 1:
            _mark_pruning(axes, pruned_at, one_shot, field)
        _label_ends(axes, ends)
        axes.set_xlabel("epoch")
        axes.set_title(axis, loc="left", fontsize=TEXT_PX, color=MUTED, pad=10)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.grid(axis="x", visible=False)
        axes.margins(x=0.02)
        axes.tick_params(length=0, pad=6)
        return _svg(figure, name, f"Line chart: {axis} by epoch, {', '.join(groups)}")


def _mark_pruning(axes: "Axes", epoch: int, one_shot: AccuracyRow | None, field: str) -> None:
    axes.axvline(epoch, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
    axes.annotate("pruned", (epoch, 0), (5, 4), xycoords=("data", "axes fraction"), textcoords="offset points", color=MUTED)
    if field == "metric" and one_shot is not None:
        low, high = axes.get_ylim()
        if low <= one_shot.mean <= high:
            axes.plot([epoch], [one_shot.mean], marker="x", color=SPARSE, markersize=7)


def _label_ends(axes: "Axes", ends: Sequence[tuple[str, float, float]]) -> None:
    """Write each variant's name right of its line, those of close lines kept apart."""
    low, high = axes.get_ylim()
    height = axes.get_window_extent().height
    last = max((x for _, x, _ in ends), default=0)
    outside = [(variant, y) for variant, x, y in ends if x == last]
    gap = (TEXT_PX + 2) * (high - low) / height
    for (variant, _), y in zip(outside, _apart([y for _, y in outside], gap), strict=True):
        label = axes.annotate(
            VARIANT_LABEL[variant], (last, y), (6, 0), textcoords="offset points", va="center", color=VARIANT_COLOUR[variant]
        )
        label.set_fontweight("bold")
    for variant, x, y in ends:
        if x != last:
            label = axes.annotate(
                VARIANT_LABEL[variant], (x, y), (-6, -8), textcoords="offset points", va="top", ha="right", color=VARIANT_COLOUR[variant]
            )
            label.set_fontweight("bold")


def flops_by_layer(layers: Sequence[LayerRow], *, width: int, name: str) -> str:
    """Return the FLOPs of each layer that ran, in the network's order, coloured by whether it is 2:4.

    Of many layers, a second panel below shows the magnitude kept of those that are.
    """
    ran = [layer for layer in layers if layer.flops is not None]
    scale, unit = step_of(max((float(layer.flops or 0) for layer in ran), default=0.0), FLOP_STEPS, "FLOP")
    values = [(layer.flops or 0) / scale for layer in ran]
    colours = [SPARSE if layer.eligible else DENSE for layer in ran]
    titles = {f"layer{i}": f"{layer.name}: {flops_text(layer.flops or 0)}, {layer.reason or '2:4'}" for i, layer in enumerate(ran)}
    label = f"Bar chart: {unit} per item of {len(ran)} layers, by whether they are 2:4"
    names = [layer.name.removesuffix(".weight") for layer in ran]
    axis = f"{unit} per item"
    return _layer_bars(names, values, colours, titles, axis, label, width=width, name=name, kept=[layer.kept_magnitude for layer in ran])


def time_by_layer(layers: Sequence["LayerRecord"], *, width: int, name: str) -> str:
    """Return the winner's time of each layer of a build that was timed, in order, coloured by whether it uses the zeros, or the CPU."""
    timed = [layer for layer in layers if layer.us is not None]
    values = [layer.us or 0.0 for layer in timed]
    colours = [SPARSE if layer.sparse else DENSE if layer.copy_us is None else CONTROL for layer in timed]
    titles = {f"layer{i}": f"{layer.name}: {significant(layer.us or 0.0)} µs, {layer.winner}" for i, layer in enumerate(timed)}
    titles |= {f"layer{i}": f"{titles[f'layer{i}']}, of it copies {significant(l.copy_us)} µs" for i, l in enumerate(timed) if l.copy_us}
    label = f"Bar chart: microseconds of {len(timed)} layers, by whether they run 2:4"
    return _layer_bars([layer.name for layer in timed], values, colours, titles, "µs a batch", label, width=width, name=name)


def _layer_bars(
    names: Sequence[str],
    values: Sequence[float],
    colours: Sequence[str],
    titles: dict[str, str],
    axis: str,
    label: str,
    *,
    width: int,
    name: str,
    kept: Sequence[float | None] = (),
) -> str:
    """Return one bar a layer: named side by side while there are few, else thin ones in the network's order, with `kept` below."""
    named = len(names) <= MOST_NAMED_LAYERS
    below = 90 if any(share is not None for share in kept) else 0
    height = 44 + 24 * len(names) if named else 300 + below
    with _figure(width, height) as figure:
        if named:
            length = 34 if width > 600 else 16
            labels = [_shortened(text, length) for text in names]
            left = 16 + 7.2 * max((len(text) for text in labels), default=0)
            axes = figure.add_axes((left / width, 40 / height, 1 - (left + 56) / width, 1 - 44 / height))
            bars = axes.barh(range(len(names)), values, height=0.66, color=colours)
            axes.set_yticks(range(len(names)), labels)
            axes.set_ylim(len(names) - 0.4, -0.6)
            axes.set_xlabel(axis)
            axes.grid(axis="y", visible=False)
            for i, value in enumerate(values):
                axes.annotate(significant(value), (value, i), (5, 0), textcoords="offset points", va="center", color=MUTED)
        else:
            bottom = 40 + (124 if below else 0)
            axes = figure.add_axes((48 / width, bottom / height, 1 - (48 + 20) / width, 1 - (bottom + 28) / height))
            bars = axes.bar(range(1, len(names) + 1), values, width=0.8, color=colours)
            axes.set_xlim(0.4, len(names) + 0.6)
            if below:
                axes.tick_params(labelbottom=False)
                _kept_below(figure, kept, width, height)
            else:
                axes.set_xlabel("layer, in the network's order")
            axes.set_title(axis, loc="left", fontsize=TEXT_PX, color=MUTED, pad=10)
            axes.grid(axis="x", visible=False)
        for i, bar in enumerate(bars):
            bar.set_gid(f"layer{i}")
        axes.tick_params(length=0, pad=6)
        return _svg(figure, name, label, titles)


def _kept_below(figure: "Figure", shares: Sequence[float | None], width: int, height: int) -> None:
    """Draw the magnitude kept of each 2:4 layer as a point."""
    axes = figure.add_axes((48 / width, 40 / height, 1 - (48 + 20) / width, 86 / height))
    kept = [(i, 100 * share) for i, share in enumerate(shares, 1) if share is not None]
    axes.plot([i for i, _ in kept], [share for _, share in kept], linestyle="", marker="o", markersize=3, color=SPARSE)
    axes.set_xlim(0.4, len(shares) + 0.6)
    # The two largest of four hold at least half; a mask chosen by something else than magnitude may keep less.
    least = min((share for _, share in kept), default=50.0)
    ticks = [50, 75, 100] if least >= 50 else [0, 50, 100]
    axes.set_ylim(ticks[0], 100)
    axes.set_yticks(ticks)
    axes.set_xlabel("layer, in the network's order")
    axes.set_title("% of magnitude kept", loc="left", fontsize=TEXT_PX, color=MUTED, pad=8)
    axes.grid(axis="x", visible=False)
    axes.tick_params(length=0, pad=6)


def share_by_operation(rows: Sequence[OperationShare], *, width: int, name: str) -> str:
    """Return the share of each engine's time in its slowest operations, dense above 2:4; the rest is one row."""
    shown = list(rows[:MOST_OPERATIONS])
    rest = rows[MOST_OPERATIONS:]
    if rest:
        shown.append(OperationShare(f"{len(rest)} others", sum(row.dense or 0.0 for row in rest), sum(row.sparse or 0.0 for row in rest)))
    height = 44 + 40 * len(shown)
    with _figure(width, height) as figure:
        labels = [_shortened(row.operation, 24) for row in shown]
        left = 16 + 7.2 * max((len(label) for label in labels), default=0)
        axes = figure.add_axes((left / width, 40 / height, 1 - (left + 60) / width, 1 - 44 / height))
        for offset, colour, values in ((-0.19, DENSE, [row.dense for row in shown]), (0.19, SPARSE, [row.sparse for row in shown])):
            axes.barh([i + offset for i in range(len(shown))], [100 * (v or 0.0) for v in values], height=0.34, color=colour)
            for i, value in enumerate(values):
                if value is not None:
                    axes.annotate(
                        share_text(value), (100 * value, i + offset), (5, 0), textcoords="offset points", va="center", color=MUTED
                    )
        axes.set_yticks(range(len(shown)), labels)
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlabel("% of the engine's time")
        axes.grid(axis="y", visible=False)
        axes.tick_params(length=0, pad=6)
        return _svg(figure, name, "Bar chart: share of the engine's time by operation, dense and 2:4")


def accuracy_by_run(runs: Sequence[tuple[str, dict[str, AccuracyRow]]], axis: str, *, width: int, name: str) -> str:
    """Return one row a run: the mean of each variant as a point, a standard deviation over the seeds to either side as a line."""
    height = 44 + 44 * len(runs)
    with _figure(width, height) as figure:
        length = 34 if width > 600 else 16
        labels = [_shortened(run, length) for run, _ in runs]
        left = 16 + 7.2 * max((len(label) for label in labels), default=0)
        axes = figure.add_axes((left / width, 40 / height, 1 - (left + 24) / width, 1 - 44 / height))
        for i, (_, rows) in enumerate(runs):
            for offset, variant in zip((-0.24, 0.0, 0.24), ("dense", "2:4", "dense + same training"), strict=True):
                if (row := rows.get(variant)) is not None:
                    spread = row.spread if math.isfinite(row.spread) else 0.0
                    axes.errorbar(
                        [row.mean], [i + offset], xerr=[spread], fmt="o", color=VARIANT_COLOUR[variant], markersize=6, linewidth=2
                    )
        axes.set_yticks(range(len(runs)), labels)
        axes.set_ylim(len(runs) - 0.4, -0.6)
        axes.set_xlabel(axis)
        axes.margins(x=0.06)
        axes.grid(axis="y", visible=False)
        axes.tick_params(length=0, pad=6)
        return _svg(figure, name, f"Point chart: {axis} of {len(runs)} runs, dense, 2:4 and control")
