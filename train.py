"""Train a MADI editor.

    python train.py                                          the toy world, minutes on a laptop CPU
    python train.py --preset shapes64                        a larger toy, for a GPU
    python train.py --data pairs.jsonl --size 32             your own image pairs, in pixels
    torchrun --nproc-per-node 4 train.py ...                 the same on several GPUs
    python train.py --preset small --data hard --init out/small/last.pt --out out/hard
                                                             go on from a toy checkpoint with other data or another loss
    torchrun --nproc-per-node 8 train.py --preset omnigen --init omnigen:OmniGen-v1 --data pairs.jsonl
                                                             fine-tune OmniGen-v1, the paper's run

Everything random is a function of (seed, index of the sample), so a resumed run goes on exactly as it would have, and the
number of processes does not change the result. The loop at the end of `main` is in time order.
"""
import argparse
import itertools
import json
import math
import os
import shutil
import signal
import sys
import textwrap
import time
import warnings
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import magd
from data import (BPE, WORLDS, Latents, Pairs, Shapes, Words, cache_header, make_batch, make_prompt, micro_batches, omnigen_folder,
                  sheet, to_array, to_tensor, whole_lines)
from metrics import SCORES, breakdown
from model import (Config, InputError, Transformer, autocast, fast_bf16, flops, is_first, load_omnigen, load_vae, own_part,
                   processes, save_omnigen, whole)
from sample import evaluate, generate, load_checkpoint, noise, read_checkpoint

PRESETS = {                               # values that differ from the defaults below; OmniGen's sizes come from its config.json
    "toy": dict(data="shapes", size=16, patch=4, width=96, layers=8, heads=6, mlp=192, batch=64, steps=1400, lr=6e-3, muon_lr=0.03,
                t_mean=-0.8),                              # narrow and deep: layers are what finding the right thing to edit takes
    "small": dict(data="simple", size=16, patch=4, width=128, layers=3, heads=4, mlp=256, batch=64, steps=1000, lr=6e-3, muon_lr=0.03,
                  t_mean=-0.4, eval_steps=10),             # for experiments: many runs of some minutes
    "shapes64": dict(data="shapes64", size=64, patch=4, width=384, layers=8, heads=6, mlp=1024, batch=256, steps=10000, lr=1e-3,
                     muon_lr=0.01, p_plan=0.5, p_masked_source=0.5, ema=0.999, warmup=200),
    "omnigen": dict(size=1024, batch=128, micro_batch=1, steps=3200, lr=1e-4, muon_lr=0.0, warmup=800, ema=0.0, edit_weight=True,
                    p_plan=0.5, p_masked_source=0.5, checkpointing=None, eval_steps=50, text_scale=2.5, image_scale=1.5, log_every=1),
}
PEAK_TFLOPS = {"B200": 2250, "H200": 989, "H100": 989, "A100": 312, "L40": 181, "RTX 4090": 165, "A10": 125}   # dense bf16


