"""A second world: photographs, with edits whose targets are computed. Do the toy's findings hold there?

    python -m experiments.photographs train --seed 0 --p-magd 0.5 --out out/x      flags as of train.py
    python -m experiments.photographs score --ckpt out/x/last.pt [--pauses 8]

The pictures are those that the package scikit-image brings along; four of them are held out whole. An output
is right if, of the targets of all edits of its source, none is nearer to it (in L1) than the instruction's.
"""
import itertools
import random
import sys
import textwrap
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

import train
from common.cli import COUNT, NONE_OR_MORE, add_device, parser, run_script
from common.devices import processes
from common.files import InputError, make_folder, optional, write_json
from common.images import open_image, sheet
from common.rows import checksum
from data import Sample, make_prompt, split_words, to_array, to_tensor
from sample import generate, load_checkpoint, noise

SIZE = 32                                 # pixels of a side
FLAGS = f"--data photographs --size {SIZE} --batch 16 --steps 1500"    # of train.py, before those given
PICTURES = {"train": "astronaut.png brick.png cell.png clock_motion.png coffee.png grass.png gravel.png "
                     "ihc.png moon.png motorcycle_left.png retina.jpg",
            "held_out": "camera.png chelsea.png coins.png rocket.jpg"}
LEAST = 3                                 # least mean difference of a crop's targets, of 255
SCORED = 10**6                            # index of the first sample to score: training does not get so far
SCORES = ("accuracy", "l1", "l1_source")

# ------------------------------------------------------------------------------------------- edits


def darker(x):                                                         # x (h, w, 3) float, 0 to 255
    return 0.4 * x


def brighter(x):
    return 102 + 0.6 * x


def gray(x):
    return x.mean(axis=2, keepdims=True)


def negative(x):
    return 255 - x


def red(x):
    return x * (1, 0.4, 0.4)


def colors(change, rows=slice(None), columns=slice(None)):
    """An edit that changes the colours of these rows and columns."""
    def edit(image):
        x = np.float32(image)                                          # (h, w, 3)
        x[rows, columns] = change(x[rows, columns])
        return np.uint8(x.round())
    return edit


def blurred(image):
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(2)))


FIRST, SECOND = slice(SIZE // 2), slice(SIZE // 2, None)               # halves
EDITS = {                                 # name: edit of an image (h, w, 3) uint8, two wordings
    "darker": (colors(darker), "make it darker", "darken the picture"),
    "brighter": (colors(brighter), "make it brighter", "brighten the picture"),
    "gray": (colors(gray), "make it gray", "remove the colors"),
    "negative": (colors(negative), "make it a negative", "invert the colors"),
    "red": (colors(red), "make it red", "tint the picture red"),
    "left brighter": (colors(brighter, columns=FIRST), "make the left half brighter",
                      "brighten the left half"),
    "top darker": (colors(darker, FIRST), "make the top half darker", "darken the top half"),
    "right negative": (colors(negative, columns=SECOND), "make the right half a negative",
                       "invert the colors of the right half"),
    "bottom red": (colors(red, SECOND), "make the bottom half red", "tint the bottom half red"),
    "blurred": (blurred, "make it blurred", "blur the picture"),
    "mirrored": (lambda image: image[:, ::-1], "mirror it", "swap left and right"),
    "upside down": (lambda image: image[::-1], "turn it upside down", "swap top and bottom")}


def targets(source):
    """{names: target} of each edit and of each pair, the one that comes first in EDITS applied first."""
    one = {(name,): edit(source) for name, (edit, *_) in EDITS.items()}
    return one | {(a, b): EDITS[b][0](one[a,]) for a, b in itertools.combinations(EDITS, 2)}


def difference(images, image):
    """Mean absolute difference, (n, h, w, 3) and (h, w, 3) uint8 -> (n,)."""
    return np.abs(np.float32(images) - image).mean(axis=(1, 2, 3))


# ------------------------------------------------------------------------------------------- samples

class Photographs:
    """An endless data set with the face of data.Shapes. split: train or held_out, which share no picture."""

    def __init__(self, split="train", seed=0):
        folder = Path(optional("skimage.data", "scikit-image").__file__).parent
        self.split = split
        self.seed = seed
        self.pictures = [open_image(folder / name) for name in PICTURES[split].split()]
        self.checksum = checksum([zlib.crc32(picture.tobytes()) for picture in self.pictures])
        texts = [text for _, *wordings in EDITS.values() for text in wordings]
        self.words = sorted(set(split_words(" and ".join(texts))))
        for picture in self.pictures:
            picture.thumbnail((256, 256))                              # crops are resized sooner

    def bucket(self, index):
        return SIZE, SIZE

    def sample(self, index):
        rng = random.Random(f"{self.seed}/{self.split}/{index}")
        names = sorted(rng.sample(list(EDITS), rng.randint(1, 2)), key=list(EDITS).index)
        instruction = " and ".join(rng.choice(EDITS[name][1:]) for name in names)
        source = self.crop(rng)
        while not varied(source):
            source = self.crop(rng)
        target = source
        for name in names:
            target = EDITS[name][0](target)
        return Sample(instruction, target, [source], task=" and ".join(names), complexity=len(names))

    def crop(self, rng):
        """A part of a picture, perhaps mirrored, in light of some colour -> (SIZE, SIZE, 3) uint8."""
        picture = rng.choice(self.pictures)
        side = rng.uniform(48, min(picture.size))
        x, y = (rng.uniform(0, length - side) for length in picture.size)
        small = picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC, (x, y, x + side, y + side))
        light = [rng.uniform(0.5, 1) for _ in range(3)]                # a gray picture gets a colour too
        image = np.uint8(np.float32(small) * light)
        return image[:, ::-1] if rng.random() < 0.5 else image


