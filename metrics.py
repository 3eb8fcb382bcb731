"""How good is an edit? The oracle of the toy world, which knows; and the tables and figures made from it.

    python metrics.py toy --ckpt out/toy/last.pt             exact, adherence and faithfulness by task and complexity
    python metrics.py grid --ckpt A.pt --ckpt B.pt           the same edits by several models, as a picture

adherence: was the instruction carried out? faithfulness: is everything else as it was? exact: both, in full. They are judged
from source, instruction and output alone, by reading the scene back from the pixels; the target image is never looked at.
"""
import argparse
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from data import (BACKGROUNDS, CAPTIONS, COLORS, EDITS, LIGHTS, NUMBERS, RELATIONS, STYLES, WORLDS, Scene, Shapes, Thing,
                  corner, lit, plural, read_instruction, related, sheet, sprite, wrap)
from model import InputError

# A cell that differs from the best drawing of it by more than this (root mean square, images in [0, 1]) is not readable.
TOLERANCE = 0.15

# ------------------------------------------------------------------------------------------- reading a scene

@lru_cache(None)
def templates(world, style):
    """Every shape, size and place in a cell -> list of (shape, size, y, x), cover (T, cell*cell)."""
    keys = [(shape, size, y, x) for shape in world.shapes for size in world.sizes
            for y in range(world.cell - size + 1) for x in range(world.cell - size + 1)]
    return keys, torch.from_numpy(np.stack([sprite(world, shape, style, *place).ravel() for shape, *place in keys]))


def parse(world, image):
    """image (size, size, 3) uint8 or float in [0, 1] -> Scene, error (grid, grid): root mean square error of each cell.

    The scene whose drawing is nearest to the image: for each background, light and style, the best thing (or none) in each
    cell by least squares over all shapes, colours, sizes and places; then the best of those.
    """
    if image.dtype == np.uint8:
        image = image / 255.0
    G, cell = world.grid, world.cell
    pixels = torch.from_numpy(np.ascontiguousarray(image, np.float32))
    pixels = pixels.view(G, cell, G, cell, 3).permute(0, 2, 1, 3, 4).reshape(G * G, cell * cell, 3)
    best = None
    for style in STYLES if "style" in world.edits else STYLES[:1]:
        keys, cover = templates(world, style)
        area, square = cover.sum(1), cover.square().sum(1)                                # (T,)
        inside = torch.einsum("tp,gpc->gtc", cover, pixels)                               # (cells, T, 3)
        for light in LIGHTS if "global" in world.edits else ["day"]:
            paint = torch.from_numpy(np.stack([lit(c, light) for c in COLORS.values()]))  # (colours, 3)
            for background, value in BACKGROUNDS.items():
                ground = torch.from_numpy(lit(value, light))                              # (3,)
                step = paint - ground                                                     # (colours, 3)
                empty = (pixels - ground).square().sum(dim=(1, 2))                        # (cells,)
                # |image - ground - cover * step|^2, expanded so that only `inside` touches the pixels
                along = (inside - area[:, None] * ground) @ step.T                        # (cells, T, colours)
                error = empty[:, None, None] - 2 * along + square[:, None] * step.square().sum(1)
                least, which = error.flatten(1).min(dim=1)                                # (cells,)
                total = torch.minimum(least, empty).sum()
                if best is None or total < best[0]:
                    best = total, style, light, background, least < empty, which, torch.minimum(least, empty)
    _, style, light, background, there, which, error = best
    things = []
    for k in there.nonzero()[:, 0].tolist():
        template, color = divmod(which[k].item(), len(COLORS))
        shape, size, y, x = templates(world, style)[0][template]
        things.append(Thing(shape, list(COLORS)[color], divmod(k, G), size, y, x))
    if not things and "style" in world.edits:
        style = STYLES[0]                                              # nothing shows it
    return Scene(background, light, style, tuple(things)), (error.clamp(min=0) / (3 * cell**2)).sqrt().view(G, G).numpy()


# ------------------------------------------------------------------------------------------- the oracle

def carried_out(world, edit, before, after, readable):
    """Is this one Edit of scene `before` true in scene `after`? Unreadable cells show nothing."""
    seen = {t.cell: t for t in after.things if readable[t.cell]}
    if edit.task in ("background", "global", "style"):
        return {"background": after.background, "global": after.light, "style": after.style}[edit.task] == edit.value
    name = f"{edit.color} {edit.shape}"
    if edit.task == "add":
        for thing in seen.values():
            if thing.name != name or thing.cell in [t.cell for t in before.things]:
                continue
            if isinstance(edit.where, str):
                near = edit.where in ("", corner(world, thing.cell))
            else:
                near = any(t.name == edit.where[1] and related(thing.cell, edit.where[0], t.cell) for t in before.things)
            if near:
                return True
        return False
    old = next((t for t in before.things if t.name == name), None)
    if old is None:
        raise InputError(f"the image has no {name}: it shows {', '.join(t.name for t in before.things) or 'nothing'}")
    if edit.task == "remove":
        return bool(readable[old.cell]) and name not in [t.name for t in seen.values()] and old.cell not in seen
    new = seen.get(old.cell)
    wanted = (edit.shape, edit.value) if edit.task == "color" else (edit.value, edit.color)
    return new is not None and (new.shape, new.color) == wanted


