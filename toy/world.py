"""The toy world: drawn scenes, and instructions that edit them. It imports nothing of this project.

The data set has no end and needs no files: `example`, the last function, is pure in (world, split, seed,
index). Its scenes are known exactly, so an edit can be judged exactly (toy/oracle.py).
"""
import random
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

# ---------------------------------------------------------------------------------------- what there is

COLORS = {"red": (0.90, 0.10, 0.10), "green": (0.10, 0.70, 0.20), "blue": (0.15, 0.25, 0.95),
          "yellow": (0.98, 0.85, 0.10), "purple": (0.60, 0.15, 0.75), "cyan": (0.10, 0.80, 0.90)}
BACKGROUNDS = {"white": (0.97, 0.97, 0.97), "gray": (0.50, 0.50, 0.50),
               "black": (0.04, 0.04, 0.04), "brown": (0.45, 0.30, 0.15)}
LIGHTS = {"day": ((1, 1, 1), (0, 0, 0)),  # gain and offset: a colour c becomes gain * c + offset
          "night": ((0.45, 0.45, 0.70), (0, 0, 0)), "sunset": ((0.55, 0.55, 0.55), (0.45, 0.25, 0.10))}
SHAPES = ("circle", "square", "triangle", "cross", "diamond", "star")
STYLES = ("filled", "outlined", "striped")
CORNERS = ("top left", "top right", "bottom left", "bottom right")
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}  # (rows, columns)
NUMBERS = ("one", "two", "three", "four")
# The kinds of edit, in Emu-Edit's words: "local" changes the shape of a thing, "global" the light of the
# scene.
EDITS = ("add", "remove", "color", "local", "background", "global", "style")
# Edits of the whole image: which field of Scene they change, and its choices.
WHOLE = {"background": ("background", BACKGROUNDS), "global": ("light", LIGHTS), "style": ("style", STYLES)}
PART = {"color": "color", "local": "shape"}     # edits of one thing: which field of Thing they change
CAPTIONS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")  # after GenEval


@dataclass(frozen=True)
class World:
    size: int = 16                        # side of an image in pixels
    grid: int = 2                         # cells per side; a cell holds one thing at most
    shapes: tuple = SHAPES[:4]
    sizes: tuple = (6, 7)                 # of things, in pixels
    objects: int = 3                      # most things in a source scene
    edits: tuple = EDITS[:5]
    complexity: int = 1                   # most edits in an instruction
    captions: float = 0.0                 # share of text-to-image examples
    alike: float = 0.3                    # share of training scenes in one colour
    refer: bool = False                   # a thing to edit is named by another one that it stands beside

    @property
    def cell_size(self):
        return self.size // self.grid

    @property
    def cells(self):
        """(row, column) of each cell."""
        return [divmod(k, self.grid) for k in range(self.grid**2)]


# experiments train a base model on `simple`, then fine-tune it on `hard`
WORLDS = {"shapes": World(),
          "simple": World(captions=0.5),
          "hard": World(complexity=4, captions=0.25),
          "refer": World(edits=("remove", "color", "local"), refer=True),
          "shapes64": World(size=64, grid=4, shapes=SHAPES, sizes=(10, 12, 14), objects=6, edits=EDITS,
                            complexity=4, captions=0.5, alike=0.0)}


class Thing(NamedTuple):
    """An object of a scene: what it is, its cell (row, column), its size and place in the cell in pixels."""
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
    things: tuple                         # of Thing, no two of one name


class Edit(NamedTuple):
    """One atomic edit, of the thing called `name` or of the whole image."""
    task: str
    shape: str = ""
    color: str = ""
    value: str = ""                       # the new colour, shape, background, light or style
    where: str | tuple = ""               # to add a thing: a corner, or (relation, name of another thing)
    beside: tuple = ()                    # (relation, name of another thing), in place of its own name

    @property
    def name(self):
        return f"{self.color} {self.shape}"


