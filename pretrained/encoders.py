"""CLIP and DINO, which measure edits of photographs: the networks, their released files, their transforms.

B batch, L tokens, D width, H heads, E head width. cfg is a dict with the keys of Hugging Face's config.json.
"""
import math
import reprlib
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from PIL import Image

from common.files import InputError, decode, optional, read_bytes, read_json
from pretrained.weights import (HINT, check_numbers, check_shapes, first_line, read_tokenizer, read_weights,
                                released)


class Layer(nn.Module):
    """A pre-norm transformer layer; clip: with the approximation of GELU that OpenAI trained CLIP with."""

    def __init__(self, cfg, clip=True, causal=False):
        super().__init__()
        self.clip = clip
        self.causal = causal
        self.heads = cfg["num_attention_heads"]
        width = cfg["hidden_size"]
        self.norm1, self.norm2 = (nn.LayerNorm(width, cfg.get("layer_norm_eps", 1e-5)) for _ in range(2))
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.fc1 = nn.Linear(width, cfg["intermediate_size"])
        self.fc2 = nn.Linear(cfg["intermediate_size"], width)

    def forward(self, x):                                                                 # (B, L, D)
        y = self.norm1(x)
        q, k, v = (rearrange(f(y), "b l (h e) -> b h l e", h=self.heads) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)                # (B, H, L, E)
        x = x + self.out(rearrange(y, "b h l e -> b l (h e)"))                            # (B, L, D)
        y = self.fc1(self.norm2(x))                                                       # (B, L, mlp)
        return x + self.fc2(y * torch.sigmoid(1.702 * y) if self.clip else F.gelu(y))     # (B, L, D)


