"""OmniGen-v1 as released: config.json, weights in and out, tokenizer and prompt, how it takes images."""
import math
import reprlib
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.devices import is_first
from common.files import InputError, make_folder, read_json, write_json, writing
from model import Config, Transformer
from pretrained.weights import check_numbers, load_weights, positive, read_tokenizer, released, write_weights
from scale.sharding import whole

# config.json of OmniGen-v1 is that of its language model, Phi-3: (its key, ours)
CONFIG_KEYS = {"vocab_size": "vocab", "hidden_size": "width", "num_hidden_layers": "layers",
               "num_attention_heads": "heads", "intermediate_size": "mlp", "rope_theta": "rope_theta",
               "max_position_embeddings": "max_positions", "rms_norm_eps": "eps",
               "original_max_position_embeddings": "original_positions"}
CONFIG_FIXED = {"model_type": "phi3", "hidden_act": "silu", "tie_word_embeddings": False}
ROPE_KEYS = {"rope_type", "short_factor", "long_factor", "rope_theta", "original_max_position_embeddings",
             "factor", "attention_factor", "partial_rotary_factor"}


def omnigen_folder(init):
    if not init.startswith("omnigen:"):
        raise InputError(f"--init {init}: omnigen:FOLDER is needed, with the files of OmniGen-v1 in FOLDER")
    return Path(init.removeprefix("omnigen:"))


def read_config(folder):
    """config.json of OmniGen-v1 -> Config. Whatever this transformer does not do is refused."""
    path = Path(folder) / "config.json"
    found = read_json(released(path))
    for key, value in CONFIG_FIXED.items():
        if found.get(key, value if key != "model_type" else None) != value:
            raise InputError(f"{path}: {key} is {reprlib.repr(found.get(key))}, OmniGen-v1 has {value!r}")
    rope = read_rope(path, found)
    found = {**found, **rope}
    reals = ("rope_theta", "rms_norm_eps")
    check_numbers(path, found, [key for key in CONFIG_KEYS if key not in reals], reals)
    cfg = Config(**{ours: found[theirs] for theirs, ours in CONFIG_KEYS.items()})
    if found.get("num_key_value_heads") not in (None, cfg.heads):
        raise InputError(f"{path}: {reprlib.repr(found['num_key_value_heads'])} key-value heads for "
                         f"{cfg.heads} heads; OmniGen-v1 has as many of each")
    half = cfg.width // cfg.heads // 2
    if cfg.width != 2 * half * cfg.heads or found.get("head_dim") not in (None, 2 * half):
        raise InputError(f"{path}: {cfg.heads} heads of an even width, head_dim, have to make up "
                         f"hidden_size, {cfg.width}")
    for key in ("short_factor", "long_factor"):
        value = rope.get(key)
        if not (isinstance(value, list) and len(value) == half and all(positive(x) for x in value)):
            raise InputError(f"{path}: {key} is {reprlib.repr(value)}; heads of {2 * half} need {half} RoPE "
                             f"factors, numbers above 0")
        setattr(cfg, key, value)
    if not 2 <= cfg.original_positions <= cfg.max_positions:
        raise InputError(f"{path}: original_max_position_embeddings is {cfg.original_positions}; from 2 to "
                         f"max_position_embeddings, {cfg.max_positions}, is expected")
    ratio = cfg.max_positions / cfg.original_positions
    scale = math.sqrt(1 + math.log(ratio) / math.log(cfg.original_positions))
    for key, value in (("factor", ratio), ("attention_factor", scale), ("partial_rotary_factor", 1.0)):
        given = rope.get(key, value)
        if not positive(given) or not math.isclose(given, value, rel_tol=1e-6):
            raise InputError(f"{path}: {key} of RoPE is {reprlib.repr(given)}; OmniGen-v1 has {value:.6g}")
    return cfg


def read_rope(path, found):
    """All that a config.json says about RoPE, in one dict, however transformers has spelled it.

    It stands under `rope_scaling` or, from release 5 on, under `rope_parameters`, there perhaps once for each
    type of layer; theta and the original length stand inside or beside it; "su" became "longrope"."""
    beside = ("rope_theta", "original_max_position_embeddings", "partial_rotary_factor")
    parts = [{key: found.get(key) for key in beside}]
    for name in ("rope_scaling", "rope_parameters"):
        part = found.get(name) or {}
        nested = isinstance(part, dict) and any(isinstance(value, dict) for value in part.values())
        parts += [value for value in part.values() if value is not None] if nested else [part]
    rope = {}
    for part in parts:
        if not isinstance(part, dict):
            raise InputError(f"{path}: {reprlib.repr(part)} stands where parameters of RoPE are expected")
        for key, value in part.items():
            key = "rope_type" if key == "type" else key
            value = "longrope" if value == "su" else value
            if value is not None and rope.setdefault(key, value) != value:
                raise InputError(f"{path}: {key} of RoPE is given twice, as {reprlib.repr(rope[key])} and as "
                                 f"{reprlib.repr(value)}")
    kind = rope.get("rope_type")
    if kind in (None, "default") and not {"short_factor", "long_factor"} & rope.keys():
        raise InputError(f"{path}: no RoPE factors under rope_scaling or rope_parameters; OmniGen-v1 has "
                         f"short_factor and long_factor: get its config.json")
    if kind != "longrope":
        raise InputError(f"{path}: rope_scaling of type {reprlib.repr(kind)}; OmniGen-v1 has 'su' (newer: "
                         f"'longrope') with short_factor and long_factor")
    unknown = sorted(rope.keys() - ROPE_KEYS)
    if unknown:
        raise InputError(f"{path}: {', '.join(unknown)} of RoPE is unknown here; OmniGen-v1 does without")
    return rope


