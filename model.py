"""The unified transformer of MADI, one class from the toy to OmniGen-v1, and the autoencoder of SDXL.

The sequence is [condition | time token | target tokens]. Training runs all of it at once (`forward`). The condition (text
with reference images in their places) never depends on the time or on the target, so sampling turns it into keys and
values once (`encode`) and at every step runs only the time token and the target over them (`denoise`). Parameter names
are OmniGen's own, so its released weights load as they are.

Letters, the same in every file:
    B batch   L condition tokens   N target tokens (= h*w / P**2)   D width   H heads   E head width
    C channels of a latent (pixels: 3)   h, w height and width of a latent   P patch size
Time runs from noise to data: t = 0 is pure noise, t = 1 is the image. Boolean masks are named for what True means.
"""
import importlib
import json
import math
import os
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

PADDING, TEXT = -1, 0                     # values of Condition.kind; k > 0 is the k-th reference image of the row


class InputError(ValueError):
    """Something the user gave is wrong. The scripts print it as one line, without a traceback."""


@dataclass
class Config:
    """Sizes of a Transformer; the defaults are OmniGen-v1's."""
    vocab: int = 32064
    width: int = 3072
    layers: int = 32
    heads: int = 32
    mlp: int = 8192                       # width of the hidden layer of the feed-forward
    channels: int = 4
    patch: int = 2
    grid: int = 192                       # side of the position table, in tokens: the largest image
    grid_step: float = 1 / 3              # distance of two neighbouring tokens in that table
    rope_theta: float = 10000.0
    short_factor: list | None = None      # E/2 divisors of the RoPE frequencies, for sequences up to ...
    long_factor: list | None = None       # ... `original_positions`, and for longer ones
    max_positions: int = 131072
    original_positions: int = 4096
    eps: float = 1e-5
    time_scale: float = 1.0               # of t in its features
    qk_norm: bool = False                 # toy only: LayerNorm of queries and keys
    prediction: str = "velocity"          # what the output means: velocity, noise or x (magd.py)


@dataclass
class Condition:
    """A batch of prompts with their reference images, left-padded to the longest row.

    No tuple: FSDP moves the tensors of a tuple to the GPU, and `kind` steers Python, on the CPU.
    """
    ids: torch.Tensor                     # (B, L) int64; anything at padding and image slots
    kind: torch.Tensor                    # (B, L) int64 on the CPU: PADDING, TEXT, or k for the k-th image of the row
    images: list                          # of (k, C, h, w): the images of all rows in reading order, neighbours of one shape stacked

    def to(self, device):
        return Condition(self.ids.to(device, non_blocking=True), self.kind,
                         [stack.to(device, non_blocking=True) for stack in self.images])

    def pin_memory(self):                                 # called by a DataLoader that is asked for pinned memory
        return Condition(self.ids.pin_memory(), self.kind, [stack.pin_memory() for stack in self.images])


class Cache(NamedTuple):
    """What `denoise` needs of an encoded condition."""
    layers: list                          # per layer: keys and values, each (B, H, L + 1 + N, E), with room for the target's
    rope: tuple                           # cos, sin of the time token and the target, each (B, 1, 1 + N, E)
    plan: list                            # whom they look at: attention_plans


# ---------------------------------------------------------------------------------------------------- attention

def attention_rule(kind):
    """kind (B, L) -> (B, L, L), True where a query (row) may look at a key (column).

    Text looks back, a reference image also sees all of itself, nobody sees padding (whose own rows, never read,
    look everywhere so that their softmax has something to look at).
    """
    L = kind.shape[1]
    causal = torch.ones(L, L, dtype=torch.bool, device=kind.device).tril()                # (L, L)
    same_image = (kind[:, :, None] == kind[:, None, :]) & (kind > TEXT)[:, :, None]       # (B, L, L)
    real = kind != PADDING                                                                # (B, L)
    return (causal | same_image) & real[:, None, :] | ~real[:, :, None]                   # (B, L, L)


# off, unmeasured: cuDNN's attention is reported to plan anew for every length, and in training nearly every row has its own
torch.backends.cuda.enable_cudnn_sdp(False)
LONG = 1000                               # tokens: from here on rows of different lengths are attended to one by one