class ViT(nn.Module):
    """A vision transformer: DINO or, with clip=True, CLIP's image tower, which differs in small things."""

    def __init__(self, cfg, clip=False):
        super().__init__()
        width = cfg["hidden_size"]
        patch = cfg["patch_size"]
        eps = cfg.get("layer_norm_eps", 1e-5)
        one = () if clip else (1,)                        # DINO's files store two tensors with a batch of one
        self.cls = nn.Parameter(torch.zeros(*one, *one, width))
        self.patch = nn.Conv2d(3, width, patch, patch, bias=not clip)
        self.position = nn.Parameter(torch.zeros(*one, 1 + (cfg["image_size"] // patch)**2, width))
        self.before = nn.LayerNorm(width, eps=eps) if clip else nn.Identity()
        self.layers = nn.Sequential(*(Layer(cfg, clip) for _ in range(cfg["num_hidden_layers"])))
        self.norm = nn.LayerNorm(width, eps=eps)

    def image_features(self, pixels):                                                     # (B, 3, h, w)
        x = rearrange(self.patch(pixels), "b d h w -> b (h w) d")
        x = torch.cat([self.cls.expand(len(x), 1, -1), x], dim=1)                         # (B, L, D)
        if x.shape[1] != self.position.shape[-2]:
            raise InputError(f"images of {pixels.shape[3]} pixels need {x.shape[1]} positions, this ViT has "
                             f"{self.position.shape[-2]}: image_size in its config.json is another")
        x = self.layers(self.before(x + self.position))
        return self.norm(x[:, 0])                                                         # (B, D)


class TextTower(nn.Module):               # CLIP's causal transformer over the tokens of a caption
    def __init__(self, cfg):
        super().__init__()
        width = cfg["hidden_size"]
        self.token = nn.Embedding(cfg["vocab_size"], width)
        self.position = nn.Parameter(torch.zeros(cfg["max_position_embeddings"], width))
        self.layers = nn.Sequential(*(Layer(cfg, causal=True) for _ in range(cfg["num_hidden_layers"])))
        self.final = nn.LayerNorm(width, cfg.get("layer_norm_eps", 1e-5))

    def forward(self, ids):                                                               # (B, L)
        x = self.layers(self.token(ids) + self.position)                                  # (B, L, D)
        end = ids.argmax(dim=1)                           # the first end token: no id is larger
        return self.final(x[torch.arange(len(x)), end])                                   # (B, D)


class CLIP(nn.Module):
    def __init__(self, cfg):              # of openai/clip-vit-base-patch32 or another CLIP of OpenAI
        super().__init__()
        width = cfg.get("projection_dim", 512)
        self.size = cfg["vision_config"]["image_size"]
        self.vision = ViT(cfg["vision_config"], clip=True)
        self.text = TextTower(cfg["text_config"])
        self.visual_projection = nn.Linear(cfg["vision_config"]["hidden_size"], width, bias=False)
        self.text_projection = nn.Linear(cfg["text_config"]["hidden_size"], width, bias=False)
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def image_features(self, pixels):                                                     # (B, 3, size, size)
        return self.visual_projection(self.vision.image_features(pixels))                 # (B, projection)

    def text_features(self, ids):                                                         # (B, L)
        return self.text_projection(self.text(ids))                                       # (B, projection)


# The only place that knows the names in released files: parts of dotted names, ours and theirs.
CLIP_NAMES = {"vision": "vision_model", "text": "text_model", "cls": "embeddings.class_embedding",
              "patch": "embeddings.patch_embedding", "position": "embeddings.position_embedding.weight",
              "token": "embeddings.token_embedding", "before": "pre_layrnorm", "layers": "encoder.layers",
              "norm1": "layer_norm1", "norm2": "layer_norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2",
              "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
              "out": "self_attn.out_proj", "norm": "post_layernorm", "final": "final_layer_norm"}
DINO_NAMES = {"cls": "embeddings.cls_token", "patch": "embeddings.patch_embeddings.projection",
              "position": "embeddings.position_embeddings", "layers": "encoder.layer", "norm": "layernorm",
              "norm1": "layernorm_before", "norm2": "layernorm_after", "q": "attention.attention.query",
              "k": "attention.attention.key", "v": "attention.attention.value",
              "out": "attention.output.dense", "fc1": "intermediate.dense", "fc2": "output.dense"}
DINO_PTH_NAMES = {"cls": "cls_token", "position": "pos_embed", "patch": "patch_embed.proj",
                  "layers": "blocks", "q": "attn.q", "k": "attn.k", "v": "attn.v", "out": "attn.proj",
                  "fc1": "mlp.fc1", "fc2": "mlp.fc2"}


def released_name(name, names):
    return ".".join(names.get(part, part) for part in name.split("."))


# What CLIP's config.json leaves out, as transformers writes it, has the value that it has there.
CLIP_DEFAULTS = {
    "vision": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224,
               "intermediate_size": 3072, "patch_size": 32, "layer_norm_eps": 1e-5,
               "hidden_act": "quick_gelu"},
    "text": {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "vocab_size": 49408,
             "intermediate_size": 2048, "max_position_embeddings": 77, "layer_norm_eps": 1e-5,
             "hidden_act": "quick_gelu"}}
TOWER = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def check_tower(where, cfg, act, *sizes):
    """A transformer of a config.json: sizes that fit each other, and the activation of the release."""
    check_numbers(where, cfg, (*sizes, *TOWER), ["layer_norm_eps"])
    for whole, part in (("hidden_size", "num_attention_heads"), ("image_size", "patch_size")):
        if whole in cfg and cfg[whole] % cfg[part]:
            raise InputError(f"{where}: {whole}, {cfg[whole]}, is not a multiple of {part}, {cfg[part]}")
    if cfg.get("hidden_act", act) != act:
        raise InputError(f"{where}: hidden_act is {reprlib.repr(cfg['hidden_act'])}; {act} is needed")


def build(kind, cfg, weights, names, path):
    """A CLIP or ViT with the weights of a released file: all of them and no others."""
    with torch.device("meta"):
        model = kind(cfg)
    ours = {released_name(key, names): key for key in model.state_dict()}
    expected = {theirs: tuple(model.state_dict()[key].shape) for theirs, key in ours.items()}
    check_shapes(path, expected, {key: tuple(value.shape) for key, value in weights.items()})
    model.load_state_dict({ours[key]: value for key, value in weights.items()}, assign=True)
    return model.requires_grad_(False).eval()


def load_clip(folder, device="cpu"):
    """A folder laid out as openai/clip-vit-base-patch32 or clip-vit-large-patch14 -> CLIP, its tokenizer."""
    path = Path(folder) / "config.json"
    found = read_json(released(path))
    if found.get("model_type") != "clip":
        raise InputError(f"{path}: model_type {reprlib.repr(found.get('model_type'))}; a CLIP of OpenAI is "
                         f"needed")
    cfg = {"projection_dim": 512, **found}
    check_numbers(path, cfg, ["projection_dim"])
    for tower, sizes in (("vision", ["patch_size", "image_size"]), ("text", ["vocab_size"])):
        key = f"{tower}_config"
        given = found.get(f"{key}_dict") or found.get(key) or {}       # the former wins in transformers, too
        if not isinstance(given, dict):
            raise InputError(f"{path}: {key} is {reprlib.repr(given)}; an object with its sizes is expected")
        cfg[key] = {**CLIP_DEFAULTS[tower], **given}
        check_tower(f"{path}: {key}", cfg[key], "quick_gelu", *sizes)
    if cfg["text_config"]["max_position_embeddings"] != 77:
        raise InputError(f"{path}: text_config: max_position_embeddings is not 77, as in OpenAI's CLIP")
    tokenizer = ClipTokenizer(folder)
    if tokenizer.end >= cfg["text_config"]["vocab_size"]:
        raise InputError(f"{folder}: the tokenizer's ids go to {tokenizer.end}, vocab_size in config.json is "
                         f"{cfg['text_config']['vocab_size']}: the files of two models")
    return build(CLIP, cfg, read_weights(folder), CLIP_NAMES, folder).to(device), tokenizer


def load_dino(path, device="cpu", eps=1e-6):           # eps of MagicBrush's evaluator; config.json has 1e-12
    """facebook/dino-vits16 as a folder, or the original dino_deitsmall16_pretrain.pth -> ViT."""
    weights = read_weights(path)
    if Path(path).is_dir():
        where, names = Path(path) / "config.json", DINO_NAMES
        cfg = read_json(released(where))
        if cfg.get("model_type") != "vit":
            raise InputError(f"{where}: model_type {reprlib.repr(cfg.get('model_type'))}; DINO's is 'vit'")
    else:
        where, names = path, DINO_PTH_NAMES
        cfg = original_dino(weights, path)
    cfg = {**cfg, "layer_norm_eps": eps}
    check_tower(where, cfg, "gelu", "patch_size", "image_size")
    return build(ViT, cfg, weights, names, path).to(device)


def original_dino(weights, path):
    """cfg for DINO's original file, from its shapes. Cuts each qkv of the weights into three, in place."""
    shapes = [weights[key].shape if key in weights else () for key in
              ("pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")]
    if [len(shape) for shape in shapes] != [3, 4, 2]:
        raise InputError(f"{path}: not DINO's original file: it has {', '.join(sorted(weights)[:3])}, ...")
    (_, positions, width), (*_, patch), (mlp, _) = shapes
    fused = [key for key in weights if ".attn.qkv." in key]            # a weight and a bias in each layer
    for key in fused:
        for part, value in zip("qkv", torch.atleast_1d(weights.pop(key)).chunk(3)):
            weights[key.replace("qkv", part)] = value
    return {"hidden_size": width, "num_attention_heads": width // 64, "num_hidden_layers": len(fused) // 2,
            "intermediate_size": mlp, "patch_size": patch,
            "image_size": patch * math.isqrt(max(0, positions - 1))}


class ClipTokenizer:
    """CLIP's byte-level BPE of lower-case text, from tokenizer.json or from vocab.json and merges.txt."""

    def __init__(self, folder):
        folder = Path(folder)
        ends = ("<|startoftext|>", "<|endoftext|>")
        whole = folder / "tokenizer.json"
        self.bpe = read_tokenizer(whole, ends) if whole.exists() else original_bpe(folder, ends)
        self.start, self.end = map(self.bpe.token_to_id, ends)
        if self.end != max(self.bpe.get_vocab().values()):             # TextTower finds it by that
            raise InputError(f"{folder}: <|endoftext|> is not the last token, as it is in OpenAI's CLIP")

    def __call__(self, texts, length=77):
        """-> ids (B, length), filled up with the end token, and how many of the texts were cut to fit."""
        rows = [self.bpe.encode(text, add_special_tokens=False).ids for text in texts]
        ids = torch.full((len(rows), length), self.end)
        for k, row in enumerate(rows):
            row = [self.start, *row[:length - 2]]
            ids[k, :len(row)] = torch.tensor(row)
        return ids, sum(len(row) > length - 2 for row in rows)


def original_bpe(folder, needed):
    """The tokenizer of vocab.json and merges.txt."""
    t = optional("tokenizers")
    vocab = read_json(released(folder / "vocab.json"))
    path = released(folder / "merges.txt")
    try:
        lines = decode(read_bytes(path)).split("\n")
        merges = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
        model = t.models.BPE(vocab, merges, end_of_word_suffix="</w>", unk_token="<|endoftext|>")
    except Exception as error:                           # the package raises nothing more exact
        reason = first_line(error)
        raise InputError(f"{path}: it does not fit vocab.json ({reason}); get both again") from None
    missing = [token for token in needed if token not in vocab]
    if missing:
        raise InputError(f"{folder}/vocab.json: it lacks the token {', '.join(missing)}; get it again")
    bpe = t.Tokenizer(model)
    bpe.normalizer = t.normalizers.Sequence([t.normalizers.NFC(), t.normalizers.Lowercase()])
    words = t.Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    split = t.pre_tokenizers.Split(words, "removed", invert=True)
    to_bytes = t.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = t.pre_tokenizers.Sequence([split, to_bytes])
    return bpe


CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def to_tensor(image):                     # RGB image -> (3, h, w) in [0, 1]
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def centre(image, short, size):
    """The middle size x size pixels of an image once its shorter side is resized to `short`."""
    shorter = min(image.size)
    resized = [short if side == shorter else int(short * side / shorter) for side in image.size]
    left, top = (int(round((side - size) / 2)) for side in resized)
    return image.resize(resized, Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


def clip_pixels(image, size=224):
    """OpenAI's transform, as in MagicBrush's evaluator: RGB image -> (3, size, size)."""
    return (to_tensor(centre(image, size, size)) - CLIP_MEAN) / CLIP_STD


def dino_pixels(image):
    """The transform of MagicBrush's evaluator for DINO: RGB image -> (3, 224, 224)."""
    return (to_tensor(centre(image, 256, 224)) - IMAGENET_MEAN) / IMAGENET_STD


def direction_pixels(image, size=224):
    """InstructPix2Pix's for CLIP-Dir, floats straight to a square: RGB image -> (3, size, size)."""
    x = F.interpolate(to_tensor(image)[None], (size, size), mode="bicubic", align_corners=False)[0]
    return (x - CLIP_MEAN) / CLIP_STD


def direction(source, output, source_text, output_text):
    """CLIP-Dir of features (B, D) -> (B,): the cosine of the change of the images with that of the captions.

    Each is normalised before the subtraction. nan, to be counted, where two captions are alike; 0 for a copy.
    """
    image = F.normalize(output, dim=-1) - F.normalize(source, dim=-1)
    text = F.normalize(output_text, dim=-1) - F.normalize(source_text, dim=-1)
    return torch.where(text.norm(dim=-1) < 1e-6, torch.nan, F.cosine_similarity(image, text, dim=-1))