def load_omnigen(folder, dtype=torch.float32, device="cpu", shard=None):
    """OmniGen-v1 from a folder with config.json and model.safetensors, as published -> Transformer.

    Memory peaks at one copy of the weights. shard(model) may split the empty model over processes before the
    weights come."""
    with torch.device("meta"):
        model = Transformer(read_config(folder))
    if shard:
        shard(model)
    return load_weights(model, Path(folder) / "model.safetensors", dtype, device)


def save_omnigen(model, folder):
    """Write config.json and model.safetensors as published, for load_omnigen, OmniGen's own code and
    diffusers' converter.

    A sharded model is gathered: all processes call this, and the first one writes."""
    cfg = model.cfg
    kept = [*CONFIG_KEYS.values(), "short_factor", "long_factor"]
    theirs = Config(**{key: getattr(cfg, key) for key in kept})
    if cfg != theirs:
        changed = [key for key, value in vars(cfg).items() if value != getattr(theirs, key)]
        raise InputError(f"OmniGen's format cannot hold a model with another {', '.join(changed)}")
    if not cfg.long_factor:
        raise InputError("OmniGen's format needs long and short RoPE factors, which this model does not have")
    weights = whole(model.state_dict())
    if not is_first():
        return
    folder = make_folder(folder)
    write_weights(folder / "model.safetensors", weights)
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)   # of shards that were here before
    rope = {"type": "su", "short_factor": cfg.short_factor, "long_factor": cfg.long_factor}
    config = {"architectures": ["Phi3ForCausalLM"], **CONFIG_FIXED,
              **{key: getattr(cfg, ours) for key, ours in CONFIG_KEYS.items()},
              "num_key_value_heads": cfg.heads, "rope_scaling": rope, "bos_token_id": 1, "eos_token_id": 2,
              "pad_token_id": min(32000, cfg.vocab - 1), "sliding_window": cfg.max_positions,
              "torch_dtype": str(weights["pos_embed"].dtype).removeprefix("torch.")}
    write_json(folder / "config.json", config)


def export(model, source, folder):
    """save_omnigen, with the autoencoder and tokenizer of the folder `source`: all that sampling needs."""
    save_omnigen(model, folder)
    source = Path(source)
    files = {source / "vae/config.json", source / "tokenizer.json"}                # without them: an error
    files |= {file for part in ("vae/*", "*token*.json") for file in source.glob(part) if file.is_file()}
    for file in sorted(files) if is_first() else []:
        target = Path(folder) / file.relative_to(source)
        if not target.exists() or not target.samefile(file):
            with open(released(file), "rb") as old, writing(target, "wb") as new:
                shutil.copyfileobj(old, new)


class BPE:
    """OmniGen's own tokenizer and prompt. The ids of all special tokens are those of its tokenizer.json."""
    template = ("<|user|>\nGenerate an image according to the following instructions\n{}<|end|>\n"
                "<|assistant|>\n<|diffusion|>")
    images_first = True
    empty = "<cfg>"                       # the prompt of unconditional training
    needed = ("<s>", "<|user|>", "<|end|>", "<|assistant|>", "<img>", "</img>")

    def __init__(self, folder, pause="<|placeholder1|>", limit=131072):
        path = Path(folder) / "tokenizer.json"
        self.tokenizer = read_tokenizer(path, self.needed)
        if (path.parent / "config.json").exists():       # beside the model's, as in a release
            vocab = read_config(folder).vocab
            largest = max(self.tokenizer.get_vocab().values())
            if largest >= vocab:
                raise InputError(f"{path}: its ids go to {largest}, vocab_size in config.json is {vocab}: "
                                 f"the files of two models")
        self.bos = self.tokenizer.token_to_id("<s>")
        self.pause = pause
        self.limit = limit
        if self.tokenizer.token_to_id(pause) is None:
            raise InputError(f"{path}: {pause!r}, the pause token, is not one of its tokens; choose one with "
                             f"--pause-token")

    def __len__(self):
        return self.tokenizer.get_vocab_size()

    def encode(self, text):
        return self.tokenizer.encode(text).ids


def prepare(image, most=1024):
    """An Image as OmniGen takes it -> (h, w, 3) uint8: no side longer than `most`, none shorter than 16,
    cropped to multiples of 16."""
    while min(image.size) >= 2 * most:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    if max(image.size) > most:
        image = scaled(image, most / max(image.size))
    if min(image.size) < 16:
        image = scaled(image, 16 / min(image.size))
    left = image.width % 16 // 2
    top = image.height % 16 // 2
    return np.asarray(image)[top:top + image.height // 16 * 16, left:left + image.width // 16 * 16]


def scaled(image, factor):
    return image.resize([max(1, round(side * factor)) for side in image.size], Image.Resampling.BICUBIC)
