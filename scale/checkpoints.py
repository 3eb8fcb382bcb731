"""Checkpoints of train.py: written whole or not at all, read without running code, for any number of GPUs."""
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from common.devices import check_finite, is_first
from common.files import InputError, writing
from model import Config
from scale.sharding import own_part, whole

MAY_CHANGE = {"out", "resume", "preset", "eval_examples", "eval_steps", "text_scale", "image_scale",
              "workers", "log_every", "save_every", "keep_every", "sample_every", "checkpointing", "compile",
              "init", "latents", "skip_bad", "device"}
TYPES = {"config": dict, "model": dict, "ema": dict, "words": (list, type(None)), "flags": dict, "step": int}


def read_checkpoint(path):
    """-> the dict that save_checkpoint wrote; its weights are looked at once, here."""
    if not Path(path).is_file():
        raise InputError(f"{path}: there is no such checkpoint. `python train.py` makes one.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:      # torch.load raises half a dozen types for a file that is not a checkpoint
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: not a checkpoint that can be read ({reason})") from None
    good = isinstance(state, dict) and set(TYPES) <= set(state)
    if not good or not all(isinstance(state[key], kind) for key, kind in TYPES.items()):
        raise InputError(f"{path}: not a checkpoint of train.py")
    for part in ("model", "ema"):
        for name, value in state[part].items():
            if not torch.is_tensor(value):
                raise InputError(f"{path}: {name} is not a tensor but a {type(value).__name__}")
            check_finite(f"{path}: {name}", value)
    return state


def config_of(state):
    """The Config of a checkpoint of a small model; TypeError or ValueError if no model can have it."""
    cfg = Config(**state["config"])
    for key, usual in vars(Config()).items():
        value = getattr(cfg, key)
        if type(value) not in (type(usual), int) or (usual is None) != (value is None):
            raise TypeError(f"{key} is {value!r}")
    if cfg.layers > len(state["model"]):
        raise ValueError(f"{cfg.layers} layers")
    return cfg


def save_checkpoint(path, model, mask_tokens, average, optimizers, **more):
    """All processes call this together; the first writes."""
    names = [name for name, _ in model.named_parameters()]
    state = whole({"config": asdict(model.cfg), "model": model.state_dict(), "ema": dict(zip(names, average)),
                   "mask_tokens": mask_tokens.state_dict() if mask_tokens else None,
                   "optimizers": [optimizer.state_dict() for optimizer in optimizers], **more})
    if is_first():
        with writing(path, "wb") as file:
            torch.save(state, file)


def keep(path, copy):
    """Keep a checkpoint under another name, where the file system can without using space for it."""
    copy.unlink(missing_ok=True)
    try:
        os.link(path, copy)
    except OSError:
        with open(path, "rb") as source, writing(copy, "wb") as file:
            shutil.copyfileobj(source, file)


def check_space(folder, model, mask_tokens, average, optimizers):
    """Is there space for two checkpoints, the last one and the next? Found out before the first step."""
    moments = sum(p.numel() * (2 if isinstance(optimizer, torch.optim.AdamW) else 1)
                  for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
    weights = sum(p.numel() for module in (model, mask_tokens) if module for p in module.parameters())
    needed = 8 * (weights + moments + sum(p.numel() for p in average))           # float32, twice
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(f"--out {folder}: {free / 1e9:.2f} GB are free there; two checkpoints, the last and "
                         f"the next, need {needed / 1e9:.2f} GB")


def check_resume(state, flags, cfg, words, data, path):
    """A resumed run has to be the same run; only --steps may grow."""
    changed = [f"--{key.replace('_', '-')} {value}" for key, value in state["flags"].items()
               if key not in MAY_CHANGE and value != getattr(flags, key, None)
               and not (key == "steps" and flags.steps > value)]
    if changed:
        raise InputError(f"{path}: this run was started with {', '.join(changed)}; resume it with the same")
    if state["config"] != asdict(cfg):
        raise InputError(f"{path}: it holds another model, {state['config']}; here it is {asdict(cfg)}")
    if state["words"] != words:
        raise InputError(f"{path}: this run knows other words: {flags.data} has changed since it was started")
    if state.get("data", data) != data:
        raise InputError(f"{path}: the rows or images of {flags.data} have changed since this run was "
                         f"started; --init {path} with another --out begins anew from its weights")


def restore(state, model, mask_tokens, average, optimizers):
    """Put the tensors of a checkpoint where they belong; each process keeps its part."""
    for module, key in ((model, "model"), (mask_tokens, "mask_tokens")):
        if module:
            module.load_state_dict({name: own_part(state[key][name], value)
                                    for name, value in module.state_dict().items()})
    for mean, (name, p) in zip(average, model.named_parameters()):
        mean.copy_(own_part(state["ema"][name], p))
    for optimizer, saved in zip(optimizers, state["optimizers"]):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for place, moments in saved["state"].items():
            p = parameters[place]
            for key, value in moments.items():
                if value.shape == p.shape:                 # not a counter of steps
                    moments[key] = own_part(value, p)
        optimizer.load_state_dict(saved)
