"""How good is an edit? The oracle of the toy world, which knows; CLIP and DINO for photographs; selection.

    python metrics.py toy --ckpt out/toy/last.pt             exact, adherence and faithfulness by task and complexity
    python metrics.py score DIR --clip FOLDER --dino FOLDER  CLIP-I, DINO, CLIP-T, CLIP-Dir, L1, L2 of edits by sample.py --data
    python metrics.py select DIR                             the paper's selection among candidates (Sec. 6.1, Table 3)
    python metrics.py judged FILE                            the averages of an MLLM's judgements (tools/mllm.py judge)

The oracle's adherence: was the instruction carried out? faithfulness: is everything else as it was? exact: both, in full. They are
judged from source, instruction and output alone, by reading the scene back from the pixels; the target image is never looked at.
"""
import argparse
import json
import math
import re
import sys
import time
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from data import (BACKGROUNDS, CAPTIONS, COLORS, EDITS, LIGHTS, NUMBERS, RELATIONS, STYLES, WHOLE, WORLDS, Scene, Shapes, Thing,
                  add_command, corner, lit, open_image, plural, read_instruction, related, sprite)
from model import InputError, check_shapes, optional, processes, read_json

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

def names_of(edits, task):
    return [f"{edit.color} {edit.shape}" for edit in edits if edit.task == task]


def carried_out(world, edit, before, after, readable, edits=()):
    """Is this one Edit of scene `before` true in scene `after`? Unreadable cells show nothing. edits: all of the instruction, since
    what one of them removes leaves its cell to what another adds."""
    seen = {t.cell: t for t in after.things if readable[t.cell]}
    if edit.task in WHOLE:
        return getattr(after, WHOLE[edit.task][0]) == edit.value
    name = f"{edit.color} {edit.shape}"
    if edit.task == "add":
        for thing in seen.values():
            if thing.name != name or thing.cell in [t.cell for t in before.things if t.name not in names_of(edits, "remove")]:
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
        gone = old.cell not in seen or seen[old.cell].name in names_of(edits, "add")
        return bool(readable[old.cell]) and name not in [t.name for t in seen.values()] and gone
    new = seen.get(old.cell)
    wanted = (edit.shape, edit.value) if edit.task == "color" else (edit.value, edit.color)
    return new is not None and (new.shape, new.color) == wanted


def kept(world, edits, before, after, readable):
    """Share of what the instruction leaves alone that is as it was: background, light, style, and each cell's content.

    A thing that changes colour or shape is redrawn, so its place and size may be off by a pixel. What is added may take one
    cell that is empty or becomes so.
    """
    tasks = [edit.task for edit in edits]
    facts = [getattr(before, key) == getattr(after, key) for task, (key, _) in WHOLE.items() if task in world.edits
             and task not in tasks and (task != "style" or before.things and after.things)]            # only things show a style
    was, now = ({t.cell: t for t in scene.things} for scene in (before, after))
    by_name = {f"{edit.color} {edit.shape}": edit for edit in edits if edit.shape}
    may_appear = names_of(edits, "add")
    for cell in np.ndindex(world.grid, world.grid):
        old, new = was.get(cell), now.get(cell)
        edit = by_name.get(old.name) if old else None
        removed = edit is not None and edit.task == "remove"
        if removed and new in (old, None):
            same = True                                                # gone is what was asked for; still there is no harm
        elif edit and edit.task in ("color", "local"):
            rest = "shape" if edit.task == "color" else "color"
            same = new is not None and getattr(new, rest) == getattr(old, rest) and \
                max(abs(a - b) for a, b in zip(new[3:], old[3:])) <= 1  # size, y, x
        elif (old is None or removed) and new is not None and new.name in may_appear:
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
        adherence = float(np.mean([carried_out(world, edit, before, after, readable, edits) for edit in edits]))
        faithfulness = kept(world, edits, before, after, readable)
    return {"exact": adherence == 1 and faithfulness == 1, "adherence": adherence, "faithfulness": faithfulness}


# ------------------------------------------------------------------------------------------- CLIP and DINO

class Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width, heads, mlp, eps, quick):
        super().__init__()
        self.heads, self.quick = heads, quick
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, mlp), nn.Linear(mlp, width)

    def forward(self, x, causal):                                                         # (B, L, D)
        y = self.norm1(x)
        q, k, v = (rearrange(f(y), "b l (h e) -> b h l e", h=self.heads) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)                     # (B, H, L, E)
        x = x + self.out(rearrange(y, "b h l e -> b l (h e)"))
        y = self.fc1(self.norm2(x))                                                       # (B, L, mlp)
        return x + self.fc2(y * torch.sigmoid(1.702 * y) if self.quick else F.gelu(y))


