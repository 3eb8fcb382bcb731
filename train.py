"""Train a MADI editor.

    python train.py                                  the toy world, minutes on a laptop CPU
    python train.py --preset shapes64                a larger toy, for a GPU
    python train.py --data pairs.jsonl --size 32     your own image pairs, in pixels
    torchrun --nproc-per-node 4 train.py ...         the same on several GPUs
    python train.py --data hard --init out/toy/last.pt --out out/hard
                                                     continue from a checkpoint, on other data
    torchrun --nproc-per-node 8 train.py --preset omnigen --init omnigen:OmniGen-v1 --data pairs.jsonl
                                                     fine-tune OmniGen-v1, the paper's run

Everything random is a function of the seed and the index of the sample. So a resumed run continues as if it
had not been interrupted (bit for bit on a CPU), and several processes give the result of one up to rounding.
Start reading at `train`: set-up, then the loop.
"""
import gc
import itertools
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import magd
from common.charts import plot_losses
from common.cli import run_script
from common.devices import autocast, catch_signals, compile_blocks, fast_bf16, start_processes
from common.files import InputError, append, finished, make_folder, write_json, write_jsonl
from common.muon import Muon
from common.rows import BadRows
from common.statistics import add_batch, log_line, new_sums
from data import MicroBatches, Pairs, Shapes, Words, make_batch, make_loader, micro_batches, open_data
from metrics import SCORES, breakdown, evaluate
from model import Config, Transformer
from pretrained.latents import Latents, cache_header
from pretrained.lora import add_lora, export_lora
from pretrained.omnigen import export, omnigen_folder
from sample import Editor, load_checkpoint, omnigen_editor, preview
from scale.checkpoints import check_resume, check_space, keep, read_checkpoint, restore, save_checkpoint
from scale.cost import blocks_to_recompute, peak_tflops
from scale.flags import parse_flags
from scale.sharding import averaged, shard, trained
from toy.world import WORLDS

# ------------------------------------------------------------------------------------------- presets

PRESETS = {                               # what a preset sets; all else has the defaults of scale/flags.py
    "toy": dict(data="shapes", size=16, patch=4, width=96, layers=8, heads=6, mlp=192, batch=64, steps=1400,
                lr=6e-3, muon_lr=0.03, t_mean=-0.8, max_gap=32, jump=0.7, eval_steps=10),
    "shapes64": dict(data="shapes64", size=64, patch=4, width=384, layers=8, heads=6, mlp=1024, batch=256,
                     steps=10000, lr=1e-3, muon_lr=0.01, warmup=200, ema=0.999, p_plan=0.5,
                     p_masked_source=0.5, max_gap=32),
    # the paper's run (Table 8); the sizes come from OmniGen's config.json
    "omnigen": dict(size=1024, batch=128, micro_batch=1, steps=3200, lr=1e-4, muon_lr=0.0, warmup=800,
                    ema=0.0, edit_weight=True, p_plan=0.5, p_masked_source=0.5, checkpointing=None,
                    eval_steps=50, text_scale=2.5, image_scale=1.5, log_every=1),
}

LORA = dict(lr=3e-4, muon_lr=0.0)         # and what --lora sets: OmniGen's own

# ------------------------------------------------------------------------------------------- set-up

class Setup(NamedTuple):
    """What training needs; from here on the toy and OmniGen are treated alike."""
    editor: Editor                        # model, tokenizer, autoencoder if there is one
    dataset: Shapes | Pairs | Latents
    validation: Shapes | Pairs | Latents | None            # held out: the iid split, or --val-data
    mask_tokens: magd.MaskTokens | None
    trained_model: torch.nn.Module        # the model, in DDP if there are several processes
    trained_mask_tokens: torch.nn.Module | None            # likewise
    words: list | None                    # the vocabulary, for the checkpoint; OmniGen has its tokenizer.json


