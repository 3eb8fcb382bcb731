"""The oracle of the toy world: it reads scenes back from pixels and judges an edit by what it finds.

    adherence       was the instruction carried out? The share of its edits that were
    faithfulness    is everything else as it was? The share of facts that are
    exact           both, in full

It sees source, instruction and output, never the target: an edit may have several right answers.
"""
import itertools
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange

from common.files import InputError
from toy.world import (BACKGROUNDS, COLORS, LIGHTS, NUMBERS, PART, RELATIONS, STYLES, WHOLE, Scene, Thing,
                       corner, is_beside, lit, plural, read_instruction, related, sprite)

# A cell further than this from its best drawing (root mean square, images in [0, 1]) cannot be read.
TOLERANCE = 0.15

# ---------------------------------------------------------------------------------------- reading a scene

class Fit(NamedTuple):
    """The best drawing of an image with one background, light and style."""
    total: float                          # squared error of the image
    error: torch.Tensor                   # (cells,) squared error of each cell
    filled: torch.Tensor                  # (cells,) bool: a thing fits better than nothing
    which: torch.Tensor                   # (cells,) the best thing: template * number of colours + colour
    background: str
    light: str
    style: str


@lru_cache(None)
def templates(world, style):
    """Every shape, size and place in a cell of P pixels -> list of T (shape, size, y, x), cover (T, P)."""
    keys = []
    for shape, size in itertools.product(world.shapes, world.sizes):
        places = range(world.cell_size - size + 1)
        keys += [(shape, size, y, x) for y in places for x in places]
    covers = [sprite(world, shape, style, size, y, x).ravel() for shape, size, y, x in keys]
    return keys, torch.from_numpy(np.stack(covers))


def fit(pixels, inside, area, square, background, light, style):
    """The thing, or nothing, that best fits each cell by least squares over all templates and colours -> Fit.

    A thing that covers m of a pixel is drawn as g + m s: g the ground, s the step from there to its colour.
    Its squared error on the pixels p is

        sum |p - g - m s|^2  =  sum |p - g|^2  -  2 s . sum m (p - g)  +  |s|^2 sum m^2

    with sum m (p - g) = sum m p - g sum m. So templates meet pixels (cells, P, 3) in sum m p alone: that is
    `inside` (cells, T, 3), the same for every colour, background and light. Nothing is drawn.
    area = sum m and square = sum m^2, both (T,)."""
    ground = torch.from_numpy(lit(BACKGROUNDS[background], light))                       # (3,)
    step = torch.from_numpy(np.stack([lit(color, light) for color in COLORS.values()])) - ground
    empty = (pixels - ground).square().sum(dim=(1, 2))                                   # (cells,)
    along = (inside - area[:, None] * ground) @ step.T                                   # (cells, T, colours)
    error = empty[:, None, None] - 2 * along + square[:, None] * step.square().sum(1)    # (cells, T, colours)
    least, which = error.flatten(1).min(dim=1)                                           # (cells,) both
    best = torch.minimum(least, empty)
    return Fit(best.sum().item(), best, least < empty, which, background, light, style)


def parse(world, image):
    """image (size, size, 3), uint8 or float in [0, 1] -> the Scene whose drawing is nearest to it, and the
    root mean square error of each cell, (grid, grid) float32."""
    if image.shape != (world.size, world.size, 3):
        raise InputError(f"an image of {image.shape[1]} x {image.shape[0]} pixels cannot be read: "
                         f"this toy world has {world.size} x {world.size}")
    if image.dtype == np.uint8:
        image = image / 255.0
    G = world.grid
    pixels = torch.from_numpy(np.ascontiguousarray(image, np.float32))
    pixels = rearrange(pixels, "(row y) (column x) c -> (row column) (y x) c", row=G, column=G)
    fits = []
    for style in STYLES if "style" in world.edits else ["filled"]:
        _, cover = templates(world, style)
        area = cover.sum(1)                                                              # (T,)
        square = cover.square().sum(1)                                                   # (T,)
        inside = torch.einsum("tp,gpc->gtc", cover, pixels)                              # (cells, T, 3)
        for light in LIGHTS if "global" in world.edits else ["day"]:
            for background in BACKGROUNDS:
                fits.append(fit(pixels, inside, area, square, background, light, style))
    best = min(fits, key=lambda candidate: candidate.total)            # the first of equals
    keys, _ = templates(world, best.style)
    things = []
    for k in best.filled.nonzero()[:, 0].tolist():
        template, color = divmod(best.which[k].item(), len(COLORS))
        shape, size, y, x = keys[template]
        things.append(Thing(shape, list(COLORS)[color], divmod(k, G), size, y, x))
    style = best.style if things else "filled"                         # nothing shows a style
    # Rounding can leave the error of a perfect fit below zero.
    error = (best.error.clamp(min=0) / (3 * world.cell_size**2)).sqrt().view(G, G)
    return Scene(best.background, best.light, style, tuple(things)), error.numpy()


# ---------------------------------------------------------------------------------------- judging