def attention_plans(kind, N, device):
    """Who looks at whom, for a condition of kind (B, L) and after it a time token and N target tokens.

    -> two plans, of the condition and of the rest, which sees everything (the time token all but the target). A plan is a list of
    (rows, padding, runs); a run (start, stop, keys, attend) lets the queries start:stop of these rows see the keys padding:keys,
    all of them or, with a mask, some. Runs without mask and padding are what the fast attention kernels want: they are used where
    all rows have one layout, and row by row where rows are long. Short ragged rows get a dense mask.
    """
    L, S = kind.shape[1], kind.shape[1] + 1 + N
    ragged = bool((kind != kind[:1]).any() or (kind == PADDING).any())
    if ragged and S < LONG:
        kind = kind.to(device, non_blocking=True)
        seen = F.pad(kind != PADDING, (0, 1 + N), value=True)[:, None, None].repeat(1, 1, 1 + N, 1)        # (B, 1, 1 + N, S)
        seen[:, :, 0, L + 1:] = False
        return ([(slice(None), 0, [(0, L, L, attention_rule(kind)[:, None])])],
                [(slice(None), 0, [(0, 1 + N, S, seen)])])
    condition, target = [], []
    for rows, row in [(slice(b, b + 1), row) for b, row in enumerate(kind.tolist())] if ragged else [(slice(None), kind[0].tolist())]:
        runs, start, padding = [], 0, row.count(PADDING)
        for value, group in groupby(row):
            stop = start + len(list(group))
            if value == TEXT:
                causal = torch.ones(stop - start, stop - padding, dtype=torch.bool, device=device).tril(start - padding)
                runs.append((start, stop, stop, causal))
            elif value > TEXT:
                runs.append((start, stop, stop, None))
            start = stop
        condition.append((rows, padding, runs))
        target.append((rows, padding, [(0, 1, L + 1, None), (1, 1 + N, S, None)]))
    return condition, target


def attend_to(q, k, v, attend):
    """softmax(q k^T / sqrt(E)) v with attend (broadcastable to (B, H, queries, keys)) or None, True = may look."""
    if q.device.type == "cpu" and k.shape[2] <= 128:     # torch's fused kernel is several times slower at toy lengths
        scores = (q * q.shape[-1]**-0.5) @ k.transpose(2, 3)                              # (B, H, queries, keys)
        if attend is not None:                            # added, not filled in: a sum has nothing to do in the backward
            scores = scores + torch.zeros_like(attend, dtype=scores.dtype).masked_fill(~attend, -torch.inf)
        return scores.softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attend)


