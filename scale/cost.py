"""What a run costs: FLOPs of a forward, memory of a training step; what a GPU can do."""
from itertools import groupby

from common.files import InputError
from model import PADDING, TEXT
from scale.sharding import trained

# dense bf16
PEAK_TFLOPS = {"B200": 2250, "H200": 989, "H100": 989, "A100": 312, "L40": 181, "RTX 4090": 165, "A10": 125}


def peak_tflops(name):
    """Dense bf16 peak of a GPU by its name, or None."""
    return next((peak for gpu, peak in PEAK_TFLOPS.items() if gpu in name), None)


def flops(cfg, kind, N):
    """FLOPs of one forward: kind (L,) of one row, N target tokens. A training step costs three forwards."""
    pairs = 0                                                          # of a query and a key it may look at
    L = 0
    for value, run in groupby(kind[kind != PADDING].tolist()):
        n = len(list(run))
        pairs += n * (L + n) if value > TEXT else n * L + n * (n + 1) // 2
        L += n
    D = cfg.width
    qkv = 6 * D * D                                                    # of one token in one layer
    rest = 2 * D * D + 6 * D * cfg.mlp
    # the condition needs only keys and values of the last layer
    condition = L * (cfg.layers * qkv + (cfg.layers - 1) * rest) + (cfg.layers - 1) * 4 * D * pairs
    target = cfg.layers * ((1 + N) * (qkv + rest) + 4 * D * (L + 1 + N * (L + 1 + N)))
    return condition + target + 4 * N * D * cfg.channels * cfg.patch**2


def memory(model, tokens, averaged, world, recomputed):
    """About how many bytes a GPU needs when FSDP2 shares the parameters over `world` GPUs, `tokens` run at
    once and so many blocks are recomputed: optimizer states, a few gathered blocks, activations. Not
    counted: the allocator's losses, and that frozen matrices need up to a quarter less activations."""
    cfg = model.cfg
    parameters = sum(p.numel() for p in model.parameters())
    learning = sum(p.numel() for p in trained(model).values())
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)  # themselves and nothing else
    # of a trained one float32 weights, gradients, two moments, mean
    states = ((16 + 4 * averaged) * learning + frozen) / world
    # bf16 of the running block, the next, its gradient
    gathered = 2 * (2 * parameters + learning) / cfg.layers
    inside = 2 * (11 * cfg.width + 4 * cfg.mlp)                # what the backward of a block needs of a token
    # a recomputed block keeps its input alone, but one of them at a time has everything
    kept = recomputed * 2 * cfg.width + min(cfg.layers, cfg.layers - recomputed + 1) * inside
    return states + gathered + tokens * kept


def sampling_memory(model, pixels, images, low_memory):
    """About how many bytes a device needs for an edit of so many pixels with reference images as large:
    weights, keys and values of the branches of guidance, one block at work; or the autoencoder's maps, if
    they are more. Not counted: the allocator's losses."""
    cfg = model.cfg
    element = next(model.parameters()).element_size()
    N = pixels // (8 * cfg.patch)**2                       # tokens of an image
    L = images * N + 100                                   # of the condition; 100 for the text
    branches = 1 if low_memory else 3 if images else 2     # at once, padded to the longest
    kept = branches * (L + N) * 2 * cfg.layers * cfg.width * element
    work = branches * max(L, N) * (9 * cfg.width + 4 * cfg.mlp) * element
    weights = sum(p.nbytes for p in model.parameters())
    autoencoder = 0.33e9                                   # in float32
    maps = 1.6e9 * pixels / 2**20                          # as tests/test_omnigen.py counts
    if low_memory:                                         # it is elsewhere while the transformer runs
        return weights + max(kept + work, autoencoder + maps)
    return weights + autoencoder + max(kept + work, maps)


def blocks_to_recompute(model, tokens, averaged, world, available, wanted=None):
    """-> blocks the backward recomputes, `wanted` or as few as `available` bytes need, and a report.

    available None: no limit is known. InputError if even that does not fit."""
    layers = model.cfg.layers
    needs = [memory(model, tokens, averaged, world, blocks) for blocks in range(layers + 1)]
    if wanted is None:
        # the rest is for the allocator's losses, which are not in the estimate
        limit = 0.8 * available if available else float("inf")
        wanted = next((blocks for blocks, need in enumerate(needs) if need < limit), layers)
    wanted = min(wanted, layers)
    has = f", of {available / 1e9:.1f} GB there" if available else ""
    report = (f"memory: about {needs[wanted] / 1e9:.1f} GB on each of {world} devices{has}, with {wanted} of "
              f"{layers} blocks recomputed (--checkpointing); {needs[0] / 1e9:.1f} GB with none, "
              f"{needs[-1] / 1e9:.1f} GB with all")
    if available and needs[wanted] > available:
        raise InputError(f"{report}: take more GPUs, a smaller --micro-batch or --size, more --checkpointing")
    return wanted, report