def parse_flags():
    def number(kind, low, high=math.inf, open_low=False):
        def parse(text):
            value = kind(text)
            if not low <= value <= high or (open_low and value == low):
                raise argparse.ArgumentTypeError(f"{text} is not in {'(' if open_low else '['}{low}, {high}]")
            return value
        parse.__name__ = {int: "whole number", float: "number"}[kind]          # argparse puts it into its message
        return parse
    count, share, positive = number(int, 1), number(float, 0, 1), number(float, 0, open_low=True)
    none_or_more, zero_or_more = number(int, 0), number(float, 0)

    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.error = lambda message: sys.exit(f"train.py: {message}")
    switch = argparse.BooleanOptionalAction
    p.add_argument("--preset", choices=PRESETS, default="toy", help="starting values; any flag overrides them")
    p.add_argument("--data", help=f"{', '.join(WORLDS)}, or a JSONL file of image pairs")
    p.add_argument("--init", help="weights to start from: a checkpoint of this script, or omnigen:FOLDER, the OmniGen-v1 there, on latents")
    p.add_argument("--latents", help="folder of `data.py latents`; DATA.latents if not given")
    p.add_argument("--out", help="folder of the run; out/PRESET if not given")
    p.add_argument("--resume", action="store_true", help="go on from last.pt in that folder")
    p.add_argument("--seed", type=none_or_more, default=0)
    # model
    p.add_argument("--size", type=count, help="pixels of a side, the longer one with --init; a toy world brings its own")
    p.add_argument("--patch", type=count)
    p.add_argument("--width", type=count)
    p.add_argument("--layers", type=count)
    p.add_argument("--heads", type=count)
    p.add_argument("--mlp", type=count, help="hidden width of the feed-forward")
    p.add_argument("--checkpointing", type=none_or_more, default=0, help="blocks that the backward recomputes: less memory, up to a third "
                   "more work; with --preset omnigen as few as the GPU's memory asks for, if not given")
    p.add_argument("--prediction", choices=magd.PREDICTIONS, default="velocity", help="what the network's output means")
    # the paper
    p.add_argument("--p-magd", type=share, default=0.5, help="chance that a sample of high noise is masked; 0 = plain training")
    p.add_argument("--tau", type=share, default=0.7, help="least noise level 1 - t of a masked sample")
    p.add_argument("--r-mask", type=share, default=0.25, help="share of tokens hidden in a masked sample")
    p.add_argument("--corruption", choices=magd.CORRUPTIONS, default="noise-mask", help="order of the corruptions; the paper's is noise-mask")
    p.add_argument("--mask-token", choices=("learned", "zero"), default="learned")
    p.add_argument("--t-mean", type=float, default=0.0, help="mean of the logit of the training times; below 0: more noise than OmniGen")
    p.add_argument("--edit-weight", action=switch, default=False, help="OmniGen's weight on the changed region of an edit")
    p.add_argument("--p-drop", type=share, default=0.1, help="chance that a prompt is emptied")
    p.add_argument("--p-plan", type=share, default=0.0, help="chance that a prompt carries its expressive plan")
    p.add_argument("--p-masked-source", type=share, default=0.0, help="chance of the masked source as one more image")
    p.add_argument("--p-edit", type=share, default=0.5, help="share of edits with --preset omnigen; the rest is text-to-image")
    p.add_argument("--pause-token", default="<|placeholder1|>", help="with --preset omnigen: a word of its tokenizer.json")
    # optimisation
    p.add_argument("--steps", type=count)
    p.add_argument("--batch", type=count, help="samples a step, over all processes")
    p.add_argument("--micro-batch", type=count, help="samples a process runs at once; its share of the batch if not given")
    p.add_argument("--lr", type=positive, help="of AdamW")
    p.add_argument("--muon-lr", type=zero_or_more, help="of Muon on the matrices of the blocks; 0 = AdamW for all")
    p.add_argument("--weight-decay", type=zero_or_more, default=0.0)
    p.add_argument("--warmup", type=none_or_more, default=50, help="steps")
    p.add_argument("--clip", type=positive, default=1.0, help="largest norm of the gradient")
    p.add_argument("--ema", type=share, default=0.99, help="decay of the averaged weights")
    # evaluation
    p.add_argument("--eval-examples", type=none_or_more, default=512, help="of each held-out set, at the end")
    p.add_argument("--eval-steps", type=count, default=20, help="Euler steps")
    p.add_argument("--text-scale", type=zero_or_more, default=1.0)
    p.add_argument("--image-scale", type=zero_or_more, default=1.0)
    # system
    p.add_argument("--bf16", action=switch, default=True, help="bf16 matrix products where the device is fast at them")
    p.add_argument("--compile", action=switch, default=False, help="torch.compile the blocks: some minutes at the start")
    p.add_argument("--workers", type=none_or_more, help="processes that make batches ahead; if not given, with a GPU its share of the cores, "
                   "at most 16, without 0")
    p.add_argument("--log-every", type=count, default=20)
    p.add_argument("--save-every", type=count, default=200)
    p.add_argument("--sample-every", type=count, default=400)
    preset = argparse.ArgumentParser(add_help=False)       # looked at first, so that --help shows the preset's values
    preset.add_argument("--preset", default="toy")
    p.set_defaults(**PRESETS.get(preset.parse_known_args()[0].preset, {}))
    flags = p.parse_args()
    flags.out = flags.out or f"out/{flags.preset}"
    if flags.corruption == "mask-noise" and flags.mask_token != "zero" or flags.corruption == "mask" and flags.prediction != "velocity":
        p.error("--corruption mask-noise blanks patches, which needs --mask-token zero; mask needs --prediction velocity")
    omnigen = (flags.init or "").startswith("omnigen:")
    if flags.preset == "omnigen" or omnigen:
        own = [f"--{name}" for name in ("patch", "width", "layers", "heads", "mlp") if getattr(flags, name)]
        if not omnigen or not flags.data or flags.data in WORLDS or own or flags.preset != "omnigen" or flags.muon_lr:
            p.error("to fine-tune OmniGen-v1: --preset omnigen --init omnigen:FOLDER --data FILE.jsonl; its sizes come from the "
                    "weights" + f", not from {', '.join(own)}" * bool(own) + ", and it is trained by AdamW alone")
        if flags.prediction != "velocity":
            p.error("OmniGen-v1 predicts the velocity; --prediction is for models trained from scratch")
        return flags
    if flags.data in WORLDS:
        flags.size = WORLDS[flags.data].size
    if flags.size % flags.patch:
        p.error(f"--size {flags.size} is not a multiple of --patch {flags.patch}")
    if flags.width % (2 * flags.heads) or flags.width % 4:
        p.error(f"--width {flags.width} is not a multiple of 4 and of twice --heads {flags.heads}")
    return flags