def set_up_from_scratch(flags, world, device, resumed, bad):
    """A model in pixels, from scratch or from a checkpoint; data parallel (DDP)."""
    dataset = open_data(flags.data, "train", flags.size, flags.seed, bad)
    tokenizer = Words(dataset.words)
    grid = flags.size // flags.patch
    # positions run from 0 to 64 whatever the image size; times run to 1000, as in DiT
    cfg = Config(len(tokenizer), flags.width, flags.layers, flags.heads, flags.mlp, 3, flags.patch, grid,
                 grid_step=64 / grid, time_scale=1000.0, qk_norm=True, prediction=flags.prediction,
                 jump=flags.jump)
    model = Transformer(cfg).init_weights()
    if flags.init and (flags.lora or not resumed):
        start_from(model, tokenizer, flags.init)
    add_lora(model, flags.lora, flags.lora_alpha, flags.lora_mlp).to(device)
    mask_tokens = make_mask_tokens(flags, cfg, device)
    editor = Editor(model, tokenizer, vae=None, size=flags.size, world=WORLDS.get(flags.data))
    validation = None
    if editor.world or flags.val_data:    # one seed: runs with different seeds have the same
        validation = open_data(flags.val_data or flags.data, "iid", flags.size, 0)
        for word in validation.words:
            tokenizer.encode(word)        # else one that training lacks would end the run hours later
    trained_model = model
    trained_mask_tokens = mask_tokens
    if world > 1:
        trained_model = DistributedDataParallel(model, broadcast_buffers=False)
        trained_mask_tokens = DistributedDataParallel(mask_tokens) if mask_tokens else None
    return Setup(editor, dataset, validation, mask_tokens, trained_model, trained_mask_tokens,
                 tokenizer.words)


def set_up_omnigen(flags, device, bad):
    """OmniGen-v1 on latents; sharded (FSDP2)."""
    folder = omnigen_folder(flags.init)
    bf16 = flags.bf16 and fast_bf16(device)
    header = cache_header(folder / "vae", flags.size)
    cache = flags.latents or Path(flags.data).with_suffix(".latents")
    dataset = Latents(flags.data, cache, header, flags.seed, flags.p_edit, bad)
    validation = None
    if flags.val_data:
        cache = Path(flags.val_data).with_suffix(".latents")
        validation = Latents(flags.val_data, cache, header, 0, flags.p_edit)
    dtype = torch.bfloat16 if flags.lora and bf16 else torch.float32    # frozen weights need no more
    editor = omnigen_editor(flags, dtype, device, lambda model: shard(
        add_lora(model, flags.lora, flags.lora_alpha, flags.lora_mlp), device, bf16))
    mask_tokens = make_mask_tokens(flags, editor.model.cfg, device)
    if mask_tokens:
        shard(mask_tokens, device, bf16)
    return Setup(editor, dataset, validation, mask_tokens, editor.model, mask_tokens, words=None)


def make_mask_tokens(flags, cfg, device):
    learned = flags.mask_token == "learned" and flags.p_magd > 0
    return magd.MaskTokens(cfg.width).to(device) if learned else None


def start_from(model, tokenizer, path):
    """Fill a fresh model with a checkpoint's weights (averaged, if it has averages), not its mask tokens."""
    other, _ = load_checkpoint(path)
    differ = [f"{key} {value} instead of {getattr(model.cfg, key)}"
              for key, value in asdict(other.model.cfg).items()
              if value != getattr(model.cfg, key) and key != "jump"]
    if other.tokenizer.words != tokenizer.words:
        differ.append("a vocabulary of other words")
    if differ:
        raise InputError(f"--init {path}: it holds another model, with {', '.join(differ)}")
    model.load_state_dict(other.model.state_dict())


def make_optimizers(flags, model, mask_tokens, bf16):
    """AdamW, and Muon for the matrices of the blocks unless --muon-lr is 0."""
    matrices = [p for p in trained(model.llm.layers).values() if p.ndim == 2] if flags.muon_lr else []
    by_muon = {id(p) for p in matrices}
    modules = [model, mask_tokens] if mask_tokens else [model]
    others = [p for module in modules for p in trained(module).values() if id(p) not in by_muon]
    optimizers = [torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=flags.weight_decay, fused=True)]
    if matrices:
        dtype = torch.bfloat16 if bf16 else torch.float32
        optimizers.append(Muon(matrices, flags.muon_lr, flags.weight_decay, dtype=dtype))
    return optimizers


