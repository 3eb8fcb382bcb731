"""Look at examples, write them as files, check a data file.

    python -m tools.pairs show --data shapes64 --out world.png   a page of examples with their instructions
    python -m tools.pairs export --n 16 --out pairs              examples as PNG files and a JSONL file
    python -m tools.pairs check pairs/pairs.jsonl                every bad row of a data file, by line number
"""
import sys
import textwrap
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.cli import COUNT, SEED, add_command, parser, run_script
from common.files import InputError, json_lines, read_lines, write_jsonl
from common.images import open_image, open_mask, save_image, sheet
from common.rows import check_row, output_path
from data import Shapes, open_data
from toy.world import WORLDS


def show(flags):
    """A page of examples: source, target, instruction, and the plan or caption."""
    dataset = open_data(flags.data, flags.split, flags.size, flags.seed)
    cells = []
    for index in range(12):
        sample = dataset.sample(index)
        source = sample.images[0] if sample.images else np.full_like(sample.target, 255)
        below = " / ".join(sample.plan) or sample.target_caption
        cells.append((source, textwrap.fill(sample.instruction, 24), False))
        cells.append((sample.target, textwrap.fill(below, 24), False))
    sheet([cells[k:k + 6] for k in range(0, 24, 6)], flags.out, max(1, 144 // sample.target.shape[0]))
    print(f"wrote {flags.out}")


def export(flags):
    """Write examples of a toy world as PNG files and a JSONL file: a data set in the form of your own."""
    folder = Path(flags.out)
    dataset = Shapes(flags.data, flags.split, flags.seed)
    rows = []
    for index in tqdm(range(flags.n)):
        sample = dataset.sample(index)
        source = sample.images[0] if sample.images else None
        names = {}
        for key, image in (("source", source), ("target", sample.target), ("mask", sample.mask)):
            if image is not None:
                names[key] = f"{index:05d}_{key}.png"
                save_image(image, folder / names[key])
        rows.append({"instruction": sample.instruction, "output_image": names["target"],
                     "input_images": [names["source"]] if sample.images else [], "mask": names.get("mask"),
                     "plan": sample.plan,
                     "source_caption": sample.source_caption, "target_caption": sample.target_caption,
                     "task": sample.task})
    write_jsonl(folder / "pairs.jsonl", rows)
    print(f"wrote {flags.n} examples to {folder / 'pairs.jsonl'}")


def check(flags):
    """Read every row and every image of a JSONL file; print each bad row; exit 1 if there is any."""
    good = bad = without_target = 0
    folder = Path(flags.data).parent
    taken = {}
    for number, row, *_ in tqdm(json_lines(read_lines(flags.data)), desc="rows", unit=""):
        try:
            if isinstance(row, InputError):
                raise row
            row = check_row(row, folder)
            images = [open_image(name) for name in (*row["input_images"], row["output_image"]) if name]
            if row.get("mask"):
                if not images:
                    raise InputError("a mask without an image")
                open_mask(row["mask"], images[0])
            output_path(folder / "edits", number, row, 0, 0, taken)
            good += 1
            without_target += row["output_image"] is None
        except InputError as error:
            bad += 1
            tqdm.write(f"{flags.data}:{number}: {error}")
    if not good and not bad:
        raise InputError(f"{flags.data}: no rows")
    less = f"; {without_target} of them without output_image: not for training" if without_target else ""
    print(f"{flags.data}: {good} good rows, {bad} bad rows{less}")
    sys.exit(bad > 0)


def main():
    p = parser(__doc__)
    commands = p.add_subparsers(required=True)
    command = add_command(commands, check)
    command.add_argument("data", help="a JSONL file")
    command = add_command(commands, show)
    command.add_argument("--data", default="shapes", help=f"{', '.join(WORLDS)}, or a JSONL file")
    command.add_argument("--size", type=COUNT, default=64, help="pixels of a side, for a file")
    command.add_argument("--split", choices=("train", "iid", "novel"), default="train")
    command.add_argument("--seed", type=SEED, default=0)
    command.add_argument("--out", default="examples.png", help="the picture")
    command = add_command(commands, export)
    command.add_argument("--data", choices=WORLDS, default="shapes")
    command.add_argument("--n", type=COUNT, default=16, help="examples")
    command.add_argument("--split", choices=("train", "iid", "novel"), default="iid")
    command.add_argument("--seed", type=SEED, default=0)
    command.add_argument("--out", default="pairs", help="folder")
    flags = p.parse_args()
    flags.run(flags)


if __name__ == "__main__":
    run_script(main)
