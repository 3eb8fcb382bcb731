"""What the model is shown: samples of the toy world or of a JSONL file, prompts, and batches.

Prompts follow the paper's Eq. 7 (expressive plans) and Eq. 8 (pause tokens). A tenth of them is emptied, so
that guidance has an unconditional branch (Sec. 5, setup). Data sets are endless: sample(index) depends on the
seed and the index alone. The toy world is drawn in toy/world.py; latents of real images, for OmniGen, come
from pretrained/latents.py.
"""
import difflib
import itertools
import os
import random
import re
from array import array
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import magd
from common.files import InputError
from common.images import open_image, open_mask, shrink_mask
from common.rows import TAG, Rows, check_tags, checksum, good_rows
from model import PADDING, TEXT, Condition
from scale.cost import flops
from toy.world import WORLDS, example, world_words

# ------------------------------------------------------------------------------------------- samples


@dataclass
class Sample:
    """One example. Images are (h, w, 3) uint8, or latents (C, h, w) float32."""
    instruction: str
    target: np.ndarray | torch.Tensor
    images: list = field(default_factory=list)             # the references, in the order of their tags
    mask: np.ndarray | None = None                         # (h, w) bool, True = changed by the edit
    blanked: np.ndarray | torch.Tensor | None = None       # the first image, with its masked region gray
    plan: list = field(default_factory=list)               # the steps of an expressive plan (Eq. 7)
    source_caption: str = ""
    target_caption: str = ""
    task: str = ""
    complexity: int = 1                                    # edits in the instruction


class Shapes:
    """The toy world. split: train; iid, the same combinations of task, shape and colour in other scenes;
    novel, each sample with a combination that the other two never show."""

    def __init__(self, world, split="train", seed=0):
        self.world = WORLDS[world]
        self.split = split
        self.seed = seed
        self.words = world_words()
        self.checksum = None              # the world is made by the code

    def bucket(self, index):
        return self.world.size, self.world.size

    def sample(self, index):
        sample = Sample(**example(self.world, self.split, self.seed, index))
        if sample.images:
            sample.blanked = blank(sample.images[0], sample.mask)
        return sample


class Pairs:
    """The rows of a JSONL file for models trained from scratch, every image resized to size x size pixels.

    bad: rows that it may leave out (--skip-bad); they are looked for at the start, so that every process and
    every resumed run leaves out the same ones."""

    def __init__(self, path, size, seed=0, bad=None):
        self.path = path
        self.size = size
        self.seed = seed
        places = array("q")
        words = set()
        sizes = array("q")                                 # of the files, in bytes
        look = bad is not None and bad.most > 0
        for place, row in tqdm(good_rows(path, bad=bad), "rows", disable=not look, leave=False):
            try:
                if look:
                    self.load(place[0], row)
            except InputError as error:
                bad.skip(error)
                continue
            places.extend(place)
            for text in [row["instruction"], *(row.get("plan") or [])]:
                words |= set(split_words(re.sub(TAG, " ", text)))
            names = [*row["input_images"], row["output_image"], row.get("mask")]
            sizes.extend(os.path.getsize(name) if name and os.path.exists(name) else -1 for name in names)
        if not places:
            raise InputError(f"{path}: every row is bad")
        self.rows = Rows(path, places=places)
        self.words = sorted(words - set(Words.special))
        self.checksum = checksum(places, sizes)

    def bucket(self, index):
        return self.size, self.size

    def sample(self, index):
        return self.load(*shuffled(self.rows, self.seed, index))

    def load(self, number, row):
        mask = None
        try:
            target = open_image(row["output_image"])
            images = [open_image(name) for name in row["input_images"]]
            if row.get("mask"):
                mask = open_mask(row["mask"], [*images, target][0])
                mask = np.asarray(shrink_mask(mask, (self.size, self.size))) > 0             # (size, size)
        except InputError as error:
            raise InputError(f"{self.path}:{number}: {error}") from None
        target, *images = (fit(image, self.size) for image in (target, *images))
        blanked = blank(images[0], mask) if mask is not None and images else None
        return Sample(row["instruction"], target, images, mask, blanked, row.get("plan") or [],
                      target_caption=row.get("target_caption") or "")


def open_data(data, split, size, seed, bad=None):
    """The data set that --data names: a toy world or a JSONL file."""
    if data not in WORLDS and not Path(data).exists():
        raise InputError(f"{data}: there is no such file; a .jsonl file is needed, or one of "
                         f"{', '.join(WORLDS)}")
    return Shapes(data, split, seed) if data in WORLDS else Pairs(data, size, seed, bad)


def fit(image, size):
    """Image -> (size, size, 3) uint8"""
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def blank(image, mask):
    """The paper's "masked source" (setup): image (h, w, 3) with the edited region, mask (h, w), gray."""
    return np.where(mask[:, :, None], np.uint8(128), image)


