"""Edit an image, or make one, with a trained model.

    python sample.py --ckpt out/toy/last.pt --image in.png --prompt "make the red circle blue" --pauses 0,8,16,32 --out edit.png
    python sample.py --init omnigen:OmniGen-v1 --image photo.jpg --prompt "make the boat blue" --out edit.png
    python sample.py --ckpt out/toy/last.pt --data pairs.jsonl --pauses 0,8 --out edits       each row of a file

Euler steps along the flow, three-branch guidance, one encoding of the condition per image (`Transformer.encode`), and the
paper's inference-time scaling (Eq. 8, Sec. 6.1): one candidate per number of pause tokens and per seed, of which one is
selected. Writes the chosen image, a contact sheet with all candidates, and a JSON line for each.
"""
import argparse
import itertools
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from tqdm import tqdm

import magd
from data import (BPE, WORLDS, Words, fit, make_condition, make_prompt, omnigen_folder, open_image, prepare, read_rows, sheet,
                  to_array, to_tensor, whole_lines)
from metrics import judge, pick
from model import VAE, Config, InputError, Transformer, autocast, load_omnigen, load_vae, processes

# ------------------------------------------------------------------------------------------- the sampler


def euler(velocity, x, steps, progress=False):
    """Integrate dx/dt = velocity(x, t) from t = 0 to 1 in equal steps; x stays in float32."""
    for k in tqdm(range(steps), unit="step", disable=not progress):
        x = x + velocity(x, k / steps) / steps
    return x


@torch.no_grad()
def generate(model, tokenizer, prompts, images, x0, steps=50, text_scale=2.5, image_scale=1.5, negative=None,
             low_memory=False, interval=(0.0, 1.0), bf16=True, progress=False):
    """Images for a batch of prompts. images: a list of (C, h, w) per prompt; x0 (B, C, h, w) noise -> (B, C, h, w).

    Guidance: v = v_u + image_scale (v_img - v_u) + text_scale (v_full - v_img), where v_full sees prompt and images, v_img the
    images, v_u the negative prompt (None: the empty one of training). Written as a weighted sum of the three, a branch of
    weight 0 is not run. A prompt without images has v_img = v_u, which leaves v_u + text_scale (v_full - v_u). Where t is outside
    `interval` there is no guidance and only v_full is run.
    """
    device, negative = x0.device, tokenizer.empty if negative is None else negative
    image_scale = image_scale if any(images) else 1.0      # two branches are enough
    only_images = [make_prompt(tokenizer, "", len(own)) if own else negative for own in images]
    branches = [(text_scale, prompts, images), (image_scale - text_scale, only_images, images),
                (1 - image_scale, [negative] * len(prompts), [[] for _ in prompts])]
    branches = [branch for branch in branches if branch[0] != 0]
    # together: all branches are one batch; with low_memory, or if only the first runs outside the interval, each is a batch of its own
    whole = tuple(interval) == (0.0, 1.0)
    groups = [branches] if whole and not low_memory else [[branch] for branch in branches]
    if not whole and text_scale == 0:
        raise InputError("a guidance interval needs a text scale above 0: outside it the full prompt is followed")
    P, N = model.cfg.patch, x0.shape[2] * x0.shape[3] // model.cfg.patch**2

    with autocast(device, bf16):
        caches = []
        for group in groups:
            condition = make_condition(tokenizer, [p for _, texts, _ in group for p in texts],
                                       [own for _, _, lists in group for own in lists], P).to(device)
            caches.append(([weight for weight, _, _ in group], model.encode(condition, N)))

        def velocity(x, t):
            total = 0
            for weights, cache in caches if interval[0] <= t <= interval[1] else [([1.0], caches[0][1])]:
                rows = torch.cat([x] * len(weights))
                time = torch.full((len(rows),), t, device=device)
                v = magd.velocity(model.denoise(rows, time, cache), rows, time, model.cfg.prediction)
                total = total + sum(weight * part for weight, part in zip(weights, v.chunk(len(weights))))
            return total
        return euler(velocity, x0.float(), steps, progress)


