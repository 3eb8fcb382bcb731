"""How good is an edit? The oracle of the toy world, which knows; and the tables and figures made from it.

    python metrics.py toy --ckpt out/toy/last.pt             exact, adherence and faithfulness by task and complexity
    python metrics.py grid --ckpt A.pt --ckpt B.pt           the same edits by several models, as a picture

adherence: was the instruction carried out? faithfulness: is everything else as it was? exact: both, in full. They are judged
from source, instruction and output alone, by reading the scene back from the pixels; the target image is never looked at.
"""
import argparse
import json
import math
import re
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from data import (BACKGROUNDS, CAPTIONS, COLORS, EDITS, LIGHTS, NUMBERS, RELATIONS, STYLES, WORLDS, Scene, Shapes, Thing,
                  corner, lit, open_image, plural, read_instruction, related, sheet, sprite, wrap)
from model import InputError, optional, read_json

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

def carried_out(world, edit, before, after, readable):
    """Is this one Edit of scene `before` true in scene `after`? Unreadable cells show nothing."""
    seen = {t.cell: t for t in after.things if readable[t.cell]}
    if edit.task in ("background", "global", "style"):
        return {"background": after.background, "global": after.light, "style": after.style}[edit.task] == edit.value
    name = f"{edit.color} {edit.shape}"
    if edit.task == "add":
        for thing in seen.values():
            if thing.name != name or thing.cell in [t.cell for t in before.things]:
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
        return bool(readable[old.cell]) and name not in [t.name for t in seen.values()] and old.cell not in seen
    new = seen.get(old.cell)
    wanted = (edit.shape, edit.value) if edit.task == "color" else (edit.value, edit.color)
    return new is not None and (new.shape, new.color) == wanted


def kept(world, edits, before, after, readable):
    """Share of what the instruction leaves alone that is as it was: background, light, style, and each cell's content.

    A thing that changes colour or shape is redrawn, so its place and size may be off by a pixel. What is added may take one
    empty cell.
    """
    tasks = [edit.task for edit in edits]
    facts = [] if "background" in tasks else [before.background == after.background]
    if "global" in world.edits and "global" not in tasks:
        facts.append(before.light == after.light)
    if "style" in world.edits and "style" not in tasks and before.things and after.things:
        facts.append(before.style == after.style)
    was, now = ({t.cell: t for t in scene.things} for scene in (before, after))
    by_name = {f"{edit.color} {edit.shape}": edit for edit in edits if edit.shape}
    may_appear = [f"{edit.color} {edit.shape}" for edit in edits if edit.task == "add"]
    for cell in np.ndindex(world.grid, world.grid):
        old, new = was.get(cell), now.get(cell)
        edit = by_name.get(old.name) if old else None
        if edit and edit.task == "remove":
            same = new in (old, None)                                  # gone is what was asked for; still there is no harm
        elif edit and edit.task in ("color", "local"):
            rest = "shape" if edit.task == "color" else "color"
            same = new is not None and getattr(new, rest) == getattr(old, rest) and \
                max(abs(a - b) for a, b in zip(new[3:], old[3:])) <= 1  # size, y, x
        elif old is None and new is not None and new.name in may_appear:
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
        adherence = float(np.mean([carried_out(world, edit, before, after, readable) for edit in edits]))
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
    """Strict loading under published names; a tensor that is missing, unknown or of another shape is named."""
    weights = {key: value for key, value in weights.items() if not key.endswith("position_ids")}       # a counter, no weight
    ours = {published(key, names): value for key, value in model.state_dict().items()}
    wrong = [f"{key} is missing" for key in ours if key not in weights] + [f"{key} is unknown" for key in weights if key not in ours]
    wrong += [f"{key} has the shape {tuple(weights[key].shape)} instead of {tuple(value.shape)}" for key, value in ours.items()
              if key in weights and weights[key].shape != value.shape]
    if wrong:
        raise InputError(f"{path}: the weights do not fit: {'; '.join(wrong[:3])}" + f"; and {len(wrong) - 3} more" * (len(wrong) > 3))
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