def kept(world, edits, before, after, readable):
    """Share of what the instruction leaves alone that is as it was: background, light, style, and each cell's content.

    A thing that changes colour or shape is redrawn, so its place and size may be off by a pixel. What is added may take one
    empty cell.
    """
    tasks = [edit.task for edit in edits]
    facts = [] if "background" in tasks else [before.background == after.background]
    if "global" in world.edits and "global" not in tasks:
        facts.append(before.light == after.light)
    if "style" in world.edits and "style" not in tasks and before.things and after.things:
        facts.append(before.style == after.style)
    was, now = ({t.cell: t for t in scene.things} for scene in (before, after))
    by_name = {f"{edit.color} {edit.shape}": edit for edit in edits if edit.shape}
    may_appear = [f"{edit.color} {edit.shape}" for edit in edits if edit.task == "add"]
    for cell in np.ndindex(world.grid, world.grid):
        old, new = was.get(cell), now.get(cell)
        edit = by_name.get(old.name) if old else None
        if edit and edit.task == "remove":
            same = new in (old, None)                                  # gone is what was asked for; still there is no harm
        elif edit and edit.task in ("color", "local"):
            rest = "shape" if edit.task == "color" else "color"
            same = new is not None and getattr(new, rest) == getattr(old, rest) and \
                max(abs(a - b) for a, b in zip(new[3:], old[3:])) <= 1  # size, y, x
        elif old is None and new is not None and new.name in may_appear:
            may_appear.remove(new.name)
            same = True
        else:
            same = old == new
        facts.append(bool(readable[cell]) and same)
    return float(np.mean(facts))


def shows(caption, scene, readable):
    """Does the scene show what one of GenEval's six kinds of caption says?"""
    things = [t for t in scene.things if readable[t.cell]]
    words = caption.split()
    for number, word in enumerate(NUMBERS, 1):
        if words[0] == word:
            return any(plural(word, t.shape) == caption for t in things) and \
                len({t.shape for t in things}) == 1 and len(things) == number
    for relation in (r for r in RELATIONS if f" {r} a " in caption):
        a, b = caption.removeprefix("a ").split(f" {relation} a ")
        return any(related(s.cell, relation, t.cell) for s in things if s.shape == a for t in things if t.shape == b)
    parts = [part.removeprefix("a ") for part in caption.split(" and ")]
    return all(any(part in (t.shape, t.name) for t in things) for part in parts)


def judge(world, source, instruction, output):
    """adherence and faithfulness in [0, 1] and exact (bool) of one output; images (h, w, 3) uint8.

    source None: text-to-image, where faithfulness is the share of cells that show something of this world.
    """
    after, error = parse(world, output)
    readable = error <= TOLERANCE
    if source is None:
        adherence, faithfulness = float(shows(instruction, after, readable)), float(readable.mean())
    else:
        edits = read_instruction(instruction)
        if edits is None:
            raise InputError(f"the oracle does not know the instruction {instruction!r}; it reads those of the toy world")
        before, _ = parse(world, source)
        adherence = float(np.mean([carried_out(world, edit, before, after, readable) for edit in edits]))
        faithfulness = kept(world, edits, before, after, readable)
    return {"exact": adherence == 1 and faithfulness == 1, "adherence": adherence, "faithfulness": faithfulness}


# ------------------------------------------------------------------------------------------- tables and figures

SCORES = ("exact", "adherence", "faithfulness")


def means(rows):
    return {key: sum(row[key] for row in rows) / len(rows) for key in SCORES}


def breakdown(rows):
    """Rows of scores -> {group: (number, means)}: all, each task, and each complexity where there are several."""
    groups = {"all": rows}
    for task in [*EDITS, "several", *CAPTIONS]:
        groups[task] = [row for row in rows if row["task"] == task]
    if len({row["complexity"] for row in rows}) > 1:
        for k in range(1, 5):
            groups[f"complexity {k}"] = [row for row in rows if row["complexity"] == k and row["task"] not in CAPTIONS]
    return {name: (len(group), means(group)) for name, group in groups.items() if group}


