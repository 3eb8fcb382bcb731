"""The oracle of the toy world: it reads a scene back from the pixels, and judges an edit by what it finds.

    adherence       was the instruction carried out? The share of its edits that were
    faithfulness    is everything else as it was? The share of facts that are
    exact           both, in full

It sees source, instruction and output only. The target image is never looked at: an edit may have several
right answers.
"""
import itertools
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange

from common.files import InputError
from toy.world import (BACKGROUNDS, COLORS, LIGHTS, NUMBERS, PART, RELATIONS, STYLES, WHOLE, Scene, Thing,
                       corner, lit, plural, read_instruction, related, sprite)

# A cell that differs by more than this from its best drawing (root mean square, images in [0, 1]) cannot be
# read.
TOLERANCE = 0.15

# ---------------------------------------------------------------------------------------- reading a scene


class Templates(NamedTuple):
    """Every shape, size and place that a thing of one style can have in a cell: T of them."""
    keys: list                            # T times (shape, size, y, x)
    cover: torch.Tensor                   # (T, P), P the pixels of a cell: how much of each the thing covers
    area: torch.Tensor                    # (T,) sum of cover
    square: torch.Tensor                  # (T,) sum of cover^2


class Fit(NamedTuple):
    """The best drawing of an image with one background, light and style."""
    total: float                          # squared error of the whole image
    error: torch.Tensor                   # (cells,) squared error
    filled: torch.Tensor                  # (cells,) bool: a thing fits better than nothing
    which: torch.Tensor             # (cells,) the thing that fits best, template * number of colours + colour
    background: str
    light: str
    style: str


@lru_cache(None)
def templates(world, style):
    keys = []
    for shape, size in itertools.product(world.shapes, world.sizes):
        places = range(world.cell_size - size + 1)
        keys += [(shape, size, y, x) for y in places for x in places]
    covers = [sprite(world, shape, style, size, y, x).ravel() for shape, size, y, x in keys]
    cover = torch.from_numpy(np.stack(covers))
    return Templates(keys, cover, cover.sum(1), cover.square().sum(1))


def fit(pixels, inside, shapes, background, light, style):
    """The thing, or nothing, that best fits each cell by least squares, over all templates and colours ->
    Fit.

    pixels (cells, P, 3); inside (cells, T, 3), the sum of cover * pixels; shapes: the Templates of this
    style.

    A thing with cover m and colour c on a ground g is drawn as g + m s, where s = c - g. Its squared error
    on pixels p is

        sum |p - g - m s|^2  =  sum |p - g|^2  -  2 s . sum m (p - g)  +  |s|^2 sum m^2

    and sum m (p - g) = inside - area * g. So the pixels enter by `inside` alone, which is the same for all
    colours, grounds and lights: it is computed once, and a drawing never is.
    """
    ground = torch.from_numpy(lit(BACKGROUNDS[background], light))                  # (3,)
    paint = torch.from_numpy(np.stack([lit(color, light) for color in COLORS.values()]))  # (colours, 3)
    step = paint - ground                                                           # (colours, 3)
    empty = (pixels - ground).square().sum(dim=(1, 2))                              # (cells,)
    along = (inside - shapes.area[:, None] * ground) @ step.T                       # (cells, T, colours)
    error = empty[:, None, None] - 2 * along + shapes.square[:, None] * step.square().sum(1)
    least, which = error.flatten(1).min(dim=1)                                      # (cells,) both
    best = torch.minimum(least, empty)
    return Fit(best.sum().item(), best, least < empty, which, background, light, style)


def parse(world, image):
    """image (size, size, 3), uint8 or float in [0, 1] -> the Scene whose drawing is nearest to it, and the
    root mean square error of each cell, (grid, grid) float32. InputError if the image has another size.
    """
    if image.shape != (world.size, world.size, 3):
        raise InputError(f"an image of {image.shape[1]} x {image.shape[0]} pixels cannot be read: "
                         f"this toy world has {world.size} x {world.size}")
    if image.dtype == np.uint8:
        image = image / 255.0
    G = world.grid
    P = world.cell_size**2
    pixels = torch.from_numpy(np.ascontiguousarray(image, np.float32))
    pixels = rearrange(pixels, "(row y) (column x) c -> (row column) (y x) c", row=G, column=G)
    lights = list(LIGHTS) if "global" in world.edits else ["day"]
    styles = STYLES if "style" in world.edits else STYLES[:1]

    fits = []
    for style in styles:
        shapes = templates(world, style)
        inside = torch.einsum("tp,gpc->gtc", shapes.cover, pixels)                  # (cells, T, 3)
        for light, background in itertools.product(lights, BACKGROUNDS):
            fits.append(fit(pixels, inside, shapes, background, light, style))
    best = min(fits, key=lambda fitted: fitted.total)                  # the first of equals

    things = []
    for k in best.filled.nonzero()[:, 0].tolist():
        template, color = divmod(best.which[k].item(), len(COLORS))
        shape, size, y, x = templates(world, best.style).keys[template]
        things.append(Thing(shape, list(COLORS)[color], world.cells[k], size, y, x))
    style = best.style if things or "style" not in world.edits else STYLES[0]       # no thing shows a style
    # rounding may leave the error of a perfect fit below zero
    error = (best.error.clamp(min=0) / (3 * P)).sqrt().view(G, G)
    return Scene(best.background, best.light, style, tuple(things)), error.numpy()


