"""Edit an image, or make one, with a trained model.

    python sample.py --ckpt out/toy/last.pt --image in.png --prompt "make the red circle blue" --out edit.png
    python sample.py --init omnigen:OmniGen-v1 --image photo.jpg --prompt "make the boat blue" --out edit.png
    python sample.py --ckpt out/toy/last.pt --data pairs.jsonl --out edits            each row of a file

Euler steps along the flow, three-branch guidance with the condition encoded once per output
(`Transformer.encode`), and the paper's inference-time scaling (Eq. 8, Sec. 6.1): one candidate for each
number of pause tokens and each seed. On the toy the oracle selects one, among photographs CLIP and DINO
(--clip, --dino); without a judge the first is taken. Writes the chosen image, a contact sheet of all
candidates, and a JSON line for each.
"""
import itertools
import math
import os
import re
import textwrap
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import magd
from common.cli import (COUNT, GUIDANCE, NONE_OR_MORE, SHARE, add_device, numbers, parser, run_script,
                        two_times, utf8_text, width_and_height)
from common.devices import autocast, compile_blocks, is_first, processes
from common.files import InputError, write_jsonl
from common.images import open_image, save_image, sheet
from common.results import edit_file
from common.rows import TAG
from data import Words, fit, make_condition, make_prompt, to_array, to_tensor
from model import Transformer
from pretrained.judges import load_judges, photo_scores
from pretrained.lora import add_lora, fill_lora, load_lora, merge_lora
from pretrained.omnigen import BPE, load_omnigen, omnigen_folder, prepare
from pretrained.vae import VAE, load_vae
from scale.checkpoints import config_of, read_checkpoint
from scale.cost import sampling_memory
from toy.oracle import judge
from toy.world import WORLDS, World

# ------------------------------------------------------------------------------------------- the sampler


def euler(velocity, x, steps, jump=1.0, progress=False):
    """Integrate dx/dt = velocity(x, t) from t = 0 to 1; x stays in float32. Steps are equal, except that with
    jump < 1 the last one goes from t = jump to 1: a model that saw few times near 1 is at its best below."""
    times = [k / steps for k in range(steps + 1)]
    if jump < 1 and steps > 1:
        times = [jump * k / (steps - 1) for k in range(steps)] + [1.0]
    for t, after in tqdm(list(itertools.pairwise(times)), unit="step", disable=not progress):
        x = x + velocity(x, t) * (after - t)
    return x


@torch.no_grad()
def generate(model, tokenizer, prompts, images, x0, steps=50, text_scale=2.5, image_scale=1.5, negative=None,
             low_memory=False, interval=(0.0, 1.0), bf16=True, progress=False):
    """Images for a batch of prompts. images: a list of (C, h, w) per prompt; x0 noise -> (B, C, h, w) both.

    Guidance mixes three velocities: v_full (prompt and images), v_img (images only) and v_u (the negative
    prompt; None: the empty prompt of training):

        v = v_u + image_scale (v_img - v_u) + text_scale (v_full - v_img)

    A prompt without images has v_img = v_u. Outside `interval`, a range of t, only v_full is used. With
    low_memory or an interval, branches run one after the other instead of as one batch; with low_memory
    their keys and values wait in the CPU's memory."""
    if interval != (0.0, 1.0) and text_scale == 0:
        raise InputError("a guidance interval needs a text scale above 0: outside it only the prompt counts")
    device = x0.device
    P = model.cfg.patch
    N = x0.shape[2] * x0.shape[3] // P**2
    negative = tokenizer.empty if negative is None else negative
    if not any(images):
        image_scale = 1.0                                  # v_img = v_u: two branches are enough
    only_images = [make_prompt(tokenizer, "", len(own)) if own else negative for own in images]
    # the formula, sorted by velocity
    branches = [(text_scale, prompts, images),
                (image_scale - text_scale, only_images, images),
                (1 - image_scale, [negative] * len(prompts), [[]] * len(prompts))]
    branches = [branch for branch in branches if branch[0] != 0]      # v_full stays first
    weights = [weight for weight, _, _ in branches]
    # outside an interval v_full runs alone, so each branch needs a cache of its own
    together = not low_memory and interval == (0.0, 1.0)

    with autocast(device, bf16):
        caches = []
        for group in [branches] if together else [[branch] for branch in branches]:
            texts = [text for _, own, _ in group for text in own]
            references = [own for _, _, lists in group for own in lists]
            condition = make_condition(tokenizer, texts, references, P).to(device)
            caches.append(model.encode(condition, N).to("cpu" if low_memory else device))

        def velocities(x, t, caches):
            v = []
            for cache in caches:
                n = len(cache.layers[0][0]) // len(x)              # branches in this cache
                x_t = x.repeat(n, 1, 1, 1)                                   # (n * B, C, h, w)
                times = torch.full((len(x_t),), t, device=device)
                output = model.denoise(x_t, times, cache.to(device))
                v += magd.velocity(output, x_t, times, model.cfg.prediction).chunk(n)
            return v                                                                # of (B, C, h, w)

        def guided(x, t):
            if not interval[0] <= t <= interval[1]:
                return velocities(x, t, caches[:1])[0]                              # v_full
            return sum(weight * v for weight, v in zip(weights, velocities(x, t, caches)))
        return euler(guided, x0.float(), steps, model.cfg.jump, progress)