def shuffled(items, seed, index):
    """Item number `index` of an endless stream that reshuffles the items in each epoch."""
    epoch, place = divmod(index, len(items))
    return items[permutation(len(items), f"{seed}/{epoch}")[place]]


@lru_cache(4)
def permutation(n, seed):
    return np.array(random.Random(seed).sample(range(n), n), np.int32)


# ------------------------------------------------------------------------------------------- prompts


def split_words(text):
    return re.findall(r"<[^<>\s]+>|\w+|[^\w\s]", text.lower())


class Words:
    """A tokenizer for a closed list of words, for the small models. (OmniGen's: pretrained/omnigen.py.)"""
    special = ["<image>", "<img>", "</img>", "<cfg>", "<pause>"]      # id 0 stands at image slots and padding
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


def make_prompt(tokenizer, instruction, n_images=0, plan=(), pauses=0):
    """The text of a prompt: instruction and images, then

    - in training with a plan, each of its steps, followed by one pause token (Eq. 7),
    - at inference, `pauses` pause tokens (Eq. 8).

    Pause tokens are ordinary tokens of the prompt. They add positions that the target can attend to, and they
    also shift the target's RoPE positions by as many. Without --p-plan and --max-pauses training never shows
    one."""
    prompt = place_images(instruction, n_images, tokenizer.images_first)
    for step in plan:
        prompt += f" {step} {tokenizer.pause}"
    if pauses:
        prompt += " " + tokenizer.pause * pauses
    return prompt


def place_images(instruction, n, images_first):
    """The instruction, its image tags checked; if it has none, all images go first, or last."""
    if check_tags(instruction, n) or not n:
        return instruction
    images = " ".join(image_tag(k) for k in range(1, n + 1))
    return (f"{images} {instruction}" if images_first else f"{instruction} {images}").strip()


def image_tag(k):
    return f"<img><|image_{k}|></img>"


def tokenize(tokenizer, prompt, sizes):
    """prompt, tokens of each image -> ids and kind, lists of length L; the order of the images.

    In a prompt without images a tag is text, as in OmniGen's negative prompts."""
    text = tokenizer.template.replace("{}", prompt)
    rest = []
    if sizes:
        if not check_tags(prompt, len(sizes)):
            raise InputError(f"a prompt names none of its {len(sizes)} images")
        text, *rest = re.split(TAG, text)                  # text, number, text, number, text
    ids = tokenizer.encode(text)
    kind = [TEXT] * len(ids)
    order = [int(number) - 1 for number in rest[::2]]
    for k, (index, text) in enumerate(zip(order, rest[1::2]), 1):
        ids += [0] * sizes[index]
        kind += [k] * sizes[index]
        piece = tokenizer.encode(text)
        if piece[:1] == [tokenizer.bos]:                   # each piece is encoded alone: one <s> is enough
            piece = piece[1:]
        ids += piece
        kind += [TEXT] * len(piece)
    if not ids:
        raise InputError("the prompt is empty")
    if len(ids) > tokenizer.limit:
        raise InputError(f"{len(ids)} tokens with the images; the model takes at most {tokenizer.limit}")
    return ids, kind, order


