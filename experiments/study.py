"""Experiments on the toy world: models side by side, and arms compared over their seeds (tables.py).

    python -m experiments.study grid --ckpt A.pt B.pt           the same edits by several models, as a picture
    python -m experiments.study pauses --ckpt FILE --out FILE   pause tokens, other words instead, other seeds
    python -m experiments.study table ARM... --columns KEY...   arms compared: Markdown and a figure
    python -m experiments.study report FILE.md                  every table and figure of that file again
    python -m experiments.study keep out/study                  finished runs into experiments/results.jsonl

An arm is a name in experiments/results.jsonl or, with a slash, a folder (out/plain) of SEED/result.json.
"""
import itertools
import shlex
import textwrap
from copy import copy
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.cli import COUNT, add_command, parser, run_script
from common.devices import processes
from common.files import InputError, decode, make_folder, read_bytes, write_json, write_text
from common.images import sheet
from data import Shapes
from experiments.tables import KINDS, keep, table
from metrics import LIMITS, breakdown, evaluate, protocol, toy_model
from sample import select

PAUSES = (0, 8, 16, 32)
SEEDS = range(4)                          # of the noise


def some_edits(dataset, n):
    """The indices of the first n samples that are edits, not captions."""
    return list(itertools.islice((k for k in itertools.count() if dataset.sample(k).images), n))