def noise(shape, seeds, device):
    """Standard normal noise of `shape`, one per seed, the same on every device."""
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(device)


# ------------------------------------------------------------------------------------------- selection

def best(scores, first, least=-math.inf):
    """Index of the candidate with the highest score `first` ("adherence" or "faithfulness") among those whose
    other score is at least `least`; None if there is none. Ties go to the higher other score, then to the
    earlier candidate. scores: one dict per candidate."""
    other = "faithfulness" if first == "adherence" else "adherence"
    passing = [k for k, score in enumerate(scores) if score[other] >= least]
    return max(passing, key=lambda k: (scores[k][first], scores[k][other]), default=None)


def select(scores, threshold):
    """Sec. 6.1: the candidate of highest adherence among those with faithfulness >= threshold; if there is
    none, the most faithful one -> (index, did any pass?)"""
    chosen = best(scores, "adherence", threshold)
    if chosen is None:
        return best(scores, "faithfulness"), False
    return chosen, True


ADHERENCE = ("adherence", "clip_dir", "clip_t")            # whichever was measured
FAITHFULNESS = ("faithfulness", "dino")


def choose(records, threshold):
    """`select` on the scores of an oracle or of CLIP and DINO. threshold None: 0.9 for the oracle, 0.91 for
    DINO (Table 3). Without a source all are faithful; without scores: None."""
    names = [next((key for key in keys if key in records[0]), None) for keys in (ADHERENCE, FAITHFULNESS)]
    if names[0] is None:
        return None
    if threshold is None:
        threshold = 0.91 if names[1] == "dino" else 0.9
    return select([{"adherence": record[names[0]], "faithfulness": record.get(names[1], 1.0)}
                   for record in records], threshold)


# ------------------------------------------------------------------------------------------- models

class Editor(NamedTuple):
    """A model with all that an edit needs."""
    model: Transformer
    tokenizer: Words | BPE
    vae: VAE | None                       # None: the model works in pixels
    size: int | None                      # pixels of a side; None: as OmniGen prepares an image
    world: World | None                   # the toy world whose oracle can judge its edits


def load_checkpoint(path, device="cpu"):
    """A checkpoint of train.py -> Editor with its averaged weights, the flags it was trained with."""
    state = read_checkpoint(path)
    if state["words"] is None:
        raise InputError(f"{path}: a fine-tuned OmniGen, whose tokenizer and autoencoder are elsewhere: add "
                         f"--init omnigen:FOLDER, the folder it was started from")
    try:
        flags = state["flags"]
        data, size = flags["data"], flags["size"]
        tokenizer = Words(state["words"])
        cfg = replace(config_of(state), vocab=len(tokenizer))
        model = Transformer(cfg).init_weights()
        if flags.get("lora"):                              # an adapter of the model that its --init named
            model.load_state_dict(load_checkpoint(flags["init"])[0].model.state_dict())
        world = WORLDS.get(data)
    except Exception as error:            # whatever odd sizes lead to
        raise InputError(f"{path}: no model can be made from it ({error})") from None
    fill(model, state, path)
    return Editor(merge_lora(model).to(device).eval(), tokenizer, None, size, world), flags


