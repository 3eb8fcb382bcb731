"""Experiments on the toy world: models side by side, and arms compared over their seeds (tables.py).

    python -m experiments.study grid --ckpt A.pt B.pt           the same edits by several models, as a picture
    python -m experiments.study table ARM... --columns KEY...   arms compared: Markdown and a figure
    python -m experiments.study report FILE.md                  every table and figure of that file again
    python -m experiments.study keep out/study                  finished runs into experiments/results.jsonl

An arm is a name in experiments/results.jsonl or, with a slash, a folder (out/plain) of SEED/result.json.
"""
import shlex
import textwrap
from pathlib import Path

from common.cli import COUNT, add_command, add_device, parser, run_script
from common.devices import processes
from common.files import InputError, decode, make_folder, read_bytes, write_text
from common.images import sheet
from data import Shapes
from experiments.measure import some_edits
from experiments.tables import KINDS, keep, table
from metrics import evaluate, toy_model


def grid(flags):
    """A picture of the same held-out edits by several toy models: source, one row a model, target."""
    device = processes(flags.device)[2]
    rows = []
    first = None
    for path in flags.ckpt:
        model, tokenizer, trained = toy_model(path, device)
        own = (trained["data"], trained["seed"])
        first = first or own
        if own != first:
            raise InputError(f"{path} was trained on {own[0]} with seed {own[1]}, the first model on "
                             f"{first[0]} with seed {first[1]}: their held-out edits differ")
        dataset = Shapes(trained["data"], "iid", trained["seed"])
        edits = evaluate(model, tokenizer, dataset, some_edits(dataset, 8), flags.steps,
                         device=device)
        name = "/".join(Path(path).parts[-3:-1])
        rows.append([(e["output"], f"{name}: exact" if e["exact"] else name, e["exact"]) for e in edits])
    samples = [e["sample"] for e in edits]
    sources = [(s.images[0], textwrap.fill(s.instruction, 18), False) for s in samples]
    targets = [(s.target, "target", False) for s in samples]
    sheet([sources, *rows, targets], flags.out, 112 // dataset.world.size)
    print(f"wrote {flags.out}")


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
    add_device(command)
    command = add_command(add, table)
    command.add_argument("rows", nargs="+", metavar="ARM", help="an arm, or ARM:REFERENCE")
    command.add_argument("--columns", nargs="+", default=["iid/all/exact", "novel/all/exact"],
                         help="paths of keys in the runs, or LABEL:PATH")
    command.add_argument("--kind", choices=KINDS, default="result", help="which file of a run")
    command.add_argument("--within", action="store_true", help="compare an arm's columns with its first")
    command.add_argument("--figure", help="a PNG file of the differences")
    command.add_argument("--lines", nargs=2, metavar=("FILE", "LABEL"),
                         help="a PNG file of the means over the columns, whose labels are numbers")
    command.add_argument("--results", default="experiments/results.jsonl", help="runs that were kept")
    add_command(add, report).add_argument("files", nargs="+", help="Markdown files")
    command = add_command(add, keep)
    command.add_argument("folder", help="of ARM/SEED/KIND.json")
    command.add_argument("--results", default="experiments/results.jsonl", help="where the runs go")
    return p


def main():
    flags = commands().parse_args()
    lines = getattr(flags, "lines", None) or [None]
    for path in (getattr(flags, "out", None), getattr(flags, "figure", None), lines[0]):
        if path:                                                       # found out before the work, not after
            make_folder(Path(path).parent)
    text = flags.run(flags)
    if text:
        print(text)


if __name__ == "__main__":
    run_script(main)
