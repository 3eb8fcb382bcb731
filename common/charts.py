"""Tables, and line charts where matplotlib is installed."""
import math

from common.files import InputError, optional, writing


def mean_or_none(values):
    """Mean of what is defined, or None."""
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def markdown(header, lines):
    """A table: numbers with four digits, - for None."""
    def shown(cell):
        return "-" if cell is None else f"{cell:.4f}" if isinstance(cell, float) else str(cell)
    table = [header, ["---"] * len(header), *([shown(cell) for cell in line] for line in lines)]
    return "\n".join("| " + " | ".join(line) + " |" for line in table)


def line_charts(panels, path):
    """Charts side by side in one PNG file. panels: (title, x label, y label, {series: [(x, y, low, high)]}).

    low and high are the ends of an interval, drawn as a bar, or None. Without matplotlib one line says so."""
    try:
        Figure = optional("matplotlib.figure").Figure
    except InputError as error:
        print(f"no {path}: {error}")
        return
    figure = Figure((5 * len(panels), 4), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, x_label, y_label, series) in zip(all_axes, panels):
        for name, points in series.items():
            if not points:
                continue
            x, y, low, high = zip(*points)
            line, = axes.plot(x, y, marker="." if len(x) < 50 else "", label=name)
            if low[0] is not None:
                axes.vlines(x, low, high, color=line.get_color())
        axes.set(title=title, xlabel=x_label, ylabel=y_label)
        axes.legend(fontsize="small")
    with writing(path, "wb") as file:
        # without the version of matplotlib: the same bytes each time
        figure.savefig(file, format="png", dpi=120, metadata={"Software": None})


def plot_losses(log, path):
    """The lines of train.py's log -> a picture of the loss over the steps, all and in four bins of t; of the
    validation loss, and of the share of exact edits where there is one."""
    series = {"all": [(line["step"], line["loss"], None, None) for line in log]}
    for k in range(4):
        name = f"t from {k / 4} to {(k + 1) / 4}"
        series[name] = [(line["step"], line["loss_by_t"][k] or math.nan, None, None) for line in log]
    panels = [("training loss by time: t = 0 is noise, 1 the image", "step", "loss", series)]
    names = {"val_loss": "weights", "val_loss_averaged": "averaged weights", "val_exact": "exact of 64 edits"}
    held_out = {name: [(line["step"], line[key], None, None) for line in log if key in line]
                for key, name in names.items()}
    if any(held_out.values()):
        panels.append(("held out: loss at fixed times and noise; exact edits", "step", "", held_out))
    line_charts(panels, path)
