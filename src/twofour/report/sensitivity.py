"""A sensitivity as a picture: a bar a layer, in the network's order."""

from pathlib import Path

from twofour.files import written_aside
from twofour.pruning.sensitivity import Sensitivity

ROW_INCHES = 0.22


def plot_sensitivity(measured: Sensitivity, path: str | Path) -> None:
    """Write the picture; its format follows from the name (.svg, .png, .pdf).

    Raises:
        InputError: the file cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams["svg.hashsalt"] = "twofour"
        figure = Figure(figsize=(8, 1.2 + ROW_INCHES * len(measured.layers)), layout="constrained")
        axes = figure.add_subplot()
        places = range(len(measured.layers))
        axes.barh(places, [layer.lost for layer in measured.layers], color="#76b900")
        axes.set_yticks(places, [layer.name for layer in measured.layers], fontsize=8)
        axes.invert_yaxis()
        axes.axvline(0, color="black", linewidth=0.8)
        change = "lost" if measured.direction == "higher" else "added"
        axes.set_xlabel(
            f"{measured.metric} {change} when only this layer is pruned ({measured.method} {measured.pattern}); dense {measured.dense:.4g}"
        )
        axes.spines[["top", "right"]].set_visible(False)
        with written_aside(path) as aside:
            figure.savefig(
                aside, format=Path(path).suffix.removeprefix("."), metadata={"Date": None} if Path(path).suffix == ".svg" else None
            )
