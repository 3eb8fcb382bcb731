"""LoRA (Hu et al., arXiv 2106.09685): a small adapter for each of a frozen Transformer's matrices.

A matrix W becomes W + (alpha / rank) B A, with A (rank, in) and B (out, rank) the only weights that are
trained. B starts as zero, so step 0 is the frozen model, bit for bit. Adapters are files of PEFT's format:
OmniGen's own pipeline (`merge_lora`) and PEFT read them, and theirs are read here.
"""
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.devices import is_first
from common.files import InputError, make_folder, read_json, write_json
from pretrained.omnigen import export, load_omnigen, omnigen_folder
from pretrained.weights import check_numbers, check_shapes, read_weights, released, write_weights
from scale.sharding import trained, whole

ATTENTION = ["qkv_proj", "o_proj"]                         # what OmniGen's own script adapts
FEED_FORWARD = ["gate_up_proj", "down_proj"]
PREFIX = "base_model.model."                               # PEFT's, before the name of a tensor
# settings of PEFT with which the same tensors mean something else, beside those called use_... and ..._config
UNKNOWN = ("alora_invocation_tokens", "alpha_pattern", "fan_in_fan_out", "layer_replication", "rank_pattern")


class Adapted(nn.Module):
    """A matrix W with its adapter: W x + (alpha / rank) B A x."""

    def __init__(self, weight, rank, alpha):                                        # weight (out, in)
        super().__init__()
        self.weight = weight
        self.lora_A = nn.Linear(weight.shape[1], rank, bias=False)
        self.lora_B = nn.Linear(rank, weight.shape[0], bias=False)
        nn.init.normal_(self.lora_A.weight, std=1 / rank)
        nn.init.zeros_(self.lora_B.weight)
        self.scale = alpha / rank

    def forward(self, x):                                                           # (B, T, in)
        return F.linear(x, self.weight) + self.lora_B(self.scale * self.lora_A(x))  # (B, T, out)


def add_lora(model, rank, alpha, mlp=False):
    """Freeze a Transformer and adapt the matrices of its attention -> the model; mlp: and those of its
    feed-forward. Rank 0 leaves it as it is.

    The adapters are made on the CPU, in float32, wherever the model is."""
    model.requires_grad_(rank == 0)
    for block in model.llm.layers if rank else []:
        for part, names in ((block.self_attn, ATTENTION), (block.mlp, FEED_FORWARD if mlp else [])):
            for name in names:
                setattr(part, name, Adapted(getattr(part, name).weight, rank, alpha))
    return model


def fill_lora(model, weights, path):
    """Give the adapters of a model their weights, {name: tensor}; `path`: the file they are from."""
    expected = {name: tuple(p.shape) for name, p in trained(model).items()}
    check_shapes(path, expected, {name: tuple(value.shape) for name, value in weights.items()})
    model.load_state_dict(weights, strict=False)


@torch.no_grad()
def merge_lora(model):
    """Put W + (alpha / rank) B A in the place of each W and its adapter -> the model, a plain Transformer."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Adapted):
            rows, columns = module.weight.shape
            linear = nn.Linear(columns, rows, bias=False, device="meta")
            change = module.scale * module.lora_B.weight @ module.lora_A.weight     # (out, in)
            linear.weight = nn.Parameter(module.weight + change)
            model.set_submodule(name, linear)
    return model.requires_grad_()


# ------------------------------------------------------------------------------------------- PEFT's folder

def save_lora(model, folder, init):
    """Write adapter_config.json and adapter_model.safetensors; init: what the adapter was trained on.

    The adapters of a sharded model are gathered: all processes call this, and the first one writes."""
    adapters = {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}
    state = model.state_dict()
    weights = whole({f"{PREFIX}{name}": state[name] for name in trained(model)})
    if not is_first():
        return
    first = next(iter(adapters.values()))
    rank = first.lora_A.out_features
    folder = make_folder(folder)
    write_weights(folder / "adapter_model.safetensors", weights)
    write_json(folder / "adapter_config.json", {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": init.removeprefix("omnigen:"),
        "r": rank, "lora_alpha": round(first.scale * rank), "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted({name.split(".")[-1] for name in adapters}),
        "init_lora_weights": "gaussian", "inference_mode": True})


def load_lora(model, folder):
    """Add the adapter of a folder in PEFT's format to a Transformer."""
    path = Path(folder) / "adapter_config.json"
    config = read_json(released(path))
    if config.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type is {config.get('peft_type')!r}; an adapter of type 'LORA' is "
                         f"expected")
    odd = [key for key, value in config.items()
           if value and (key in UNKNOWN or key.startswith("use_") or key.endswith("_config"))]
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start not in ("gaussian", "orthogonal"):        # PiSSA and others change W
        odd.append(f"init_lora_weights {start!r}")
    if odd:
        raise InputError(f"{path}: {', '.join(odd)} of PEFT is unknown here; an adapter trained without is "
                         f"expected")
    check_numbers(path, config, ["r"], ["lora_alpha"])
    file = path.with_name("adapter_model.safetensors")
    weights = {name.removeprefix(PREFIX): value for name, value in read_weights(file).items()}
    add_lora(model, config["r"], config["lora_alpha"], mlp=any(".mlp." in name for name in weights))
    fill_lora(model, weights, file)


def export_lora(model, init, out):
    """What a run leaves: out/adapter and, if it started from OmniGen-v1, out/export, which has it merged into
    the released weights, in float32."""
    save_lora(model, out / "adapter", init)
    if init.startswith("omnigen:") and is_first():
        source = omnigen_folder(init)
        merged = load_omnigen(source)
        load_lora(merged, out / "adapter")
        export(merge_lora(merged), source, out / "export")
