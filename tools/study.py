"""Experiments on the toy world: several models side by side, runs compared over their seeds.

    python tools/study.py grid --ckpt A.pt B.pt                the same edits by several models, as a picture
    python tools/study.py pauses --ckpt FILE --out FILE.json   a model with pause tokens, other fillers and other seeds
    python tools/study.py table DIR... --columns KEY...        runs compared over their seeds, as Markdown and as a figure
    python tools/study.py report RESULTS.md                    make every table of that file again
"""
import argparse
import itertools
import json
import math
import re
import shlex
import sys
import textwrap
from copy import copy
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import Shapes, add_command, sheet  # noqa: E402
from metrics import LIMITS, breakdown, check_folder, markdown, protocol, toy_model  # noqa: E402
from model import InputError, processes, read_json  # noqa: E402
from sample import evaluate, select  # noqa: E402


def some_edits(dataset, n):
    """The indices of the first n samples that are edits, not captions."""
    return list(itertools.islice((k for k in itertools.count() if dataset.sample(k).images), n))


def grid(flags):
    """A picture of the same held-out edits by several toy models: source and instruction, one row a model, target."""
    rows, first = [], None
    for path in flags.ckpt:
        model, tokenizer, trained = toy_model(path)
        dataset = Shapes(trained["data"], "iid", trained["seed"])
        first = first or (trained["data"], trained["seed"])
        if (trained["data"], trained["seed"]) != first:
            raise InputError(f"{path} was trained on {trained['data']} with seed {trained['seed']}, the first model on {first[0]} with seed "
                             f"{first[1]}: their held-out edits differ")
        edits = evaluate(model, tokenizer, dataset, some_edits(dataset, 8), flags.steps)
        if not rows:
            rows.append([(e["sample"].images[0], textwrap.fill(e["sample"].instruction, 18), False) for e in edits])
        name = "/".join(Path(path).parts[-3:-1])
        rows.append([(e["output"], f"{name}{': exact' * e['exact']}", e["exact"]) for e in edits])
    rows.append([(e["sample"].target, "target", False) for e in edits])
    sheet(rows, flags.out, 112 // rows[0][0][0].shape[0])
    print(f"wrote {flags.out}")


def pauses(flags):
    """Edits of a toy model with 0, 8, 16, 32 pause tokens, with as many words "the" in their place, and with four seeds each."""
    out, device = Path(flags.out), processes()[2]
    model, tokenizer, trained = toy_model(flags.ckpt, device)
    filler = copy(tokenizer)
    filler.pause = "the "
    dataset = Shapes(trained["data"], "iid", trained["seed"])
    indices = some_edits(dataset, flags.examples)
    counts, seeds = (0, 8, 16, 32), range(4)
    rows = {(kind, count, seed): evaluate(model, words, dataset, indices, flags.steps, pauses=count, seed=seed, device=device, progress=False)
            for seed in tqdm(seeds, desc="seeds") for kind, words in (("pauses", tokenizer), ("fillers", filler))
            for count in counts if kind == "pauses" or count}

    def best(candidates):                                  # of each example, as sample.py chooses
        return [own[select(own, LIMITS["faithfulness"])[0]] for own in zip(*candidates)]
    sets = {f"{count} {kind}": sum((rows[kind, count, seed] for seed in seeds), []) for kind, count, seed in rows if seed == 0}
    sets["best of 4 counts"] = sum((best([rows["pauses", count, seed] for count in counts]) for seed in seeds), [])
    for count in counts:
        sets[f"best of 4 seeds, {count} pauses"] = best([rows["pauses", count, seed] for seed in seeds])
    result = {name: breakdown(own) for name, own in sets.items()}

    def scores(candidates):                                # -> A, Fa (examples, candidates)
        return [np.array([[row[key] for row in own] for own in zip(*candidates)]) for key in ("adherence", "faithfulness")]
    result["table 3"] = {name: protocol(*scores([rows["pauses", *c] for c in chosen]), LIMITS["faithfulness"], LIMITS["adherence"])
                         for name, chosen in {"0 pauses": [(0, 0)], "4 counts": [(count, 0) for count in counts],
                                              "4 seeds": [(0, seed) for seed in seeds]}.items()}
    # the picture is of the example whose candidates differ most: about half of them exact
    shown = min(range(len(indices)), key=lambda k: abs(8 - sum(rows["pauses", c, s][k]["exact"] for c in counts for s in seeds)))
    sample = rows["pauses", 0, 0][shown]["sample"]
    cells = [[(sample.images[0], "source", False)] + [None] * 2 + [(sample.target, "target", False)]]
    cells += [[(row["output"], f"{count} pauses, seed {seed}", row["exact"]) for seed in seeds for row in [rows["pauses", count, seed][shown]]]
              for count in counts]
    sheet(cells, out.with_suffix(".png"), 6, title=f"{sample.instruction}; framed: exact")
    out.write_text(json.dumps({**result, "ckpt": flags.ckpt, "examples": len(indices), "steps": flags.steps}))
    print(f"wrote {out} and {out.with_suffix('.png')}")


# Student's t, 97.5%, for 1 to 9 degrees of freedom; for more the last one serves, a little too wide
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def interval(values):
    """-> mean and half the width of its 95% interval (Student's t; nan for one value)."""
    n = len(values)
    return float(np.mean(values)), float(T95[min(n, 10) - 2] * np.std(values, ddof=1) / n**0.5) if n > 1 else math.nan


def read_arm(folder, columns, name):
    """FOLDER/SEED/name, a JSON file per seed -> {column: {seed: value}}. A column is a path of keys such as iid/edits/exact."""
    files = sorted(Path(folder).glob(f"*/{name}"))
    if not files:
        raise InputError(f"{folder}: no {name} in its folders; a run of runs/*.sh leaves FOLDER/SEED/{name} there")
    arm = {column: {} for column in columns}
    for file in files:
        whole = read_json(file)
        for column in columns:
            value = whole
            for key in column.split("/"):
                if not isinstance(value, dict) or key not in value:
                    raise InputError(f"{file}: no {key!r} of {column}; there are {', '.join(value) if isinstance(value, dict) else 'none'}")
                value = value[key]
            if not isinstance(value, (int, float)):
                raise InputError(f"{file}: {column} is not a number")
            arm[column][file.parent.name] = value
    return arm


def compare(own, reference):
    """{seed: value} of two arms -> mean of own, mean difference and half its 95% interval over the seeds that both have."""
    seeds = sorted(own.keys() & reference.keys())
    if not seeds:
        raise InputError(f"no seed in common: {', '.join(own)} in one arm, {', '.join(reference)} in the other")
    return (float(np.mean([own[s] for s in seeds])), *interval([own[s] - reference[s] for s in seeds]))


def table(flags):
    """Compare runs over their seeds, each row with its reference or, `within`, each column with the first one of its row."""
    columns = {label or path.replace("/", ", "): path for label, _, path in (column.rpartition(":") for column in flags.columns)}
    if len(columns) < len(flags.columns):
        raise InputError(f"--columns: two have one label among {', '.join(columns)}")
    folders = {folder for row in flags.rows for folder in filter(None, row.split(":"))}
    short = len({Path(folder).name for folder in folders}) == len(folders)                 # are the last parts of the paths enough?
    default, first = flags.rows[0].partition(":")[0], next(iter(columns))
    names = {folder: Path(folder).name if short else folder for folder in folders}
    arms = {folder: read_arm(folder, columns.values(), flags.file) for folder in folders}
    pairs, references = {}, {}                             # {row: [({seed: value}, those of the reference) per column]}
    for row in flags.rows:
        folder, _, named = row.partition(":")
        other = folder if flags.within else named or default
        against = f" against {names[other]}" if named and other != folder else ""
        if flags.within or other != folder:
            references["the run that it names" if against else first if flags.within else names[default]] = True
        pairs[names[folder] + against] = [(arms[folder][path], arms[other][columns[first] if flags.within else path])
                                          for path in columns.values()]

    def cell(own, reference):
        if own is reference:
            return "{:.3f} ± {:.3f}".format(*interval(list(own.values())))
        mean, difference, half = compare(own, reference)
        text = f"{mean:.3f} ({difference:+.3f} ± {half:.3f})"
        return f"**{text}**" if abs(difference) > half else text
    # one seed has no interval
    lines = [["", *columns], *([name, *(cell(*pair).replace(" ± nan", "") for pair in line)] for name, line in pairs.items())]
    if len(columns) > len(pairs):                          # the longer side goes down the page
        lines = [list(line) for line in zip(*lines)]
    counts = {len(own.keys() & reference.keys()) for line in pairs.values() for own, reference in line}
    seeds = " to ".join(map(str, sorted({min(counts), max(counts)})))
    text, difference = markdown(lines[0], lines[1:]), f"paired difference to {', or to '.join(references)}"
    text += f"\n\n*{seeds} seeds; mean ± 95% interval" + f"; in brackets the {difference}; bold: zero is outside" * bool(references) + ".*"
    points = {(name, column): compare(*pair)[1:] for name, line in pairs.items() for column, pair in zip(columns, line)
              if pair[0] is not pair[1]}
    if flags.figure and points:
        rows, series = (list(dict.fromkeys(names)) for names in zip(*points))
        if len(series) > len(rows):                        # as few colours as can be
            rows, series, points = series, rows, {key[::-1]: point for key, point in points.items()}
        forest(f"{difference}, 95% interval", rows, series, points, flags.figure)
        text += f"\n\n![{difference}]({flags.figure})"
    return text


def forest(title, rows, series, points, path):
    """Save differences as points with their 95% intervals around zero. points: {(row, series): (difference, half interval)}; each
    series has a colour."""
    font, colors = ImageFont.load_default(13), ["#3465a4", "#f57900", "#4e9a06", "#75507b", "#a40000"]
    step, left, width, top = 16 * len(series) + 8, 24 + max(map(font.getlength, rows)), 520, 36 + 18 * len(series)
    points = {key: (d, h if math.isfinite(h) else 0) for key, (d, h) in points.items()}
    low, high = min(0, *(d - h for d, h in points.values())), max(0, *(d + h for d, h in points.values()))
    high += (high == low)
    tick = next(t for t in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5) if t >= (high - low) / 6 or t == 5)
    bottom = top + step * len(rows)
    page = Image.new("RGB", (int(left) + width + 40, bottom + 26), "white")
    pen = ImageDraw.Draw(page)

    def x(value):
        return left + width * (value - low) / (high - low)
    pen.text((8, 6), title, fill="black", font=font)
    for k in range(math.ceil(low / tick - 1e-9), math.floor(high / tick + 1e-9) + 1):
        pen.line([x(k * tick), top, x(k * tick), bottom], fill="#dddddd" if k else "#666666")
        pen.text((x(k * tick), bottom + 4), f"{k * tick:+.3g}" if k else "0", fill="black", font=font, anchor="ma")
    for s, name in enumerate(series):
        pen.text((left, 24 + 18 * s), name, fill=colors[s % 5], font=font)
        for r, row in enumerate(rows):
            if (row, name) in points:
                (difference, half), y = points[row, name], top + r * step + 12 + 16 * s
                pen.line([x(difference - half), y, x(difference + half), y], fill=colors[s % 5], width=2)
                pen.ellipse([x(difference) - 4, y - 4, x(difference) + 4, y + 4], fill=colors[s % 5])
    for r, row in enumerate(rows):
        pen.text((8, top + r * step + step / 2 - 9), row, fill="black", font=font)
    page.save(path)


