"""OmniGen-v1 as released: config.json, weights in and out, tokenizer and prompt, how it takes images."""
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.devices import is_first
from common.files import InputError, make_folder, optional, read_json, write_json, writing
from model import Config, Transformer
from pretrained.weights import HINT, load_weights
from scale.sharding import whole

# config.json of OmniGen-v1 is that of its language model, Phi-3: (its key, ours)
CONFIG_KEYS = {"vocab_size": "vocab", "hidden_size": "width", "num_hidden_layers": "layers",
               "num_attention_heads": "heads", "intermediate_size": "mlp", "rope_theta": "rope_theta",
               "max_position_embeddings": "max_positions", "rms_norm_eps": "eps",
               "original_max_position_embeddings": "original_positions"}
CONFIG_FIXED = {"model_type": "phi3", "hidden_act": "silu", "tie_word_embeddings": False}


def omnigen_folder(init):
    if not init.startswith("omnigen:"):
        raise InputError(f"--init {init}: omnigen:FOLDER is needed, with the files of OmniGen-v1 in FOLDER")
    return Path(init.removeprefix("omnigen:"))


def read_config(folder):
    """config.json of OmniGen-v1 -> Config. Whatever this transformer does not do is refused."""
    path = Path(folder) / "config.json"
    found = read_json(path, dict, HINT)
    for key, value in CONFIG_FIXED.items():
        if found.get(key, value if key != "model_type" else None) != value:
            raise InputError(f"{path}: {key} is {found.get(key)!r}, OmniGen-v1 has {value!r}")
    missing = [key for key in CONFIG_KEYS if key not in found]
    if missing:
        raise InputError(f"{path}: the keys {', '.join(missing)} are missing")
    heads = found["num_attention_heads"]
    if found.get("num_key_value_heads", heads) != heads:
        raise InputError(f"{path}: {found['num_key_value_heads']} key-value heads for {heads} heads; "
                         f"OmniGen-v1 has as many of each")
    rope = found.get("rope_scaling") or {}
    known = rope.get("type") in ("su", "longrope") and {"short_factor", "long_factor"} <= set(rope)
    if rope and not known:
        raise InputError(f"{path}: rope_scaling of type {rope.get('type')!r}; OmniGen-v1 has 'su' with "
                         f"short_factor and long_factor")
    sizes = {ours: found[theirs] for theirs, ours in CONFIG_KEYS.items()}
    cfg = Config(**sizes, short_factor=rope.get("short_factor"), long_factor=rope.get("long_factor"))
    half = cfg.width // cfg.heads // 2
    if rope and {len(cfg.short_factor), len(cfg.long_factor)} != {half}:
        raise InputError(f"{path}: {len(cfg.short_factor)} short and {len(cfg.long_factor)} long RoPE "
                         f"factors; heads of {2 * half} need {half}")
    return cfg


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
    weights = whole(model.state_dict())
    if not is_first():
        return
    folder = make_folder(folder)
    save_file = optional("safetensors.torch").save_file
    with writing(folder / "model.safetensors", "wb") as file:
        save_file(weights, file.name, metadata={"format": "pt"})
    rope = None
    if cfg.long_factor:
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
    if is_first():
        shutil.copytree(Path(source) / "vae", Path(folder) / "vae", dirs_exist_ok=True)
        for file in Path(source).glob("*token*.json"):
            shutil.copyfile(file, Path(folder) / file.name)


class BPE:
    """OmniGen's own tokenizer and prompt. The ids of all special tokens are those of its tokenizer.json."""
    template = ("<|user|>\nGenerate an image according to the following instructions\n{}<|end|>\n"
                "<|assistant|>\n<|diffusion|>")
    images_first = True
    empty = "<cfg>"                       # the prompt of unconditional training

    def __init__(self, folder, pause="<|placeholder1|>", limit=131072):
        path = Path(folder) / "tokenizer.json"
        read_json(path, dict, HINT)                      # a missing or broken file has a clearer message here
        self.tokenizer = optional("tokenizers").Tokenizer.from_file(str(path))
        self.tokenizer.no_truncation()
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
