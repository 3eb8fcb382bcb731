"""Arms compared over their seeds: the runs that were kept, paired differences, Markdown tables and figures.

An arm is one way to train or to sample, run with several seeds. Without a slash it is a name in
experiments/results.jsonl, one JSON line a run; with one (out/plain) it is a folder of files SEED/result.json.
"""
import math
from pathlib import Path

import numpy as np

from common.charts import line_charts, markdown
from common.files import InputError, optional, read_json, rows_of, write_jsonl, writing

# the files of a run (toy_all.sh, photographs.py)
KINDS = ("result", "distance", "pauses", "curve", "scaling", "photographs")
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")       # the colour-blind can tell them apart
# Student's t, 97.5%, for 1 to 9 degrees of freedom; for more the last one serves, a little too wide
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def keep(flags):
    """Put finished runs, FOLDER/ARM/SEED/KIND.json, into the results, in place of an older run."""
    runs = {}
    for file in sorted(Path(flags.folder).glob("*/*/*.json")):
        arm, seed = file.parts[-3:-1]
        if file.stem in KINDS and seed.isdecimal():
            key = {"arm": arm, "seed": int(seed), "kind": file.stem}
            runs[arm, file.stem, int(seed)] = {**key, **read_json(file), **key}  # the key is first, and wins
    Path(flags.results).parent.mkdir(parents=True, exist_ok=True)
    fcntl = optional("fcntl")
    with open(f"{flags.results}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)                               # two scripts may end at the same time
        kept = {(row["arm"], row["kind"], row["seed"]): row for row in all_runs(flags.results)}
        kept.update(runs)
        write_jsonl(flags.results, [kept[key] for key in sorted(kept)])
    print(f"{flags.results}: {len(kept)} runs, {len(runs)} of them from {flags.folder}")


def all_runs(results):
    return [row for _, row in rows_of(results)] if Path(results).exists() else []


def read_arms(arms, kind, paths, results):
    """-> {(arm, path): {seed: number}}, for paths of keys in the runs such as iid/edits/exact."""
    kept = all_runs(results)
    values = {}
    for arm in arms:
        if "/" in arm:
            runs = {file.parent.name: read_json(file) for file in sorted(Path(arm).glob(f"*/{kind}.json"))}
        else:
            runs = {str(row["seed"]): row for row in kept if row["arm"] == arm and row["kind"] == kind}
        if not runs:
            raise InputError(f"{arm}: no SEED/{kind}.json in this folder" if "/" in arm else
                             f"{arm}: no {kind} of this arm in {results}; a folder is written with a slash")
        for path in paths:
            values[arm, path] = {seed: number_at(path, content, f"{arm}, {kind} of seed {seed}")
                                 for seed, content in runs.items()}
    return values


def number_at(path, value, where):
    for key in path.split("/"):
        known = value if isinstance(value, dict) else {}
        if key not in known:
            raise InputError(f"{where}: no {key!r} of {path}; there are {', '.join(known) or 'none'}")
        value = known[key]
    if not isinstance(value, (int, float)):
        raise InputError(f"{where}: {path} is not a number")
    return value


def interval(values):
    """-> mean and half the width of its 95% interval (Student's t; nan for one value)."""
    n = len(values)
    half = T95[min(n, 10) - 2] * np.std(values, ddof=1) / n**0.5 if n > 1 else math.nan
    return float(np.mean(values)), float(half)


def compare(own, reference):
    """{seed: number} of two -> mean of own, mean difference, half its 95% interval, over common seeds."""
    seeds = sorted(own.keys() & reference.keys())
    if not seeds:
        raise InputError(f"no seed in common: {', '.join(own)} in one arm, {', '.join(reference)} in another")
    return float(np.mean([own[s] for s in seeds])), *interval([own[s] - reference[s] for s in seeds])


def table(flags):
    """Compare arms over their seeds, each with the first one, or with the one that it names after a colon."""
    labels = [column.rpartition(":")[0] or column.replace("/", ", ") for column in flags.columns]
    columns = dict(zip(labels, (column.rpartition(":")[2] for column in flags.columns)))
    if len(columns) < len(labels):
        raise InputError(f"--columns: two have one label among {', '.join(labels)}")
    rows = [row.partition(":")[::2] for row in flags.rows]                         # [(arm, reference or "")]
    arms = dict.fromkeys(arm for row in rows for arm in row if arm)
    values = read_arms(arms, flags.kind, columns.values(), flags.results)
    pairs, reference = pair_up(rows, columns, values, flags.within)
    if flags.figure:
        forest(pairs, f"paired difference to {reference}", flags.figure)
    if flags.lines:
        lines(pairs, *flags.lines)
    seeds = {len(own.keys() & other.keys()) for own, other in pairs.values()}
    note = f"{' to '.join(map(str, sorted({min(seeds), max(seeds)})))} seeds; mean ± 95% interval"
    if reference:
        note += f"; in brackets the paired difference to {reference}; bold: zero is outside"
    return f"{as_markdown(pairs)}\n\n*{note}.*"


def pair_up(rows, columns, values, within):
    """-> {(row, column): (own, reference)}, each {seed: number}, and the names of the references.

    A reference is paired with itself. within: each column is compared with the first one of its row."""
    default = rows[0][0]
    first = next(iter(columns))
    pairs = {}
    references = {}                                                    # its keys, as an ordered set
    for arm, named in rows:
        other = arm if within else named or default
        row = f"{arm} against {other}" if named and other != arm else arm
        for column, path in columns.items():
            pairs[row, column] = (values[arm, path], values[other, columns[first] if within else path])
        if within or other != arm:
            references[first if within else "the run that it names" if named else default] = True
    return pairs, ", or to ".join(references)


def cell(own, reference):
    """Mean ± interval of a reference; mean (difference ± interval) of what is compared with one."""
    if own is reference:
        text = "{:.3f} ± {:.3f}".format(*interval(list(own.values())))
    else:
        mean, difference, half = compare(own, reference)
        text = f"{mean:.3f} ({difference:+.3f} ± {half:.3f})"
        text = f"**{text}**" if abs(difference) > half else text
    return text.replace(" ± nan", "")                                  # one seed has no interval


def as_markdown(pairs):
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*pairs))
    lines = [["", *columns]] + [[row, *(cell(*pairs[row, column]) for column in columns)] for row in rows]
    if len(columns) > len(rows):                                       # the longer side goes down the page
        lines = [list(line) for line in zip(*lines)]
    return markdown(lines[0], lines[1:])