def report(flags):
    """Make every table of Markdown files again: what follows a line `<!-- table ARGUMENTS -->`, up to `<!-- end -->`."""
    for path in map(Path, flags.files):
        if not path.is_file():
            raise InputError(f"{path}: there is no such file")
        text = path.read_text()
        parts = re.split(r"(<!-- table .*? -->\n|<!-- end -->)", text)
        for k, part in enumerate(parts):
            if part.startswith("<!-- table"):
                if parts[k + 2:k + 3] != ["<!-- end -->"]:
                    raise InputError(f"{path}: no <!-- end --> after {part.strip()}")
                own = parser().parse_args(shlex.split(part.strip()[5:-4]))
                parts[k + 1] = "\n" + table(own) + "\n\n"
        path.write_text("".join(parts))
        print(f"{path}: {'as it was' if ''.join(parts) == text else 'its tables have changed'}")


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: sys.exit(f"study.py: {message}")
    add = partial(add_command, p.add_subparsers(required=True), p.error)
    command = add(grid)
    command.add_argument("--ckpt", required=True, nargs="+", help="checkpoints of train.py")
    command.add_argument("--steps", type=int, default=20, help="Euler steps")
    command.add_argument("--out", default="grid.png", help="the picture")
    command = add(pauses)
    command.add_argument("--ckpt", required=True, help="checkpoint of train.py")
    command.add_argument("--steps", type=int, default=20, help="Euler steps")
    command.add_argument("--examples", type=int, default=256, help="of held-out edits")
    command.add_argument("--out", required=True, help="a JSON file; a picture goes beside it")
    command = add(table)
    command.add_argument("rows", nargs="+", help="FOLDER with SEED/result.json inside, or FOLDER:REFERENCE")
    command.add_argument("--columns", nargs="+", default=["iid/all/exact", "novel/all/exact"], help="paths of keys in that file, "
                         "or LABEL:PATH")
    command.add_argument("--file", default="result.json", help="its name")
    command.add_argument("--within", action="store_true", help="compare the columns of each arm with the first column")
    command.add_argument("--figure", help="a PNG file of the differences")
    add(report).add_argument("files", nargs="+", help="Markdown files")
    return p


def main():
    p = parser()
    flags = p.parse_args()
    if min(getattr(flags, "examples", 1), getattr(flags, "steps", 1)) < 1:
        p.error("--examples and --steps should be at least 1")
    for path in (getattr(flags, "out", None), getattr(flags, "figure", None)):
        check_folder(path)
    text = flags.run(flags)
    if text:
        print(text)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"study.py: {error}")