# ---------------------------------------------------------------------------------------- drawing

# Corners (x, y) in a box from (0, 0), top left, to (1, 1).
POLYGONS = {"triangle": [(0.5, 0), (1, 1), (0, 1)], "diamond": [(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)],
            "cross": [(.33, 0), (.67, 0), (.67, .33), (1, .33), (1, .67), (.67, .67),
                      (.67, 1), (.33, 1), (.33, .67), (0, .67), (0, .33), (.33, .33)],
            "star": [(0.5 + radius * np.sin(k * np.pi / 5), 0.5 - radius * np.cos(k * np.pi / 5))
                     for k, radius in enumerate([0.5, 0.22] * 5)]}


def silhouette(world, shape, size, y, x):
    """How much of each pixel of its cell a shape covers -> (cell_size, cell_size) float32 in [0, 1]."""
    canvas = Image.new("L", (8 * world.cell_size, 8 * world.cell_size))             # finer, for smooth edges
    pen = ImageDraw.Draw(canvas)
    side = 8 * size - 1                   # Pillow paints the last row and column too
    box = [8 * x, 8 * y, 8 * x + side, 8 * y + side]
    if shape == "circle":
        pen.ellipse(box, fill=255)
    elif shape == "square":
        pen.rectangle(box, fill=255)
    else:
        pen.polygon([(8 * x + side * u, 8 * y + side * v) for u, v in POLYGONS[shape]], fill=255)
    return np.asarray(canvas.resize((world.cell_size, world.cell_size), Image.BOX), np.float32) / 255


@lru_cache(None)
def sprite(world, shape, style, size, y, x):
    """How much of each pixel of its cell a thing covers -> (cell_size, cell_size) float32 in [0, 1]."""
    cover = silhouette(world, shape, size, y, x)
    if style == "outlined":                                            # a line of two pixels
        cover = np.clip(cover - silhouette(world, shape, size - 4, y + 2, x + 2), 0, 1)
    if style == "striped":                                             # two rows of every three
        cover = cover * ((np.arange(world.cell_size) - y) % 3 < 2)[:, None]
    return cover


@lru_cache(None)
def lit(color, light):
    """A colour under a light -> (3,) float32."""
    gain, offset = LIGHTS[light]
    return np.asarray(gain, np.float32) * np.asarray(color, np.float32) + np.asarray(offset, np.float32)