def make_condition(tokenizer, prompts, images, patch):
    """prompts: a text per row; images: per row a list of (C, h, w), by their numbers -> Condition."""
    rows = []
    placed = []
    for prompt, own in zip(prompts, images):
        sizes = [x.shape[-2] * x.shape[-1] // patch**2 for x in own]
        ids, kind, order = tokenize(tokenizer, prompt, sizes)
        rows.append((ids, kind))
        placed += [own[k] for k in order]
    L = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([[0] * (L - len(ids)) + ids for ids, _ in rows])             # (B, L)
    kind = torch.tensor([[PADDING] * (L - len(kind)) + kind for _, kind in rows])   # (B, L)
    # stacked, because each tensor costs a message from the worker and a copy to the GPU
    stacks = [torch.stack(list(alike)) for _, alike in itertools.groupby(placed, lambda image: image.shape)]
    return Condition(ids, kind, stacks)


# ------------------------------------------------------------------------------------------- batches

class Batch(NamedTuple):
    x1: torch.Tensor                      # (B, C, h, w) targets
    condition: Condition
    source: torch.Tensor                  # (B, C, h, w) first reference image; anything where there is none
    edit: torch.Tensor                    # (B,) bool: is there one, of the target's size?
    seeds: list                           # one per sample, for the random numbers of the loss


def to_tensor(image):
    """(..., h, w, 3) uint8 -> (..., 3, h, w) in [-1, 1]; a latent stays as it is."""
    if torch.is_tensor(image):
        return image
    return torch.from_numpy(np.float32(image)).movedim(-1, -3) / 127.5 - 1


def to_array(x):
    """(3, h, w) about in [-1, 1] -> (h, w, 3) uint8; what is far from that is no image: InputError."""
    if not x.abs().max() < 1e4:           # also where it is not a number
        raise InputError("the sample is not finite, or beyond all bounds: a weight or the guidance is too "
                         "large; try --text-scale 1 --image-scale 1, or get the weights again")
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()


def training_prompt(tokenizer, sample, rng, p_drop, p_plan, p_masked_source):
    """One sample as the model sees it in training -> (prompt, images).

    With probability p_drop the instruction is emptied; half of those samples lose their images too. They
    train the two weaker branches of guidance. With probability p_plan the plan follows the instruction; with
    probability p_masked_source the blanked source is one more image."""
    drop = rng.random()                   # always three draws, so that no option shifts another
    plan = rng.random()
    blank_source = rng.random()
    images = [to_tensor(image) for image in sample.images]
    if drop < p_drop / 2 or (drop < p_drop and not images):
        return tokenizer.empty, []
    if drop < p_drop:
        return make_prompt(tokenizer, "", len(images)), images
    instruction = place_images(sample.instruction, len(images), tokenizer.images_first)
    if sample.blanked is not None and blank_source < p_masked_source:
        images.append(to_tensor(sample.blanked))
        extra = image_tag(len(images))
        instruction = f"{extra} {instruction}" if tokenizer.images_first else f"{instruction} {extra}"
    return make_prompt(tokenizer, instruction, len(images), sample.plan if plan < p_plan else ()), images


def make_batch(dataset, indices, tokenizer, patch, seed, p_drop, p_plan, p_masked_source, max_gap=0,
               max_pauses=0):
    """The samples of these indices, targets of one size -> Batch. Depends on (seed, index) alone.

    max_gap: the target stands 0 to max_gap positions behind its prompt, as if prompts had many lengths. Else
    a model of short prompts learns the distance by heart, and longer ones (pause tokens) ruin its copying.
    max_pauses: 0 to max_pauses pause tokens end the prompt, as in Eq. 8, which the paper never trains."""
    targets, sources, edit, seeds, prompts, images, gaps = [], [], [], [], [], [], []
    for index in indices:
        sample = dataset.sample(index)
        rng = random.Random(f"batch/{seed}/{index}")
        seeds.append(rng.getrandbits(62))
        prompt, own = training_prompt(tokenizer, sample, rng, p_drop, p_plan, p_masked_source)
        gaps.append(rng.randint(0, max_gap))
        prompts.append(make_prompt(tokenizer, prompt, len(own), pauses=rng.randint(0, max_pauses)))
        images.append(own)
        # without the images that p_drop took away it is text-to-image, as in OmniGen
        comparable = bool(own) and sample.images[0].shape == sample.target.shape
        edit.append(comparable)
        targets.append(sample.target)
        sources.append(sample.images[0] if comparable else sample.target)
    condition = make_condition(tokenizer, prompts, images, patch)
    condition.gap = torch.tensor(gaps)                                              # (B,)
    stack = torch.stack if torch.is_tensor(targets[0]) else np.stack
    return Batch(to_tensor(stack(targets)), condition, to_tensor(stack(sources)), torch.tensor(edit), seeds)


def micro_batches(dataset, size):
    """Group the indices of an endless data set by shape; yield each group of `size` as it fills up."""
    waiting = {}                          # shape -> indices
    for index in itertools.count():
        group = waiting.setdefault(tuple(dataset.bucket(index)), [])
        group.append(index)
        if len(group) == size:
            yield tuple(group)
            group.clear()


class MicroBatches(torch.utils.data.Dataset):
    """Indices -> their Batch, the Draws of its loss, the FLOPs of a training step on it."""

    def __init__(self, flags, dataset, tokenizer, cfg):
        self.flags = flags
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.cfg = cfg

    def __getitem__(self, indices):
        P = self.cfg.patch
        flags = self.flags
        try:
            batch = make_batch(self.dataset, indices, self.tokenizer, P, flags.seed, flags.p_drop,
                               flags.p_plan, flags.p_masked_source, flags.max_gap, flags.max_pauses)
        except InputError as error:
            if torch.utils.data.get_worker_info() is None:
                raise
            return error                  # raised in a worker it would arrive with a traceback
        shape = tuple(batch.x1.shape[1:])
        N = shape[1] * shape[2] // P**2
        # the backward costs two forwards; through frozen weights one
        flop = (2 if flags.lora else 3) * sum(flops(self.cfg, kind, N) for kind in batch.condition.kind)
        return batch, magd.draw(shape, N, batch.seeds, flags.t_mean), flop


def make_loader(flags, items, micro, accumulate, first, rank, world, device):
    """The micro-batches of one process from step `first` on, as an iterator. All processes walk the same list
    of micro-batches; process `rank` takes every world-th of them."""
    order = itertools.islice(micro_batches(items.dataset, micro), flags.steps * accumulate * world)
    own = itertools.islice(order, first * accumulate * world + rank, None, world)
    gpu = device.type == "cuda"
    workers = flags.workers
    if workers is None:
        cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = min(16, cores) if gpu else 0
    return iter(torch.utils.data.DataLoader(items, None, sampler=own, num_workers=workers, pin_memory=gpu))