class Tower(nn.Module):
    """CLIP's image tower, DINO (both cut an image into patches), or CLIP's text tower (vocab given; causal)."""

    def __init__(self, width, heads, layers, mlp, length, eps, patch=None, vocab=None, dino=False):
        super().__init__()
        lead = (1,) if dino else ()                       # the released files store some parameters with a batch of one
        if vocab:
            self.token = nn.Embedding(vocab, width)
        else:
            self.cls = nn.Parameter(torch.zeros(*2 * lead, width))
            self.patch = nn.Conv2d(3, width, patch, patch, bias=dino)
        self.position = nn.Parameter(torch.zeros(*lead, length, width))
        self.before = nn.Identity() if vocab or dino else nn.LayerNorm(width, eps=eps)
        self.layers = nn.ModuleList(Layer(width, heads, mlp, eps, not dino) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=eps)

    def forward(self, x):                                 # (B, 3, h, w) pixels or (B, L) ids
        text = hasattr(self, "token")
        if text:
            x = self.token(x)                                                             # (B, L, D)
        else:
            x = rearrange(self.patch(x), "b d h w -> b (h w) d")
            x = torch.cat([self.cls.expand(len(x), 1, -1), x], dim=1)                     # (B, 1 + patches, D)
        x = self.before(x + self.position)
        for layer in self.layers:
            x = layer(x, text)
        return x                                                                          # (B, L, D), before the last norm


