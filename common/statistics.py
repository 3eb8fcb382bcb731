"""What train.py logs: sums over samples, added over the processes at each line of the log."""
import math

import torch
import torch.distributed as dist

from common.files import InputError


def new_sums(device):
    """Sums since the last line of the log; loss and samples in four bins of t, from noise to image."""
    sizes = dict(loss=4, samples=4, masked_samples=1, masked_tokens=1, grad_norm=1, tflop=1, stop=1)
    return {name: torch.zeros(size, device=device) for name, size in sizes.items()}


@torch.no_grad()
def add_batch(sums, losses, t, masked, flop, untrained):
    """losses (B,), t (B,), masked (B, N), FLOPs of the batch; untrained: no step was taken before it."""
    if untrained and not losses.isfinite().all():
        raise InputError("the first loss is not finite, before a weight was changed: weights or data are "
                         "broken, or too large for bf16 (--no-bf16)")
    bins = (4 * t).long().clamp(max=3)                                              # (B,)
    sums["loss"].index_add_(0, bins, losses.float())
    sums["samples"].index_add_(0, bins, torch.ones_like(t))
    sums["masked_samples"] += masked.any(dim=1).sum()
    sums["masked_tokens"] += masked.float().mean(dim=1).sum()
    sums["tflop"] += flop / 1e12


def log_line(sums, step, seconds, batch, world, peak):
    """The sums of all processes as a line of the log, and whether one of them was told to stop; the sums
    start anew.

    batch: samples a step; peak: TFLOP/s of a GPU, or None."""
    every = torch.cat(list(sums.values()))                             # one message, and one wait for the GPU
    if world > 1:
        dist.all_reduce(every)
    for value in sums.values():
        value.zero_()
    losses, counts = every[:8].view(2, 4).tolist()
    masked_samples, masked_tokens, norm, tflop, stop = every[8:].tolist()
    samples = sum(counts)
    line = {"step": step, "loss": sum(losses) / samples,
            "loss_by_t": [loss / count if count else None for loss, count in zip(losses, counts)],
            "masked_samples": masked_samples / samples, "masked_tokens": masked_tokens / samples,
            "grad_norm": norm / (samples / batch * world), "images_per_s": samples / seconds,
            "tflops": tflop / seconds}
    if peak:
        line["mfu"] = line["tflops"] / (peak * world)      # without what checkpointing computes twice
    if not math.isfinite(line["loss"]) or not math.isfinite(line["grad_norm"]):
        raise InputError(f"the loss is not finite near step {step}; a checkpoint, if any, is from before. "
                         f"Try a lower --lr and --muon-lr, or --no-bf16.")
    return line, stop > 0