def attention(q, k, v, plan):             # q (B, H, queries, E), k and v (B, H, keys, E)
    """-> (B, H, queries, E)"""
    outs = []
    for rows, padding, runs in plan:
        out = [attend_to(q[rows, :, a:b], k[rows, :, padding:n], v[rows, :, padding:n], attend) for a, b, n, attend in runs]
        if runs[0][0] > 0:
            out.insert(0, q[rows, :, :runs[0][0]])                                        # of padding, which nobody reads
        outs.append(out[0] if len(out) == 1 else torch.cat(out, dim=2))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps). Written out: on the CPU the backward of torch's own takes twice as long."""

    def __init__(self, width, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        if x.is_cuda or x.dtype != torch.float32:
            with torch.autocast(x.device.type, enabled=False):         # it would turn a bf16 stream into float32 and back
                return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        scale = (torch.linalg.vecdot(x, x) / x.shape[-1] + self.eps).rsqrt()
        return x * (scale[..., None] * self.weight)


def rotate(x, rope):
    """RoPE on x (B, H, L, E) in half-split pairs (a, b) = (i, i + E/2): (a cos - b sin, b cos + a sin); rope as from Transformer.rope."""
    cos, sin = rope
    return x * cos.to(x.dtype) + x.roll(x.shape[-1] // 2, dims=-1) * sin.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.heads = cfg.heads
        self.qkv_proj = nn.Linear(cfg.width, 3 * cfg.width, bias=False)
        self.o_proj = nn.Linear(cfg.width, cfg.width, bias=False)
        norm = (lambda: nn.LayerNorm(cfg.width // cfg.heads, bias=False)) if cfg.qk_norm else nn.Identity
        self.q_norm, self.k_norm = norm(), norm()

    def qkv(self, x, rope):                                                               # x (B, L, D)
        q, k, v = (rearrange(y, "b l (h e) -> b h l e", h=self.heads) for y in self.qkv_proj(x).chunk(3, dim=-1))
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)                     # autocast norms in float32 on a GPU
        return rotate(q, rope), rotate(k, rope), v                                        # (B, H, L, E) each

    def output(self, y):                                                                  # y (B, H, L, E)
        return self.o_proj(rearrange(y, "b h l e -> b l (h e)"))                          # (B, L, D)


class FeedForward(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.gate_up_proj = nn.Linear(cfg.width, 2 * cfg.mlp, bias=False)
        self.down_proj = nn.Linear(cfg.mlp, cfg.width, bias=False)

    def forward(self, x):                                                                 # (B, L, D)
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)                                  # (B, L, mlp) each
        return self.down_proj(up * F.silu(gate))                                          # (B, L, D)


class Block(nn.Module):
    """A Phi-3 block: pre-norm attention and SwiGLU."""

    def __init__(self, cfg):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.width, cfg.eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.width, cfg.eps)
        self.mlp = FeedForward(cfg)

    def forward(self, x, rope, plan, past=None, first=0):
        """x (B, L, D) -> x and its keys and values; `past` (sampling only): those of the condition, with room for them.

        In the last layer a condition is only looked at: first > 0 returns x from that token on, plan = None no x at all.
        """
        q, k, v = self.self_attn.qkv(self.input_layernorm(x), rope)                       # (B, H, L, E) each
        if plan is None:
            return None, (k, v)
        if past is not None:                              # keys and values have their places after those of the condition
            past[0][:, :, -k.shape[2]:], past[1][:, :, -k.shape[2]:] = k, v
            k, v = past                                                                   # (B, H, past + L, E)
        x = x[:, first:] + self.self_attn.output(attention(q[:, :, first:], k, v, plan))  # (B, L - first, D)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x, (k, v)


# -------------------------------------------------------------------------------------------------- embeddings

def patchify(x, P):
    return rearrange(x, "... c (h p) (w q) -> ... (h w) (c p q)", p=P, q=P)               # (..., N, C*P*P)


def position_table(cfg):
    """(grid**2, D) sin-cos positions: the first half of the channels is the column, the second half the row."""
    position = torch.arange(cfg.grid, dtype=torch.float64) * cfg.grid_step                # (grid,)
    frequency = 10000.0 ** (-torch.arange(cfg.width // 4, dtype=torch.float64) / (cfg.width // 4))
    angle = position[:, None] * frequency                                                 # (grid, D/4)
    line = torch.cat([angle.sin(), angle.cos()], dim=1).float()                           # (grid, D/2)
    column = line[None, :, :].expand(cfg.grid, -1, -1)
    row = line[:, None, :].expand(-1, cfg.grid, -1)
    return torch.cat([column, row], dim=2).flatten(0, 1)                                  # (grid**2, D)


def timestep_features(t):
    """t (B,), of OmniGen in [0, 1], not times 1000 -> (B, 256)"""
    frequency = 10000.0 ** (-torch.arange(128, dtype=torch.float32, device=t.device) / 128)
    angle = t.float()[:, None] * frequency                                                # (B, 128)
    return torch.cat([angle.cos(), angle.sin()], dim=1)                                   # (B, 256)


class PatchEmbed(nn.Module):
    """A P x P convolution with stride P, written as the matrix product that it is."""

    def __init__(self, cfg):
        super().__init__()
        self.proj = nn.Conv2d(cfg.channels, cfg.width, cfg.patch, cfg.patch)

    def forward(self, patches):                                                           # (..., C*P*P)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)             # (..., D)


class TimeEmbed(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, features):                                                          # (B, 256)
        return self.mlp(features)                                                         # (B, D)


class FinalLayer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cfg.width, 2 * cfg.width))
        self.linear = nn.Linear(cfg.width, cfg.channels * cfg.patch**2)

    def forward(self, x, time):                                                           # (B, N, D), (B, D)
        shift, scale = self.adaLN_modulation(time)[:, None].chunk(2, dim=-1)              # (B, 1, D) each
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        return self.linear(x)                                                             # (B, N, P*P*C)


class LanguageModel(nn.Module):
    """Holds the parameters that OmniGen keeps under the name `llm`."""

    def __init__(self, cfg):
        super().__init__()
        self.embed_tokens = nn.Embedding(cfg.vocab, cfg.width)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.norm = RMSNorm(cfg.width, cfg.eps)


# ------------------------------------------------------------------------------------------------- transformer

class Transformer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.llm = LanguageModel(cfg)
        self.x_embedder = PatchEmbed(cfg)                 # the noisy target
        self.input_x_embedder = PatchEmbed(cfg)           # reference images
        self.time_token = TimeEmbed(cfg.width)
        self.t_embedder = TimeEmbed(cfg.width)
        self.final_layer = FinalLayer(cfg)
        self.register_buffer("pos_embed", torch.empty(1, cfg.grid**2, cfg.width))
        self.checkpointing = 0                            # so many blocks are recomputed in the backward, to save memory

    def init_weights(self):
        """Xavier matrices, small embeddings; zero where a block or the model ends, so that it starts as the identity, then zero."""
        self.pos_embed.copy_(position_table(self.cfg)[None])
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))       # flatten is a view: it fills the weight
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        ends = [self.final_layer.linear, self.final_layer.adaLN_modulation[1]]
        for layer in ends + [end for block in self.llm.layers for end in (block.self_attn.o_proj, block.mlp.down_proj)]:
            nn.init.zeros_(layer.weight)
        return self

    def positions(self, rows, columns):
        """(rows * columns, D): the centre crop of the position table."""
        grid = self.cfg.grid
        if max(rows, columns) > grid:
            raise InputError(f"an image of {rows} x {columns} tokens does not fit the position table of {grid} x {grid}")
        top, left = (grid - rows) // 2, (grid - columns) // 2
        table = self.pos_embed.view(grid, grid, -1)
        return table[top:top + rows, left:left + columns].flatten(0, 1).to(self.x_embedder.proj.weight.dtype)

    def rope(self, position, long):
        """position (B, L), long (B,) -> cos and sin, which is negative in its first half, (B, 1, L, E) in float32."""
        cfg, device = self.cfg, position.device
        half = cfg.width // cfg.heads // 2
        frequency = cfg.rope_theta ** (-torch.arange(half, device=device, dtype=torch.float32) / half)    # (E/2,)
        scale = 1.0
        if cfg.long_factor is not None:
            factors = torch.tensor([cfg.short_factor, cfg.long_factor], device=device)    # (2, E/2)
            frequency = frequency / factors[long.long()][:, None]                         # (B, 1, E/2)
            # the magnitude belongs to the model, not to the sequence: it stays when the short factors are in use
            scale = math.sqrt(1 + math.log(cfg.max_positions / cfg.original_positions) / math.log(cfg.original_positions))
        angle = (position[..., None] * frequency)[:, None]                                # (B, 1, L, E/2)
        cos, sin = angle.cos() * scale, angle.sin() * scale
        return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)              # (B, 1, L, E) each

    def compile_blocks(self):
        """Let torch.compile fuse what a block does between its matrix products. One graph serves all lengths, but each way in which
        text and images alternate needs its own; past the limit the rest runs uncompiled."""
        torch._dynamo.config.recompile_limit = 64
        for block in self.llm.layers:
            block.forward = torch.compile(block.forward, dynamic=True)

    def run(self, number, *inputs):
        block = self.llm.layers[number]
        if number < self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def embed_condition(self, condition, N):
        """-> x (B, L, D) and its rope; the positions (B, 1 + N) that follow; long (B,), which RoPE factors the row takes."""
        kind, images, device, P = condition.kind, condition.images, condition.ids.device, self.cfg.patch
        x = self.llm.embed_tokens(condition.ids)                                          # (B, L, D)
        # also without any image, so that all processes of a sharded model have gradients of the same parameters
        none = x.new_zeros(0, self.input_x_embedder.proj.weight[0].numel())
        patches = torch.cat([none, *(patchify(stack, P).flatten(0, 1) for stack in images)])              # (all image tokens, C*P*P)
        embedded = self.input_x_embedder(patches)                                         # (all image tokens, D)
        where = [self.positions(stack.shape[2] // P, stack.shape[3] // P).repeat(len(stack), 1) for stack in images]
        embedded = embedded + torch.cat([embedded[:0], *where])
        slots = (kind > TEXT).flatten().nonzero()[:, 0].to(device, non_blocking=True)
        x = x.flatten(0, 1).index_copy(0, slots, embedded.to(x.dtype)).view_as(x)         # (B, L, D)

        real = kind.to(device, non_blocking=True) != PADDING                              # (B, L)
        length = real.sum(dim=1)                                                          # (B,)
        long = length + 1 + N > self.cfg.original_positions                               # (B,)
        rope = self.rope((real.cumsum(dim=1) - 1).clamp(min=0), long)
        return x, rope, length[:, None] + torch.arange(1 + N, device=device), long

    def embed_target(self, x_t, t, masked=None, mask_token=None):
        """-> x (B, 1 + N, D), the time token first, and the features of the time (B, 256)."""
        P = self.cfg.patch
        x = self.x_embedder(patchify(x_t, P))                                             # (B, N, D)
        if masked is not None:
            x = torch.where(masked[:, :, None], mask_token[:, None].to(x.dtype), x)       # its position stays
        x = x + self.positions(x_t.shape[2] // P, x_t.shape[3] // P)                      # float32 weights: so is the stream, also under autocast
        features = timestep_features(t * self.cfg.time_scale).to(self.pos_embed.dtype)    # (B, 256)
        return torch.cat([self.time_token(features)[:, None].to(x.dtype), x], dim=1), features                # (B, 1 + N, D)

    def read_out(self, x, features, x_t):                                                 # (B, 1 + N, D) -> like x_t
        x = self.final_layer(self.llm.norm(x[:, 1:]), self.t_embedder(features))          # (B, N, P*P*C)
        P = self.cfg.patch
        return rearrange(x.float(), "b (h w) (p q c) -> b c (h p) (w q)", h=x_t.shape[2] // P, p=P, q=P)

    def forward(self, x_t, t, condition, masked=None, mask_token=None):
        """x_t (B, C, h, w), t (B,) -> what `prediction` says, (B, C, h, w): condition and target in one pass, for training.

        masked (B, N), True = hidden: the embedding of that token is replaced by mask_token (B, D) (Eq. 4).
        """
        target, features = self.embed_target(x_t, t, masked, mask_token)                  # (B, 1 + N, D)
        N = target.shape[1] - 1
        x, rope, position, long = self.embed_condition(condition, N)                      # (B, L, D)
        L = x.shape[1]
        rope = [torch.cat(pair, dim=2) for pair in zip(rope, self.rope(position, long))]
        x = torch.cat([x, target.to(x.dtype)], dim=1)                                     # (B, L + 1 + N, D)
        before, after = attention_plans(condition.kind, N, x.device)
        plan = [(rows, padding, runs + [(L + start, L + stop, keys, attend) for start, stop, keys, attend in more])
                for (rows, padding, runs), (_, _, more) in zip(before, after)]
        last = len(self.llm.layers) - 1
        for number in range(last):
            x, _ = self.run(number, x, rope, plan)                                        # (B, L + 1 + N, D)
        x, _ = self.run(last, x, rope, after, None, L)                                    # (B, 1 + N, D)
        return self.read_out(x, features, x_t)

    @torch.no_grad()
    def encode(self, condition, N):
        """Condition -> Cache for targets of N tokens: what `forward` computes of a condition depends neither on t nor on x_t."""
        x, rope, position, long = self.embed_condition(condition, N)
        plan, rest = attention_plans(condition.kind, N, x.device)
        layers = []
        for block in self.llm.layers[:-1]:
            x, keys_values = block(x, rope, plan)                                         # (B, L, D)
            layers.append(keys_values)
        layers.append(self.llm.layers[-1](x, rope, None)[1])
        layers = [tuple(F.pad(value, (0, 0, 0, 1 + N)) for value in pair) for pair in layers]             # (B, H, L + 1 + N, E)
        return Cache(layers, self.rope(position, long), rest)

    @torch.no_grad()
    def denoise(self, x_t, t, cache):
        """`forward` with the condition already encoded."""
        x, features = self.embed_target(x_t, t)                                           # (B, 1 + N, D)
        for block, past in zip(self.llm.layers, cache.layers):
            x, _ = block(x, cache.rope, cache.plan, past)                                 # (B, 1 + N, D)
        return self.read_out(x, features, x_t)


def flops(cfg, kind, N):
    """Floating-point operations of one forward: the kinds of one row, (L,), and N target tokens. A training step costs three."""
    looks = L = 0                                                                         # pairs of the condition, its tokens
    for value, run in groupby(kind[kind != PADDING].tolist()):
        n = len(list(run))
        looks += n * (L + n) if value > TEXT else n * L + n * (n + 1) // 2
        L += n
    D = cfg.width
    qkv, rest = 6 * D * D, 2 * D * D + 6 * D * cfg.mlp                                    # of one token in one layer
    condition = L * (cfg.layers * qkv + (cfg.layers - 1) * rest) + (cfg.layers - 1) * 4 * D * looks
    target = cfg.layers * ((1 + N) * (qkv + rest) + 4 * D * (L + 1 + N * (L + 1 + N)))
    return condition + target + 4 * N * D * cfg.channels * cfg.patch**2


def fast_bf16(device):
    """Is the device fast at bf16 matrix products? CUDA, and CPUs with matrix units for it."""
    return torch.device(device).type == "cuda" or getattr(torch.cpu, "_is_amx_tile_supported", bool)()


def autocast(device, enabled=True):
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled and fast_bf16(device))


# ------------------------------------------------------------------------------------------------- autoencoder

class Resnet(nn.Module):
    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):                                                                 # (B, c_in, h, w)
        y = self.conv1(F.silu(self.norm1(x)))                                             # (B, c_out, h, w)
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class PixelAttention(nn.Module):
    """One head over all positions."""

    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):                                                                 # (B, c, h, w)
        y = rearrange(self.group_norm(x), "b c h w -> b 1 (h w) c")
        y = F.scaled_dot_product_attention(self.to_q(y), self.to_k(y), self.to_v(y))      # (B, 1, h*w, c)
        return x + rearrange(self.to_out[0](y), "b 1 (h w) c -> b c h w", h=x.shape[2])


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))                                          # (B, c, h/2, w/2)


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))              # (B, c, 2h, 2w)