def load_dino(path, device="cpu", eps=None):
    """facebook/dino-vits16 as a folder, or the original dino_deitsmall16_pretrain.pth -> DINO.

    eps of the norms: what config.json says (1e-12), and 1e-6 for the original file, unless given.
    """
    weights, path = read_weights(path), Path(path)
    if path.is_dir():
        cfg = read_json(path / "config.json")
        if cfg.get("model_type") != "vit":
            raise InputError(f"{path}/config.json: model_type {cfg.get('model_type')!r}; the ViT of DINO is needed")
        sizes = [cfg[key] for key in ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")]
        length, patch, names = 1 + (cfg["image_size"] // cfg["patch_size"])**2, cfg["patch_size"], DINO_NAMES
        eps = eps or cfg["layer_norm_eps"]
    else:
        if "pos_embed" not in weights or "blocks.0.mlp.fc1.weight" not in weights:
            raise InputError(f"{path}: not the original file of DINO: it has {', '.join(sorted(weights)[:3])}, ...")
        width, layers = weights["cls_token"].shape[-1], 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks."))
        sizes = [width, width // 64, layers, len(weights["blocks.0.mlp.fc1.weight"])]
        length, patch, names, eps = weights["pos_embed"].shape[1], weights["patch_embed.proj.weight"].shape[-1], DINO_FILE_NAMES, eps or 1e-6
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

    Each is normalised before the subtraction. nan where a change is zero (two captions alike): undefined, to be counted.
    """
    a, b = (F.normalize(y, dim=-1) - F.normalize(x, dim=-1) for x, y in ((source, output), (source_text, output_text)))
    cosine = F.cosine_similarity(a, b, dim=-1)
    return torch.where(b.norm(dim=-1) < 1e-6, torch.nan, cosine)       # an unchanged image has cosine 0


# ------------------------------------------------------------------------------------------- tables and figures

SCORES = ("exact", "adherence", "faithfulness")


def means(rows):
    return {key: sum(row[key] for row in rows) / len(rows) for key in SCORES}


def breakdown(rows):
    """Rows of scores -> {group: (number, means)}: all, each task, and each complexity where there are several."""
    groups = {"all": rows}
    for task in [*EDITS, "several", *CAPTIONS]:
        groups[task] = [row for row in rows if row["task"] == task]
    if len({row["complexity"] for row in rows}) > 1:
        for k in range(1, 5):
            groups[f"complexity {k}"] = [row for row in rows if row["complexity"] == k and row["task"] not in CAPTIONS]
    return {name: (len(group), means(group)) for name, group in groups.items() if group}


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
                    value = group[name][1][score]
                    pen.rectangle([x, y + k * height, x + 1 + 150 * value, y + (k + 1) * height - 2], fill=colors[k])
                    pen.text((x + 156, y + k * height - 1), f"{value:.2f}", fill="black", font=font)
    page.save(path)


def toy(flags):
    """Table by task and complexity of a toy model on both held-out sets, between the two ends of the scale."""
    from sample import evaluate, load_checkpoint              # sample.py imports this file for its oracle
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer, trained = load_checkpoint(flags.ckpt, device)
    if trained["data"] not in WORLDS:
        raise InputError(f"{flags.ckpt} was trained on {trained['data']}: the oracle only knows {', '.join(WORLDS)}")
    groups = {}
    for split in ("iid", "novel"):
        dataset = Shapes(trained["data"], split, trained["seed"])
        rows = evaluate(model, tokenizer, dataset, range(flags.examples), flags.steps, flags.text_scale, flags.image_scale,
                        flags.pauses, device=device)
        groups[split] = breakdown(rows)
        print(f"\n{split}: {flags.examples} examples, {flags.steps} Euler steps, {flags.pauses} pause tokens")
        print(f"{'':16}{'number':>8}" + "".join(f"{score:>14}" for score in SCORES))
        for name, (number, values) in groups[split].items():
            print(f"{name:16}{number:8}" + "".join(f"{values[score]:14.3f}" for score in SCORES))
        edits = [row["sample"] for row in rows if row["sample"].images]
        for name, output in (("output = source", lambda s: s.images[0]), ("output = target", lambda s: s.target)):
            values = means([judge(dataset.world, s.images[0], s.instruction, output(s)) for s in edits])
            print(f"{name:16}{len(edits):8}" + "".join(f"{values[score]:14.3f}" for score in SCORES))
    bars(f"{flags.ckpt}: {flags.examples} held-out examples each", groups, flags.out)
    print(f"\nwrote {flags.out}")


def grid(flags):
    """A picture of the same held-out edits by several toy models: source and instruction, one row a model, target."""
    from sample import evaluate, load_checkpoint
    rows, n = [], 8
    for path in flags.ckpt:
        model, tokenizer, trained = load_checkpoint(path)
        edits = evaluate(model, tokenizer, Shapes(trained["data"], "iid", trained["seed"]), range(n), flags.steps)
        if not rows:
            rows.append([(e["sample"].images[0], wrap(e["sample"].instruction, 18), False) for e in edits])
        name = f"p_magd {trained['p_magd']:g}"
        rows.append([(e["output"], f"{name}: {'exact' if e['exact'] else 'not exact'}", False) for e in edits])
    rows.append([(e["sample"].target, "target", False) for e in edits])
    sheet(rows, flags.out, 112 // rows[0][0][0].shape[0])
    print(f"wrote {flags.out}")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: sys.exit(f"metrics.py: {message}")
    p.add_argument("command", choices=["toy", "grid"])
    p.add_argument("--ckpt", required=True, action="append", help="a checkpoint of train.py; grid takes several")
    p.add_argument("--examples", type=int, default=512, help="toy: of each held-out set")
    p.add_argument("--steps", type=int, default=20, help="Euler steps")
    p.add_argument("--pauses", type=int, default=0, help="toy: pause tokens after each prompt")
    p.add_argument("--text-scale", type=float, default=1.0, help="toy: guidance by the prompt; 1 = none")
    p.add_argument("--image-scale", type=float, default=1.0, help="toy: guidance by the image; 1 = none")
    p.add_argument("--out", help="the picture; toy.png beside the checkpoint, or grid.png, if not given")
    flags = p.parse_args()
    if flags.examples < 1 or flags.steps < 1 or flags.pauses < 0:
        p.error("--examples and --steps should be at least 1, --pauses at least 0")
    if flags.command == "grid":
        flags.out = flags.out or "grid.png"
        grid(flags)
    elif len(flags.ckpt) == 1:
        flags.ckpt = flags.ckpt[0]
        flags.out = flags.out or Path(flags.ckpt).with_name("toy.png")
        toy(flags)
    else:
        p.error("toy takes one --ckpt")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"metrics.py: {error}")
