"""Checkpoints of train.py: written whole or not at all, read without running code, for any number of GPUs."""
from dataclasses import asdict
from pathlib import Path

import torch

from common.devices import is_first
from common.files import InputError, writing
from scale.sharding import own_part, whole

MAY_CHANGE = {"out", "resume", "preset", "eval_examples", "eval_steps", "text_scale", "image_scale",
              "workers", "log_every", "save_every", "sample_every", "checkpointing", "compile", "init",
              "latents"}


def read_checkpoint(path):
    if not Path(path).is_file():
        raise InputError(f"{path}: there is no such checkpoint. `python train.py` makes one.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:      # torch.load raises half a dozen types for a file that is not a checkpoint
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: not a checkpoint that can be read ({reason})") from None
    if not isinstance(state, dict) or not {"config", "model", "ema", "words", "flags", "step"} <= set(state):
        raise InputError(f"{path}: not a checkpoint of train.py")
    return state


def save_checkpoint(path, model, mask_tokens, average, optimizers, **more):
    """All processes call this together; the first writes."""
    names = [name for name, _ in model.named_parameters()]
    state = whole({"config": asdict(model.cfg), "model": model.state_dict(), "ema": dict(zip(names, average)),
                   "mask_tokens": mask_tokens.state_dict() if mask_tokens else None,
                   "optimizers": [optimizer.state_dict() for optimizer in optimizers], **more})
    if is_first():
        with writing(path, "wb") as file:
            torch.save(state, file)


def check_resume(state, flags, cfg, words, path):
    """A resumed run has to be the same run."""
    changed = [f"--{key.replace('_', '-')} {value}" for key, value in state["flags"].items()
               if key not in MAY_CHANGE and value != getattr(flags, key)]
    if changed:
        raise InputError(f"{path}: this run was started with {', '.join(changed)}; resume it with the same")
    if state["config"] != asdict(cfg):
        raise InputError(f"{path}: it holds another model, {state['config']}; here it is {asdict(cfg)}")
    if state["words"] != words:
        raise InputError(f"{path}: this run knows other words: {flags.data} has changed since it was started")


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