class CLIP(nn.Module):
    """cfg: the config.json of openai/clip-vit-base-patch32 or another CLIP of that form."""

    def __init__(self, cfg):
        super().__init__()
        v, t = cfg["vision_config"], cfg["text_config"]
        sizes = [(c["hidden_size"], c["num_attention_heads"], c["num_hidden_layers"], c["intermediate_size"]) for c in (v, t)]
        self.vision = Tower(*sizes[0], 1 + (v["image_size"] // v["patch_size"])**2, v.get("layer_norm_eps", 1e-5), patch=v["patch_size"])
        self.text = Tower(*sizes[1], t["max_position_embeddings"], t.get("layer_norm_eps", 1e-5), vocab=t["vocab_size"])
        self.visual_projection = nn.Linear(sizes[0][0], cfg["projection_dim"], bias=False)
        self.text_projection = nn.Linear(sizes[1][0], cfg["projection_dim"], bias=False)
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.size = v["image_size"]

    @torch.no_grad()
    def image_features(self, pixels):                                                     # (B, 3, size, size) -> (B, projection)
        return self.visual_projection(self.vision.norm(self.vision(pixels)[:, 0]))

    @torch.no_grad()
    def text_features(self, ids):                         # (B, L); the end token has the largest id, the first of it counts
        x = self.text.norm(self.text(ids))
        return self.text_projection(x[torch.arange(len(x)), ids.argmax(dim=1)])           # (B, projection)


class DINO(Tower):
    @torch.no_grad()
    def image_features(self, pixels):                     # (B, 3, h, w) -> (B, D): the CLS token after the last norm
        return self.norm(self(pixels))[:, 0]


# the only place that knows the names of the released files: (ours, theirs)
CLIP_NAMES = [(r"^(vision|text)\.layers\.", r"\1_model.encoder.layers."), (r"^vision\.cls$", "vision_model.embeddings.class_embedding"),
              (r"^vision\.patch\.", "vision_model.embeddings.patch_embedding."), (r"^text\.token\.", "text_model.embeddings.token_embedding."),
              (r"^(vision|text)\.position$", r"\1_model.embeddings.position_embedding.weight"),
              (r"^vision\.before\.", "vision_model.pre_layrnorm."), (r"^vision\.norm\.", "vision_model.post_layernorm."),
              (r"^text\.norm\.", "text_model.final_layer_norm."), (r"\.norm([12])\.", r".layer_norm\1."), (r"\.(fc[12])\.", r".mlp.\1."),
              (r"\.([qkv])\.", r".self_attn.\1_proj."), (r"\.out\.", ".self_attn.out_proj.")]
DINO_NAMES = [(r"^cls$", "embeddings.cls_token"), (r"^position$", "embeddings.position_embeddings"), (r"^norm\.", "layernorm."),
              (r"^patch\.", "embeddings.patch_embeddings.projection."), (r"^layers\.", "encoder.layer."), (r"\.norm1\.", ".layernorm_before."),
              (r"\.norm2\.", ".layernorm_after."), (r"\.q\.", ".attention.attention.query."), (r"\.k\.", ".attention.attention.key."),
              (r"\.v\.", ".attention.attention.value."), (r"\.out\.", ".attention.output.dense."), (r"\.fc1\.", ".intermediate.dense."),
              (r"\.fc2\.", ".output.dense.")]
DINO_FILE_NAMES = [(r"^cls$", "cls_token"), (r"^position$", "pos_embed"), (r"^patch\.", "patch_embed.proj."), (r"^layers\.", "blocks."),
                   (r"\.([qkv])\.", r".attn.\1."), (r"\.out\.", ".attn.proj."), (r"\.(fc[12])\.", r".mlp.\1.")]


def published(name, names):
    for ours, theirs in names:
        name = re.sub(ours, theirs, name)
    return name


def read_weights(path):
    """model.safetensors or pytorch_model.bin of a folder, or a .pth file -> {name: tensor}"""
    path = Path(path)
    files = [path / "model.safetensors", path / "pytorch_model.bin"] if path.is_dir() else [path]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise InputError(f"{path}: {' or '.join(file.name for file in files)} is not there")
    try:
        if file.suffix == ".safetensors":
            return optional("safetensors.torch").load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:                            # what a broken file makes these readers raise has a dozen types
        raise InputError(f"{file}: these weights cannot be read ({str(error).splitlines()[0]})") from None


def fill(model, weights, names, path):
    """Strict loading under published names."""
    weights = {key: value for key, value in weights.items() if not key.endswith("position_ids")}       # a counter, no weight
    ours = {published(key, names): value for key, value in model.state_dict().items()}
    check_shapes(path, *({key: tuple(value.shape) for key, value in some.items()} for some in (ours, weights)))
    model.load_state_dict({key: weights[published(key, names)].float() for key in model.state_dict()}, assign=True)
    return model.eval()


def load_clip(folder, device="cpu"):
    """A folder of the layout of openai/clip-vit-base-patch32 or clip-vit-large-patch14 -> CLIP, its tokenizer."""
    cfg = read_json(Path(folder) / "config.json")
    if cfg.get("model_type") != "clip" or cfg["vision_config"].get("hidden_act", "quick_gelu") != "quick_gelu":
        raise InputError(f"{folder}/config.json: model_type {cfg.get('model_type')!r}; a CLIP of OpenAI is needed, with quick_gelu")
    with torch.device("meta"):
        model = CLIP({"projection_dim": 512, **cfg})
    return fill(model, read_weights(folder), CLIP_NAMES, folder).to(device), ClipTokenizer(folder)


def load_dino(path, device="cpu", eps=1e-6):
    """facebook/dino-vits16 as a folder, or the original dino_deitsmall16_pretrain.pth -> DINO. eps of its norms: that of the original
    code, which MagicBrush's evaluator runs; the config.json of the folder says 1e-12."""
    weights, path = read_weights(path), Path(path)
    if path.is_dir():
        cfg = read_json(path / "config.json")
        if cfg.get("model_type") != "vit":
            raise InputError(f"{path}/config.json: model_type {cfg.get('model_type')!r}; the ViT of DINO is needed")
        sizes = [cfg[key] for key in ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")]
        length, patch, names = 1 + (cfg["image_size"] // cfg["patch_size"])**2, cfg["patch_size"], DINO_NAMES
    else:
        if "pos_embed" not in weights or "blocks.0.mlp.fc1.weight" not in weights:
            raise InputError(f"{path}: not the original file of DINO: it has {', '.join(sorted(weights)[:3])}, ...")
        width, layers = weights["cls_token"].shape[-1], 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks."))
        sizes = [width, width // 64, layers, len(weights["blocks.0.mlp.fc1.weight"])]
        length, patch, names = weights["pos_embed"].shape[1], weights["patch_embed.proj.weight"].shape[-1], DINO_FILE_NAMES
        for key in [key for key in weights if ".attn.qkv." in key]:
            for part, value in zip("qkv", weights.pop(key).chunk(3)):
                weights[key.replace("qkv", part)] = value
    with torch.device("meta"):
        model = DINO(*sizes, length, eps, patch=patch, dino=True)
    return fill(model, weights, names, path).to(device)


class ClipTokenizer:
    """Byte-level BPE in lower case, from vocab.json and merges.txt (or the tokenizer.json that holds both)."""

    def __init__(self, folder):
        t, folder = optional("tokenizers"), Path(folder)
        if (folder / "tokenizer.json").is_file():
            self.bpe = t.Tokenizer.from_file(str(folder / "tokenizer.json"))
            self.bpe.no_padding()
            self.bpe.no_truncation()
        else:
            read_json(folder / "vocab.json")              # a missing or broken file has a clearer message here
            self.bpe = t.Tokenizer(t.models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"), end_of_word_suffix="</w>",
                                                          unk_token="<|endoftext|>"))
            self.bpe.normalizer = t.normalizers.Sequence([t.normalizers.NFC(), t.normalizers.Replace(t.Regex(r"\s+"), " "),
                                                          t.normalizers.Lowercase()])
            words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
            self.bpe.pre_tokenizer = t.pre_tokenizers.Sequence([t.pre_tokenizers.Split(t.Regex(words), "removed", invert=True),
                                                                t.pre_tokenizers.ByteLevel(add_prefix_space=False)])
        self.start, self.end = (self.bpe.token_to_id(token) for token in ("<|startoftext|>", "<|endoftext|>"))

    def __call__(self, texts, length=77):
        """-> ids (B, length), and how many of the texts were too long and lost their end."""
        rows = [self.bpe.encode(text, add_special_tokens=False).ids for text in texts]
        ids = torch.full((len(rows), length), self.end)
        for k, row in enumerate(rows):
            row = [self.start, *row[:length - 2]]
            ids[k, :len(row)] = torch.tensor(row)
        return ids, sum(len(row) > length - 2 for row in rows)


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pixels(image, resize, crop=None, mean=CLIP_MEAN, std=CLIP_STD, resample=Image.Resampling.BICUBIC):
    """PIL image -> (3, h, w): the shorter side to `resize` (a pair: both sides), centre crop, [0, 1], normalised."""
    if isinstance(resize, int):
        short = min(image.size)
        resize = tuple(resize if side == short else int(resize * side / short) for side in image.size)
    image = image.resize(resize, resample)
    if crop:
        left, top = (int(round((side - crop) / 2)) for side in image.size)
        image = image.crop((left, top, left + crop, top + crop))
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def clip_pixels(image, size=224):
    """OpenAI's transform, as the MagicBrush evaluator uses it."""
    return pixels(image, size, size)


def dino_pixels(image):
    """The transform of the MagicBrush evaluator: shorter side 256, crop 224."""
    return pixels(image, 256, 224, IMAGENET_MEAN, IMAGENET_STD)


def direction_pixels(image, size=224):
    """InstructPix2Pix's for CLIP-Dir: bicubic straight to a square, on floats."""
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    x = F.interpolate(x, size=(size, size), mode="bicubic", align_corners=False)[0]
    return (x - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


def direction(source, output, source_text, output_text):
    """CLIP-Dir of features (B, D): the cosine of the change of the images with the change of the captions.

    Each is normalised before the subtraction. nan where two captions are alike: undefined, to be counted.
    """
    a, b = (F.normalize(y, dim=-1) - F.normalize(x, dim=-1) for x, y in ((source, output), (source_text, output_text)))
    cosine = F.cosine_similarity(a, b, dim=-1)
    return torch.where(b.norm(dim=-1) < 1e-6, torch.nan, cosine)       # an unchanged image has cosine 0


# ------------------------------------------------------------------------------------------- scores of a toy model

SCORES = ("exact", "adherence", "faithfulness")


def means(rows):
    return {key: sum(row[key] for row in rows) / len(rows) for key in SCORES}


def breakdown(rows):
    """Rows of scores -> {group: number and means}: all; where both are there, edits and captions; each task; each complexity."""
    groups = {"all": rows, "edits": [row for row in rows if row["task"] not in CAPTIONS],
              "captions": [row for row in rows if row["task"] in CAPTIONS]}
    if not groups["edits"] or not groups["captions"]:
        del groups["edits"], groups["captions"]
    for task in [*EDITS, "several", *CAPTIONS]:
        groups[task] = [row for row in rows if row["task"] == task]
    if len({row["complexity"] for row in rows}) > 1:
        for k in range(1, 5):
            groups[f"complexity {k}"] = [row for row in rows if row["complexity"] == k and row["task"] not in CAPTIONS]
    return {name: {"number": len(group), **means(group)} for name, group in groups.items() if group}


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
                    value = group[name][score]
                    pen.rectangle([x, y + k * height, x + 1 + 150 * value, y + (k + 1) * height - 2], fill=colors[k])
                    pen.text((x + 156, y + k * height - 1), f"{value:.2f}", fill="black", font=font)
    page.save(path)


def check_folder(path):
    """Before minutes of work: can the file be written in the end?"""
    if path and not Path(path).parent.is_dir():
        raise InputError(f"{path}: there is no folder {Path(path).parent}")


def toy_model(path, device="cpu"):
    """load_checkpoint of sample.py, for a model of a toy world."""
    from sample import load_checkpoint                        # here, since sample.py imports this file for its oracle
    model, tokenizer, trained = load_checkpoint(path, device)
    if trained["data"] not in WORLDS:
        raise InputError(f"{path} was trained on {trained['data']}: the oracle only knows {', '.join(WORLDS)}")
    return model, tokenizer, trained


def toy(flags):
    """Table by task and complexity of a toy model on both held-out sets, between the two ends of the scale."""
    from sample import evaluate
    device = processes()[2]
    model, tokenizer, trained = toy_model(flags.ckpt, device)
    groups, seconds, world = {}, 0.0, flags.data or trained["data"]
    if WORLDS[world].size != trained["size"]:
        raise InputError(f"--data {world}: its images have {WORLDS[world].size} pixels a side, those of {flags.ckpt} {trained['size']}")
    for split in ("iid", "novel"):
        dataset = Shapes(world, split, trained["seed"])
        start = time.perf_counter()
        rows = evaluate(model, tokenizer, dataset, range(flags.examples), flags.steps, flags.text_scale, flags.image_scale,
                        flags.guidance_interval, flags.pauses, flags.plans, device=device)
        seconds += time.perf_counter() - start
        groups[split] = breakdown(rows)
        print(f"\n{split}: {flags.examples} examples of {world}, {flags.steps} Euler steps, {flags.pauses} pause tokens"
              + ", plans given" * flags.plans)
        print(f"{'':16}{'number':>8}" + "".join(f"{score:>14}" for score in SCORES))
        for name, values in groups[split].items():
            print(f"{name:16}{values['number']:8}" + "".join(f"{values[score]:14.3f}" for score in SCORES))
        edits = [row["sample"] for row in rows if row["sample"].images]
        for name, output in (("output = source", lambda s: s.images[0]), ("output = target", lambda s: s.target)):
            if not edits:
                continue                                               # a few examples can all be captions
            values = means([judge(dataset.world, s.images[0], s.instruction, output(s)) for s in edits])
            print(f"{name:16}{len(edits):8}" + "".join(f"{values[score]:14.3f}" for score in SCORES))
    picture = Path(flags.out or Path(flags.ckpt).with_name("toy.png"))
    bars(f"{flags.ckpt}: {flags.examples} held-out examples each", groups, picture)
    settings = {"data": world, **{key: getattr(flags, key) for key in ("steps", "pauses", "plans", "text_scale", "image_scale",
                                                                       "guidance_interval")}}
    picture.with_suffix(".json").write_text(json.dumps({**groups, **settings, "seconds": seconds}))
    print(f"\nsampled and judged in {seconds:.1f} s; wrote {picture} and {picture.with_suffix('.json')}")


# ------------------------------------------------------------------------------------------- scores of real edits

EDIT_METRICS = ("clip_i", "dino", "clip_t", "clip_dir", "l1", "l2", "copied")


def read_results(folder, scored=True):
    """The lines that `sample.py --data` wrote (results*.jsonl; scored: scores.jsonl where `score` has run), in a fixed order."""
    results, scores, rows = sorted(Path(folder).glob("results*.jsonl")), Path(folder) / "scores.jsonl", []
    files = [scores] if scored and scores.exists() else results
    for file in files:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            try:
                rows.append(json.loads(line))
                rows[-1]["id"], rows[-1]["pauses"], rows[-1]["seed"]                       # have to be there
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{file}:{number}: not a line of sample.py --data ({error!r})") from None
    if not rows:
        raise InputError(f"{folder}: no results there; make them with: sample.py --data FILE.jsonl --out {folder}")
    edits = sum(len(file.read_text().splitlines()) for file in results)
    if files == [scores] and edits not in (0, len(rows)):
        raise InputError(f"{scores}: scores of {len(rows)} edits, but there are {edits}; run `metrics.py score {folder}` again")
    return sorted(rows, key=lambda row: (str(row["id"]), row["pauses"], row["seed"]))


def distance(image, reference):
    """L1 and L2 of two PIL images in [0, 1]; the first is resized to the second."""
    a, b = (np.asarray(x, np.float64) / 255 for x in (image.resize(reference.size), reference))
    return float(np.abs(a - b).mean()), float(np.square(a - b).mean())


def edit_metrics(rows, folder, clip, tokenizer, dino, against, device):
    """Rows of results with the metrics of each, and those of the source in the place of the output as row["identity"].

    against: what CLIP-I, DINO, L1 and L2 compare the output with, "target" (MagicBrush) or "source" (Emu-Edit). A metric that
    is not defined for a row (no source, no caption, two captions alike) is None.
    """
    images = [{key: open_image(folder / row[key]) if row.get(key) else None for key in ("source", "target", "output")} for row in rows]

    def features(encode, transform, key):                  # -> {place of the row: feature}, of the rows that have this image
        some = [k for k, own in enumerate(images) if own[key]]
        if not some:
            return {}
        return dict(zip(some, encode(torch.stack([transform(images[k][key]) for k in some]).to(device)).float().cpu()))
    views = {"clip": (clip.image_features, lambda x: clip_pixels(x, clip.size)), "dino": (dino.image_features, dino_pixels),
             "direct": (clip.image_features, lambda x: direction_pixels(x, clip.size))}
    f = {(view, key): features(*views[view], key) for view in views for key in {"source", "output", against}}
    texts = [row.get("source_caption") or "" for row in rows] + [row.get("target_caption") or "" for row in rows]
    ids, cut = tokenizer(texts)
    captions = clip.text_features(ids.to(device)).float().cpu()

    def scores(k, key):
        row, own = rows[k], images[k]
        found = dict.fromkeys(EDIT_METRICS)
        reference, target_caption = own[against], captions[len(rows) + k]
        if own[key] and reference:
            for metric, view in (("clip_i", "clip"), ("dino", "dino")):
                found[metric] = F.cosine_similarity(f[view, key][k], f[view, against][k], dim=0).item()
            found["l1"], found["l2"] = distance(own[key], reference)
        if own[key] and row.get("target_caption"):
            found["clip_t"] = F.cosine_similarity(f["clip", key][k], target_caption, dim=0).item()
        if own[key] and own["source"]:
            found["copied"] = float(distance(own[key], own["source"])[0] < 0.01)
            if row.get("source_caption") and row.get("target_caption") and row["source_caption"] != row["target_caption"]:
                value = direction(f["direct", "source"][k], f["direct", key][k], captions[k], target_caption).item()
                found["clip_dir"] = None if math.isnan(value) else value
        return found
    return [{**row, **scores(k, "output"), "identity": scores(k, "source")} for k, row in enumerate(rows)], cut


def average(values):
    """Mean of what is defined, and how many that are."""
    values = [value for value in values if value is not None]
    return (sum(values) / len(values) if values else None), len(values)


def markdown(header, lines):
    cells = [["-" if cell is None else f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *cells])


def score(flags):
    """CLIP-I, DINO, CLIP-T, CLIP-Dir, L1, L2 and the share of copies of a folder of edits, by task, beside the unchanged source."""
    device, folder = processes()[2], Path(flags.folder)
    clip, tokenizer = load_clip(flags.clip, device)
    dino = load_dino(flags.dino, device)
    rows = read_results(folder, scored=False)
    against = flags.against or ("target" if all(row.get("target") for row in rows) else "source")
    done, cut = [], 0
    for start in tqdm(range(0, len(rows), flags.batch), desc="scores"):
        some, more = edit_metrics(rows[start:start + flags.batch], folder, clip, tokenizer, dino, against, device)
        done, cut = done + some, cut + more
    tasks = sorted({row.get("task") or "" for row in done} - {""})
    groups = {"all": done, **{task: [row for row in done if row.get("task") == task] for task in tasks}}
    lines, report = [], {}
    for name, group in groups.items():
        for what, values in ((name, group), (f"{name}, output = source", [row["identity"] for row in group])):
            means = {metric: average([row[metric] for row in values]) for metric in EDIT_METRICS}
            report[what] = {metric: {"mean": mean, "number": number} for metric, (mean, number) in means.items()}
            lines.append([what, len(group), *(mean for mean, _ in means.values())])
    undefined = len(done) - report["all"]["clip_dir"]["number"]
    encoder, transform = f"CLIP {Path(flags.clip).name}", "shorter side 224 bicubic, centre crop"
    labels = {"clip_i": f"cosine of image features, {encoder}, {transform}; output against {against}",
              "dino": f"cosine of CLS features, {Path(flags.dino).name}, shorter side 256 bicubic, centre crop 224; output against {against}",
              "clip_t": f"cosine of output and target_caption, {encoder}, {transform}",
              "clip_dir": f"cosine of the change of image and captions, {encoder}, bicubic straight to a square; undefined for {undefined} "
                          f"of {len(done)} (no or equal captions, no source)",
              "l1, l2": f"output resized to the {against}, in [0, 1]", "copied": "share of outputs with L1 < 0.01 to the source",
              "captions": f"source_caption and target_caption of the data file; {cut} were longer than 77 tokens and cut"}
    text = markdown(["group", "number", *EDIT_METRICS], lines) + "\n\n" + "\n".join(f"- {key}: {value}" for key, value in labels.items())
    (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in done))
    (folder / "scores.json").write_text(json.dumps({"groups": report, "labels": labels}, indent=1))
    (folder / "scores.md").write_text(text + "\n")
    print(text + f"\n\nwrote {folder / 'scores.md'}, scores.json, scores.jsonl")


# ------------------------------------------------------------------------------------------- selection among candidates (Sec. 6.1, Table 3)

LIMITS = {"dino": 0.91, "clip_dir": 0.09, "faithfulness": 0.9, "adherence": 1.0}          # of Table 3; of the toy's oracle


def pick(A, Fa, first, least=-math.inf):
    """Of each item's candidates, A and Fa (items, candidates), the best by `first` ("adherence" or "faithfulness") among those
    whose other score is at least `least`; the other score breaks ties -> index (items,), -1 where none passes."""
    ranked, other = (A, Fa) if first == "adherence" else (Fa, A)
    return np.array([max((k for k in range(len(a)) if b[k] >= least), key=lambda k: (a[k], b[k]), default=-1)
                     for a, b in zip(ranked, other)])


def protocol(A, Fa, min_faithfulness, min_adherence, resamples=1000):
    """Table 3: A, Fa (items, candidates) -> {rule: {adherence, faithfulness: mean and 95% interval, recall: share of items that pass}}."""
    passing = pick(A, Fa, "adherence", min_faithfulness)
    rules = {"best adherence": pick(A, Fa, "adherence"), "best faithfulness": pick(A, Fa, "faithfulness"),
             f"best adherence, faithfulness >= {min_faithfulness:g}": passing,
             f"best faithfulness, adherence >= {min_adherence:g}": pick(A, Fa, "faithfulness", min_adherence),
             "threshold, else the most faithful": np.where(passing >= 0, passing, pick(A, Fa, "faithfulness"))}
    n = len(A)
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), resamples).astype(np.float32)      # bootstrap over items
    table = {}
    for rule, index in rules.items():
        passed, row = index >= 0, {"recall": float((index >= 0).mean())}
        for name, values in (("adherence", A), ("faithfulness", Fa)):
            value = np.where(passed, np.take_along_axis(values, index.clip(0)[:, None], 1)[:, 0], 0)
            if passed.any():
                weight = counts @ passed.astype(np.float32)
                means = (counts @ value.astype(np.float32))[weight > 0] / weight[weight > 0]
                row[name] = {"mean": float(value.sum() / passed.sum()), "interval": np.percentile(means, [2.5, 97.5]).tolist()}
            else:
                row[name] = {"mean": None, "interval": [None, None]}
        table[rule] = row
    return table


def candidate_sets(rows, adherence, faithfulness):
    """Rows of results -> {name: (A, Fa)}: pause counts at one seed; as many seeds at one count (the control); each count alone."""
    items = {}
    for row in rows:
        items.setdefault(str(row["id"]), {})[row["pauses"], row["seed"]] = row
    pauses, seeds = (sorted({row[key] for row in rows}) for key in ("pauses", "seed"))
    sets = {"pause counts " + ", ".join(map(str, pauses)): [(p, seeds[0]) for p in pauses]}
    if len(seeds) >= len(pauses) > 1:
        sets["seeds " + ", ".join(map(str, seeds[:len(pauses)])) + " (control)"] = [(pauses[0], s) for s in seeds[:len(pauses)]]
    sets |= {f"{p} pauses alone": [(p, seeds[0])] for p in pauses}
    undefined = {name for name, own in items.items() if any(row.get(key) is None for row in own.values() for key in (adherence, faithfulness))}
    kept = [name for name in sorted(items) if name not in undefined]
    if not kept:
        raise InputError(f"no item has {adherence} and {faithfulness} for all its candidates; run `metrics.py score` first")
    for name in kept:
        for candidate in {c for wanted in sets.values() for c in wanted} - set(items[name]):
            raise InputError(f"item {name} has no candidate with {candidate[0]} pauses and seed {candidate[1]}; run sample.py to its end")
    scores = {title: tuple(np.array([[items[name][c][key] for c in wanted] for name in kept], float) for key in (adherence, faithfulness))
              for title, wanted in sets.items()}
    return scores, kept, len(undefined), [next(iter(items[name].values())).get("identity") or {} for name in kept]


def plot(panels, path):
    """Save line charts side by side. panels: (title, x label, y label, {series: [(x, y, low, high)]}); low and high None: no bar."""
    colors, font = ["#3465a4", "#f57900", "#73d216", "#75507b", "#cc0000", "#555753", "#c4a000", "#06989a"], ImageFont.load_default(12)
    page = Image.new("RGB", (460 * len(panels), 380), "white")
    pen = ImageDraw.Draw(page)
    for k, (title, across, up, series) in enumerate(panels):
        points = [point for line in series.values() for point in line]
        lows = [(p[0], v) for p in points for v in p[1:] if v is not None]
        (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*lows))
        x1, y1, y0 = x1 if x1 > x0 else x0 + 1, y1 + 0.05 * (y1 - y0 or 1), y0 - 0.05 * (y1 - y0 or 1)

        def at(x, y):
            return 460 * k + 60 + 370 * (x - x0) / (x1 - x0), 300 - 240 * (y - y0) / (y1 - y0)
        pen.text((460 * k + 60, 6), title, fill="black", font=font)
        pen.rectangle([at(x0, y1), at(x1, y0)], outline="#bbbbbb")
        for step in range(5):
            x, y = x0 + (x1 - x0) * step / 4, y0 + (y1 - y0) * step / 4
            pen.text((at(x, y0)[0] - 10, 304), f"{x:.3g}", fill="black", font=font)
            pen.text((460 * k + 18, at(x0, y)[1] - 7), f"{y:.3g}", fill="black", font=font)
        pen.text((460 * k + 200, 320), across, fill="black", font=font)
        pen.text((460 * k + 18, 26), up, fill="black", font=font)
        for s, (name, line) in enumerate(series.items()):
            color = colors[s % len(colors)]
            pen.line([at(x, y) for x, y, *_ in line], fill=color, width=2)
            for x, y, low, high in line:
                pen.ellipse([at(x, y)[0] - 3, at(x, y)[1] - 3, at(x, y)[0] + 3, at(x, y)[1] + 3], fill=color)
                if low is not None:
                    pen.line([at(x, low), at(x, high)], fill=color)
            pen.text((460 * k + 60 + 200 * (s % 2), 338 + 13 * (s // 2)), name, fill=color, font=font)
    page.save(path)


def frontier(A, Fa):
    """Mean (faithfulness, adherence) of "threshold, else the most faithful" for 21 thresholds: the trade-off curve."""
    most = pick(A, Fa, "faithfulness")
    points = []
    for threshold in np.quantile(Fa, np.linspace(0, 1, 21)):
        index = pick(A, Fa, "adherence", threshold)
        index = np.where(index >= 0, index, most)[:, None]
        points.append((*(float(np.take_along_axis(x, index, 1).mean()) for x in (Fa, A)), None, None))
    return points


def select(flags):
    """Table 3 of the paper over a folder of candidates: pause counts, the same number of seeds as control, each count alone."""
    folder, rows = Path(flags.folder), read_results(flags.folder)
    toy = "adherence" in rows[0]
    adherence = flags.adherence or ("adherence" if toy else "clip_dir")
    faithfulness = flags.faithfulness or ("faithfulness" if toy else "dino")
    own = ((flags.min_faithfulness, faithfulness), (flags.min_adherence, adherence))
    limits = [LIMITS.get(key, 0.0) if limit is None else limit for limit, key in own]
    sets, kept, undefined, identity = candidate_sets(rows, adherence, faithfulness)
    tables = {name: protocol(A, Fa, *limits) for name, (A, Fa) in sets.items()}

    def shown(mean, interval):
        return "-" if mean is None else f"{mean:.4f} [{interval[0]:.4f}, {interval[1]:.4f}]"
    lines = []
    for name, table in tables.items():
        alone = name.endswith("alone")                    # one candidate: every rule takes it
        for rule, row in list(table.items())[:1 if alone else None]:
            scores = [shown(**row[key]) for key in ("adherence", "faithfulness")]
            lines.append([name, "as it is" if alone else rule, *scores, f"{row['recall']:.3f}"])
    same = [average([own.get(key) for own in identity])[0] for key in (adherence, faithfulness)]
    lines.append(["output = source", "as it is", *("-" if value is None else f"{value:.4f}" for value in same), "1.000"])
    text = markdown(["candidates", "rule", f"adherence ({adherence})", f"faithfulness ({faithfulness})", "recall"], lines)
    text += f"\n\n{len(kept)} items; {undefined} more where a score is undefined are left out. Intervals: 95%, bootstrap over items."
    counts = sorted({row["pauses"] for row in rows})
    alone = {key: [(p, t["mean"], *t["interval"]) for p in counts for t in [tables[f"{p} pauses alone"]["best adherence"][key]]]
             for key in ("adherence", "faithfulness")}
    plot([("each pause count alone", "pause tokens", "mean score", alone),
          ("threshold on faithfulness, then adherence", "faithfulness", "adherence",
           {name: frontier(*scores) for name, scores in sets.items()})], folder / "selection.png")
    (folder / "selection.json").write_text(json.dumps({"adherence": adherence, "faithfulness": faithfulness, "items": len(kept),
                                                       "undefined": undefined, "identity": same, "tables": tables}, indent=1))
    (folder / "selection.md").write_text(text + "\n")
    print(text + f"\n\nwrote {folder / 'selection.md'}, selection.json, selection.png")


# ------------------------------------------------------------------------------------------- the judgements of an MLLM

def complex_edit(rows):
    """Complex-Edit: rows with IF, IP, PQ in 0..10 -> the means, and overall, the mean of each sample's own three."""
    scores = {key: sum(row[key] for row in rows) / len(rows) for key in ("IF", "IP", "PQ")}
    return {**scores, "overall": sum(scores.values()) / 3}


def madi_average(rows, if_high=7.0, idp_low=3.0, idp_high=7.0, if_low=3.0, weight=0.5):
    """The paper's aggregate of IF and IDP: samples with IF > if_high and IDP < idp_low are left out (another image, not an edit);
    IDP > idp_high with IF < if_low (nearly a copy) weighs `weight`; else (IF + IDP) / 2. The paper gives the first two numbers; the
    other three are ours. -> average, number left out, number with less weight."""
    kept = [row for row in rows if not (row["IF"] > if_high and row["IDP"] < idp_low)]
    copies = [row["IDP"] > idp_high and row["IF"] < if_low for row in kept]
    weights = [weight if copy else 1.0 for copy in copies]
    total = sum(w * (row["IF"] + row["IDP"]) / 2 for w, row in zip(weights, kept))
    return (total / sum(weights) if any(weights) else None), len(rows) - len(kept), sum(copies)


def judged(flags):
    """Means of what `tools/mllm.py judge` wrote, by Complex-Edit's rule and by the paper's."""
    rows = []
    if not Path(flags.file).is_file():
        raise InputError(f"{flags.file}: there is no such file; tools/mllm.py judge makes one")
    for number, line in enumerate(Path(flags.file).read_text().splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise InputError(f"{flags.file}:{number}: not JSON ({error})") from None
    if not rows or not ({"IF", "IP", "PQ"} <= set(rows[0]) or {"IF", "IDP"} <= set(rows[0])):
        raise InputError(f"{flags.file}: no judgements; each line needs IF, PQ and IP (Complex-Edit) or IDP (the paper)")
    if "IP" in rows[0]:
        print("Complex-Edit: " + "  ".join(f"{key} {value:.3f}" for key, value in complex_edit(rows).items()) + f"  ({len(rows)} samples)")
        rows = [{**row, "IDP": row["IP"]} for row in rows]
    whole = [row for row in rows if row["IF"] is not None and row["IDP"] is not None]
    value, left_out, less = madi_average(whole, flags.if_high, flags.idp_low, flags.idp_high, flags.if_low, flags.weight)
    print(f"the paper's average of IF and IDP: {'none' if value is None else f'{value:.3f}'}  ({len(whole)} samples: {left_out} with IF > "
          f"{flags.if_high:g} and IDP < {flags.idp_low:g} left out, {less} with IDP > {flags.idp_high:g} and IF < {flags.if_low:g} at weight "
          f"{flags.weight:g}; {len(rows) - len(whole)} without both scores)")


def main():
    from sample import two_times
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: sys.exit(f"metrics.py: {message}")
    add = partial(add_command, p.add_subparsers(required=True), p.error)
    command = add(toy)
    command.add_argument("--ckpt", required=True, help="checkpoint of train.py")
    command.add_argument("--steps", type=int, default=20, help="Euler steps")
    command.add_argument("--examples", type=int, default=512, help="of each held-out set")
    command.add_argument("--data", choices=WORLDS, help="the world of the examples; the one of the training if not given")
    command.add_argument("--pauses", type=int, default=0, help="pause tokens after each prompt")
    command.add_argument("--plans", action="store_true", help="give each instruction its plan, as in training")
    command.add_argument("--text-scale", type=float, default=1.0, help="guidance by the prompt; 1 = none")
    command.add_argument("--image-scale", type=float, default=1.0, help="guidance by the image; 1 = none")
    command.add_argument("--guidance-interval", type=two_times, default=[0.0, 1.0], help="times between which there is guidance")
    command.add_argument("--out", help="the picture; toy.png beside the checkpoint if not given")
    command = add(score)
    command.add_argument("folder", help="made by sample.py --data")
    command.add_argument("--clip", required=True, help="folder with a CLIP of OpenAI, such as clip-vit-base-patch32")
    command.add_argument("--dino", required=True, help="folder dino-vits16, or dino_deitsmall16_pretrain.pth")
    command.add_argument("--against", choices=("source", "target"), help="target where every row has one, else source, if not given")
    command.add_argument("--batch", type=int, default=32)
    command = add(select)
    command.add_argument("folder", help="made by sample.py --data --pauses ... --seeds ..., then scored")
    for key in ("adherence", "faithfulness"):
        command.add_argument(f"--{key}", help="the score that stands for it; the oracle's, or CLIP-Dir and DINO")
        command.add_argument(f"--min-{key}", type=float, help="threshold; 0.91 for DINO, 0.09 for CLIP-Dir as in Table 3")
    command = add(judged)
    command.add_argument("file", help="made by tools/mllm.py judge")
    for name, value in (("if-high", 7.0), ("idp-low", 3.0), ("idp-high", 7.0), ("if-low", 3.0), ("weight", 0.5)):
        command.add_argument(f"--{name}", type=float, default=value, help="see madi_average")
    flags = p.parse_args()
    if min(getattr(flags, "examples", 1), getattr(flags, "steps", 1), getattr(flags, "batch", 1)) < 1 or getattr(flags, "pauses", 0) < 0:
        p.error("--examples, --steps and --batch should be at least 1, --pauses at least 0")
    check_folder(getattr(flags, "out", None))
    flags.run(flags)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"metrics.py: {error}")