def fill(model, state, path):
    """Give a model the weights of a checkpoint, the averaged ones if it has averages; or add its adapter."""
    weights = {**state["model"], **state["ema"]}
    if state["flags"].get("lora"):
        add_lora(model, *(state["flags"][key] for key in ("lora", "lora_alpha", "lora_mlp")))
        return fill_lora(model, weights, path)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        line = str(error).splitlines()[1].strip()
        raise InputError(f"{path}: the weights do not fit the model: {line}") from None


def omnigen_editor(flags, dtype, device, shard=None):
    """The OmniGen-v1 that --init omnigen:FOLDER names; shard: see load_omnigen."""
    folder = omnigen_folder(flags.init)
    model = load_omnigen(folder, dtype, device, shard)
    tokenizer = BPE(folder, flags.pause_token, model.cfg.max_positions)
    return Editor(model, tokenizer, load_vae(folder / "vae", device), size=None, world=None)


def load_editor(flags, device):
    """What --ckpt, --init or both name: with both, a fine-tuned OmniGen at any of its checkpoints."""
    if not flags.init:
        editor, _ = load_checkpoint(flags.ckpt, device)
    else:
        editor = omnigen_editor(flags, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
        editor.model.eval()
        if flags.ckpt:
            fill(editor.model, read_checkpoint(flags.ckpt), flags.ckpt)
    if flags.lora:
        load_lora(editor.model, flags.lora)
    editor.model.to(device)
    if flags.compile:
        compile_blocks(editor.model)
    return editor


# ------------------------------------------------------------------------------------------- one edit

def open_source(path, size):
    """An image as the model takes it, (h, w, 3) uint8."""
    image = open_image(path)
    if size is None:
        return prepare(image)
    if image.size != (size, size):
        tqdm.write(f"{path}: resized from {image.width} x {image.height} to the model's {size} x {size}")
    return fit(image, size)


def edit(editor, flags, sources, instruction, pauses, seed, device, progress=True):
    """Edit the sources (h, w, 3) uint8 by the instruction -> (h, w, 3) uint8."""
    images = [to_tensor(source) for source in sources]
    if sources:
        height, width, _ = sources[0].shape
    else:
        width, height = (editor.size, editor.size) if editor.size else flags.size
    shape = (3, height, width)
    if editor.vae:
        editor.vae.to(device)             # with --low-memory it is elsewhere while the transformer runs
        # the mean of the posterior, not a draw
        images = [editor.vae.encode(image[None].to(device))[0][0] for image in images]
        editor.vae.to("cpu" if flags.low_memory else device)
        shape = (4, height // 8, width // 8)
    prompt = make_prompt(editor.tokenizer, instruction, len(images), pauses=pauses)
    x0 = noise(shape, [seed], device)
    x = generate(editor.model, editor.tokenizer, [prompt], [images], x0, flags.steps, flags.text_scale,
                 flags.image_scale, flags.negative_prompt, flags.low_memory, flags.guidance_interval,
                 progress=progress)
    return to_array((editor.vae.to(device).decode(x) if editor.vae else x)[0])


def preview(editor, dataset, path, flags, device, n=8):
    """A sheet of n edits of a data set from fixed noise: sources with instructions, outputs, targets.

    -> mean absolute difference from the target, in [0, 1], of the outputs and of the unchanged sources"""
    def pixels(x):
        return to_array(editor.vae.decode(x[None].to(device))[0] if editor.vae else x)
    rows = [[], [], []]
    differences = []
    for index in range(n):
        sample = dataset.sample(index)
        images = [to_tensor(image).to(device) for image in sample.images]
        x1 = to_tensor(sample.target)
        prompt = make_prompt(editor.tokenizer, sample.instruction, len(images))
        x = generate(editor.model, editor.tokenizer, [prompt], [images], noise(x1.shape, [index], device),
                     flags.eval_steps, flags.text_scale, flags.image_scale, low_memory=editor.vae is not None,
                     bf16=flags.bf16)
        output = pixels(x[0])
        target = pixels(x1)
        source = pixels(images[0]) if images else np.full_like(target, 255)
        rows[0].append((source, textwrap.fill(sample.instruction, 24), False))
        rows[1].append((output, "output", False))
        rows[2].append((target, "target", False))
        if images and source.shape == target.shape:
            differences.append([np.abs(x - target.astype(float)).mean() / 255 for x in (output, source)])
    if is_first():
        sheet(rows, path, max(1, 128 // max(output.shape)))
    return np.mean(differences or [[math.nan] * 2], axis=0).tolist()


# ------------------------------------------------------------------------------------------- a file

def scores_of(editor, judges, sources, instruction, output, source_caption, target_caption):
    """What the oracle of the toy, or CLIP and DINO, say of an output -> {score: number}, perhaps none."""
    source = sources[0] if sources else None
    if editor.world:
        return judge(editor.world, source, instruction, output)
    if judges is None:
        return {}
    text = target_caption or re.sub(f"<img>{TAG}</img>", " ", instruction)
    return photo_scores(judges, source, output, source_caption, text)


def edit_row(editor, flags, device, judges, row, pauses, seed):
    """Edit one row -> output (h, w, 3) uint8, its scores if there is a judge."""
    sources = [open_source(path, editor.size) for path in row["input_images"]]
    output = edit(editor, flags, sources, row["instruction"], pauses, seed, device, progress=False)
    captions = (row.get("source_caption"), row.get("target_caption"))
    scores = scores_of(editor, judges, sources, row["instruction"], output, *captions)
    if editor.world and sources:
        scores["identity"] = judge(editor.world, sources[0], row["instruction"], sources[0])
    return output, scores


# ------------------------------------------------------------------------------------------- one prompt

def edit_prompt(editor, flags, judges, device):
    """All candidates of one prompt: the chosen one, a sheet and a JSONL file."""
    out = Path(flags.out)
    page = out.with_name(f"{out.stem}_sheet.png")
    for path in (out, page):
        if os.path.realpath(path) in map(os.path.realpath, flags.image):
            raise InputError(f"--out {out}: it would overwrite the source {path}")
    sources = [open_source(path, editor.size) for path in flags.image]
    if editor.vae:
        height, width = sources[0].shape[:2] if sources else flags.size[::-1]
        need = sampling_memory(editor.model, width * height, len(sources), flags.low_memory)
        print(f"memory: about {need / 1e9:.1f} GB on the device, all candidates one by one")
    records = []
    outputs = []
    start = time.perf_counter()
    for pauses, seed in itertools.product(flags.pauses, flags.seeds):
        output = edit(editor, flags, sources, flags.prompt, pauses, seed, device)
        outputs.append(output)
        scores = scores_of(editor, judges, sources, flags.prompt, output, flags.source_caption,
                           flags.target_caption)
        records.append({"pauses": pauses, "seed": seed, **scores})
    seconds = (time.perf_counter() - start) / flags.steps / len(records)
    height, width, _ = outputs[0].shape
    print(f"{width} x {height} pixels; {len(records)} candidates of {flags.steps} steps, {seconds:.3f} s a "
          f"step, all included")

    choice = choose(records, flags.threshold)
    chosen, passed = choice or (0, True)
    if not passed:
        print("no candidate is as faithful as --threshold asks for: the most faithful one is chosen")
    if "clip_t" in records[0]:
        text = "target caption" if flags.target_caption else "instruction"
        print(f"adherence is CLIP-T of the {text}; CLIP-Dir needs an image and two captions that differ")
    elif choice is None and len(records) > 1:
        print("no judge of this model's images (--clip, --dino): the first candidate is chosen, compare them "
              "on the sheet")

    cells = [(source, "source", False) for source in sources[:1]]
    for k, (record, output) in enumerate(zip(records, outputs)):
        cells.append((output, caption(record), k == chosen))
        record.update(chosen=k == chosen, prompt=flags.prompt, images=flags.image)
    sheet([cells], page, scale=max(1, 160 // width), title=flags.prompt)
    save_image(outputs[chosen], out)
    write_jsonl(out.with_name(f"{out.stem}.jsonl"), records)
    print("chose " + caption(records[chosen]).replace("\n", ", "))
    print(f"wrote {out}, {page.name}, {out.stem}.jsonl")


def caption(record):
    scores = [f"{key} {record[key]:.2f}" for key in ADHERENCE + FAITHFULNESS if key in record]
    return "\n".join([f"{record['pauses']} pauses, seed {record['seed']}", *scores])


# ------------------------------------------------------------------------------------------- the command

def parse_flags():
    p = parser(__doc__)
    p.add_argument("--ckpt", help="a checkpoint of train.py")
    p.add_argument("--init", help="omnigen:FOLDER, with OmniGen-v1's files in FOLDER; with --ckpt too, a "
                   "checkpoint of its fine-tuning")
    p.add_argument("--lora", help="folder of an adapter of that model, in PEFT's format")
    p.add_argument("--image", action="append", default=[], help="image to edit; repeat it for more")
    p.add_argument("--prompt", type=utf8_text, help="the instruction; without --image a caption")
    p.add_argument("--data", help="instead of --prompt: a JSONL file; edits each row, into the folder --out")
    p.add_argument("--pauses", type=numbers(4096), default=[0],
                   help="numbers of pause tokens, one candidate each")
    p.add_argument("--seeds", type=numbers(2**63 - 1), default=[0], help="noise seeds, one candidate each")
    p.add_argument("--threshold", type=SHARE, help="least faithfulness to be chosen (oracle 0.9, DINO 0.91)")
    p.add_argument("--clip", help="judge photographs: a folder clip-vit-base-patch32, with --dino")
    p.add_argument("--dino", help="folder dino-vits16, or dino_deitsmall16_pretrain.pth")
    for which in ("source", "target"):
        p.add_argument(f"--{which}-caption", type=utf8_text, help=f"says what the {which} shows; for CLIP")
    p.add_argument("--steps", type=COUNT, help="Euler steps (20; OmniGen 50)")
    p.add_argument("--text-scale", type=GUIDANCE, help="guidance by the prompt; 1 = none (1; OmniGen 2.5)")
    p.add_argument("--image-scale", type=GUIDANCE, help="guidance by the image; 1 = none (1; OmniGen 1.5)")
    p.add_argument("--guidance-interval", type=two_times, default=(0.0, 1.0),
                   help="times with guidance, such as 0.1,0.6; elsewhere one branch runs, not three")
    p.add_argument("--negative-prompt", type=utf8_text,
                   help="what guidance leads away from, instead of the empty prompt")
    p.add_argument("--size", type=width_and_height, default=[1024, 1024],
                   help="WIDTHxHEIGHT of OmniGen's image when there is no --image")
    p.add_argument("--pause-token", default="<|placeholder1|>", help="OmniGen: a word of its tokenizer.json")
    p.add_argument("--compile", action="store_true", help="torch.compile: minutes at the start")
    p.add_argument("--low-memory", action="store_true",
                   help="run the branches of guidance one by one; what waits is on the CPU")
    add_device(p)
    p.add_argument("--skip-bad", type=NONE_OR_MORE, default=0, help="--data: bad rows to leave out (0)")
    p.add_argument("--out", default="edit.png", help="the image; with --data a folder")
    flags = p.parse_args()
    if not flags.ckpt and not flags.init:
        p.error("give --ckpt, a checkpoint of train.py, or --init omnigen:FOLDER")
    if bool(flags.clip) != bool(flags.dino):
        p.error("--clip and --dino judge together: give both or none")
    if flags.lora and flags.ckpt and flags.init:
        p.error("--lora adds an adapter to what --init or --ckpt names; give one of the two")
    if bool(flags.prompt) == bool(flags.data) or flags.data and flags.image:
        p.error("give either --prompt (and --image), or --data, a JSONL file")
    defaults = (50, 2.5, 1.5) if flags.init else (20, 1.0, 1.0)
    for name, default in zip(("steps", "text_scale", "image_scale"), defaults):
        if getattr(flags, name) is None:
            setattr(flags, name, default)
    return flags


def main():
    flags = parse_flags()
    rank, world, device = processes(flags.device)
    out = Path(flags.out)
    if not flags.data:
        writable = out.parent.is_dir() and os.access(out.parent, os.W_OK)
        if out.suffix.lower() not in (".png", ".jpg", ".jpeg") or not writable:
            raise InputError(f"--out {out}: a .png or .jpg file in a folder that can be written is needed")
    editor = load_editor(flags, device)
    judges = load_judges(flags.clip, flags.dino, device) if flags.clip and not editor.world else None
    if flags.data:
        weights = [flags.ckpt or omnigen_folder(flags.init) / "config.json"]
        weights += [Path(flags.lora) / "adapter_config.json"] if flags.lora else []
        edit_file(flags, weights, partial(edit_row, editor, flags, device, judges), choose, rank, world)
    else:
        edit_prompt(editor, flags, judges, device)


if __name__ == "__main__":
    run_script(main)