def named(edit, before):
    """The edit with the name of the thing that it calls "the one left of the red circle"."""
    if not edit.beside:
        return edit
    found = is_beside(before, *edit.beside)
    if len(found) != 1:
        raise InputError(f"{len(found)} things are {' the '.join(edit.beside)}; the instruction needs one")
    return edit._replace(shape=found[0].shape, color=found[0].color)


def names_of(edits, task):
    return [edit.name for edit in edits if edit.task == task]


def carried_out(world, edit, before, after, readable, edits=()):
    """Is one Edit of the scene `before` true of the scene `after`? Cells that are not readable show nothing.

    edits: all of the instruction, since what one of them removes leaves its cell to what another adds."""
    if edit.task in WHOLE:
        return getattr(after, WHOLE[edit.task][0]) == edit.value
    seen = {thing.cell: thing for thing in after.things if readable[thing.cell]}
    if edit.task == "add":
        taken = [thing.cell for thing in before.things if thing.name not in names_of(edits, "remove")]
        added = [thing.cell for thing in seen.values() if thing.name == edit.name and thing.cell not in taken]
        if isinstance(edit.where, str):
            return any(edit.where in ("", corner(world, cell)) for cell in added)
        relation, name = edit.where
        near = [thing.cell for thing in before.things if thing.name == name]
        return any(related(cell, relation, other) for cell in added for other in near)
    old = next((thing for thing in before.things if thing.name == edit.name), None)
    if old is None:
        shown = ", ".join(thing.name for thing in before.things) or "nothing"
        raise InputError(f"the image has no {edit.name}: it shows {shown}")
    new = seen.get(old.cell)
    if edit.task == "remove":                                          # and not only moved
        elsewhere = edit.name in [thing.name for thing in seen.values()]
        vacated = new is None or new.name in names_of(edits, "add")
        return bool(readable[old.cell]) and not elsewhere and vacated
    wanted = old._replace(**{PART[edit.task]: edit.value})
    return new is not None and new.name == wanted.name


def kept(world, edits, before, after, readable):
    """Share of what the instruction leaves alone that is as it was: background, light, style and each cell.

    A thing that changes colour or shape is redrawn, so its size and place may be off by a pixel. What is
    added may take one cell that is empty or becomes so."""
    facts = []
    for task, (field, _) in WHOLE.items():
        visible = task != "style" or before.things and after.things    # only things show a style
        if visible and task in world.edits and task not in [edit.task for edit in edits]:
            facts.append(getattr(before, field) == getattr(after, field))
    was = {thing.cell: thing for thing in before.things}
    now = {thing.cell: thing for thing in after.things}
    task_of = {edit.name: edit.task for edit in edits if edit.task not in WHOLE}
    to_add = names_of(edits, "add")
    for cell in np.ndindex(world.grid, world.grid):
        old = was.get(cell)
        new = now.get(cell)
        task = task_of.get(old.name) if old else None
        same = old == new
        if task == "remove" and new is None:                           # gone, as it should be
            same = True
        elif task in PART and new is not None:
            rest = "shape" if task == "color" else "color"
            off = max(abs(new.size - old.size), abs(new.y - old.y), abs(new.x - old.x))
            same = getattr(old, rest) == getattr(new, rest) and off <= 1
        elif not same and (old is None or task == "remove") and new.name in to_add:
            to_add.remove(new.name)                                    # it may appear once
            same = True
        facts.append(bool(readable[cell]) and same)
    return float(np.mean(facts))


def shows(caption, scene, readable):
    """Does the scene show what one of GenEval's six kinds of caption says?"""
    things = [thing for thing in scene.things if readable[thing.cell]]
    for number, word in enumerate(NUMBERS, 1):
        if caption.startswith(f"{word} "):                             # this many, and nothing else
            return len(things) == number and all(plural(word, thing.shape) == caption for thing in things)
    for relation in RELATIONS:
        first, found, second = caption.removeprefix("a ").partition(f" {relation} a ")
        if found:
            pairs = [(a, b) for a in things if a.shape == first for b in things if b.shape == second]
            return any(related(a.cell, relation, b.cell) for a, b in pairs)
    parts = [part.removeprefix("a ") for part in caption.split(" and ")]
    return all(any(part in (thing.shape, thing.name) for thing in things) for part in parts)


def judge(world, source, instruction, output):
    """adherence and faithfulness in [0, 1] and exact (bool) of one output; images (size, size, 3) uint8.

    source None: text-to-image, where faithfulness is the share of cells that show something of this world."""
    after, error = parse(world, output)
    readable = error <= TOLERANCE
    if source is None:
        adherence = float(shows(instruction, after, readable))
        faithfulness = float(readable.mean())
    else:
        edits = read_instruction(instruction)
        if edits is None:
            raise InputError(f"the oracle does not know the instruction {instruction!r}: it is not the toy's")
        before, _ = parse(world, source)
        edits = [named(edit, before) for edit in edits]
        done = [carried_out(world, edit, before, after, readable, edits) for edit in edits]
        adherence = float(np.mean(done))
        faithfulness = kept(world, edits, before, after, readable)
    exact = adherence == 1 and faithfulness == 1
    return {"exact": exact, "adherence": adherence, "faithfulness": faithfulness}
