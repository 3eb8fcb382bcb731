"""Which device, which precision, which of several processes."""
import os
import signal
from datetime import timedelta

import torch
import torch.distributed as dist

from common.files import InputError


def processes(wanted="auto"):
    """-> rank of this process, number of processes (as torchrun says), device of this process.

    wanted, the flag --device: cpu, cuda, mps (Apple's GPUs), or auto: CUDA where it is, else the CPU."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if wanted == "auto":
        wanted = "cuda" if there["cuda"] else "cpu"
    if not there[wanted]:
        raise InputError(f"--device {wanted}: PyTorch finds no such device here; there are "
                         f"{', '.join(name for name in there if there[name])}")
    if wanted == "mps" and world > 1:
        raise InputError(f"--device mps: {world} processes; it works with one")
    number = int(os.environ.get("LOCAL_RANK", 0)) if wanted == "cuda" else None
    return rank, world, torch.device(wanted, number)


def start_processes(sharded, wanted="auto"):
    """`processes`, and the group that exchanges gradients; sharded: for one process too, as FSDP2 needs."""
    rank, world, device = processes(wanted)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if world > 1:                                        # the others wait while the first writes a checkpoint
        dist.init_process_group(backend, timeout=timedelta(hours=1))
    elif sharded:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return rank, world, device


def is_first():
    return not dist.is_initialized() or dist.get_rank() == 0


def fast_bf16(device):
    """Is the device fast at bf16 matrix products? CUDA, and CPUs with matrix units for it."""
    return torch.device(device).type == "cuda" or getattr(torch.cpu, "_is_amx_tile_supported", bool)()


def autocast(device, enabled=True):
    """bf16 matrix products where the device is fast at them and `enabled`; float32 elsewhere."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled and fast_bf16(device))


def check_finite(where, tensor):
    """Refuse numbers that are not finite; `where` names the file and the tensor."""
    bad = tensor.numel() - int(tensor.isfinite().sum())
    if bad:
        raise InputError(f"{where}: {bad} of {tensor.numel()} values are not finite numbers; the file is "
                         f"broken, get or make it again")


def catch_signals(catch=True):
    """From now on Ctrl-C, SIGTERM and SIGUSR1, which SLURM and spot machines send, end nothing: they fill the
    list that is returned. catch=False: as Python has it again."""
    caught = []
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        usual = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
        if number := getattr(signal, name, None):          # Windows has two of them
            signal.signal(number, (lambda *_: caught.append(True)) if catch else usual)
    return caught


def compile_blocks(model):
    """Let torch.compile fuse what a Transformer's block does between its matrix products.

    One graph serves all lengths, but each order of text and images needs its own; past the limit the rest is
    not compiled."""
    torch._dynamo.config.recompile_limit = 64
    for block in model.llm.layers:
        block.forward = torch.compile(block.forward, dynamic=True)
