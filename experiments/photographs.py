"""A second world: crops of photographs, and edits whose target is computed. Do the toy's findings carry over?

    python -m experiments.photographs train --seed 0 --p-magd 0.5 --out out/x      flags as of train.py
    python -m experiments.photographs score --ckpt out/x/last.pt [--pauses 8]

The pictures are those that the optional package scikit-image brings along; some are held out whole. An output
is right if, among the targets of all edits of its source, none is nearer to it than that of its instruction.
"""
import random
import sys
import textwrap
import time
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

import train
from common.cli import COUNT, NONE_OR_MORE, parser, run_script
from common.devices import processes
from common.files import InputError, make_folder, optional, write_json
from common.images import open_image, sheet
from common.rows import checksum
from data import Sample, make_prompt, split_words, to_array, to_tensor
from sample import generate, load_checkpoint, noise

FLAGS = "--data photographs --size 32 --batch 32 --steps 1500"         # of train.py; those given come after
PICTURES = {"train": ("astronaut.png brick.png cell.png coffee.png grass.png gravel.png clock_motion.png "
                      "ihc.png moon.png motorcycle_left.png retina.jpg"),
            "held_out": "camera.png chelsea.png coins.png rocket.jpg"}
SIZE = 32                                 # pixels of a side
LEAST = 3                                 # least mean difference of a crop's targets, of 255
SCORES = ("accuracy", "l1", "l1_source")
SCORED = 10**6                            # the first sample that is scored: training does not get so far

# ------------------------------------------------------------------------------------------- edits


def part(change, rows=slice(None), columns=slice(None)):
    """An edit that changes the colours, float (h, w, 3), in one half of an image, or all of it."""
    def edit(image):
        pixels = np.float32(image)                                     # (h, w, 3)
        pixels[rows, columns] = change(pixels[rows, columns])
        return np.uint8(pixels.round())
    return edit


def gray(x):
    return x.mean(axis=2, keepdims=True)


def blurred(image):
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(2)))


FIRST, SECOND = slice(SIZE // 2), slice(SIZE // 2, None)             # halves
COLORS = {                                # edit: its function, its wordings
    "darker": (part(lambda x: 0.4 * x), "make it darker", "darken the picture"),
    "brighter": (part(lambda x: 102 + 0.6 * x), "make it brighter", "brighten the picture"),
    "gray": (part(gray), "make it gray", "remove the colors"),
    "negative": (part(lambda x: 255 - x), "make it a negative", "invert the colors"),
    "red": (part(lambda x: x * (1, 0.4, 0.4)), "make it red", "tint the picture red"),
    "left half gray": (part(gray, columns=FIRST), "make the left half gray",
                       "remove the colors of the left half"),
    "top half darker": (part(lambda x: 0.4 * x, FIRST), "make the top half darker", "darken the top half"),
    "right half negative": (part(lambda x: 255 - x, columns=SECOND), "make the right half a negative",
                            "invert the colors of the right half"),
    "bottom half red": (part(lambda x: x * (1, 0.4, 0.4), SECOND), "make the bottom half red",
                        "tint the bottom half red")}
PLACES = {
    "blurred": (blurred, "make it blurred", "blur the picture"),
    "mirrored": (lambda image: image[:, ::-1], "mirror it", "swap left and right"),
    "upside down": (lambda image: image[::-1], "turn it upside down", "swap top and bottom")}
EDITS = COLORS | PLACES


def edited(source, names):
    for name in names:
        source = EDITS[name][0](source)
    return source


def targets(source):
    """source (h, w, 3) uint8 -> {edits, in their order: target (h, w, 3) uint8}, of one edit or of two."""
    one = {(name,): edit(source) for name, (edit, *_) in EDITS.items()}
    return one


def difference(a, b):
    """Mean absolute difference of uint8 images, (..., h, w, 3) -> (...)."""
    return np.abs(np.float32(a) - b).mean(axis=(-3, -2, -1))


# ------------------------------------------------------------------------------------------- samples

class Photographs:
    """An endless data set with the face of data.Shapes. split: train or held_out, whose pictures differ."""

    def __init__(self, split="train", seed=0):
        folder = Path(optional("skimage.data", "scikit-image").__file__).parent
        self.split = split
        self.seed = seed
        self.pictures = [open_image(folder / name) for name in PICTURES[split].split()]
        self.words = sorted({word for _, *texts in EDITS.values() for text in texts for word in split_words(text)}
                            | {"and"})
        self.checksum = checksum([zlib.crc32(picture.tobytes()) for picture in self.pictures])
        for picture in self.pictures:
            picture.thumbnail((256, 256))                              # crops of it are resized sooner

    def bucket(self, index):
        return SIZE, SIZE

    def sample(self, index):
        rng = random.Random(f"{self.seed}/{self.split}/{index}")
        names = [rng.choice(list(EDITS))]
        if names[0] in COLORS and rng.random() < 0.0:
            names.append(rng.choice(list(PLACES)))
        instruction = " and ".join(rng.choice(EDITS[name][1:]) for name in names)
        source = self.crop(rng)
        while least_difference(source) < LEAST:                        # of a plain sky, say
            source = self.crop(rng)
        return Sample(instruction, edited(source, names), [source], task=" and ".join(names), complexity=len(names))

    def crop(self, rng):
        """Some of a picture, perhaps mirrored, in light of some colour -> (SIZE, SIZE, 3) uint8."""
        picture = rng.choice(self.pictures)
        side = rng.uniform(48, min(picture.size))
        x, y = (rng.uniform(0, length - side) for length in picture.size)
        small = picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC, (x, y, x + side, y + side))
        light = [rng.uniform(0.5, 1) for _ in range(3)]                # gray pictures get a colour too
        image = np.uint8(np.float32(small) * light)
        return image[:, ::-1] if rng.random() < 0.5 else image


