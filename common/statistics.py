"""What train.py logs: sums over samples, added over the processes at each line of the log."""
import math

import torch
import torch.distributed as dist

from common.files import InputError


def new_sums(device):
    """Sums since the last line of the log; loss and samples in four bins of t, from noise to image."""
    sums = {"loss": torch.zeros(4, device=device), "samples": torch.zeros(4, device=device)}
    for name in ("masked_samples", "masked_tokens", "grad_norm", "tflop", "stop"):
        sums[name] = torch.zeros((), device=device)
    return sums


@torch.no_grad()
def add_batch(sums, losses, t, masked, flop):
    """losses (B,), t (B,), masked (B, N), FLOPs of the batch."""
    bins = (4 * t).long().clamp(max=3)                                              # (B,)
    sums["loss"].index_add_(0, bins, losses.float())
    sums["samples"].index_add_(0, bins, torch.ones_like(t))
    sums["masked_samples"] += masked.any(dim=1).sum()
    sums["masked_tokens"] += masked.float().mean(dim=1).sum()
    sums["tflop"] += flop / 1e12


def log_line(sums, step, seconds, batch, world, peak):
    """The sums of all processes as a line of the log, and whether one of them was told to stop; the sums
    start anew.

    batch: samples a step; peak: TFLOP/s of a GPU, or None.
    """
    if world > 1:
        for value in sums.values():
            dist.all_reduce(value)
    total = {name: value.tolist() for name, value in sums.items()}
    for value in sums.values():
        value.zero_()
    samples = sum(total["samples"])
    steps = samples / batch
    line = {"step": step, "loss": sum(total["loss"]) / samples,
            "loss_by_t": [a / b if b else None for a, b in zip(total["loss"], total["samples"])],
            "masked_samples": total["masked_samples"] / samples,
            "masked_tokens": total["masked_tokens"] / samples,
            "grad_norm": total["grad_norm"] / (steps * world), "images_per_s": samples / seconds,
            "tflops": total["tflop"] / seconds}
    if peak:
        line["mfu"] = line["tflops"] / (peak * world)      # without what checkpointing computes twice
    if not math.isfinite(line["loss"]) or not math.isfinite(line["grad_norm"]):
        raise InputError(f"the loss is not finite near step {step}; the last checkpoint is from before. Try "
                         f"a lower --lr and --muon-lr, or --no-bf16.")
    return line, total["stop"] > 0