def grid(flags):
    """A picture of the same held-out edits by several toy models: source, one row a model, target."""
    rows = []
    first = None
    for path in flags.ckpt:
        model, tokenizer, trained = toy_model(path)
        own = (trained["data"], trained["seed"])
        first = first or own
        if own != first:
            raise InputError(f"{path} was trained on {own[0]} with seed {own[1]}, the first model on "
                             f"{first[0]} with seed {first[1]}: their held-out edits differ")
        dataset = Shapes(trained["data"], "iid", trained["seed"])
        edits = evaluate(model, tokenizer, dataset, some_edits(dataset, 8), flags.steps)
        name = "/".join(Path(path).parts[-3:-1])
        rows.append([(e["output"], f"{name}: exact" if e["exact"] else name, e["exact"]) for e in edits])
    samples = [e["sample"] for e in edits]
    sources = [(s.images[0], textwrap.fill(s.instruction, 18), False) for s in samples]
    targets = [(s.target, "target", False) for s in samples]
    sheet([sources, *rows, targets], flags.out, 112 // dataset.world.size)
    print(f"wrote {flags.out}")


def pauses(flags):
    """Edits of a toy model with 0 to 32 pause tokens, or as many words "the", each with four noise seeds."""
    out = Path(flags.out)
    device = processes()[2]
    model, tokenizer, trained = toy_model(flags.ckpt, device)
    filler = copy(tokenizer)
    filler.pause = "the "
    dataset = Shapes(trained["data"], "iid", trained["seed"])
    indices = some_edits(dataset, flags.examples)
    settings = [("pauses", tokenizer, count) for count in PAUSES]
    settings += [("fillers", filler, count) for count in PAUSES[1:]]
    edits = {}                                                         # "8 pauses": [[edit] of each seed]
    for kind, words, count in tqdm(settings):
        edits[f"{count} {kind}"] = [evaluate(model, words, dataset, indices, flags.steps, pauses=count,
                                             seed=seed, device=device, progress=False) for seed in SEEDS]
    scores = {name: breakdown(sum(by_seed, [])) for name, by_seed in edits.items()}
    by_count = [edits[f"{count} pauses"] for count in PAUSES]
    scores["best of 4 counts"] = breakdown(sum(map(best, zip(*by_count)), []))
    for count, by_seed in zip(PAUSES, by_count):
        scores[f"best of 4 seeds, {count} pauses"] = breakdown(best(by_seed))
    scores["table 3"] = {"0 pauses": table_3(by_count[0][:1]),
                         "4 counts": table_3([by_seed[0] for by_seed in by_count]),
                         "4 seeds": table_3(by_count[0])}
    write_json(out, {**scores, "ckpt": flags.ckpt, "examples": len(indices), "steps": flags.steps})
    show_candidates(by_count, out.with_suffix(".png"))
    print(f"wrote {out} and {out.with_suffix('.png')}")


def best(candidates):
    """[[edit] of each candidate] -> [edit]: of each example the one that sample.py chooses (Sec. 6.1)."""
    return [own[select(own, LIMITS["faithfulness"])[0]] for own in zip(*candidates)]


def table_3(candidates):
    """[[edit] of each candidate] -> scores of the paper's Table 3, by rule."""
    scores = [np.array([[edit[key] for edit in own] for own in zip(*candidates)])    # (examples, candidates)
              for key in ("adherence", "faithfulness")]
    return protocol(*scores, LIMITS["faithfulness"], LIMITS["adherence"])


def show_candidates(by_count, path):
    """A picture of the example whose 16 candidates differ most: about half of them are exact."""
    exact = np.array([[[edit["exact"] for edit in edits] for edits in by_seed] for by_seed in by_count])
    shown = abs(8 - exact.sum(axis=(0, 1))).argmin()
    sample = by_count[0][0][shown]["sample"]
    rows = [[(sample.images[0], "source", False), None, None, (sample.target, "target", False)]]
    for count, by_seed in zip(PAUSES, by_count):
        own = [edits[shown] for edits in by_seed]
        rows.append([(e["output"], f"{count} pauses, seed {k}", e["exact"]) for k, e in enumerate(own)])
    sheet(rows, path, 6, title=f"{sample.instruction}; framed: exact")


def report(flags):
    """Make the tables of Markdown files again: what stands between <!-- table FLAGS --> and <!-- end -->."""
    for path in flags.files:
        text = decode(read_bytes(path)).replace("\r\n", "\n")
        new, *blocks = text.split("<!-- table ")
        for block in blocks:
            arguments, _, rest = block.partition(" -->")
            _, end, after = rest.partition("<!-- end -->")
            if not end:
                raise InputError(f"{path}: no <!-- end --> after <!-- table {arguments} -->")
            made = table(commands().parse_args(["table", *shlex.split(arguments)]))
            new += f"<!-- table {arguments} -->\n\n{made}\n\n<!-- end -->{after}"
        write_text(path, new)
        print(f"{path}: {'as it was' if new == text else 'its tables have changed'}")


def commands():
    p = parser(__doc__)
    add = p.add_subparsers(required=True)
    command = add_command(add, grid)
    command.add_argument("--ckpt", required=True, nargs="+", help="checkpoints of train.py")
    command.add_argument("--steps", type=COUNT, default=20, help="Euler steps")
    command.add_argument("--out", default="grid.png", help="the picture")
    command = add_command(add, pauses)
    command.add_argument("--ckpt", required=True, help="checkpoint of train.py")
    command.add_argument("--steps", type=COUNT, default=20, help="Euler steps")
    command.add_argument("--examples", type=COUNT, default=256, help="of held-out edits")
    command.add_argument("--out", required=True, help="a JSON file; a picture goes beside it")
    command = add_command(add, table)
    command.add_argument("rows", nargs="+", metavar="ARM", help="an arm, or ARM:REFERENCE")
    command.add_argument("--columns", nargs="+", default=["iid/all/exact", "novel/all/exact"],
                         help="paths of keys in the runs, or LABEL:PATH")
    command.add_argument("--kind", choices=KINDS, default="result", help="which file of a run")
    command.add_argument("--within", action="store_true", help="compare an arm's columns with its first")
    command.add_argument("--figure", help="a PNG file of the differences")
    command.add_argument("--results", default="experiments/results.jsonl", help="runs that were kept")
    add_command(add, report).add_argument("files", nargs="+", help="Markdown files")
    command = add_command(add, keep)
    command.add_argument("folder", help="of ARM/SEED/KIND.json")
    command.add_argument("--results", default="experiments/results.jsonl", help="where the runs go")
    return p


def main():
    flags = commands().parse_args()
    for path in (getattr(flags, "out", None), getattr(flags, "figure", None)):
        if path:                                                       # found out before the work, not after
            make_folder(Path(path).parent)
    text = flags.run(flags)
    if text:
        print(text)


if __name__ == "__main__":
    run_script(main)
