"""Everything the model is shown: the toy world, image pairs from a JSONL file, prompts, and batches.

    python data.py show --data shapes64 --out world.png      a page of examples with their instructions
    python data.py export --n 16 --out pairs                 examples as PNG files and a JSONL file
    python data.py check pairs/pairs.jsonl                   every bad row of a data file, by line number
    python data.py latents pairs.jsonl --init omnigen:DIR    encode its images once, for training OmniGen

The toy world is an endless stream that is a pure function of (seed, index). Its scenes are known exactly, so an edit can be
judged exactly (metrics.py). Prompts follow the paper's Eq. 7 (expressive plans) and Eq. 8 (pause tokens); a tenth of
them is emptied so that guidance has something to compare with (Sec. 5, setup).
"""
import argparse
import difflib
import hashlib
import itertools
import json
import os
import random
import re
import sys
import textwrap
import zlib
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from model import PADDING, TEXT, Condition, InputError, load_vae, optional, processes, read_json

# --------------------------------------------------------------------------------------- the toy world: what there is

COLORS = {"red": (0.90, 0.10, 0.10), "green": (0.10, 0.70, 0.20), "blue": (0.15, 0.25, 0.95),
          "yellow": (0.98, 0.85, 0.10), "purple": (0.60, 0.15, 0.75), "cyan": (0.10, 0.80, 0.90)}
BACKGROUNDS = {"white": (0.97, 0.97, 0.97), "gray": (0.50, 0.50, 0.50), "black": (0.04, 0.04, 0.04), "brown": (0.45, 0.30, 0.15)}
LIGHTS = {"day": ((1, 1, 1), (0, 0, 0)),                       # a colour c becomes gain * c + offset
          "night": ((0.45, 0.45, 0.70), (0, 0, 0)), "sunset": ((0.55, 0.55, 0.55), (0.45, 0.25, 0.10))}
SHAPES = ("circle", "square", "triangle", "cross", "diamond", "star")
STYLES = ("filled", "outlined", "striped")
CORNERS = ("top left", "top right", "bottom left", "bottom right")
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}         # (row, column)
NUMBERS = ("one", "two", "three", "four")
EDITS = ("add", "remove", "color", "local", "background", "global", "style")                    # Emu-Edit's names
# edits of the whole image: field of a Scene, its choices
WHOLE = {"background": ("background", BACKGROUNDS), "global": ("light", LIGHTS), "style": ("style", STYLES)}
CAPTIONS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")      # GenEval's six kinds


@dataclass(frozen=True)
class World:
    size: int                             # pixels of a side
    grid: int                             # cells of a side; each holds at most one object
    shapes: tuple
    sizes: tuple                          # of an object, in pixels
    objects: int                          # at most, in a source scene
    edits: tuple
    complexity: int                       # edits in one instruction, at most
    captions: float                       # share of text-to-image samples
    alike: float                          # share of training scenes in one colour, where only the shape tells things apart

    @property
    def cell(self):
        return self.size // self.grid


WORLDS = {"shapes": World(16, 2, SHAPES[:4], (6, 7), 3, EDITS[:5], 1, 0.0, 0.3),
          "simple": World(16, 2, SHAPES[:4], (6, 7), 3, EDITS[:5], 1, 0.5, 0.3),    # runs/toy_all.sh: a base model learns this,
          "hard": World(16, 2, SHAPES[:4], (6, 7), 3, EDITS[:5], 4, 0.25, 0.3),      # a fine-tune this
          "shapes64": World(64, 4, SHAPES, (10, 12, 14), 6, EDITS, 4, 0.5, 0.0)}


class Thing(NamedTuple):
    """An object of a scene: what it is, its cell (row, column), its size, and its place inside the cell in pixels."""
    shape: str
    color: str
    cell: tuple
    size: int
    y: int
    x: int

    @property
    def name(self):
        return f"{self.color} {self.shape}"


class Scene(NamedTuple):
    background: str
    light: str
    style: str
    things: tuple                         # of Thing, no two of one shape and colour


class Edit(NamedTuple):
    """One atomic edit. `value` is the new colour, shape, background, light or style; `where` a corner, or (relation, name)."""
    task: str
    shape: str = ""
    color: str = ""
    value: str = ""
    where: str | tuple = ""


# ------------------------------------------------------------------------------------------- drawing

OUTLINES = {"triangle": [(0.5, 0), (1, 1), (0, 1)], "diamond": [(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)],
            "cross": [(.33, 0), (.67, 0), (.67, .33), (1, .33), (1, .67), (.67, .67), (.67, 1), (.33, 1), (.33, .67), (0, .67),
                      (0, .33), (.33, .33)],
            "star": [(0.5 + r * np.sin(a), 0.5 - r * np.cos(a)) for r, a in
                     zip([0.5, 0.22] * 5, np.arange(10) * np.pi / 5)]}


@lru_cache(None)
def sprite(world, shape, style, size, y, x):
    """How much of each pixel of the cell a thing covers, (cell, cell) in [0, 1]."""
    def draw(inset):                      # drawn eight times too large and averaged down, for smooth edges
        canvas = Image.new("L", (8 * world.cell, 8 * world.cell))
        box = [8 * (x + inset), 8 * (y + inset), 8 * (x + size - inset) - 1, 8 * (y + size - inset) - 1]
        if shape == "circle":
            ImageDraw.Draw(canvas).ellipse(box, fill=255)
        elif shape == "square":
            ImageDraw.Draw(canvas).rectangle(box, fill=255)
        else:
            side = 8 * (size - 2 * inset) - 1
            ImageDraw.Draw(canvas).polygon([(box[0] + side * u, box[1] + side * v) for u, v in OUTLINES[shape]], fill=255)
        return np.asarray(canvas.resize((world.cell, world.cell), Image.Resampling.BOX), np.float32) / 255
    cover = draw(0)
    if style == "outlined":
        cover = np.clip(cover - draw(2), 0, 1)
    if style == "striped":
        cover = cover * ((np.arange(world.cell) - y) % 3 < 2)[:, None]
    return cover