class Stage(nn.Module):
    """Resnets at one resolution, then a change of resolution. The names are those of the released file."""

    def __init__(self, c_in, c_out, resnets, groups, down=False, up=False):
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(c_out if k else c_in, c_out, groups) for k in range(resnets))
        if down:
            self.downsamplers = nn.ModuleList([Downsample(c_out)])
        if up:
            self.upsamplers = nn.ModuleList([Upsample(c_out)])

    def forward(self, x):
        for part in self.children():
            for layer in part:
                x = layer(x)
        return x


class Middle(nn.Module):
    def __init__(self, channels, groups):
        super().__init__()
        self.attentions = nn.ModuleList([PixelAttention(channels, groups)])
        self.resnets = nn.ModuleList(Resnet(channels, channels, groups) for _ in range(2))

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    def __init__(self, channels, groups, latent):
        super().__init__()
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(Stage(channels[max(k - 1, 0)], c, 2, groups, down=k < last) for k, c in enumerate(channels))
        self.mid_block = Middle(channels[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], 2 * latent, 3, padding=1)

    def forward(self, x):                                                                 # (B, 3, 8h, 8w)
        x = self.conv_in(x)
        for stage in self.down_blocks:
            x = stage(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))               # (B, 2 * latent, h, w)


class Decoder(nn.Module):
    def __init__(self, channels, groups, latent):
        super().__init__()
        channels, last = channels[::-1], len(channels) - 1
        self.conv_in = nn.Conv2d(latent, channels[0], 3, padding=1)
        self.mid_block = Middle(channels[0], groups)
        self.up_blocks = nn.ModuleList(Stage(channels[max(k - 1, 0)], c, 3, groups, up=k < last) for k, c in enumerate(channels))
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, z):                                                                 # (B, latent, h, w)
        x = self.mid_block(self.conv_in(z))
        for stage in self.up_blocks:
            x = stage(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))                               # (B, 3, 8h, 8w)