def varied(source):
    """Can its edits be told apart? Not those of a plain sky, say. Measured at every other row and column."""
    images = np.stack([edit(source)[::2, ::2] for edit, *_ in EDITS.values()])      # (n, h/2, w/2, 3)
    return all(difference(images[k + 1:], images[k]).min() >= LEAST for k in range(len(images) - 1))


def open_photographs(data, split, size, seed, bad=None):
    """In place of data.open_data."""
    if data != "photographs" or size != SIZE:
        raise InputError(f"the photographs have {SIZE} pixels a side: leave out --data and --size")
    return Photographs(split, seed)


# ------------------------------------------------------------------------------------------- scores

def judge(sample, output):
    """accuracy: is the output right? l1, l1_source: L1 in 0 to 1 of output and unchanged source."""
    names, images = zip(*targets(sample.images[0]).items())
    distances = difference(images, output)                             # (n,)
    own, unchanged = difference([output, sample.images[0]], sample.target)
    return {"accuracy": distances.min() >= own, "l1": own / 255, "l1_source": unchanged / 255,
            "nearest": " and ".join(names[distances.argmin()]), "sample": sample, "output": output}


def evaluate(editor, dataset, flags, device):
    tokenizer = editor.tokenizer
    rows = []
    for start in range(SCORED, SCORED + flags.examples, 64):
        indices = range(start, min(start + 64, SCORED + flags.examples))
        samples = [dataset.sample(index) for index in indices]
        prompts = [make_prompt(tokenizer, sample.instruction, 1, pauses=flags.pauses) for sample in samples]
        images = [[to_tensor(sample.images[0]).to(device)] for sample in samples]
        x0 = noise((3, SIZE, SIZE), indices, device)                   # (B, 3, SIZE, SIZE)
        x = generate(editor.model, tokenizer, prompts, images, x0, flags.steps, text_scale=1, image_scale=1)
        rows += [judge(sample, to_array(output)) for sample, output in zip(samples, x)]
    return rows


def means(rows):
    return {key: float(np.mean([row[key] for row in rows])) for key in SCORES}


def breakdown(rows):
    """Means of all rows, of instructions with one edit and with two, of those with each edit."""
    groups = {"all": rows}
    groups |= {f"complexity {k}": [row for row in rows if row["sample"].complexity == k] for k in (1, 2)}
    groups |= {name: [row for row in rows if name in row["sample"].task.split(" and ")] for name in EDITS}
    return {name: {"number": len(group), **means(group)} for name, group in groups.items() if group}


def picture(rows, path):
    """Up to six edits that are right and six that are not: source, output (framed if right), target."""
    shown = [row for right in (True, False) for row in [row for row in rows if row["accuracy"] == right][:6]]
    cells = [((row["sample"].images[0], textwrap.fill(row["sample"].instruction, 20), False),
              (row["output"], textwrap.fill(f"nearest: {row['nearest']}", 20), row["accuracy"]),
              (row["sample"].target, "target", False)) for row in shown]
    sheet(list(zip(*cells)), path, scale=4)


def score(flags):
    device = processes(flags.device)[2]
    editor, trained = load_checkpoint(flags.ckpt, device)
    if trained["data"] != "photographs":
        raise InputError(f"{flags.ckpt} was trained on {trained['data']}, not on photographs")
    out = Path(flags.out or Path(flags.ckpt).with_name("photographs.json"))
    make_folder(out.parent)
    result = {}
    for split in PICTURES:
        rows = evaluate(editor, Photographs(split, trained["seed"]), flags, device)
        result[split] = breakdown(rows)
        print(f"{split:16}{'number':>8}" + "".join(f"{key:>12}" for key in SCORES))
        for name, values in result[split].items():
            print(f"{name:16}{values['number']:8}" + "".join(f"{values[key]:12.3f}" for key in SCORES))
        picture(rows, out.with_name(f"{out.stem}_{split}.png"))
    write_json(out, {**result, "ckpt": flags.ckpt, "steps": flags.steps, "pauses": flags.pauses})
    print(f"wrote {out} and a picture of each split")


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
    p.add_argument("--out", help="a JSON file; photographs.json beside --ckpt if not given")
    add_device(p)
    score(p.parse_args())


if __name__ == "__main__":
    run_script(main)