def least_difference(source):
    """The smallest difference of two edits' targets."""
    images = np.float32([edit(source)[::2, ::2] for edit, *_ in EDITS.values()])         # (n, h/2, w/2, 3)
    return min(np.abs(images[k + 1:] - images[k]).mean(axis=(1, 2, 3)).min() for k in range(len(images) - 1))


def open_photographs(data, split, size, seed, bad=None):
    """In place of data.open_data: the only data set of `train`."""
    if data != "photographs" or size != SIZE:
        raise InputError(f"the photographs have {SIZE} pixels a side: leave out --data and --size")
    return Photographs(split, seed)


# ------------------------------------------------------------------------------------------- scores

def evaluate(model, tokenizer, dataset, indices, steps, pauses, device, batch=64):
    """Edit the samples of these indices -> for each a dict of edits, scores, sample, output, nearest edits."""
    rows = []
    for start in range(0, len(indices), batch):
        some = indices[start:start + batch]
        samples = [dataset.sample(index) for index in some]
        prompts = [make_prompt(tokenizer, sample.instruction, 1, pauses=pauses) for sample in samples]
        images = [[to_tensor(sample.images[0])] for sample in samples]
        x = generate(model, tokenizer, prompts, images, noise((3, SIZE, SIZE), some, device), steps, 1, 1)
        rows += [judge(sample, to_array(output)) for sample, output in zip(samples, x)]
    return rows


def judge(sample, output):
    """L1 to the target (in 0 to 1) of the output and of the source; is no other edit's target nearer?"""
    source = sample.images[0]
    names, images = zip(*targets(source).items())
    distances = difference(np.stack(images), output)                   # (edits,)
    return {"task": sample.task, "complexity": sample.complexity,
            "accuracy": distances.min() >= difference(sample.target, output),
            "l1": difference(sample.target, output) / 255, "l1_source": difference(sample.target, source) / 255,
            "sample": sample, "output": output, "nearest": " and ".join(names[distances.argmin()])}


def breakdown(rows):
    """Rows of scores -> {group: number and means}: all, one edit and two, and each edit, alone or with another."""
    groups = {"all": rows, **{f"{k} edits": [row for row in rows if row["complexity"] == k] for k in (1, 2)}}
    groups |= {name: [row for row in rows if name in row["task"].split(" and ")] for name in EDITS}
    return {name: {"number": len(group), **{key: float(np.mean([row[key] for row in group])) for key in SCORES}}
            for name, group in groups.items() if group}


def picture(rows, path):
    """Six edits that are right and six that are not: source, output (framed if right) and target."""
    shown = [row for right in (True, False) for row in [row for row in rows if row["accuracy"] == right][:6]]
    sheet([[(row["sample"].images[0], textwrap.fill(row["sample"].instruction, 20), False) for row in shown],
           [(row["output"], textwrap.fill(f"nearest: {row['nearest']}", 20), row["accuracy"]) for row in shown],
           [(row["sample"].target, "target", False) for row in shown]], path, 4)


def score(flags):
    device = processes()[2]
    editor, trained = load_checkpoint(flags.ckpt, device)
    if trained["data"] != "photographs":
        raise InputError(f"{flags.ckpt} was trained on {trained['data']}, not on photographs")
    out = Path(flags.out or Path(flags.ckpt).with_name("photographs.json"))
    make_folder(out.parent)
    start = time.perf_counter()
    result = {}
    for split in PICTURES:
        dataset = Photographs(split, trained["seed"])
        rows = evaluate(editor.model, editor.tokenizer, dataset, range(SCORED, SCORED + flags.examples), flags.steps,
                        flags.pauses, device)
        result[split] = breakdown(rows)
        print(f"\n{split}: {flags.examples} examples, {flags.steps} Euler steps, {flags.pauses} pause tokens")
        print(f"{'':20}{'number':>8}" + "".join(f"{key:>12}" for key in SCORES))
        for name, values in result[split].items():
            print(f"{name:20}{values['number']:8}" + "".join(f"{values[key]:12.3f}" for key in SCORES))
        picture(rows, out.with_name(f"{out.stem}_{split}.png"))
    write_json(out, {**result, "ckpt": flags.ckpt, "steps": flags.steps, "pauses": flags.pauses,
                     "seconds": time.perf_counter() - start})
    print(f"\nwrote {out} and its pictures")


def main():
    if sys.argv[1:2] == ["train"]:
        sys.argv[1:2] = FLAGS.split()
        train.open_data = open_photographs
        train.main()
        return
    p = parser(__doc__)
    p.add_argument("command", choices=("train", "score"))
    p.add_argument("--ckpt", required=True, help="a checkpoint of `train`")
    p.add_argument("--pauses", type=NONE_OR_MORE, default=0, help="pause tokens (0)")
    p.add_argument("--steps", type=COUNT, default=10, help="Euler steps (10)")
    p.add_argument("--examples", type=COUNT, default=512, help="of each split (512)")
    p.add_argument("--out", help="a JSON file, pictures go beside it; if not given, photographs.json beside --ckpt")
    score(p.parse_args())


if __name__ == "__main__":
    run_script(main)