@lru_cache(None)
def lit(color, light):
    gain, offset = LIGHTS[light]
    return np.asarray(gain, np.float32) * np.asarray(color, np.float32) + np.asarray(offset, np.float32)


def render(world, scene):
    """Scene -> (size, size, 3) uint8."""
    ground = lit(BACKGROUNDS[scene.background], scene.light)
    image = np.full((world.size, world.size, 3), ground)
    for thing in scene.things:
        row, column = (world.cell * k for k in thing.cell)
        cover = sprite(world, thing.shape, scene.style, thing.size, thing.y, thing.x)[:, :, None]
        image[row:row + world.cell, column:column + world.cell] += cover * (lit(COLORS[thing.color], scene.light) - ground)
    return np.round(image * 255).astype(np.uint8)


# ------------------------------------------------------------------------------------------- language

def corner(world, cell):
    return CORNERS[2 * (cell[0] * 2 // world.grid) + cell[1] * 2 // world.grid]


def related(cell, relation, other):
    """Is `cell` left of, right of, above or below `other`? The larger distance decides, as for a person."""
    dy, dx = cell[0] - other[0], cell[1] - other[1]
    row, column = RELATIONS[relation]
    along, across = (dy * row, dx) if row else (dx * column, dy)
    return along > 0 and abs(across) <= along


def phrase(edit):
    """Edit -> its instruction."""
    where = edit.where if isinstance(edit.where, str) else f"{edit.where[0]} the {edit.where[1]}"
    return {"add": f"add a {edit.color} {edit.shape} {where}".strip(),
            "remove": f"remove the {edit.color} {edit.shape}",
            "color": f"make the {edit.color} {edit.shape} {edit.value}",
            "local": f"make the {edit.color} {edit.shape} a {edit.value}",
            "background": f"change the background to {edit.value}",
            "global": f"make it {edit.value}",
            "style": f"redraw it {edit.value}"}[edit.task]


def one_of(words):
    return "(" + "|".join(words) + ")"


C, S = one_of(COLORS), one_of(SHAPES)
VALUES = {"color": C, "local": S, **{task: one_of(choices) for task, (_, choices) in WHOLE.items()}}
GRAMMAR = {task: phrase(Edit(task, S, C, VALUES.get(task, ""))) for task in EDITS}                # regular expressions
GRAMMAR["add"] += f"(?: {one_of(CORNERS)}| {one_of(RELATIONS)} the ({C} {S}))?"


def read_instruction(text):
    """The inverse of phrase, for instructions of one or more edits joined by "and" -> [Edit], or None: not of this world."""
    edits = []
    for part in text.strip().lower().split(" and "):
        task, match = next(((task, m) for task, rule in GRAMMAR.items() if (m := re.fullmatch(rule, part))), (None, None))
        if match is None:
            return None
        words = match.groups()
        if task == "add":
            color, shape, place, relation, other = words[:5]
            edits.append(Edit(task, shape, color, where=(relation, other) if relation else place or ""))
        elif task in WHOLE:
            edits.append(Edit(task, value=words[0]))
        else:
            edits.append(Edit(task, words[1], words[0], words[2] if len(words) > 2 else ""))
    return edits


def plural(number, shape):
    return f"{number} {shape}" if number == "one" else f"{number} {shape}es" if shape == "cross" else f"{number} {shape}s"


def describe(scene):
    """Scene -> caption."""
    things = " and ".join(f"a {thing.name}" for thing in scene.things) or "nothing"
    return f"{things} on a {scene.background} background , {scene.style} , {scene.light}"


def plan_of(world, edits, before, after):
    """The expressive prompt (Eq. 7): up to five steps that say in place what happens, then what stays."""
    steps, touched = [], []
    for edit in edits:
        if edit.task in WHOLE:
            steps.append(f"the {WHOLE[edit.task][0]} becomes {edit.value}")
            continue
        name = f"{edit.color} {edit.shape}"
        thing = next(t for t in (after if edit.task == "add" else before).things if t.name == name)
        touched.append(name)
        place = f"the {name} {corner(world, thing.cell)}"
        steps.append({"add": f"a {name} appears {corner(world, thing.cell)}", "remove": f"{place} vanishes",
                      "color": f"{place} becomes {edit.value}", "local": f"{place} becomes a {edit.value}"}[edit.task])
    steps += [f"keep the {t.name} {corner(world, t.cell)}" for t in before.things if t.name not in touched]
    return steps[:5]


def world_words():
    text = " ".join([*COLORS, *BACKGROUNDS, *LIGHTS, *SHAPES, *STYLES, *CORNERS, *RELATIONS, *NUMBERS,
                     *(plural("two", s) for s in SHAPES), "add a remove the make change background to it redraw and",
                     "nothing on , becomes light style appears vanishes keep"])
    return sorted(set(text.split()))


# ------------------------------------------------------------------------------------------- scenes and edits at random

def held_out(task, shape, color):
    """The pairs (shape, colour) that training never shows for this task: about one in seven, no whole shape or colour."""
    number = EDITS.index(task) if task in EDITS else len(EDITS)
    return (2 * SHAPES.index(shape) + list(COLORS).index(color) + 3 * number) % 7 == 0


def random_thing(world, rng, cell, shape=None, color=None):
    size = rng.choice(world.sizes)
    return Thing(shape or rng.choice(world.shapes), color or rng.choice(list(COLORS)), cell, size,
                 rng.randrange(world.cell - size + 1), rng.randrange(world.cell - size + 1))


def random_cells(world, rng, n):
    return [divmod(k, world.grid) for k in rng.sample(range(world.grid**2), n)]


def random_scene(world, rng, n, shape=None, color=None):
    """A scene of n things, all of `shape`, or of `color`, if that is given."""
    things = []
    for cell in random_cells(world, rng, n):
        taken = [t.name for t in things]
        while (thing := random_thing(world, rng, cell, shape, color)).name in taken:
            pass
        things.append(thing)
    return Scene(rng.choice(list(BACKGROUNDS)), rng.choice(list(LIGHTS)) if "global" in world.edits else "day",
                 rng.choice(STYLES) if "style" in world.edits else "filled", tuple(things))


def other(rng, choices, but):
    return rng.choice([c for c in choices if c != but])


def random_edit(world, rng, task, scene, free, names):
    """One edit of `scene`, on one of the things `free` to be edited, that makes nothing called one of `names`.

    -> (Edit, new Scene), or None if chance led nowhere: the caller draws again.
    """
    if task in WHOLE:
        key, choices = WHOLE[task]
        edit = Edit(task, value=other(rng, choices, getattr(scene, key)))
        return (edit, scene._replace(**{key: edit.value})) if scene.things or task != "style" else None
    if task == "add":
        empty = [c for c in (divmod(k, world.grid) for k in range(world.grid**2)) if c not in [t.cell for t in scene.things]]
        # what is added has the middle size and stands in the middle of its cell, so that there is one right answer
        size = world.sizes[len(world.sizes) // 2]
        middle = (world.cell - size) // 2
        thing = Thing(rng.choice(world.shapes), rng.choice(list(COLORS)), rng.choice(empty), size, middle, middle)
        where = corner(world, thing.cell)
        near = [(relation, t.name) for t in free for relation in RELATIONS if related(thing.cell, relation, t.cell)]
        if world.grid > 2 and near and rng.random() < 0.5:
            where = rng.choice(near)
        if thing.name in names:
            return None
        return Edit(task, thing.shape, thing.color, where=where), scene._replace(things=scene.things + (thing,))
    old = rng.choice(free)
    if task == "remove":
        return Edit(task, old.shape, old.color), scene._replace(things=tuple(t for t in scene.things if t != old))
    part, choices = ("color", COLORS) if task == "color" else ("shape", world.shapes)
    value = other(rng, choices, getattr(old, part))
    new = old._replace(**{part: value})
    if new.name in names:
        return None
    return Edit(task, old.shape, old.color, value), scene._replace(things=tuple(new if t == old else t for t in scene.things))


def combinations(edits, scene):
    """The (task, shape, colour) that a sample teaches: of what an edit makes, or of all things for a whole-image edit."""
    for edit in edits:
        if edit.task in WHOLE:
            yield from ((edit.task, t.shape, t.color) for t in scene.things)
        else:
            yield (edit.task, edit.value if edit.task == "local" else edit.shape,
                   edit.value if edit.task == "color" else edit.color)


@dataclass
class Sample:
    """One example. Images are (h, w, 3) uint8, or latents (C, h, w); `images` are the references in the order of their tags."""
    instruction: str
    target: np.ndarray | torch.Tensor
    images: list = field(default_factory=list)
    mask: np.ndarray | None = None        # (h, w) bool, True = changed by the edit
    blanked: np.ndarray | torch.Tensor | None = None       # the first image without what the mask covers
    plan: list = field(default_factory=list)
    source_caption: str = ""
    target_caption: str = ""
    task: str = ""
    complexity: int = 1


class Shapes:
    """The toy world as an endless data set: sample(index) is a pure function of (world, split, seed, index).

    split: train; iid, the same combinations of task, shape and colour in other scenes; novel, each sample with a combination
    that the other two never show. Only train has the scenes in one colour: chance rarely makes them, and they teach the most.
    """

    def __init__(self, world, split="train", seed=0):
        self.world, self.split, self.seed = WORLDS[world], split, seed
        self.words = world_words()

    def bucket(self, index):
        return self.world.size, self.world.size

    def sample(self, index):
        rng = random.Random(f"{self.seed}/{self.split}/{index}")
        make = self.caption_sample if rng.random() < self.world.captions else self.edit_sample
        while True:
            sample, shown = make(rng)
            if sample and any(held_out(*c) for c in shown) == (self.split == "novel"):
                return sample

    def edit_sample(self, rng):
        world = self.world
        alike = self.split == "train" and rng.random() < world.alike
        before = scene = random_scene(world, rng, rng.randint(1, world.objects), color=rng.choice(list(COLORS)) if alike else None)
        edits, free, names = [], list(before.things), {t.name for t in before.things}
        tasks = list(world.edits)
        for _ in range(rng.randint(1, world.complexity)):
            possible = [task for task in tasks if task in WHOLE or (len(scene.things) < world.grid**2 if task == "add" else free)]
            if not possible:
                return None, ()
            task = rng.choice(possible)
            result = random_edit(world, rng, task, scene, free, names)
            if result is None:
                return None, ()
            edit, scene = result
            edits.append(edit)
            if task in WHOLE:
                tasks.remove(task)                                     # twice would contradict itself
            # what one edit made or named, another leaves alone, so the order does not matter
            named = edit.where[1] if isinstance(edit.where, tuple) else f"{edit.color} {edit.shape}"
            free = [t for t in free if t.name != named]
            names |= {t.name for t in scene.things}
        source, target = render(world, before), render(world, scene)
        mask = (source != target).any(axis=2)
        sample = Sample(" and ".join(map(phrase, edits)), target, [source], mask, blank(source, mask),
                        plan_of(world, edits, before, scene), describe(before), describe(scene),
                        edits[0].task if len(edits) == 1 else "several", len(edits))
        return sample, combinations(edits, before)

    def caption_sample(self, rng):
        """Text-to-image with one of GenEval's six kinds of caption."""
        world, kind = self.world, rng.choice(CAPTIONS)
        n = {"single_object": 1, "colors": 1, "counting": rng.randint(1, len(NUMBERS))}.get(kind, 2)
        scene = random_scene(world, rng, n, rng.choice(world.shapes) if kind == "counting" else None)
        a, b = scene.things[0], scene.things[-1]
        if kind in ("two_object", "position") and a.shape == b.shape:
            return None, ()
        if kind == "position":
            relations = [r for r in RELATIONS if related(a.cell, r, b.cell)]
            caption = f"a {a.shape} {rng.choice(relations)} a {b.shape}"
        else:
            caption = {"single_object": f"a {a.shape}", "two_object": f"a {a.shape} and a {b.shape}",
                       "counting": plural(NUMBERS[n - 1], a.shape), "colors": f"a {a.name}",
                       "color_attr": f"a {a.name} and a {b.name}"}[kind]
        return Sample(caption, render(world, scene), target_caption=caption, task=kind), \
            [("caption", t.shape, t.color) for t in scene.things]


# ------------------------------------------------------------------------------------------- image pairs from files

MOST_PIXELS = 2**26                       # 67 megapixels, 8192 x 8192: more is refused before it is decoded
Image.MAX_IMAGE_PIXELS = None             # Pillow's own, looser limit: ours stands in its place


def open_image(path):
    """Any still image that Pillow reads, as an upright RGB Image; alpha goes onto white, 16 bits become 8."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > MOST_PIXELS:
                raise InputError(f"{path}: {image.width} x {image.height} pixels are too many to decode safely; "
                                 f"at most {MOST_PIXELS}. Scale it down first.")
            if getattr(image, "n_frames", 1) > 1:
                raise InputError(f"{path}: an animation of {image.n_frames} frames; a still image is needed. Save one frame of it.")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):                             # 16-bit gray: Pillow's own conversion clips it
                image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such image") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:      # what Pillow's decoders raise on broken files
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not an image that can be read ({error})") from None


def blank(image, mask):
    """The masked source of the paper: image (h, w, 3) with its edited region, mask (h, w), gray."""
    return np.where(mask[:, :, None], np.uint8(128), image)


def prepare(image, most=1024):
    """An image as OmniGen takes it -> (h, w, 3) uint8: no side longer than `most`, none shorter than 16, cropped to multiples of 16."""
    while min(image.size) >= 2 * most:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)

    def scale(image, factor):
        return image.resize([max(1, round(side * factor)) for side in image.size], Image.Resampling.BICUBIC)
    if max(image.size) > most:
        image = scale(image, most / max(image.size))
    if min(image.size) < 16:
        image = scale(image, 16 / min(image.size))
    left, top = image.width % 16 // 2, image.height % 16 // 2
    return np.asarray(image)[top:top + image.height // 16 * 16, left:left + image.width // 16 * 16]


def bucket(width, height, most):
    """The (width, height) an image is trained at: no side longer than `most`, both multiples of 64, so that batches of one size fill."""
    factor = min(1, most / max(width, height))
    return tuple(max(64, round(side * factor / 64) * 64) for side in (width, height))


def read_rows(path, targets=True):
    """A JSONL file of image pairs -> [(line number, row)], image paths made absolute. A bad row raises, with its line.

    A row: instruction, input_images (list, may be empty), output_image (null where there is none: not for training); optionally
    mask, plan (list of steps), source_caption, target_caption, task. Paths are relative to the file. OmniGen's rows have this form.
    """
    rows = []
    for number, row in rows_or_errors(path):
        if isinstance(row, InputError):
            raise InputError(f"{path}:{number}: {row}")
        if targets and row["output_image"] is None:
            raise InputError(f"{path}:{number}: output_image is null: this row can be edited (sample.py --data), not trained on")
        rows.append((number, row))
    if not rows:
        raise InputError(f"{path}: no rows")
    return rows


TYPES = {"instruction": str, "input_images": list, "output_image": str, "mask": str, "plan": list, "source_caption": str,
         "target_caption": str, "task": str}


def rows_or_errors(path):
    """Yield (line number, row or InputError) for each line that is not blank."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: there is no such file. --data takes {', '.join(WORLDS)} or a .jsonl file.")
    for number, line in enumerate(path.read_bytes().decode("utf-8", "replace").split("\n"), 1):
        if line.strip():
            try:
                row = check_row(json.loads(line), path.parent)
            except json.JSONDecodeError as error:
                row = InputError(f"not JSON ({error})")
            except InputError as error:
                row = error
            yield number, row


def check_row(row, folder):
    """-> the row with its paths below folder, or InputError."""
    if not isinstance(row, dict):
        raise InputError(f"a row is a JSON object, this is {type(row).__name__}")
    for key in ("instruction", "input_images", "output_image"):
        if key not in row:
            raise InputError(f"the key {key!r} is missing; there are {sorted(row)}")
    for key, kind in TYPES.items():
        required = key in ("instruction", "input_images")
        if (required or row.get(key) is not None) and not isinstance(row[key], kind):
            raise InputError(f"{key} should be a {kind.__name__}, not {type(row[key]).__name__}")
    for key in ("input_images", "plan"):
        if not all(isinstance(item, str) for item in row.get(key) or []):
            raise InputError(f"{key} should be a list of strings")
    place_images(row["instruction"], len(row["input_images"]))
    paths = {key: str(folder / row[key]) for key in ("output_image", "mask") if row.get(key)}
    return {**row, **paths, "input_images": [str(folder / name) for name in row["input_images"]]}


def fit(image, size):
    """Image -> (size, size, 3) uint8"""
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


class Pairs:
    """The rows of a JSONL file as an endless data set for the small model, every image resized to size x size pixels."""

    def __init__(self, path, size, seed=0):
        self.path, self.size, self.seed = path, size, seed
        self.rows = read_rows(path)
        text = " ".join(" ".join([row["instruction"], *(row.get("plan") or [])]) for _, row in self.rows)
        self.words = sorted(set(split_words(re.sub(TAG, " ", text))) - set(Words.special))

    def bucket(self, index):
        return self.size, self.size

    def sample(self, index):
        number, row = shuffled(self.rows, self.seed, index)
        try:
            target = fit(open_image(row["output_image"]), self.size)
            images = [fit(open_image(name), self.size) for name in row["input_images"]]
            mask = fit(open_image(row["mask"]), self.size)[:, :, 0] > 127 if row.get("mask") else None
        except InputError as error:
            raise InputError(f"{self.path}:{number}: {error}") from None
        return Sample(row["instruction"], target, images, mask, blank(images[0], mask) if mask is not None and images else None,
                      row.get("plan") or [], target_caption=row.get("target_caption") or "")


def shuffled(items, seed, index):
    """The index-th of an endless stream that shuffles the items anew in each epoch."""
    epoch, place = divmod(index, len(items))
    return items[permutation(len(items), f"{seed}/{epoch}")[place]]


@lru_cache(4)
def permutation(n, seed):
    return random.Random(seed).sample(range(n), n)


# ------------------------------------------------------------------------------------------- latents of real images
# `python data.py latents` encodes every image of a JSONL file once. A cache is a folder with cache.json (which autoencoder, which
# size), and for each process that wrote it a file of float16 numbers, memory-mapped, and an index of one JSON line an image.

def cache_header(vae_folder, size):
    path = Path(vae_folder) / "diffusion_pytorch_model.safetensors"
    try:
        with open(path, "rb") as file:
            return {"size": size, "vae": hashlib.file_digest(file, "sha256").hexdigest()}
    except OSError as error:
        raise InputError(f"{path}: the autoencoder of OmniGen-v1 cannot be read ({error.strerror}). The README says where to get it.") from None


def needed(row, root):
    """A row -> (key, image, mask) of each latent it needs: reference images, target, and the source without the masked region.

    Keys name files relative to root, the folder of the JSONL file, so that data and cache can move together.
    """
    latents = [(os.path.relpath(name, root), name, None) for name in [*row["input_images"], row["output_image"]]]
    if row.get("mask") and row["input_images"]:
        source, mask = row["input_images"][0], row["mask"]
        latents.append((f"{os.path.relpath(source, root)} without {os.path.relpath(mask, root)}", source, mask))
    return latents


def whole_lines(path):
    """The lines of a file that a killed run may have left with half a line at its end, or not begun."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith("\n")]


def read_cache(folder, header):
    """-> {key: line of the index}; of several lines of a key, each by a process with an index of its own, the newest counts."""
    path = Path(folder) / "cache.json"
    if not path.is_file():
        raise InputError(f"{folder}: there are no latents. Make them with: python data.py latents DATA.jsonl --init omnigen:FOLDER")
    found = read_json(path)
    if found != header:
        wrong = "of another autoencoder" if found.get("vae") != header["vae"] else f"made at size {found['size']}, not {header['size']}"
        raise InputError(f"{folder}: these latents are {wrong}. Make new ones with `python data.py latents` in another --out folder.")
    entries = {}
    for index in Path(folder).glob("*.jsonl"):
        for entry in map(json.loads, whole_lines(index)):
            if entry["version"] >= entries.get(entry["key"], entry)["version"]:
                entries[entry["key"]] = entry
    return entries


class Latents:
    """The rows of a JSONL file as an endless stream of latents: a share p_edit of edits, the rest text-to-image.

    Text-to-image rows are those without input images; if there are none, the target captions of the edits serve.
    """

    def __init__(self, path, folder, header, seed=0, p_edit=0.5):
        self.path, self.folder, self.seed, self.p_edit = path, Path(folder), seed, p_edit
        rows, self.root = read_rows(path), Path(path).parent
        self.entries = read_cache(folder, header)
        for number, row in rows:
            for key, _, _ in needed(row, self.root):
                if key not in self.entries:
                    raise InputError(f"{path}:{number}: {key} is not in {folder}; run `python data.py latents {path}` again")
        self.edits = [(number, row) for number, row in rows if row["input_images"]]
        self.texts = [(number, row) for number, row in rows if not row["input_images"]] or [
            (number, {**row, "instruction": row["target_caption"], "input_images": [], "plan": []}) for number, row in rows
            if row.get("target_caption")]
        if p_edit > 0 and not self.edits:
            raise InputError(f"{path}: no row has input_images, so there is nothing to edit; --p-edit 0 trains text-to-image only")
        if p_edit < 1 and not self.texts:
            raise InputError(f"{path}: every row is an edit without target_caption, so there is nothing for text-to-image, which is "
                             f"{1 - p_edit:.0%} of the training; add such rows, or train on edits only with --p-edit 1")

    def row(self, index):
        before = int(index * self.p_edit)                              # edits among the samples 0 ... index - 1
        if int((index + 1) * self.p_edit) > before:
            return shuffled(self.edits, f"{self.seed}/edit", before)
        return shuffled(self.texts, f"{self.seed}/text", index - before)

    def bucket(self, index):
        return self.entries[os.path.relpath(self.row(index)[1]["output_image"], self.root)]["shape"]

    def latent(self, key, generator):
        """One draw of the autoencoder's posterior, (C, h, w) float32."""
        entry = self.entries[key]
        data = np.fromfile(self.folder / entry["file"], np.float16, int(np.prod(entry["shape"])), offset=entry["offset"])
        if zlib.crc32(data.tobytes()) != entry["crc32"]:
            raise InputError(f"{self.folder / entry['file']}: the latent of {key} is damaged; delete {self.folder} and make it anew")
        mean, std = torch.from_numpy(data.astype(np.float32)).view(entry["shape"]).chunk(2)
        return mean + std * torch.randn(mean.shape, generator=generator)

    def sample(self, index):
        number, row = self.row(index)
        generator = torch.Generator().manual_seed(random.Random(f"latents/{self.seed}/{index}").getrandbits(62))
        latents = [self.latent(key, generator) for key, _, _ in needed(row, self.root)]
        images, (target, *blanked) = latents[:len(row["input_images"])], latents[len(row["input_images"]):]
        return Sample(row["instruction"], target, images, None, blanked[0] if blanked else None, row.get("plan") or [])


# ------------------------------------------------------------------------------------------- prompts

TAG = r"<\|image_(\d+)\|>"


def split_words(text):
    return re.findall(r"<[^<>\s]+>|\w+|[^\w\s]", text.lower())


class Words:
    """A tokenizer for a closed list of words, for the small models. Id 0 stands at image slots and padding."""
    special = ["<image>", "<img>", "</img>", "<cfg>", "<pause>"]
    template = "{}"
    images_first = False                  # the order of Eq. 8: instruction, reference image, pause tokens
    pause = "<pause>"
    empty = "<cfg>"                       # the prompt with nothing in it
    bos = None
    limit = 131072                        # tokens of a prompt with its images

    def __init__(self, words):
        self.words = list(words)
        self.ids = {word: k for k, word in enumerate(self.special + self.words)}

    def __len__(self):
        return len(self.ids)

    def encode(self, text):
        ids = []
        for word in split_words(text):
            if word not in self.ids:
                near = difflib.get_close_matches(word, self.words, n=4, cutoff=0)
                raise InputError(f"unknown word {word!r}; the nearest known ones are: {', '.join(near)}")
            ids.append(self.ids[word])
        return ids


class BPE:
    """OmniGen's own tokenizer and prompt. The ids of all special tokens are those of its tokenizer.json."""
    template = "<|user|>\nGenerate an image according to the following instructions\n{}<|end|>\n<|assistant|>\n<|diffusion|>"
    images_first = True
    empty = "<cfg>"                       # the prompt of unconditional training

    def __init__(self, folder, pause="<|placeholder1|>", limit=131072):
        path = Path(folder) / "tokenizer.json"
        read_json(path)                   # a missing or broken file has a clearer message here
        self.tokenizer = optional("tokenizers").Tokenizer.from_file(str(path))
        self.tokenizer.no_truncation()
        self.bos, self.pause, self.limit = self.tokenizer.token_to_id("<s>"), pause, limit
        if self.tokenizer.token_to_id(pause) is None:
            raise InputError(f"{path}: {pause!r}, the pause token, is not one of its tokens; choose one with --pause-token")

    def __len__(self):
        return self.tokenizer.get_vocab_size()

    def encode(self, text):
        return self.tokenizer.encode(text).ids


def place_images(instruction, n, images_first=True):
    """Check the image tags <|image_1|> ... <|image_n|> of an instruction; without any, put all images first or last."""
    tags = [int(k) for k in re.findall(TAG, instruction)]
    if not tags and n:
        images = " ".join(f"<img><|image_{k}|></img>" for k in range(1, n + 1))
        return (f"{images} {instruction}" if images_first else f"{instruction} {images}").strip()
    if set(tags) != set(range(1, n + 1)):
        raise InputError(f"the instruction names images {sorted(set(tags))}, but {n} {'is' if n == 1 else 'are'} given; "
                         f"tags run from <|image_1|> to <|image_n|> without a gap")
    return instruction


def make_prompt(tokenizer, instruction, n_images=0, plan=(), pauses=0):
    """The text of a prompt. Training with a plan: each step, then one pause token (Eq. 7). Inference: n pause tokens (Eq. 8)."""
    steps = "".join(f" {step} {tokenizer.pause}" for step in plan)
    return place_images(instruction, n_images, tokenizer.images_first) + steps + " " * (pauses > 0) + tokenizer.pause * pauses


def tokenize(tokenizer, prompt, sizes):
    """prompt, tokens of each image -> ids, kind, order: two lists of length L, and the images in order of their tags."""
    pieces = re.split(TAG, tokenizer.template.replace("{}", prompt))    # text, number, text, number, ..., text
    order = [int(k) - 1 for k in pieces[1::2]]
    ids, kind = [], []
    for k, piece in enumerate(pieces[::2]):
        piece = tokenizer.encode(piece)
        if k and piece[:1] == [tokenizer.bos]:                         # each piece is encoded alone: one <s> is enough
            piece = piece[1:]
        ids += piece
        kind += [TEXT] * len(piece)
        if k < len(order):
            ids += [0] * sizes[order[k]]
            kind += [k + 1] * sizes[order[k]]
    if not ids:
        raise InputError("the prompt is empty")
    if len(ids) > tokenizer.limit:
        raise InputError(f"the prompt and its images make {len(ids)} tokens; the model takes at most {tokenizer.limit}")
    return ids, kind, order


def to_tensor(image):
    """(..., h, w, 3) uint8 -> (..., 3, h, w) in [-1, 1]; a latent stays as it is"""
    return image if torch.is_tensor(image) else torch.from_numpy(np.float32(image)).movedim(-1, -3) / 127.5 - 1


def to_array(x):
    """(3, h, w) in [-1, 1] -> (h, w, 3) uint8"""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()


def make_condition(tokenizer, prompts, images, patch):
    """prompts: a text per row; images: a list of (C, h, w) per row, in the order of their numbers -> Condition."""
    rows, placed = [], []
    for prompt, own in zip(prompts, images):
        ids, kind, order = tokenize(tokenizer, prompt, [x.shape[-2] * x.shape[-1] // patch**2 for x in own])
        rows.append((ids, kind))
        placed += [own[k] for k in order]
    L = max(len(ids) for ids, _ in rows)
    # few large tensors: each is a message of its own from a worker, and a copy of its own to a GPU
    stacks = [torch.stack(list(alike)) for _, alike in itertools.groupby(placed, lambda image: image.shape)]
    return Condition(torch.tensor([[0] * (L - len(ids)) + ids for ids, _ in rows]),
                     torch.tensor([[PADDING] * (L - len(kind)) + kind for _, kind in rows]), stacks)


# ------------------------------------------------------------------------------------------- batches

class Batch(NamedTuple):
    x1: torch.Tensor                      # (B, C, h, w) targets
    condition: Condition
    source: torch.Tensor                  # (B, C, h, w) first reference image; anything where there is none
    edit: torch.Tensor                    # (B,) bool: is there one, of the target's size?
    seeds: list                           # one per sample, for the random numbers of the loss


def training_prompt(tokenizer, sample, rng, p_drop, p_plan, p_masked_source):
    """One sample as the model sees it in training -> (prompt, images).

    With probability p_drop the instruction is emptied, and in half of those cases the images go too: the two weaker
    branches of guidance. With p_masked_source, the source without the edited region is one more image.
    """
    drop, plan, masked = rng.random(), rng.random(), rng.random()      # always three draws: options do not shift the others
    images = [to_tensor(image) for image in sample.images]
    if drop < p_drop / 2 or (drop < p_drop and not images):
        return tokenizer.empty, []
    if drop < p_drop:
        return make_prompt(tokenizer, "", len(images)), images
    instruction = place_images(sample.instruction, len(images), tokenizer.images_first)
    if sample.blanked is not None and masked < p_masked_source:
        images.append(to_tensor(sample.blanked))
        extra = f"<img><|image_{len(images)}|></img>"
        instruction = f"{extra} {instruction}" if tokenizer.images_first else f"{instruction} {extra}"
    return make_prompt(tokenizer, instruction, len(images), sample.plan if plan < p_plan else ()), images


def make_batch(dataset, indices, tokenizer, patch, seed, p_drop, p_plan, p_masked_source):
    """The samples of these indices, with targets of one size, as a Batch; all randomness is a function of (seed, index)."""
    samples = [dataset.sample(index) for index in indices]
    chances = [random.Random(f"batch/{seed}/{index}") for index in indices]
    seeds = [rng.getrandbits(62) for rng in chances]
    rows = [training_prompt(tokenizer, sample, rng, p_drop, p_plan, p_masked_source) for sample, rng in zip(samples, chances)]
    edit = torch.tensor([bool(sample.images) and sample.images[0].shape == sample.target.shape for sample in samples])
    source = [sample.images[0] if e else sample.target for sample, e in zip(samples, edit)]
    return Batch(torch.stack([to_tensor(sample.target) for sample in samples]),
                 make_condition(tokenizer, [prompt for prompt, _ in rows], [images for _, images in rows], patch),
                 torch.stack([to_tensor(image) for image in source]), edit, seeds)


def micro_batches(dataset, size):
    """Cut the endless data set into tuples of `size` indices whose targets have one shape (`bucket`), in the order in which they fill."""
    waiting = {}
    for index in itertools.count():
        group = waiting.setdefault(tuple(dataset.bucket(index)), [])
        group.append(index)
        if len(group) == size:
            yield tuple(group)
            group.clear()


# ------------------------------------------------------------------------------------------- pictures

def sheet(rows, path, scale=1, pad=4, title=""):
    """Save a table of images with captions: rows of (image (h, w, 3) uint8, caption, framed) or None for an empty place."""
    height = max(cell[0].shape[0] for row in rows for cell in row if cell) * scale
    width = max(cell[0].shape[1] for row in rows for cell in row if cell) * scale
    text = [14 * (1 + max(cell[1].count("\n") for cell in row if cell)) for row in rows]
    tops = list(itertools.accumulate((height + own + pad for own in text), initial=pad + 18 * bool(title)))
    page = Image.new("RGB", (max(map(len, rows)) * (width + pad) + pad, tops[-1]), "white")
    pen = ImageDraw.Draw(page)
    pen.text((pad, pad), title, fill="black")
    for r, row in enumerate(rows):
        for c, cell in enumerate(row):
            if cell is None:
                continue
            image, caption, framed = cell
            x, y = pad + c * (width + pad), tops[r]
            page.paste(Image.fromarray(image).resize((image.shape[1] * scale, image.shape[0] * scale), Image.Resampling.NEAREST), (x, y))
            if framed:
                pen.rectangle([x - 2, y - 2, x + width + 1, y + height + 1], outline="red", width=2)
            pen.multiline_text((x, y + height + 1), caption, fill="black", spacing=2)
    page.save(path)


# ------------------------------------------------------------------------------------------- the command

def show(flags):
    """A page of examples: source, target, instruction, and the plan or caption."""
    dataset = Shapes(flags.data, flags.split, flags.seed) if flags.data in WORLDS else Pairs(flags.data, flags.size, flags.seed)
    cells = []
    for index in range(12):
        sample = dataset.sample(index)
        source = sample.images[0] if sample.images else np.full_like(sample.target, 255)
        cells.append([(source, textwrap.fill(sample.instruction, 24), False),
                      (sample.target, textwrap.fill(" / ".join(sample.plan) or sample.target_caption, 24), False)])
    sheet([sum(cells[k:k + 3], []) for k in range(0, 12, 3)], flags.out, max(1, 144 // flags.size))
    print(f"wrote {flags.out}")


def export(flags):
    """Write examples of a toy world as PNG files and a JSONL file: a data set in the form of your own."""
    folder, dataset = Path(flags.out), Shapes(flags.data, flags.split, flags.seed)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "pairs.jsonl", "w") as file:
            for index in tqdm(range(flags.n)):
                sample, row = dataset.sample(index), {}
                for key, image in (("source", sample.images[0] if sample.images else None), ("target", sample.target),
                                   ("mask", sample.mask)):
                    if image is not None:
                        row[key] = f"{index:05d}_{key}.png"
                        Image.fromarray(image).save(folder / row[key])
                row = {"instruction": sample.instruction, "input_images": [row[k] for k in ("source",) if k in row],
                       "output_image": row["target"], "mask": row.get("mask"), "plan": sample.plan,
                       "source_caption": sample.source_caption, "target_caption": sample.target_caption, "task": sample.task}
                file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise InputError(f"--out {folder}: cannot write there ({error.strerror})") from None
    print(f"wrote {flags.n} examples to {folder / 'pairs.jsonl'}")


def check(flags):
    """Read every row and every image of a JSONL file; print each bad row; exit 1 if there is any."""
    good = bad = 0
    for number, row in tqdm(rows_or_errors(flags.data), desc="rows", unit=""):
        try:
            if isinstance(row, InputError):
                raise row
            for name in filter(None, [*row["input_images"], row["output_image"], row.get("mask")]):
                open_image(name)
            good += 1
        except InputError as error:
            bad += 1
            tqdm.write(f"{flags.data}:{number}: {error}")
    print(f"{flags.data}: {good} good rows, {bad} bad rows")
    sys.exit(bad > 0)


def load_picture(flags, item):
    """What a worker of `latents` does: one picture -> key, file sizes, tensor; or key, None, what is wrong with it."""
    number, key, image, mask = item
    try:
        picture = open_image(image)
        size = bucket(*picture.size, flags.size)
        picture = np.asarray(ImageOps.fit(picture, size, Image.Resampling.BICUBIC))
        if mask:
            picture = blank(picture, np.asarray(ImageOps.fit(open_image(mask), size))[:, :, 0] > 127)
    except InputError as error:
        return key, None, f"{flags.data}:{number}: {error}"
    return key, file_sizes(image, mask), to_tensor(picture)


def latents(flags):
    """Encode every image of a JSONL file with the autoencoder, for train.py. Continues where a killed run stopped."""
    # torchrun --nproc-per-node N data.py latents ... shares the work: a key belongs to one process by its checksum
    rank, world, device = processes()
    if flags.size % 64 or flags.size < 64:
        raise InputError(f"--size {flags.size}: a multiple of 64 is needed")
    source = omnigen_folder(flags.init) / "vae"
    vae, header, root = load_vae(source, device), cache_header(source, flags.size), Path(flags.data).parent
    folder = Path(flags.out or Path(flags.data).with_suffix(".latents"))
    data, index = folder / f"{rank}.f16", folder / f"{rank}.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "cache.json").exists():
            (folder / f"cache.json.{rank}").write_text(json.dumps(header))
            os.replace(folder / f"cache.json.{rank}", folder / "cache.json")
        done = read_cache(folder, header)
        # what a killed run left half-written goes: a torn last line, and numbers without a line
        lines = whole_lines(index)
        index.write_text("".join(lines))
        end = max([entry["offset"] + 2 * int(np.prod(entry["shape"])) for entry in map(json.loads, lines)], default=0)
        with open(data, "ab") as file:
            file.truncate(end)
    except OSError as error:
        raise InputError(f"--out {folder}: cannot write there ({error.strerror})") from None

    todo = {}
    for number, row in read_rows(flags.data):
        for key, image, mask in needed(row, root):
            if zlib.crc32(key.encode()) % world == rank and done.get(key, {}).get("bytes") != file_sizes(image, mask):
                todo.setdefault(key, (number, key, image, mask))

    work = torch.utils.data.DataLoader(list(todo.values()), batch_size=None, collate_fn=partial(load_picture, flags),
                                       num_workers=flags.workers)
    with open(data, "ab") as numbers, open(index, "a") as lines:
        for key, sizes, picture in tqdm(work, desc="latents", unit="image", disable=rank > 0):
            if sizes is None:
                raise InputError(picture)
            latent = torch.cat(vae.encode(picture[None].to(device)), dim=1)[0].half().cpu().numpy()
            entry = {"key": key, "file": data.name, "offset": numbers.tell(), "shape": latent.shape, "bytes": sizes,
                     "version": done.get(key, {}).get("version", 0) + 1, "crc32": zlib.crc32(latent.tobytes())}
            numbers.write(latent.tobytes())
            numbers.flush()
            os.fsync(numbers.fileno())
            lines.write(json.dumps(entry) + "\n")                      # only now is it there
            lines.flush()
    print(f"{folder}: {len(todo)} new latents, {len(done)} were there" + f" (process {rank})" * (world > 1))


def file_sizes(image, mask):
    """Bytes of the files that a latent comes from: a file that was exchanged is encoded again."""
    return [os.path.getsize(name) if os.path.exists(name) else None for name in (image, mask) if name]


def omnigen_folder(init):
    if not init.startswith("omnigen:"):
        raise InputError(f"--init {init}: omnigen:FOLDER is needed, with the files of OmniGen-v1 in FOLDER")
    return Path(init.removeprefix("omnigen:"))


def add_command(commands, error, function):
    """A subcommand of the function's name, with its docstring as help."""
    command = commands.add_parser(function.__name__, help=function.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    command.error = error
    command.set_defaults(run=function)
    return command


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: sys.exit(f"data.py: {message}")
    commands = p.add_subparsers(required=True)
    add = partial(add_command, commands, p.error)
    add(check).add_argument("data", help="a JSONL file")
    command = add(show)
    command.add_argument("--data", default="shapes", help="shapes, shapes64, or a JSONL file")
    command.add_argument("--split", choices=("train", "iid", "novel"), default="train")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--size", type=int, default=64, help="pixels of a side, for a file")
    command.add_argument("--out", default="examples.png")
    command = add(export)
    command.add_argument("--data", choices=WORLDS, default="shapes")
    command.add_argument("--split", choices=("train", "iid", "novel"), default="iid")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--n", type=int, default=16, help="examples")
    command.add_argument("--out", default="pairs", help="folder")
    command = add(latents)
    command.add_argument("data", help="a JSONL file")
    command.add_argument("--init", required=True, help="omnigen:FOLDER, for the autoencoder in FOLDER/vae")
    command.add_argument("--size", type=int, default=1024, help="longest side in pixels")
    command.add_argument("--out", help="folder; DATA.latents if not given")
    command.add_argument("--workers", type=int, default=2, help="processes that read images")
    flags = p.parse_args()
    if flags.data in WORLDS:
        flags.size = WORLDS[flags.data].size
    flags.run(flags)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"data.py: {error}")