def lines(pairs, path, label):
    """Save a chart of the means and the range of the seeds, a line a row; columns are labelled by numbers."""
    series = {}
    for (row, column), (own, _) in pairs.items():
        seeds = list(own.values())
        try:
            series.setdefault(row, []).append((float(column), np.mean(seeds), min(seeds), max(seeds)))
        except ValueError:
            raise InputError(f"--lines: the label {column!r} of a column is not a number") from None
    line_charts([("", label, "mean of the seeds", series)], path)


def forest(pairs, label, path):
    """Save a chart of the differences: points with their 95% intervals beside the line of zero."""
    points = {key: compare(*pair)[1:] for key, pair in pairs.items() if pair[0] is not pair[1]}
    if not points:
        raise InputError(f"{path}: nothing is compared, so there is no difference to draw")
    rows, series = (list(dict.fromkeys(names)) for names in zip(*points))
    if len(series) > len(rows):                                        # as few colours as can be
        rows, series = series, rows
        points = {key[::-1]: point for key, point in points.items()}
    height = 1.1 + len(rows) * (0.14 + 0.16 * len(series))             # inches
    figure = optional("matplotlib.figure").Figure(figsize=(8, height), layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0, color="0.3", linewidth=1)
    for place, name in enumerate(series):
        own = [(y, *points[row, name]) for y, row in enumerate(rows) if (row, name) in points]
        y, mean, half = np.array(own).T
        y = y + 0.8 * ((place + 0.5) / len(series) - 0.5)              # side by side
        axes.errorbar(mean, y, xerr=np.nan_to_num(half), fmt="o", ms=4, color=COLORS[place % 5], label=name)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)                               # the first row on top
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.set_xlabel(f"{label}\n(scores are from 0 to 1; lines: 95% intervals)")
    if len(series) > 1:
        figure.legend(loc="outside upper left", ncols=3, frameon=False)
    with writing(path, "wb") as file:
        figure.savefig(file, format="png", dpi=100, metadata={"Software": None})       # always the same bytes