class VAE(nn.Module):
    """The autoencoder of SDXL (AutoencoderKL): 8 x 8 pixels become one position of a latent with 4 channels.

    Latents, here and in every file, are scaled to about unit size. Images are (B, 3, H, W) in [-1, 1], sides multiples of 8.
    """

    def __init__(self, channels=(128, 256, 512, 512), groups=32, latent=4, scale=0.13025):
        super().__init__()
        self.scale = scale
        self.encoder = Encoder(channels, groups, latent)
        self.decoder = Decoder(channels, groups, latent)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)

    @torch.no_grad()
    def encode(self, image):
        """image (B, 3, H, W) -> mean and standard deviation of its latent, each (B, 4, H/8, W/8)."""
        mean, logvar = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
        return mean * self.scale, (0.5 * logvar.clamp(-30, 20)).exp() * self.scale

    @torch.no_grad()
    def decode(self, latent):                                                             # (B, 4, h, w)
        return self.decoder(self.post_quant_conv(latent / self.scale))                    # (B, 3, 8h, 8w)


# ----------------------------------------------------------------------------------------------- released files

def optional(name):
    """Import a package that only pretrained files need."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(f"reading pretrained files needs the package {name}: pip install tokenizers safetensors") from None


def read_json(path):
    if not path.is_file():
        raise InputError(f"{path}: there is no such file. The README says which files of OmniGen-v1 are needed and where to get them.")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None


def check_shapes(path, expected, found):
    """{name: shape} of a model and of a file: a tensor that is missing, unknown or of another shape is named."""
    wrong = [f"{key} is missing" for key in expected if key not in found] + [f"{key} is unknown" for key in found if key not in expected]
    wrong += [f"{key} has the shape {found[key]} instead of {shape}" for key, shape in expected.items() if found.get(key, shape) != shape]
    if wrong:
        raise InputError(f"{path}: the weights do not fit: {'; '.join(wrong[:3])}" + f"; and {len(wrong) - 3} more" * (len(wrong) > 3))


def load_weights(model, path, dtype, device):
    """Give a model made on the device `meta` its weights from a .safetensors file, or from its shards, one tensor at a time.

    Strict: a tensor that is missing, unknown or of another shape is named. A sharded model (FSDP2) keeps only its own rows.
    """
    safetensors = optional("safetensors")
    index = path.with_name(f"{path.name}.index.json")
    names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else [path.name]
    expected, where = model.state_dict(), {}
    for file in (path.with_name(name) for name in names):
        if not file.is_file():
            raise InputError(f"{file}: there is no such file. The README says where to get the weights.")
        try:
            with safetensors.safe_open(file, "pt") as tensors:
                where |= {key: (file, tuple(tensors.get_slice(key).get_shape())) for key in tensors.keys()}
        except safetensors.SafetensorError as error:
            raise InputError(f"{file}: not a whole .safetensors file ({error}); get it again") from None
    check_shapes(path, {key: tuple(value.shape) for key, value in expected.items()}, {key: shape for key, (_, shape) in where.items()})
    weights = {}
    for key, (file, _) in where.items():
        with safetensors.safe_open(file, "pt") as tensors:             # opened anew each time, so that what was read is let go
            weights[key] = own_part(tensors.get_tensor(key).to(device, dtype, copy=True), expected[key])
    model.load_state_dict(weights, assign=True)
    return model


# config.json of OmniGen-v1 is that of its language model, Phi-3
CONFIG_KEYS = {"vocab_size": "vocab", "hidden_size": "width", "num_hidden_layers": "layers", "num_attention_heads": "heads",
               "intermediate_size": "mlp", "rope_theta": "rope_theta", "max_position_embeddings": "max_positions",
               "original_max_position_embeddings": "original_positions", "rms_norm_eps": "eps"}
CONFIG_FIXED = {"model_type": "phi3", "hidden_act": "silu", "tie_word_embeddings": False}


def read_config(folder):
    """config.json of OmniGen-v1 -> Config. Whatever this transformer does not do is refused."""
    path = Path(folder) / "config.json"
    found = read_json(path)
    if not isinstance(found, dict):
        raise InputError(f"{path}: a JSON object is needed")
    for key, value in CONFIG_FIXED.items():
        if found.get(key, value if key != "model_type" else None) != value:
            raise InputError(f"{path}: {key} is {found.get(key)!r}, OmniGen-v1 has {value!r}: this is another architecture")
    missing = [key for key in CONFIG_KEYS if key not in found]
    if missing:
        raise InputError(f"{path}: the keys {', '.join(missing)} are missing")
    heads = found["num_attention_heads"]
    if found.get("num_key_value_heads", heads) != heads:
        raise InputError(f"{path}: {found['num_key_value_heads']} key-value heads for {heads} heads; OmniGen-v1 has as many of each")
    rope = found.get("rope_scaling") or {}
    if rope and (rope.get("type") not in ("su", "longrope") or not {"short_factor", "long_factor"} <= set(rope)):
        raise InputError(f"{path}: rope_scaling of type {rope.get('type')!r}; OmniGen-v1 has 'su' with short_factor and long_factor")
    cfg = Config(**{ours: found[theirs] for theirs, ours in CONFIG_KEYS.items()}, short_factor=rope.get("short_factor"),
                 long_factor=rope.get("long_factor"))
    half = cfg.width // cfg.heads // 2
    if rope and {len(cfg.short_factor), len(cfg.long_factor)} != {half}:
        raise InputError(f"{path}: {len(cfg.short_factor)} short and {len(cfg.long_factor)} long RoPE factors; heads of {2 * half} need {half}")
    return cfg


def load_omnigen(folder, dtype=torch.float32, device="cpu", shard=lambda model: None):
    """OmniGen-v1 from a folder with config.json and model.safetensors, as published -> Transformer.

    Memory peaks at one copy of the weights. `shard` may split the empty model over processes before the weights come.
    """
    with torch.device("meta"):
        model = Transformer(read_config(folder))
    shard(model)
    return load_weights(model, Path(folder) / "model.safetensors", dtype, device)


def save_omnigen(model, folder):
    """Write config.json and model.safetensors as published, for load_omnigen, OmniGen's own code and the converter of diffusers.

    A sharded model is gathered: then all processes call this, and the first one writes.
    """
    cfg, folder = model.cfg, Path(folder)
    theirs = Config(**{key: getattr(cfg, key) for key in [*CONFIG_KEYS.values(), "short_factor", "long_factor"]})
    if cfg != theirs:
        changed = [key for key, value in vars(cfg).items() if value != getattr(theirs, key)]
        raise InputError(f"OmniGen's format cannot hold a model with another {', '.join(changed)}")
    weights = whole(model.state_dict())
    if not is_first():
        return
    rope = cfg.long_factor and {"type": "su", "short_factor": cfg.short_factor, "long_factor": cfg.long_factor}
    config = {"architectures": ["Phi3ForCausalLM"], **CONFIG_FIXED, **{key: getattr(cfg, ours) for key, ours in CONFIG_KEYS.items()},
              "num_key_value_heads": cfg.heads, "rope_scaling": rope, "bos_token_id": 1, "eos_token_id": 2,
              "pad_token_id": min(32000, cfg.vocab - 1), "sliding_window": cfg.max_positions,
              "torch_dtype": str(weights["pos_embed"].dtype).removeprefix("torch.")}
    folder.mkdir(parents=True, exist_ok=True)
    optional("safetensors.torch").save_file(weights, folder / "model.safetensors.tmp", metadata={"format": "pt"})
    os.replace(folder / "model.safetensors.tmp", folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def own_part(value, like):
    """Of a whole tensor what this process keeps, if it is sharded like `like`; otherwise all of it."""
    if isinstance(like, DTensor):
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return value


def whole(value):
    """The inverse, for tensors in dicts and lists: gathered on the CPU of the first process; elsewhere nothing of use.

    All processes have to call it together.
    """
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [whole(item) for item in value]
    if not isinstance(value, torch.Tensor):
        return value
    value = value.full_tensor() if isinstance(value, DTensor) else value
    return value.detach().cpu() if is_first() else None


def processes():
    """-> rank of this process, their number (as torchrun says), its device."""
    rank, world, local = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    return rank, world, torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")


def is_first():
    return not dist.is_initialized() or dist.get_rank() == 0


def load_vae(folder, device="cpu"):
    """The autoencoder from folder/config.json and folder/diffusion_pytorch_model.safetensors -> VAE in float32."""
    path = Path(folder) / "config.json"
    found = read_json(path)
    fixed = {"_class_name": "AutoencoderKL", "layers_per_block": 2, "act_fn": "silu", "in_channels": 3, "out_channels": 3,
             "latents_mean": None, "shift_factor": None}
    for key, value in fixed.items():
        if found.get(key, value) != value:
            raise InputError(f"{path}: {key} is {found[key]!r} instead of {value!r}: not the autoencoder of SDXL")
    try:
        channels, groups, latent, scale = (found[key] for key in ("block_out_channels", "norm_num_groups", "latent_channels",
                                                                  "scaling_factor"))
    except KeyError as error:
        raise InputError(f"{path}: the key {error} is missing") from None
    with torch.device("meta"):
        vae = VAE(tuple(channels), groups, latent, scale)
    return load_weights(vae, Path(folder) / "diffusion_pytorch_model.safetensors", torch.float32, device).eval()