def bars(title, groups, path):
    """A bar chart of breakdowns: groups is {series: breakdown}; one block of bars per group, one bar per series."""
    names = list(next(iter(groups.values())))
    colors = ["#3465a4", "#f57900", "#73d216"]
    font, height, left = ImageFont.load_default(12), 14, 110
    block = height * len(groups) + 10
    page = Image.new("RGB", (left + len(SCORES) * 210, 66 + block * len(names)), "white")
    pen = ImageDraw.Draw(page)
    pen.text((8, 6), title, fill="black", font=font)
    for k, series in enumerate(groups):
        pen.rectangle([left + 130 * k, 29, left + 130 * k + 10, 39], fill=colors[k])
        pen.text((left + 130 * k + 16, 26), series, fill="black", font=font)
    for c, score in enumerate(SCORES):
        x = left + 210 * c
        pen.text((x, 46), score, fill="black", font=font)
        for r, name in enumerate(names):
            y = 66 + r * block
            if c == 0:
                pen.text((8, y + (block - 20) // 2), name, fill="black", font=font)
            for k, group in enumerate(groups.values()):
                if name in group:
                    value = group[name][1][score]
                    pen.rectangle([x, y + k * height, x + 1 + 150 * value, y + (k + 1) * height - 2], fill=colors[k])
                    pen.text((x + 156, y + k * height - 1), f"{value:.2f}", fill="black", font=font)
    page.save(path)


def toy(flags):
    """Table by task and complexity of a toy model on both held-out sets, between the two ends of the scale."""
    from sample import evaluate, load_checkpoint              # sample.py imports this file for its oracle
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer, trained = load_checkpoint(flags.ckpt, device)
    if trained["data"] not in WORLDS:
        raise InputError(f"{flags.ckpt} was trained on {trained['data']}: the oracle only knows {', '.join(WORLDS)}")
    groups = {}
    for split in ("iid", "novel"):
        dataset = Shapes(trained["data"], split, trained["seed"])
        rows = evaluate(model, tokenizer, dataset, range(flags.examples), flags.steps, flags.text_scale, flags.image_scale,
                        flags.pauses, device=device)
        groups[split] = breakdown(rows)
        print(f"\n{split}: {flags.examples} examples, {flags.steps} Euler steps, {flags.pauses} pause tokens")
        print(f"{'':16}{'number':>8}" + "".join(f"{score:>14}" for score in SCORES))
        for name, (number, values) in groups[split].items():
            print(f"{name:16}{number:8}" + "".join(f"{values[score]:14.3f}" for score in SCORES))
        edits = [row["sample"] for row in rows if row["sample"].images]
        for name, output in (("output = source", lambda s: s.images[0]), ("output = target", lambda s: s.target)):
            values = means([judge(dataset.world, s.images[0], s.instruction, output(s)) for s in edits])
            print(f"{name:16}{len(edits):8}" + "".join(f"{values[score]:14.3f}" for score in SCORES))
    bars(f"{flags.ckpt}: {flags.examples} held-out examples each", groups, flags.out)
    print(f"\nwrote {flags.out}")


def grid(flags):
    """A picture of the same held-out edits by several toy models: source and instruction, one row a model, target."""
    from sample import evaluate, load_checkpoint
    rows, n = [], 8
    for path in flags.ckpt:
        model, tokenizer, trained = load_checkpoint(path)
        edits = evaluate(model, tokenizer, Shapes(trained["data"], "iid", trained["seed"]), range(n), flags.steps)
        if not rows:
            rows.append([(e["sample"].images[0], wrap(e["sample"].instruction, 18), False) for e in edits])
        name = f"p_magd {trained['p_magd']:g}"
        rows.append([(e["output"], f"{name}: {'exact' if e['exact'] else 'not exact'}", False) for e in edits])
    rows.append([(e["sample"].target, "target", False) for e in edits])
    sheet(rows, flags.out, 112 // rows[0][0][0].shape[0])
    print(f"wrote {flags.out}")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: sys.exit(f"metrics.py: {message}")
    p.add_argument("command", choices=["toy", "grid"])
    p.add_argument("--ckpt", required=True, action="append", help="a checkpoint of train.py; grid takes several")
    p.add_argument("--examples", type=int, default=512, help="toy: of each held-out set")
    p.add_argument("--steps", type=int, default=20, help="Euler steps")
    p.add_argument("--pauses", type=int, default=0, help="toy: pause tokens after each prompt")
    p.add_argument("--text-scale", type=float, default=1.0, help="toy: guidance by the prompt; 1 = none")
    p.add_argument("--image-scale", type=float, default=1.0, help="toy: guidance by the image; 1 = none")
    p.add_argument("--out", help="the picture; toy.png beside the checkpoint, or grid.png, if not given")
    flags = p.parse_args()
    if flags.examples < 1 or flags.steps < 1 or flags.pauses < 0:
        p.error("--examples and --steps should be at least 1, --pauses at least 0")
    if flags.command == "grid":
        flags.out = flags.out or "grid.png"
        grid(flags)
    elif len(flags.ckpt) == 1:
        flags.ckpt = flags.ckpt[0]
        flags.out = flags.out or Path(flags.ckpt).with_name("toy.png")
        toy(flags)
    else:
        p.error("toy takes one --ckpt")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"metrics.py: {error}")