def render(world, scene):
    """Scene -> (size, size, 3) uint8."""
    ground = lit(BACKGROUNDS[scene.background], scene.light)
    image = np.full((world.size, world.size, 3), ground)
    for thing in scene.things:
        top, left = (world.cell_size * k for k in thing.cell)
        cover = sprite(world, thing.shape, scene.style, thing.size, thing.y, thing.x)[:, :, None]
        paint = lit(COLORS[thing.color], scene.light)
        image[top:top + world.cell_size, left:left + world.cell_size] += cover * (paint - ground)
    return np.round(image * 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------- language

def corner(world, cell):
    return CORNERS[2 * (cell[0] * 2 // world.grid) + cell[1] * 2 // world.grid]


def related(cell, relation, other):
    """Is `cell` left of, right of, above or below `other`? The larger distance decides."""
    down = cell[0] - other[0]
    right = cell[1] - other[1]
    row, column = RELATIONS[relation]
    along = down * row + right * column
    return along > 0 and along == max(abs(down), abs(right))


def phrase(edit):
    """Edit -> its instruction."""
    where = edit.where if isinstance(edit.where, str) else " the ".join(edit.where)
    thing = "one " + " the ".join(edit.beside) if edit.beside else edit.name
    return {"add": f"add a {edit.name} {where}".strip(),
            "remove": f"remove the {thing}",
            "color": f"make the {thing} {edit.value}",
            "local": f"make the {thing} a {edit.value}",
            "background": f"change the background to {edit.value}",
            "global": f"make it {edit.value}",
            "style": f"redraw it {edit.value}"}[edit.task]


COLOR = "|".join(COLORS)
SHAPE = "|".join(SHAPES)
THING = f"(?P<color>{COLOR}) (?P<shape>{SHAPE})"
BESIDE = f"(?:{'|'.join(RELATIONS)}) the (?:{COLOR}) (?:{SHAPE})"
PLACE = f"{'|'.join(CORNERS)}|{BESIDE}"
OLD = f"(?:{THING}|one (?P<beside>{BESIDE}))"
# What `phrase` writes, as regular expressions; the groups are called by the fields of Edit.
GRAMMAR = {"add": f"add a {THING}(?: (?P<where>{PLACE}))?",
           "remove": f"remove the {OLD}",
           "color": f"make the {OLD} (?P<value>{COLOR})",
           "local": f"make the {OLD} a (?P<value>{SHAPE})",
           "background": f"change the background to (?P<value>{'|'.join(BACKGROUNDS)})",
           "global": f"make it (?P<value>{'|'.join(LIGHTS)})",
           "style": f"redraw it (?P<value>{'|'.join(STYLES)})"}


def read_edit(text):
    """The inverse of `phrase` -> Edit, or None: not an instruction of this world."""
    for task, rule in GRAMMAR.items():
        if match := re.fullmatch(rule, text):
            fields = match.groupdict(default="")
            for name in ("where", "beside"):
                if " the " in fields.get(name, ""):
                    fields[name] = tuple(fields[name].split(" the "))
            return Edit(task, **{name: value for name, value in fields.items() if value})
    return None


def read_instruction(text):
    """Edits joined by "and" -> [Edit], or None if one of them is not of this world."""
    edits = [read_edit(part) for part in text.strip().lower().split(" and ")]
    return None if None in edits else edits


def plural(number, shape):
    return f"{number} {shape}" + ("" if number == "one" else "es" if shape == "cross" else "s")


def describe(scene):
    """Scene -> caption."""
    things = " and ".join(f"a {thing.name}" for thing in scene.things) or "nothing"
    return f"{things} on a {scene.background} background , {scene.style} , {scene.light}"


def expressive_plan(world, edits, before, after):
    """The expressive plan (Eq. 7): up to five steps, first what changes and where, then what stays."""
    steps = []
    for edit in edits:
        scene = after if edit.task == "add" else before
        place = next((corner(world, thing.cell) for thing in scene.things if thing.name == edit.name), "")
        steps.append({"add": f"a {edit.name} appears {place}",
                      "remove": f"the {edit.name} {place} vanishes",
                      "color": f"the {edit.name} {place} becomes {edit.value}",
                      "local": f"the {edit.name} {place} becomes a {edit.value}",
                      "background": f"the background becomes {edit.value}",
                      "global": f"the light becomes {edit.value}",
                      "style": f"the style becomes {edit.value}"}[edit.task])
    untouched = [thing for thing in before.things if thing.name not in [edit.name for edit in edits]]
    steps += [f"keep the {thing.name} {corner(world, thing.cell)}" for thing in untouched]
    return steps[:5]


def world_words():
    """Every word of an instruction, caption or plan, sorted: the vocabulary of models of the toy world."""
    text = " ".join([*COLORS, *BACKGROUNDS, *LIGHTS, *SHAPES, *STYLES, *CORNERS, *RELATIONS, *NUMBERS,
                     *(plural("two", shape) for shape in SHAPES),
                     "add a remove the make change background to it redraw and nothing",
                     "on , becomes light style appears vanishes keep"])
    return sorted(set(text.split()))


# ---------------------------------------------------------------------------------------- at random

def random_thing(world, rng, cell, shape=None, color=None):
    size = rng.choice(world.sizes)
    shape = shape or rng.choice(world.shapes)
    color = color or rng.choice(list(COLORS))
    room = world.cell_size - size + 1
    return Thing(shape, color, cell, size, y=rng.randrange(room), x=rng.randrange(room))


def random_scene(world, rng, n, shape=None, color=None):
    """A scene of n things, all of one shape or colour if it is given."""
    things = []
    for cell in rng.sample(world.cells, n):
        thing = random_thing(world, rng, cell, shape, color)
        while thing.name in [other.name for other in things]:
            thing = random_thing(world, rng, cell, shape, color)
        things.append(thing)
    background = rng.choice(list(BACKGROUNDS))
    light = rng.choice(list(LIGHTS)) if "global" in world.edits else "day"
    style = rng.choice(STYLES) if "style" in world.edits else "filled"
    return Scene(background, light, style, tuple(things))


class Redraw(Exception):
    """The draw is no valid example. The next one takes its place."""


def another(rng, choices, current):
    return rng.choice([choice for choice in choices if choice != current])


def random_edit(world, rng, task, scene, free, names):
    """An edit that names only things in `free`, and makes none called one of `names` -> (Edit, new Scene)."""
    if task in WHOLE:
        field, choices = WHOLE[task]
        value = another(rng, choices, getattr(scene, field))
        if task == "style" and not scene.things:                       # it would not show
            raise Redraw
        return Edit(task, value=value), scene._replace(**{field: value})
    if task == "add":
        size = world.sizes[len(world.sizes) // 2]
        middle = (world.cell_size - size) // 2                         # so that there is one right answer
        occupied = [thing.cell for thing in scene.things]
        empty = [cell for cell in world.cells if cell not in occupied]
        shape = rng.choice(world.shapes)
        color = rng.choice(list(COLORS))
        new = Thing(shape, color, rng.choice(empty), size, middle, middle)
        near = [(relation, other.name) for other in free for relation in RELATIONS
                if related(new.cell, relation, other.cell)]
        by_relation = world.grid > 2 and near and rng.random() < 0.5
        where = rng.choice(near) if by_relation else corner(world, new.cell)
        if new.name in names:
            raise Redraw
        return Edit(task, new.shape, new.color, where=where), scene._replace(things=(*scene.things, new))
    old = rng.choice(free)
    if task == "remove":
        rest = tuple(thing for thing in scene.things if thing != old)
        return Edit(task, old.shape, old.color), scene._replace(things=rest)
    choices = COLORS if task == "color" else world.shapes
    value = another(rng, choices, getattr(old, PART[task]))
    new = old._replace(**{PART[task]: value})
    if new.name in names:
        raise Redraw
    things = tuple(new if thing == old else thing for thing in scene.things)
    return Edit(task, old.shape, old.color, value), scene._replace(things=things)


def random_edits(world, rng, scene):
    """Up to world.complexity edits whose order does not matter -> ([Edit], the new Scene)."""
    edits = []
    tasks = list(world.edits)
    free = list(scene.things)
    names = {thing.name for thing in scene.things}
    for _ in range(rng.randint(1, world.complexity)):
        room = len(scene.things) < world.grid**2
        possible = [task for task in tasks if task in WHOLE or (room if task == "add" else free)]
        if not possible:
            raise Redraw
        task = rng.choice(possible)
        edit, scene = random_edit(world, rng, task, scene, free, names)
        edits.append(edit)
        if task in WHOLE:
            tasks.remove(task)                                         # a second would contradict the first
        # Later edits leave alone what this one names or makes, so the order does not matter.
        named = edit.where[1] if isinstance(edit.where, tuple) else edit.name
        free = [thing for thing in free if thing.name != named]
        names.update(thing.name for thing in scene.things)
    return edits, scene


def is_beside(scene, relation, name):
    """The things of a scene that are left of, right of, above or below the one of this name."""
    others = [thing.cell for thing in scene.things if thing.name == name]
    return [thing for thing in scene.things for cell in others if related(thing.cell, relation, cell)]


def refer(rng, edit, before):
    """The edit of a thing that is named by another one beside it, in a way that fits no third."""
    ways = [(relation, other.name) for other in before.things for relation in RELATIONS
            if [thing.name for thing in is_beside(before, relation, other.name)] == [edit.name]]
    if not ways:
        raise Redraw
    return edit._replace(beside=rng.choice(ways))


# ---------------------------------------------------------------------------------------- one example

def held_out(task, shape, color):
    """Does training never show this? About one in seven combinations, but no shape or colour as a whole."""
    number = EDITS.index(task) if task in EDITS else len(EDITS)        # captions count as one more task
    return (2 * SHAPES.index(shape) + list(COLORS).index(color) + 3 * number) % 7 == 0


def combinations(edits, before):
    """The (task, shape, colour) that edits teach: of what each makes, or of all things for a whole image."""
    for edit in edits:
        if edit.task in WHOLE:
            yield from ((edit.task, thing.shape, thing.color) for thing in before.things)
        else:
            shape = edit.value if edit.task == "local" else edit.shape
            color = edit.value if edit.task == "color" else edit.color
            yield edit.task, shape, color


def check_split(split, shown):
    """A novel example shows a held-out combination, any other none."""
    if any(held_out(*combination) for combination in shown) != (split == "novel"):
        raise Redraw


def edit_example(world, rng, split):
    alike = split == "train" and rng.random() < world.alike            # only the shape tells the things apart
    n = rng.randint(1, world.objects)
    before = random_scene(world, rng, n, color=rng.choice(list(COLORS)) if alike else None)
    edits, after = random_edits(world, rng, before)
    check_split(split, combinations(edits, before))
    said = [refer(rng, edit, before) if world.refer else edit for edit in edits]
    source = render(world, before)
    target = render(world, after)
    return dict(instruction=" and ".join(phrase(edit) for edit in said), target=target, images=[source],
                mask=(source != target).any(axis=2), plan=expressive_plan(world, edits, before, after),
                source_caption=describe(before), target_caption=describe(after),
                task=edits[0].task if len(edits) == 1 else "several", complexity=len(edits))


def caption_example(world, rng, split):
    kind = rng.choice(CAPTIONS)
    number = rng.randint(1, len(NUMBERS))                              # drawn for every kind, used to count
    n = {"single_object": 1, "colors": 1, "counting": number}.get(kind, 2)
    scene = random_scene(world, rng, n, shape=rng.choice(world.shapes) if kind == "counting" else None)
    a = scene.things[0]
    b = scene.things[-1]
    if kind in ("two_object", "position") and a.shape == b.shape:
        raise Redraw
    relations = [relation for relation in RELATIONS if related(a.cell, relation, b.cell)]
    relation = rng.choice(relations) if kind == "position" else ""
    check_split(split, [("caption", thing.shape, thing.color) for thing in scene.things])
    caption = {"single_object": f"a {a.shape}", "two_object": f"a {a.shape} and a {b.shape}",
               "counting": plural(NUMBERS[n - 1], a.shape), "position": f"a {a.shape} {relation} a {b.shape}",
               "colors": f"a {a.name}", "color_attr": f"a {a.name} and a {b.name}"}[kind]
    return dict(instruction=caption, target=render(world, scene), images=[], mask=None, plan=[],
                source_caption="", target_caption=caption, task=kind, complexity=1)


def example(world, split, seed, index):
    """One edit or, without images, text-to-image -> dict of instruction, target (size, size, 3) uint8,
    images [source], mask (size, size) bool, plan [str], source_caption, target_caption, task and complexity,
    the number of edits.

    split: "train"; "iid", the same combinations of task, shape and colour in other scenes; "novel", each
    with one that the other two never show. Only "train" has extra scenes in one colour: they teach the most,
    and chance rarely makes them."""
    rng = random.Random(f"{seed}/{split}/{index}")
    draw = caption_example if rng.random() < world.captions else edit_example
    while True:
        try:
            return draw(world, rng, split)
        except Redraw:
            pass