def learning_rate(step, steps, warmup):
    """Share of the full rate: linear warm-up, then a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def describe(flags, setup, items, micro, accumulate, world, device, say):
    """Print the derived numbers before the first step, and choose how many blocks are recomputed."""
    model = setup.editor.model
    order = micro_batches(setup.dataset, micro)
    batches = [items[indices] for indices in itertools.islice(order, min(16, accumulate * world))]
    L = max(batch.condition.kind.shape[1] for batch, _, _ in batches)
    N = max(draws.u_token.shape[1] for _, draws, _ in batches)
    parameters = sum(p.numel() for p in model.parameters())
    few = f" ({sum(p.numel() for p in trained(model).values()) / 1e6:.2f}M trained)" if flags.lora else ""
    flop = sum(flop for _, _, flop in batches) / len(batches) / micro
    say(f"{flags.data} at {flags.size} pixels: up to {N} target tokens and {L} of the condition; "
        f"a vocabulary of {len(setup.editor.tokenizer)}")
    say(f"{parameters / 1e6:.2f}M parameters{few}, {flop / 1e9:.2f} GFLOP a sample")
    say(f"{flags.steps} steps of {flags.batch} samples = {world} x {device.type} x {micro} at once "
        f"x {accumulate} in turn")
    if setup.words is None:
        total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
        flags.checkpointing, report = blocks_to_recompute(model, micro * (L + N), flags.ema > 0, world, total,
                                                          flags.checkpointing)
        say(report)
    model.checkpointing = flags.checkpointing
    return parameters


@torch.no_grad()
def validate(setup, flags, device):
    """Loss of 64 held-out samples (Eq. 3) that never change, nor does their noise; sample k is at time
    (k mod 8) / 8 + 1/16. Each process does all of it."""
    model = setup.editor.model
    P = model.cfg.patch
    size = 1 if setup.editor.vae else 16                   # samples at once
    losses = []
    for indices in itertools.islice(micro_batches(setup.validation, size), 64 // size):
        batch = make_batch(setup.validation, indices, setup.editor.tokenizer, P, 0, 0.0, 0.0, 0.0)
        shape = batch.x1.shape[1:]                                                  # (C, h, w)
        draws = magd.draw(shape, shape[1] * shape[2] // P**2, batch.seeds)
        draws = draws._replace(t=torch.tensor([k % 8 / 8 + 1 / 16 for k in indices]))
        draws = magd.Draws(*(drawn.to(device) for drawn in draws))
        with autocast(device, flags.bf16):
            own, _ = magd.magd_loss(setup.trained_model, batch.x1.to(device), batch.condition.to(device),
                                    draws, prediction=flags.prediction)
        losses.append(own.mean())
    return torch.stack(losses).mean().item()


def exact_share(setup, flags, device):
    """The share of exact ones among 64 edits of the validation set of a toy world."""
    edits = (k for k in itertools.count() if setup.validation.sample(k).images)
    rows = evaluate(setup.editor.model, setup.editor.tokenizer, setup.validation,
                    list(itertools.islice(edits, 64)), flags.eval_steps, flags.text_scale, flags.image_scale,
                    device=device, bf16=flags.bf16, progress=False)
    return breakdown(rows)["all"]["exact"]


def held_out_scores(setup, flags, rank, world, device, say):
    """Edits of both held-out sets, shared out over the processes -> {split: breakdown}."""
    result = {}
    for split in ("iid", "novel"):
        dataset = Shapes(flags.data, split, flags.seed)
        rows = evaluate(setup.editor.model, setup.editor.tokenizer, dataset,
                        range(rank, flags.eval_examples, world), flags.eval_steps, flags.text_scale,
                        flags.image_scale, device=device, bf16=flags.bf16, progress=rank == 0)
        rows = [{key: value for key, value in row.items() if key not in ("sample", "output")} for row in rows]
        if world > 1:
            shares = [None] * world
            dist.all_gather_object(shares, rows)
            rows = [row for share in shares for row in share]
        result[split] = breakdown(rows)
        scores = "  ".join(f"{key} {result[split]['all'][key]:.3f}" for key in SCORES)
        say(f"{split:>6} {scores}  ({len(rows)} examples)")
    return result


# ------------------------------------------------------------------------------------------- the training

def train(flags):
    omnigen = flags.preset == "omnigen"
    rank, world, device = start_processes(omnigen, flags.device)
    say = print if rank == 0 else lambda *_: None
    micro = flags.micro_batch or max(1, flags.batch // world)
    accumulate = flags.batch // (world * micro)
    if flags.batch != accumulate * world * micro:
        raise InputError(f"--batch {flags.batch} is not a multiple of {world} processes x {micro} samples at "
                         f"once (--micro-batch)")
    out = make_folder(flags.out)
    last = out / "last.pt"
    if last.exists() and not flags.resume:
        raise InputError(f"{out} already holds a run. Continue with --resume, or choose another --out.")
    state = read_checkpoint(last) if flags.resume else None

    torch.manual_seed(flags.seed)
    bad = BadRows(flags.skip_bad, say)
    if omnigen:
        setup = set_up_omnigen(flags, device, bad)
    else:
        setup = set_up_from_scratch(flags, world, device, flags.resume, bad)
    model = setup.editor.model
    if flags.compile:
        compile_blocks(model)
    weights = list(trained(model).values())
    parameters = weights + (list(setup.mask_tokens.parameters()) if setup.mask_tokens else [])
    average = [p.detach().clone() for p in weights] if flags.ema else []       # what is used in the end
    optimizers = make_optimizers(flags, model, setup.mask_tokens, flags.bf16 and fast_bf16(device))
    if rank == 0:
        check_space(out, model, setup.mask_tokens, average, optimizers)
    first = 0
    seconds = 0.0
    if state:                              # data and noise follow from the step
        check_resume(state, flags, model.cfg, setup.words, setup.dataset.checksum, last)
        restore(state, model, setup.mask_tokens, average, optimizers)
        first = state["step"]
        seconds = state["seconds"]
        steps = state["flags"]["steps"]
        if flags.steps > steps:
            old, new = (learning_rate(first, total, flags.warmup) for total in (steps, flags.steps))
            say(f"{flags.steps} steps instead of {steps}: the learning rate goes from {old:.2f} to {new:.2f} "
                f"of its highest value, then to 0 at the new end")
        del state
    items = MicroBatches(flags, setup.dataset, setup.editor.tokenizer, model.cfg)
    count = describe(flags, setup, items, micro, accumulate, world, device, say)
    if first:
        say(f"resuming at step {first}")
    if rank == 0:                                          # drop the log of steps that will be repeated
        kept = [line for line in finished(out / "log.jsonl") if line["step"] <= first]
        write_jsonl(out / "log.jsonl", kept)
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    stop = catch_signals()                                 # not empty once one has come

    # ------------------------------------------------------------------ the loop
    sums = new_sums(device)
    batches = make_loader(flags, items, micro, accumulate, first, rank, world, device)
    bar = tqdm(range(first, flags.steps), initial=first, total=flags.steps, disable=rank > 0, unit="step")
    validated = ""                                         # for the bar
    pictured = setup.validation or setup.dataset
    start = tick = time.perf_counter()
    for step in bar:
        rate = learning_rate(step, flags.steps, flags.warmup)
        for optimizer, full_rate in zip(optimizers, (flags.lr, flags.muon_lr)):
            for group in optimizer.param_groups:
                group["lr"] = full_rate * rate

        for item in itertools.islice(batches, accumulate):
            if isinstance(item, InputError):
                raise item
            batch, draws, flop = item
            x1 = batch.x1.to(device, non_blocking=True)                             # (micro, C, h, w)
            condition = batch.condition.to(device)
            draws = magd.Draws(*(drawn.to(device, non_blocking=True) for drawn in draws))
            weight = None
            if flags.edit_weight:                          # Sec. 9
                source = batch.source.to(device, non_blocking=True)
                weight = magd.edit_weight(x1, source, batch.edit.to(device, non_blocking=True))
            with autocast(device, flags.bf16):             # Eq. 6
                losses, masked = magd.magd_loss(setup.trained_model, x1, condition, draws, flags.p_magd,
                                                flags.tau, flags.r_mask, setup.trained_mask_tokens, weight,
                                                flags.prediction, flags.corruption)
            (losses.mean() / accumulate).backward()
            add_batch(sums, losses.detach(), draws.t, masked, flop, untrained=step == first)

        norm = torch.nn.utils.clip_grad_norm_(parameters, flags.clip)
        sums["grad_norm"] += norm.full_tensor() if isinstance(norm, DTensor) else norm
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if average:
            decay = min(flags.ema, (step + 1) / (step + 10))     # early on, forget the initial weights fast
            with torch.no_grad():
                torch._foreach_lerp_(average, weights, 1 - decay)

        done = step + 1
        keeps = flags.keep_every > 0 and done % flags.keep_every == 0
        save = keeps or done % flags.save_every == 0 or done == flags.steps
        picture = done % flags.sample_every == 0
        if not (done % flags.log_every == 0 or save or picture or (stop and world == 1)):
            continue
        now = time.perf_counter()
        sums["stop"] += bool(stop)                         # a signal may reach one process only
        line, stopped = log_line(sums, done, now - tick, flags.batch, world, gpu and peak_tflops(gpu))
        if setup.validation and (picture or done == flags.steps):
            line["val_loss"] = validate(setup, flags, device)
            with averaged(model, average):
                if average:
                    line["val_loss_averaged"] = validate(setup, flags, device)
                if setup.editor.world:
                    line["val_exact"] = exact_share(setup, flags, device)
            validated = "".join(f", {key} {line[key]:.3f}" for key in line if key.startswith("val_"))
        if rank == 0:
            bar.set_postfix_str(f"loss {line['loss']:.4f}, {line['images_per_s']:.0f} images/s{validated}")
            append(out / "log.jsonl", {**line, "lr": flags.lr * rate, "skipped_rows": bad.skipped})
        if save or stopped:
            save_checkpoint(last, model, setup.mask_tokens, average, optimizers, step=done,
                            words=setup.words, data=setup.dataset.checksum, flags=vars(flags),
                            seconds=seconds + now - start)
            if keeps and rank == 0:
                keep(last, out / f"step_{done:06d}.pt")
        if picture:
            with averaged(model, average):
                preview(setup.editor, pictured, out / "samples" / f"step_{done:06d}.png", flags, device)
        if stopped:
            bar.close()
            say(f"stopped at step {done} of {flags.steps}; {last} is saved. Continue with --resume.")
            sys.exit(130)
        tick = time.perf_counter()                         # saves and pictures are not timed
    bar.close()
    catch_signals(False)
    seconds += time.perf_counter() - start
    say(f"trained in {seconds:.0f} s")

    # ------------------------------------------------------------------ how good is it?
    result = {"seconds": seconds, "steps": flags.steps, "images": flags.steps * flags.batch,
              "parameters": count, "skipped_rows": bad.skipped, "seed": flags.seed, "preset": flags.preset,
              "processes": world, "device": gpu or "cpu", "torch": torch.__version__, "flags": vars(flags)}
    final = out / "samples" / "final.png"
    with averaged(model, average):
        if setup.editor.world and flags.eval_examples:
            result |= held_out_scores(setup, flags, rank, world, device, say)
        result["l1"], result["l1_identity"] = preview(setup.editor, pictured, final, flags, device)
        if flags.lora:
            export_lora(model, flags.init, out)
            say(f"wrote {out / 'adapter'}, an adapter for sample.py --lora")
        elif omnigen:
            export(model, omnigen_folder(flags.init), out / "export")
        if omnigen:
            say(f"wrote {out / 'export'}: python sample.py --init omnigen:{out / 'export'}")
    if rank == 0:
        write_json(out / "result.json", result)
        plot_losses(finished(out / "log.jsonl"), out / "loss.png")
        say(f"wrote {last}, {out / 'result.json'} and the picture {final}")


def main():
    train(parse_flags(PRESETS, LORA))
    if dist.is_initialized():
        gc.collect()                      # before the process group: DDP destroyed after it can deadlock
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