def learning_rate(step, flags):
    """Share of the full rate: linear warm-up, then a cosine to zero."""
    if step < flags.warmup:
        return (step + 1) / flags.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - flags.warmup) / max(1, flags.steps - flags.warmup)))


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update is made orthogonal by a Newton-Schulz iteration, for matrices (Keller Jordan et al., 2024).

    torch.optim.Muon does the same, but always in bf16, whose rounding makes runs that differ only in the order of their sums
    (one process, two processes) drift apart; dtype float32 keeps them together.
    """

    def __init__(self, matrices, lr, weight_decay=0.0, momentum=0.9, dtype=torch.bfloat16):
        super().__init__(matrices, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}                                                # matrices of one shape are one batch of products
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for (rows, columns), same in shapes.items():
                grads = [p.grad for p in same]
                momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in same]
                torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
                x = torch.stack(torch._foreach_lerp(grads, momenta, group["momentum"])).to(self.dtype)    # (matrices, rows, columns)
                x = x.mT if rows > columns else x
                x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
                for _ in range(5):                                     # the singular values of x go towards 1
                    a = x @ x.mT
                    x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
                x = x.mT if rows > columns else x
                torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(same, x.to(same[0].dtype).unbind(), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


class MicroBatches(torch.utils.data.Dataset):
    """Item (indices of samples) -> their batch, all random numbers of its loss, and the FLOPs of a training step on it."""

    def __init__(self, flags, dataset, tokenizer, cfg):
        self.flags, self.dataset, self.tokenizer, self.cfg = flags, dataset, tokenizer, cfg

    def __getitem__(self, indices):
        f = self.flags
        try:
            batch = make_batch(self.dataset, indices, self.tokenizer, self.cfg.patch, f.seed, f.p_drop, f.p_plan, f.p_masked_source)
        except InputError as error:
            if torch.utils.data.get_worker_info() is None:
                raise
            return error                                               # a worker's exceptions arrive with its traceback
        shape = tuple(batch.x1.shape[1:])
        tokens = shape[1] * shape[2] // self.cfg.patch**2
        work = 3 * sum(flops(self.cfg, kind, tokens) for kind in batch.condition.kind)    # the backward costs two forwards
        return batch, magd.draw(shape, tokens, batch.seeds, f.t_mean), work


def shard(model, device, bf16):
    """FSDP2: each process keeps its part of every matrix in float32 and sees a block whole, in bf16, only while it runs."""
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # about views changed in place: nothing here is
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.llm.layers if isinstance(model, Transformer) else ():
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for method in ("encode", "denoise") if isinstance(model, Transformer) else ():        # sampling calls these
        register_fsdp_forward_method(model, method)


def memory(cfg, parameters, L, N, flags, micro, world, recomputed):
    """About how many bytes a GPU needs if so many blocks are recomputed: states of the optimizer, a few gathered blocks, activations."""
    states = (16 + 4 * (flags.ema > 0)) * parameters / world           # float32 weights, gradients, two moments of AdamW, mean
    gathered = 3 * 2 * parameters / cfg.layers                         # bf16 weights of the running block, the next, its gradient
    inside = 2 * (11 * cfg.width + 4 * cfg.mlp)                        # what the backward of a block needs of a token
    # a recomputed block keeps its input alone, but one of them at a time has everything
    kept = recomputed * 2 * cfg.width + min(cfg.layers, cfg.layers - recomputed + 1) * inside
    return states + gathered + micro * (L + N) * kept


def save(path, state):
    """Atomic: a run killed here leaves the old file or the new one, whole."""
    with open(f"{path}.tmp", "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


MAY_CHANGE = {"out", "resume", "preset", "eval_examples", "eval_steps", "text_scale", "image_scale", "workers", "log_every",
              "save_every", "sample_every", "checkpointing", "compile", "init", "latents"}


def check_resume(state, flags, cfg, words, path):
    """A resumed run has to be the same run."""
    changed = [f"--{key.replace('_', '-')} {value}" for key, value in state["flags"].items()
               if key not in MAY_CHANGE and value != getattr(flags, key)]
    if changed:
        raise InputError(f"{path}: this run was started with {', '.join(changed)}; resume it with the same")
    if state["config"] != asdict(cfg):
        raise InputError(f"{path}: it holds another model, {state['config']}; this command makes {asdict(cfg)}")
    if state["words"] != words:
        raise InputError(f"{path}: this run knows other words: {flags.data} has changed since it was started")


def start_from(model, tokenizer, path):
    """Fill a fresh model with the averaged weights of a checkpoint, which has to hold a model of the same kind."""
    other, words, _ = load_checkpoint(path)
    if other.cfg != model.cfg or words.words != tokenizer.words:
        differ = [f"{key} {value} instead of {getattr(model.cfg, key)}" for key, value in asdict(other.cfg).items()
                  if value != getattr(model.cfg, key)] or ["a vocabulary of other words"]
        raise InputError(f"--init {path}: it holds another model, with {', '.join(differ)}; the sizes and the words have to be the same")
    model.load_state_dict(other.state_dict())


def preview(model, tokenizer, dataset, flags, device, path, vae=None, n=8):
    """A sheet of n edits from fixed noise: held-out ones of the toy world, else the first of the training data.

    -> mean absolute difference to the target, of the outputs and of the sources, in [0, 1]
    """
    dataset = Shapes(flags.data, "iid", flags.seed) if flags.data in WORLDS else dataset
    pixels = (lambda x: to_array(vae.decode(x[None].to(device))[0])) if vae else to_array
    cells, differences = [[], [], []], []
    for index in range(n):
        sample = dataset.sample(index)
        images, target = [to_tensor(image).to(device) for image in sample.images], to_tensor(sample.target)
        x = generate(model, tokenizer, [make_prompt(tokenizer, sample.instruction, len(images))], [images],
                     noise(target.shape, [index], device), flags.eval_steps, flags.text_scale, flags.image_scale, bf16=flags.bf16)
        output, target = pixels(x[0]), pixels(target)
        source = pixels(images[0]) if images else np.full_like(target, 255)
        for row, image, caption in zip(cells, (source, output, target), (textwrap.fill(sample.instruction, 24), "output", "target")):
            row.append((image, caption, False))
        if images and source.shape == target.shape:
            differences.append([np.abs(image.astype(float) - target).mean() / 255 for image in (output, source)])
    if is_first():
        sheet(cells, path, max(1, 128 // flags.size))
    return np.mean(differences or [[math.nan] * 2], axis=0).tolist()


@torch.no_grad()
def swap(a, b):
    """Exchange the values of two lists of tensors: the model takes its averaged weights, or gives them back."""
    for x, y in zip(a, b):
        old = x.clone()
        x.copy_(y)
        y.copy_(old)


def main():
    flags = parse_flags()

    # ------------------------------------------------------------------ processes and device
    omnigen = flags.preset == "omnigen"
    rank, world, device = processes()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend, bf16 = "nccl" if device.type == "cuda" else "gloo", flags.bf16 and fast_bf16(device)
    if world > 1:
        dist.init_process_group(backend, timeout=timedelta(hours=1))   # the others wait while the first writes a checkpoint
    elif omnigen:                                          # sharding over one process is how OmniGen trains on one GPU
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    micro = flags.micro_batch or max(1, flags.batch // world)
    accumulate = flags.batch // (world * micro)
    if flags.batch != accumulate * world * micro:
        raise InputError(f"--batch {flags.batch} is not a multiple of {world} processes x {micro} samples at once (--micro-batch)")
    main_process = rank == 0
    say = print if main_process else lambda *_: None

    # ------------------------------------------------------------------ folder
    out = Path(flags.out)
    last = out / "last.pt"
    try:
        (out / "samples").mkdir(parents=True, exist_ok=True)
        open(out / "log.jsonl", "a").close()
    except OSError as error:
        raise InputError(f"--out {out}: cannot write there ({error.strerror})") from None
    if last.exists() and not flags.resume:
        raise InputError(f"{out} already holds a run. Go on with --resume, or choose another folder with --out.")
    state = read_checkpoint(last) if flags.resume else None

    # ------------------------------------------------------------------ data, model
    torch.manual_seed(flags.seed)
    vae = None
    if omnigen:
        folder = omnigen_folder(flags.init)
        header = cache_header(folder / "vae", flags.size)
        dataset = Latents(flags.data, flags.latents or Path(flags.data).with_suffix(".latents"), header, flags.seed, flags.p_edit)
        raw_model = load_omnigen(folder, device=device, shard=lambda model: shard(model, device, bf16))
        cfg, vae = raw_model.cfg, load_vae(folder / "vae", device)
        tokenizer = BPE(folder, flags.pause_token, cfg.max_positions)
    else:
        dataset = Shapes(flags.data, "train", flags.seed) if flags.data in WORLDS else Pairs(flags.data, flags.size, flags.seed)
        tokenizer = Words(dataset.words)
        # an image spans 64 positions of the table, whatever its size, and times run to 1000, as in DiT
        cfg = Config(vocab=len(tokenizer), width=flags.width, layers=flags.layers, heads=flags.heads, mlp=flags.mlp, channels=3,
                     patch=flags.patch, grid=flags.size // flags.patch, grid_step=64 / (flags.size // flags.patch),
                     time_scale=1000.0, qk_norm=True, prediction=flags.prediction)
        raw_model = Transformer(cfg).init_weights().to(device)
        if flags.init and not state:
            start_from(raw_model, tokenizer, flags.init)
    words = None if omnigen else tokenizer.words
    if flags.compile:
        raw_model.compile_blocks()
    learned = flags.mask_token == "learned" and flags.p_magd > 0
    raw_mask_tokens = magd.MaskTokens(cfg.width).to(device) if learned else None
    model, mask_tokens = raw_model, raw_mask_tokens
    if omnigen and learned:
        shard(mask_tokens, device, bf16)
    elif world > 1 and not omnigen:
        model = DistributedDataParallel(raw_model, broadcast_buffers=False)
        mask_tokens = DistributedDataParallel(raw_mask_tokens) if learned else None

    # ------------------------------------------------------------------ optimizers, averaged weights
    weights = list(raw_model.parameters())
    parameters = weights + (list(raw_mask_tokens.parameters()) if learned else [])
    average = [p.detach().clone() for p in weights] if flags.ema else []      # the weights that are used in the end
    matrices = {id(p): p for p in raw_model.llm.layers.parameters() if p.ndim == 2} if flags.muon_lr else {}
    optimizers = [torch.optim.AdamW([p for p in parameters if id(p) not in matrices], flags.lr, betas=(0.9, 0.95),
                                    weight_decay=flags.weight_decay, fused=True)]
    if matrices:
        optimizers.append(Muon(matrices.values(), flags.muon_lr, flags.weight_decay, dtype=torch.bfloat16 if bf16 else torch.float32))
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]

    # ------------------------------------------------------------------ resume
    first, seconds = 0, 0.0
    if state:
        check_resume(state, flags, cfg, words, last)
        raw_model.load_state_dict({key: own_part(state["model"][key], value) for key, value in raw_model.state_dict().items()})
        if learned:
            raw_mask_tokens.load_state_dict({key: own_part(state["mask_tokens"][key], value)
                                             for key, value in raw_mask_tokens.state_dict().items()})
        if average:
            average = [own_part(state["ema"][name], p).to(device) for name, p in raw_model.named_parameters()]
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            for p, moments in zip((p for group in optimizer.param_groups for p in group["params"]), saved["state"].values()):
                moments.update({key: own_part(value, p) for key, value in moments.items() if value.shape == p.shape})
            optimizer.load_state_dict(saved)
        first, seconds = state["step"], state["seconds"]
        del state

    # ------------------------------------------------------------------ what is about to happen
    steps, order = MicroBatches(flags, dataset, tokenizer, cfg), micro_batches(dataset, micro)
    examples = [steps[indices] for indices in itertools.islice(order, min(16, accumulate * world))]
    L = max(batch.condition.kind.shape[1] for batch, _, _ in examples)
    N = max(draws.hide.shape[1] for _, draws, _ in examples)
    count = sum(p.numel() for p in weights)
    work = sum(work for _, _, work in examples) / len(examples) / micro
    say(f"{flags.data} at {flags.size} pixels: up to {N} target tokens and {L} of the condition; a vocabulary of {len(tokenizer)}")
    say(f"{count / 1e6:.2f}M parameters, {work / 1e9:.2f} GFLOP a sample")
    say(f"{flags.steps} steps of {flags.batch} samples = {world} x {device.type} x {micro} at once x {accumulate} in turn")
    raw_model.checkpointing = flags.checkpointing
    if omnigen:
        needs = [memory(cfg, count, L, N, flags, micro, world, blocks) for blocks in range(cfg.layers + 1)]
        has = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
        if flags.checkpointing is None:                                # the estimate knows nothing of the allocator's losses
            flags.checkpointing = next((blocks for blocks, need in enumerate(needs) if not has or need < 0.8 * has), cfg.layers)
        raw_model.checkpointing = min(flags.checkpointing, cfg.layers)
        need = needs[raw_model.checkpointing]
        say(f"memory: about {need / 1e9:.1f} GB on each of {world} x {device.type}" + (f", which has {has / 1e9:.1f} GB" if has else "") +
            f", with {raw_model.checkpointing} of {cfg.layers} blocks recomputed (--checkpointing); {needs[0] / 1e9:.1f} GB with none, "
            f"{needs[-1] / 1e9:.1f} GB with all")
        if has and need > has:
            raise InputError(f"this plan needs about {need / 1e9:.0f} GB on each GPU, which has {has / 1e9:.0f} GB: use more GPUs, a "
                             f"smaller --micro-batch or --size, or a larger --checkpointing")
    if first:
        say(f"resuming at step {first}")

    # ------------------------------------------------------------------ loop
    if main_process:
        log = [line for line in whole_lines(out / "log.jsonl") if json.loads(line)["step"] <= first]          # what is redone goes
        (out / "log.jsonl").write_text("".join(log))
    stop = []
    signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    # sums since the last log line: loss in four bins of t, samples in each, masked samples, masked tokens, norm, Ctrl-C, TFLOP
    stats = torch.zeros(13, device=device)
    peak = next((value for name, value in PEAK_TFLOPS.items() if device.type == "cuda" and name in torch.cuda.get_device_name()), None)
    # this process takes every world-th micro-batch of the order, from the first one that is not done yet
    share = itertools.islice(micro_batches(dataset, micro), first * accumulate * world + rank, flags.steps * accumulate * world, world)
    cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    workers = flags.workers if flags.workers is not None else min(16, cores) if device.type == "cuda" else 0
    batches = iter(torch.utils.data.DataLoader(steps, batch_size=None, sampler=share, num_workers=workers, pin_memory=device.type == "cuda"))
    bar = tqdm(range(first, flags.steps), initial=first, total=flags.steps, disable=not main_process, unit="step")
    start = tick = time.perf_counter()
    for step in bar:
        rate = learning_rate(step, flags)
        for group, full in zip((group for optimizer in optimizers for group in optimizer.param_groups), rates):
            group["lr"] = full * rate
        for item in itertools.islice(batches, accumulate):
            if isinstance(item, InputError):
                raise item
            batch, draws, work = item
            x1, source, edit = (x.to(device, non_blocking=True) for x in (batch.x1, batch.source, batch.edit))
            condition, draws = batch.condition.to(device), magd.Draws(*(d.to(device, non_blocking=True) for d in draws))
            weight = magd.edit_weight(x1, source, edit) if flags.edit_weight else None
            with autocast(device, flags.bf16):
                losses, masked = magd.magd_loss(model, x1, condition, draws, flags.p_magd, flags.tau, flags.r_mask, mask_tokens,
                                                weight, flags.prediction, flags.corruption)
            (losses.mean() / accumulate).backward()
            with torch.no_grad():
                bins = (4 * draws.t).long().clamp(max=3)                                  # (B,)
                stats[:4].index_add_(0, bins, losses.float())
                stats[4:8].index_add_(0, bins, torch.ones_like(losses, dtype=torch.float32))
                stats[8] += masked.any(dim=1).sum()
                stats[9] += masked.float().mean() * len(masked)
                stats[12] += work / 1e12
        norm = torch.nn.utils.clip_grad_norm_(parameters, flags.clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            decay = min(flags.ema, (step + 1) / (step + 10))                               # the first weights are soon forgotten
            if average:
                torch._foreach_lerp_(average, weights, 1 - decay)
            stats[10] += norm
            stats[11] += bool(stop)

        done = step + 1
        due = done % flags.save_every == 0 or done == flags.steps
        if not (done % flags.log_every == 0 or done % flags.sample_every == 0 or due):
            continue
        if world > 1:
            dist.all_reduce(stats)
        values = stats.tolist()
        stats.zero_()
        samples = sum(values[4:8])
        loss = sum(values[:4]) / samples
        if not math.isfinite(loss) or not math.isfinite(values[10]):
            raise InputError(f"the loss is not finite near step {done}. {last if last.exists() else 'No checkpoint'} is from before; "
                             f"try a lower --lr and --muon-lr, or --no-bf16.")
        now = time.perf_counter()
        line = {"step": done, "loss": loss, "loss_by_t": [a / b if b else None for a, b in zip(values[:4], values[4:8])],
                "masked_samples": values[8] / samples, "masked_tokens": values[9] / samples,
                "grad_norm": values[10] / (samples / flags.batch * world), "lr": flags.lr * rate, "images_per_s": samples / (now - tick),
                "tflops": values[12] / (now - tick)}
        if peak:
            line["mfu"] = line["tflops"] / (peak * world)              # without what checkpointing computes twice
        if main_process:
            bar.set_postfix_str(f"loss {loss:.4f}, {line['images_per_s']:.0f} images/s")
            with open(out / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
        if due or values[11]:
            names = [name for name, _ in raw_model.named_parameters()]
            state = whole({"step": done, "seconds": seconds + now - start, "config": asdict(cfg), "flags": vars(flags),
                           "words": words, "model": raw_model.state_dict(),
                           "ema": dict(zip(names, average)),
                           "mask_tokens": raw_mask_tokens.state_dict() if learned else None,
                           "optimizers": [optimizer.state_dict() for optimizer in optimizers]})
            if main_process:
                save(last, state)
            del state
        if done % flags.sample_every == 0 and (main_process or omnigen):                  # a sharded model needs all processes
            swap(weights, average)
            preview(raw_model, tokenizer, dataset, flags, device, out / "samples" / f"step_{done:06d}.png", vae)
            if omnigen:
                raw_model.reshard()                                    # else the gathered averages would serve the next step
            swap(weights, average)
        if values[11]:
            bar.close()
            say(f"stopped at step {done} of {flags.steps}; {last} is saved. Go on with the same command and --resume.")
            sys.exit(130)
        tick = time.perf_counter()                                     # saving and drawing are not training
    bar.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    seconds += time.perf_counter() - start

    # ------------------------------------------------------------------ how good is it?
    swap(weights, average)
    result = {"seconds": seconds, "steps": flags.steps, "images": flags.steps * flags.batch, "parameters": count, "seed": flags.seed,
              "preset": flags.preset, "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "processes": world,
              "torch": torch.__version__, "flags": vars(flags)}
    say(f"trained in {seconds:.0f} s")
    if flags.data in WORLDS and flags.eval_examples:
        for split in ("iid", "novel"):
            rows = evaluate(raw_model, tokenizer, Shapes(flags.data, split, flags.seed), range(rank, flags.eval_examples, world),
                            flags.eval_steps, flags.text_scale, flags.image_scale, device=device, bf16=flags.bf16,
                            progress=main_process)
            rows = [{key: value for key, value in row.items() if key not in ("sample", "output")} for row in rows]
            if world > 1:
                shares = [None] * world
                dist.all_gather_object(shares, rows)
                rows = [row for share in shares for row in share]
            result[split] = breakdown(rows)
            say(f"{split:>6} " + "  ".join(f"{key} {result[split]['all'][key]:.3f}" for key in SCORES) + f"  ({len(rows)} examples)")
    picture = out / "samples" / "final.png"
    if main_process or omnigen:
        result["l1"], result["l1_identity"] = preview(raw_model, tokenizer, dataset, flags, device, picture, vae)
    if omnigen:
        save_omnigen(raw_model, out / "export")
        if main_process:
            shutil.copytree(folder / "vae", out / "export" / "vae", dirs_exist_ok=True)
            for file in folder.glob("*token*.json"):
                shutil.copyfile(file, out / "export" / file.name)
        say(f"wrote {out / 'export'}: python sample.py --init omnigen:{out / 'export'}")
    if main_process:
        with open(out / "result.json.tmp", "w") as file:
            json.dump(result, file, indent=1)
        os.replace(out / "result.json.tmp", out / "result.json")
        say(f"wrote {last}, {out / 'result.json'} and the picture {picture}")
    if dist.is_initialized():
        model = mask_tokens = None       # DDP goes before the process group: after it, its destructor can deadlock
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"train.py: {error}")