# ---------------------------------------------------------------------------------------- judging an edit

def names_of(edits, task):
    return [edit.name for edit in edits if edit.task == task]


def is_there(world, cell, where, before):
    """Does a cell satisfy the `where` of an edit? What it names is looked up in the scene before the edit."""
    if isinstance(where, str):
        return where in ("", corner(world, cell))
    relation, name = where
    return any(thing.name == name and related(cell, relation, thing.cell) for thing in before.things)


def carried_out(world, edit, before, after, readable, edits=()):
    """Is one Edit of the scene `before` true of the scene `after`? Cells that cannot be read show nothing.

    readable (grid, grid) bool. edits: all of the instruction, since what one removes leaves its cell to what
    another adds. InputError if `before` lacks the thing to be edited.
    """
    if edit.task in WHOLE:
        field, _ = WHOLE[edit.task]
        return getattr(after, field) == edit.value
    seen = {thing.cell: thing for thing in after.things if readable[thing.cell]}
    if edit.task == "add":
        removed = names_of(edits, "remove")
        occupied = [thing.cell for thing in before.things if thing.name not in removed]
        free = [thing for thing in seen.values() if thing.name == edit.name and thing.cell not in occupied]
        return any(is_there(world, thing.cell, edit.where, before) for thing in free)
    old = next((thing for thing in before.things if thing.name == edit.name), None)
    if old is None:
        shown = ", ".join(thing.name for thing in before.things) or "nothing"
        raise InputError(f"the image has no {edit.name}: it shows {shown}")
    new = seen.get(old.cell)
    if edit.task == "remove":                                          # moved elsewhere is not removed
        nowhere = edit.name not in [thing.name for thing in seen.values()]
        cleared = new is None or new.name in names_of(edits, "add")
        return bool(readable[old.cell]) and nowhere and cleared
    wanted = old._replace(**{PART[edit.task]: edit.value})
    return new is not None and new.name == wanted.name


def redrawn(old, new, task):
    """Is `new` the thing `old` but for its colour or shape (`task`)? It may be off by a pixel."""
    rest = "shape" if task == "color" else "color"
    off = max(abs(new.size - old.size), abs(new.y - old.y), abs(new.x - old.x))
    return getattr(new, rest) == getattr(old, rest) and off <= 1


def kept(world, edits, before, after, readable):
    """Share of the facts that the instruction leaves alone and that are as before: background, light, style,
    each cell.

    What is added may take one cell that is empty or becomes so. A cell that cannot be read is not as before.
    """
    facts = []
    tasks = [edit.task for edit in edits]
    for task, (field, _) in WHOLE.items():
        hidden = task == "style" and not (before.things and after.things)           # only things show a style
        if task in world.edits and task not in tasks and not hidden:
            facts.append(getattr(before, field) == getattr(after, field))

    was = {thing.cell: thing for thing in before.things}
    now = {thing.cell: thing for thing in after.things}
    edit_of = {edit.name: edit for edit in edits if edit.task not in WHOLE}
    to_add = names_of(edits, "add")
    for cell in world.cells:
        old = was.get(cell)
        new = now.get(cell)
        task = edit_of[old.name].task if old and old.name in edit_of else None
        may_appear = new is not None and new.name in to_add and (old is None or task == "remove")
        if task == "remove" and new in (old, None):                 # not yet removed is a matter of adherence
            same = True
        elif task in PART:
            same = new is not None and redrawn(old, new, task)
        elif may_appear:
            to_add.remove(new.name)                                    # once
            same = True
        else:
            same = old == new
        facts.append(bool(readable[cell]) and same)
    return float(np.mean(facts))


# ---------------------------------------------------------------------------------------- text-to-image

def shows(caption, scene, readable):
    """Does the scene show what a caption of one of GenEval's six kinds says?"""
    things = [thing for thing in scene.things if readable[thing.cell]]
    for number, word in enumerate(NUMBERS, 1):
        if caption.startswith(f"{word} "):                             # counting: these and nothing else
            return len(things) == number and all(plural(word, thing.shape) == caption for thing in things)
    for relation in RELATIONS:
        first, found, second = caption.removeprefix("a ").partition(f" {relation} a ")
        if found:
            return any(related(a.cell, relation, b.cell)
                       for a in things if a.shape == first for b in things if b.shape == second)
    wanted = [part.removeprefix("a ") for part in caption.split(" and ")]
    return all(any(part in (thing.shape, thing.name) for thing in things) for part in wanted)


def judge(world, source, instruction, output):
    """Scores of one output: {exact: bool, adherence, faithfulness in [0, 1]}; images (size, size, 3) uint8.

    source None: text-to-image, where faithfulness is the share of cells that show something of this world.
    InputError if the instruction is not of the toy world, or edits what the source does not show.
    """
    after, error = parse(world, output)
    readable = error <= TOLERANCE
    if source is None:
        adherence = float(shows(instruction, after, readable))
        faithfulness = float(readable.mean())
    else:
        edits = read_instruction(instruction)
        if edits is None:
            raise InputError(f"the oracle does not know the instruction {instruction!r}, not of the toy")
        before, _ = parse(world, source)
        done = [carried_out(world, edit, before, after, readable, edits) for edit in edits]
        adherence = float(np.mean(done))
        faithfulness = kept(world, edits, before, after, readable)
    exact = adherence == 1 and faithfulness == 1
    return {"exact": exact, "adherence": adherence, "faithfulness": faithfulness}