def noise(shape, seeds, device):
    """One standard normal of `shape` per seed, the same on every device."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]).to(device)


def select(scores, threshold):
    """Sec. 6.1: among the candidates with faithfulness >= threshold the one of highest adherence; if none passes, the most
    faithful. The other score breaks ties, then the order. scores: list of dicts -> (index, did any pass?)"""
    A, Fa = ([[score[key] for score in scores]] for key in ("adherence", "faithfulness"))
    index = int(pick(A, Fa, "adherence", threshold)[0])
    return (index, True) if index >= 0 else (int(pick(A, Fa, "faithfulness")[0]), False)


def evaluate(model, tokenizer, dataset, indices, steps=20, text_scale=1.0, image_scale=1.0, interval=(0.0, 1.0), pauses=0, plans=False,
             seed=0, batch=128, device="cpu", bf16=True, progress=True):
    """Edit the samples of these indices and let the oracle judge -> a list of dicts: task, complexity, scores, sample, output.

    The noise is a function of the index and of `seed`, so that models, pause counts and guidance are compared on the same noise.
    plans: each instruction is followed by its plan, as in training (Eq. 7); the paper's editor never gets one (Eq. 8).
    """
    size, rows = dataset.world.size, []
    for start in tqdm(range(0, len(indices), batch), desc=dataset.split, disable=not progress, leave=False):
        some = indices[start:start + batch]
        samples = [dataset.sample(index) for index in some]
        prompts = [make_prompt(tokenizer, s.instruction, len(s.images), s.plan if plans else (), pauses) for s in samples]
        images = [[to_tensor(image) for image in s.images] for s in samples]
        x0 = noise((3, size, size), [index + 10**6 * seed for index in some], device)
        x = generate(model, tokenizer, prompts, images, x0, steps, text_scale, image_scale, interval=interval, bf16=bf16)
        for sample, output in zip(samples, map(to_array, x)):
            scores = judge(dataset.world, sample.images[0] if sample.images else None, sample.instruction, output)
            rows.append({"task": sample.task, "complexity": sample.complexity, **scores, "sample": sample, "output": output})
    return rows


# ------------------------------------------------------------------------------------------- checkpoints

def load_checkpoint(path, device="cpu"):
    """A checkpoint of train.py -> model with its averaged weights, tokenizer, the flags it was trained with."""
    state = read_checkpoint(path)
    if state["words"] is None:
        raise InputError(f"{path}: a fine-tuned OmniGen; give --init omnigen:{Path(path).parent / 'export'} instead")
    model = Transformer(Config(**state["config"])).init_weights()
    try:
        model.load_state_dict({**state["model"], **state["ema"]}, strict=True)
    except RuntimeError as error:
        raise InputError(f"{path}: the weights do not fit the model it describes: {str(error).splitlines()[1].strip()}") from None
    return model.to(device).eval(), Words(state["words"]), state["flags"]


def read_checkpoint(path):
    if not Path(path).is_file():
        raise InputError(f"{path}: there is no such checkpoint. `python train.py` makes one.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:            # torch.load raises half a dozen types for a file that is not a checkpoint
        raise InputError(f"{path}: not a checkpoint that can be read ({str(error).splitlines()[0]})") from None
    if not isinstance(state, dict) or not {"config", "model", "ema", "words", "flags", "step"} <= set(state):
        raise InputError(f"{path}: not a checkpoint of train.py")
    return state


# ------------------------------------------------------------------------------------------- the command

def numbers(text):
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 0,8,16,32") from None
    if min(values) < 0 or max(values) > 4096:
        raise argparse.ArgumentTypeError(f"{text!r}: each number should be from 0 to 4096")
    return values


def two_times(text):
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low = high = math.nan
    if not 0 <= low <= high <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not two times from 0 (noise) to 1 (image), such as 0.1,0.6")
    return [low, high]


def width_and_height(text):
    sides = text.split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) > 0 and int(side) % 16 == 0 for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT in multiples of 16, such as 1024x768")
    return [int(side) for side in sides]


def parse_flags():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: sys.exit(f"sample.py: {message}")
    p.add_argument("--ckpt", help="a checkpoint of train.py")
    p.add_argument("--init", help="or omnigen:FOLDER, with the files of OmniGen-v1 in FOLDER")
    p.add_argument("--image", action="append", default=[], help="the image to edit; again for more; none: text-to-image")
    p.add_argument("--prompt", help="the instruction; with --image or without")
    p.add_argument("--data", help="or a JSONL file: edit each of its rows, into the folder --out")
    p.add_argument("--pauses", type=numbers, default=[0], help="numbers of pause tokens, one candidate each")
    p.add_argument("--seeds", type=numbers, default=[0], help="noise seeds, one candidate each")
    p.add_argument("--threshold", type=float, default=0.9, help="least faithfulness of a candidate to be chosen")
    p.add_argument("--steps", type=int, help="Euler steps (20; OmniGen 50)")
    p.add_argument("--text-scale", type=float, help="guidance by the prompt; 1 = none (1; OmniGen 2.5)")
    p.add_argument("--image-scale", type=float, help="guidance by the image; 1 = none (1; OmniGen 1.5)")
    p.add_argument("--guidance-interval", type=two_times, default=[0.0, 1.0], help="times between which there is guidance, such as "
                   "0.1,0.6; elsewhere one branch runs instead of three")
    p.add_argument("--negative-prompt", help="what guidance leads away from; the empty prompt of training if not given")
    p.add_argument("--size", type=width_and_height, default=[1024, 1024], help="WIDTHxHEIGHT of OmniGen's image when there is no --image")
    p.add_argument("--pause-token", default="<|placeholder1|>", help="OmniGen's: a word of its tokenizer.json")
    p.add_argument("--compile", action="store_true", help="torch.compile the blocks: some minutes at the start, for a long --data")
    p.add_argument("--low-memory", action="store_true", help="run the branches of guidance one by one")
    p.add_argument("--out", default="edit.png")
    flags = p.parse_args()
    if bool(flags.ckpt) == bool(flags.init):
        p.error("give either --ckpt, a checkpoint of train.py, or --init omnigen:FOLDER")
    if bool(flags.prompt) == bool(flags.data) or flags.data and flags.image:
        p.error("give either --prompt (and --image), or --data, a JSONL file")
    for name, toy, omnigen in (("steps", 20, 50), ("text_scale", 1.0, 2.5), ("image_scale", 1.0, 1.5)):
        if getattr(flags, name) is None:
            setattr(flags, name, omnigen if flags.init else toy)
    if flags.steps < 1:
        p.error(f"--steps {flags.steps}: at least 1 is needed")
    return flags


class Editor(NamedTuple):
    model: Transformer
    tokenizer: Words | BPE
    vae: VAE | None                       # None: the model works in pixels
    trained: dict | None                  # the flags it was trained with; None: OmniGen

    @property
    def world(self):
        """The toy world whose oracle can judge its edits, or None."""
        return WORLDS.get((self.trained or {}).get("data"))


def load_editor(flags, device):
    if flags.ckpt:
        model, tokenizer, trained = load_checkpoint(flags.ckpt, device)
        editor = Editor(model, tokenizer, None, trained)
    else:
        folder = omnigen_folder(flags.init)
        model = load_omnigen(folder, torch.bfloat16 if device.type == "cuda" else torch.float32, device).eval()
        editor = Editor(model, BPE(folder, flags.pause_token, model.cfg.max_positions), load_vae(folder / "vae", device), None)
    if flags.compile:
        editor.model.compile_blocks()
    return editor


def open_source(path, trained):
    """An image as the model takes it, (h, w, 3) uint8."""
    image = open_image(path)
    if trained is None:
        return prepare(image)
    size = trained["size"]
    if image.size != (size, size):
        tqdm.write(f"{path}: resized from {image.width} x {image.height} to the model's {size} x {size} pixels")
    return fit(image, size)


def edit(editor, flags, sources, instruction, pauses, seed, device, progress=True):
    """One candidate: the sources (h, w, 3) uint8 edited by the instruction -> (h, w, 3) uint8, its number of tokens."""
    model, tokenizer, vae, trained = editor
    images = [to_tensor(source) for source in sources]
    width, height = sources[0].shape[1::-1] if sources else flags.size if trained is None else (trained["size"],) * 2
    shape = (3, height, width)
    if vae:
        images = [vae.encode(image[None].to(device))[0][0] for image in images]           # the mean of the posterior
        shape = (4, height // 8, width // 8)
    x = generate(model, tokenizer, [make_prompt(tokenizer, instruction, len(images), pauses=pauses)], [images],
                 noise(shape, [seed], device), flags.steps, flags.text_scale, flags.image_scale, flags.negative_prompt,
                 flags.low_memory, flags.guidance_interval, progress=progress)
    return to_array((vae.decode(x) if vae else x)[0]), shape[1] * shape[2] // model.cfg.patch**2


def output_path(row, number, pauses, seed):
    """Where the output of a row goes below --out: for a benchmark of tools/prepare.py, as its published scorer expects it below
    the folder of the candidate."""
    folder, kind = f"pauses{pauses}_seed{seed}", row.get("benchmark")
    if kind == "geneval":                                  # its samples of one prompt are our seeds
        return f"pauses{pauses}/{row['id']}/samples/{seed:04d}.png"
    if kind == "magicbrush":                               # each turn starts from the true image of the turn before
        image, turn = row["id"].rsplit("-", 1)
        return f"{folder}/{image}/{image}_{'' if turn == '1' else 'inde_'}{turn}.png"
    if kind == "complex-edit":
        place, complexity = row["id"].rsplit("-", 1)
        return f"{folder}/complexity_{complexity}/{place}.png"
    if kind == "idea-bench":
        return f"{folder}/{row['id']}/0001.jpg"
    return f"{folder}/{number:05d}.png"


def edit_file(editor, flags):
    """Edit every row of a JSONL file, one candidate for each number of pauses and each seed; a line of results.RANK.jsonl each.

    Continues where a killed run stopped. Under torchrun the processes share the rows.
    """
    rank, count, device = processes()
    out = Path(flags.out)
    settings = {key: getattr(flags, key) for key in ("ckpt", "init", "steps", "text_scale", "image_scale", "guidance_interval",
                                                    "negative_prompt", "pause_token", "size")}
    settings["data"] = str(Path(flags.data).resolve())
    try:
        out.mkdir(parents=True, exist_ok=True)
        results = out / f"results.{rank}.jsonl"
        results.write_text("".join(whole_lines(results)))
    except OSError as error:
        raise InputError(f"--out {out}: cannot write there ({error.strerror})") from None
    done = {}
    for file in sorted(out.glob("results.*.jsonl")):
        for row in map(json.loads, whole_lines(file)):
            done[row["id"], row["pauses"], row["seed"]] = row["settings"]
    if any(value != settings for value in done.values()):
        raise InputError(f"--out {out}: it holds results of {next(v for v in done.values() if v != settings)}, not of {settings}")
    rows = read_rows(flags.data, targets=False)
    todo = [(number, row, p, s) for number, row in rows for p in flags.pauses for s in flags.seeds
            if number % count == rank and (number, p, s) not in done]
    with open(results, "a") as file:
        for number, row, pauses, seed in tqdm(todo, desc="edits", disable=rank > 0):
            try:
                sources = [open_source(path, editor.trained) for path in row["input_images"]]
                output, _ = edit(editor, flags, sources, row["instruction"], pauses, seed, device, progress=False)
                scores = {}
                if editor.world:
                    scores = judge(editor.world, sources[0] if sources else None, row["instruction"], output)
                    if sources:
                        scores["identity"] = judge(editor.world, sources[0], row["instruction"], sources[0])
            except InputError as error:
                raise InputError(f"{flags.data}:{number}: {error}") from None
            path = out / output_path(row, number, pauses, seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(output).save(path, quality=95)             # of a JPEG; a PNG has none
            if "geneval" in row:
                (path.parent.parent / "metadata.jsonl").write_text(json.dumps(row["geneval"]) + "\n")
            paths = {"source": row["input_images"][0] if row["input_images"] else None, "target": row["output_image"], "output": path}
            line = {**{key: value for key, value in row.items() if key not in ("input_images", "output_image", "mask", "id")},
                    "id": number, "item": row.get("id"), "pauses": pauses, "seed": seed, **scores, "settings": settings,
                    **{key: value and os.path.relpath(value, out) for key, value in paths.items()}}
            file.write(json.dumps(line) + "\n")
            file.flush()
    print(f"{out}: {len(todo)} new edits, {len(rows) * len(flags.pauses) * len(flags.seeds)} in all" + f" (process {rank})" * (count > 1))


def main():
    flags = parse_flags()
    device = processes()[2]
    if flags.data:
        return edit_file(load_editor(flags, device), flags)
    out = Path(flags.out)
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg") or not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise InputError(f"--out {out}: a .png or .jpg file in a folder that exists and can be written is needed")
    editor = load_editor(flags, device)
    sources = [open_source(path, editor.trained) for path in flags.image]

    records, outputs, start = [], [], time.perf_counter()
    for pauses, seed in itertools.product(flags.pauses, flags.seeds):
        output, tokens = edit(editor, flags, sources, flags.prompt, pauses, seed, device)
        outputs.append(output)
        records.append({"pauses": pauses, "seed": seed})
    seconds = (time.perf_counter() - start) / flags.steps / len(records)
    height, width, _ = outputs[0].shape
    print(f"{width} x {height} pixels, {tokens} tokens; {len(records)} candidates of {flags.steps} steps, {seconds:.3f} s a step")

    chosen = 0
    if editor.world:
        for record, output in zip(records, outputs):
            record.update(judge(editor.world, sources[0] if sources else None, flags.prompt, output))
        chosen, passed = select(records, flags.threshold)
        if not passed:
            print(f"no candidate reaches faithfulness {flags.threshold}: the most faithful one is chosen")
    elif len(records) > 1:
        print("there is no oracle for this model's images: the first candidate is chosen, compare them on the sheet")

    def caption(record):
        scores = "".join(f"\n{key} {record[key]:.2f}" for key in ("adherence", "faithfulness") if key in record)
        return f"{record['pauses']} pauses, seed {record['seed']}{scores}"
    cells = [(source, "source", False) for source in sources[:1]]
    cells += [(output, caption(record), k == chosen) for k, (record, output) in enumerate(zip(records, outputs))]
    sheet([cells], out.with_name(f"{out.stem}_sheet.png"), scale=max(1, 160 // width), title=flags.prompt)
    Image.fromarray(outputs[chosen]).save(out, quality=95)
    with open(out.with_name(f"{out.stem}.jsonl"), "w") as file:
        for k, record in enumerate(records):
            file.write(json.dumps({**record, "chosen": k == chosen, "prompt": flags.prompt, "images": flags.image}) + "\n")
    print(f"chose {caption(records[chosen])}".replace("\n", ", "))
    print(f"wrote {out}, {out.stem}_sheet.png, {out.stem}.jsonl")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"sample.py: {error}")
