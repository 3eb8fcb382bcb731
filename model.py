"""The unified transformer of MADI, one class from the toy to OmniGen-v1.

The sequence is [condition | time token | target tokens]. Training runs all of it at once (`forward`). The
condition (text, with reference images in it) depends neither on the time nor on the target, so sampling turns
it into keys and values once (`encode`), and each step runs only the time token and the target, which attend
to them (`denoise`). Parameters are named as in OmniGen, so its released weights load unchanged.

Letters, the same in every file:
    B batch   L condition tokens   N target tokens (= h*w / P**2)   D width   H heads   E head width
    S = L + 1 + N tokens in all   T tokens of whatever a function is given (L, 1 + N or S)
    C channels of a latent (pixels: 3)   h, w its sides   P patch size
Time runs from noise to data: t = 0 is pure noise, t = 1 is the image. Boolean masks are named for what True
means. Without an autoencoder, as on the toy, "latent" simply means the image.
"""
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.utils.checkpoint import checkpoint

from common.attention import attention, attention_runs, queries
from common.files import InputError

PADDING = -1                          # values of Condition.kind; k > 0 is the k-th reference image of the row
TEXT = 0


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
    grid_step: float = 1 / 3              # distance between neighbouring tokens in it
    rope_theta: float = 10000.0
    short_factor: list | None = None      # E/2 divisors of the RoPE frequencies, for sequences up to ...
    long_factor: list | None = None       # ... `original_positions`, and for longer ones
    max_positions: int = 131072
    original_positions: int = 4096
    eps: float = 1e-5
    time_scale: float = 1.0               # t is multiplied by this before its features
    qk_norm: bool = False                 # toy only: LayerNorm of queries and keys
    prediction: str = "velocity"          # what the output means: velocity, noise or x (magd.py)
    jump: float = 1.0                     # toy only: time of the last sampling step (sample.euler)


@dataclass
class Condition:
    """A batch of prompts with their reference images, left-padded to the longest row.

    Not a tuple: FSDP would move every tensor of a tuple to the GPU, but `kind` is read by Python code and
    stays on the CPU."""
    ids: torch.Tensor                     # (B, L) int64; anything at padding and image slots
    kind: torch.Tensor            # (B, L) int64 on the CPU: PADDING, TEXT, or k for the k-th image of the row
    images: list               # of (n, C, h, w): all images in reading order, neighbours of one shape stacked
    gap: torch.Tensor | int = 0           # (B,) RoPE positions left free before the time token and the target

    def to(self, device):
        return self.moved(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self):                 # called by a DataLoader that is asked for pinned memory
        return self.moved(torch.Tensor.pin_memory)

    def moved(self, move):
        gap = move(self.gap) if torch.is_tensor(self.gap) else self.gap
        return Condition(move(self.ids), self.kind, [move(stack) for stack in self.images], gap)


class Cache(NamedTuple):
    """What `denoise` needs of an encoded condition."""
    layers: list                     # keys and values of each layer, (B, H, S, E), with room for the target's
    rope: tuple                           # cos, sin of the time token and the target, each (B, 1, 1 + N, E)
    runs: list                            # which keys they may look at (common/attention.py)

    def to(self, device):
        return self._replace(layers=[tuple(value.to(device) for value in pair) for pair in self.layers])


# ------------------------------------------------------------------------------------------- attention

def attention_rule(kind):
    """Which keys may a query look at? kind (B, S) of the whole sequence -> (B, S, S), True = may look.

    Text looks back; an image also sees all of itself; nobody sees padding. The time token counts as text, the
    target as one more image. Here with padding p, words w, an image i, the time s, the target n:

                   p  w  i  i  i  w  s  n  n
        padding    #  #  #  #  #  #  #  #  #       never read; without keys its softmax would not be finite
        word       .  #
        image      .  #  #  #  #
        image      .  #  #  #  #
        image      .  #  #  #  #
        word       .  #  #  #  #  #
        time       .  #  #  #  #  #  #
        target     .  #  #  #  #  #  #  #  #
        target     .  #  #  #  #  #  #  #  #

    Computed by `attention` of common/attention.py, which skips what the rule hides."""
    S = kind.shape[1]
    causal = torch.ones(S, S, dtype=torch.bool, device=kind.device).tril()          # (S, S)
    same_image = (kind[:, :, None] == kind[:, None, :]) & (kind > TEXT)[:, :, None]  # (B, S, S)
    real = kind != PADDING                                                          # (B, S)
    return (causal | same_image) & real[:, None, :] | ~real[:, :, None]             # (B, S, S)


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps)"""

    def __init__(self, width, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        if x.device.type != "cpu" or x.dtype != torch.float32:
            # autocast would turn a bf16 stream into float32 and back
            with torch.autocast(x.device.type, enabled=False):
                return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        # on the CPU the backward of F.rms_norm takes twice as long
        scale = (torch.linalg.vecdot(x, x) / x.shape[-1] + self.eps).rsqrt()
        return x * (scale[..., None] * self.weight)


def rotate(x, rope):
    """RoPE on x (B, H, T, E): each pair (a, b) = (x_i, x_{i + E/2}) becomes (a cos - b sin, b cos + a sin).

    roll swaps the halves, so b stands in a's place; the minus sign is in rope's sin (Transformer.rope)."""
    cos, sin = rope
    return x * cos.to(x.dtype) + x.roll(x.shape[-1] // 2, dims=-1) * sin.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.heads = cfg.heads
        self.qkv_proj = nn.Linear(cfg.width, 3 * cfg.width, bias=False)
        self.o_proj = nn.Linear(cfg.width, cfg.width, bias=False)
        E = cfg.width // cfg.heads
        self.q_norm = nn.LayerNorm(E, bias=False) if cfg.qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(E, bias=False) if cfg.qk_norm else nn.Identity()

    def qkv(self, x, rope):                                                         # x (B, T, D)
        parts = self.qkv_proj(x).chunk(3, dim=-1)                                   # 3 of (B, T, D)
        q, k, v = (rearrange(part, "b l (h e) -> b h l e", h=self.heads) for part in parts)  # (B, H, T, E)
        q = self.q_norm(q).to(v.dtype)                           # autocast norms in float32 on a GPU
        k = self.k_norm(k).to(v.dtype)
        return rotate(q, rope), rotate(k, rope), v                                  # (B, H, T, E) each

    def output(self, y):                                                            # y (B, H, T, E)
        return self.o_proj(rearrange(y, "b h l e -> b l (h e)"))                    # (B, T, D)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, cfg):
        super().__init__()
        self.gate_up_proj = nn.Linear(cfg.width, 2 * cfg.mlp, bias=False)
        self.down_proj = nn.Linear(cfg.mlp, cfg.width, bias=False)

    def forward(self, x):                                                           # (B, T, D)
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)                            # (B, T, mlp) each
        return self.down_proj(up * F.silu(gate))                                    # (B, T, D)


class Block(nn.Module):
    """A Phi-3 block: attention and feed-forward, each after a norm and added to the stream."""

    def __init__(self, cfg):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.width, cfg.eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.width, cfg.eps)
        self.mlp = FeedForward(cfg)

    def forward(self, x, rope, runs, past=None, first=0):
        """x (B, T, D) -> the block's output, and its keys and values (k, v).

        past (`denoise` only): keys and values of the condition with empty room at the end, where those of x
        are written in place. Of what the last layer makes of the condition only keys and values are used:
        first > 0 leaves out the first tokens of the output, runs = None all of it."""
        q, k, v = self.self_attn.qkv(self.input_layernorm(x), rope)                 # (B, H, T, E) each
        if runs is None:
            return None, (k, v)
        if past is not None:
            room = slice(-k.shape[2], None)
            past[0][:, :, room] = k
            past[1][:, :, room] = v
            k, v = past                                                             # (B, H, S, E) each
        y = attention(q[:, :, first:], k, v, runs)                                  # (B, H, T - first, E)
        x = x[:, first:] + self.self_attn.output(y)                                 # (B, T - first, D)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x, (k, v)


# ------------------------------------------------------------------------------------------- embeddings

def patchify(x, P):
    return rearrange(x, "... c (h p) (w q) -> ... (h w) (c p q)", p=P, q=P)         # (..., N, C*P*P)


def position_table(cfg):
    """(grid**2, D) sin-cos positions: the column in the first half of the channels, the row in the second."""
    position = torch.arange(cfg.grid, dtype=torch.float64) * cfg.grid_step          # (grid,)
    frequency = 10000.0 ** (-torch.arange(cfg.width // 4, dtype=torch.float64) / (cfg.width // 4))
    angle = position[:, None] * frequency                                           # (grid, D/4)
    line = torch.cat([angle.sin(), angle.cos()], dim=1).float()                     # (grid, D/2)
    column = line[None, :, :].expand(cfg.grid, -1, -1)                              # (grid, grid, D/2)
    row = line[:, None, :].expand(-1, cfg.grid, -1)                                 # (grid, grid, D/2)
    return torch.cat([column, row], dim=2).flatten(0, 1)                            # (grid**2, D)


def timestep_features(t):
    """Features of the time, t (B,) -> (B, 256). OmniGen's t is in [0, 1]; the toy's was scaled by 1000."""
    frequency = 10000.0 ** (-torch.arange(128, dtype=torch.float32, device=t.device) / 128)
    angle = t.float()[:, None] * frequency                                          # (B, 128)
    return torch.cat([angle.cos(), angle.sin()], dim=1)                             # (B, 256)


class PatchEmbed(nn.Module):
    """A P x P convolution with stride P, written as the matrix product that it is."""

    def __init__(self, cfg):
        super().__init__()
        self.proj = nn.Conv2d(cfg.channels, cfg.width, cfg.patch, cfg.patch)

    def forward(self, patches):                                                     # (..., C*P*P)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)       # (..., D)


class TimeEmbed(nn.Module):
    """An MLP of the time features: `time_token` makes the token, `t_embedder` modulates the read-out."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, features):                                                    # (B, 256)
        return self.mlp(features)                                                   # (B, D)


class FinalLayer(nn.Module):
    """Norm, shifted and scaled by the time (adaLN), then a linear read-out."""

    def __init__(self, cfg):
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cfg.width, 2 * cfg.width))
        self.linear = nn.Linear(cfg.width, cfg.channels * cfg.patch**2)

    def forward(self, x, time):                                                     # (B, N, D), (B, D)
        shift, scale = self.adaLN_modulation(time)[:, None].chunk(2, dim=-1)        # (B, 1, D) each
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        return self.linear(x)                                                       # (B, N, P*P*C)


class LanguageModel(nn.Module):
    """Holds the parameters that OmniGen keeps under the name `llm`."""

    def __init__(self, cfg):
        super().__init__()
        self.embed_tokens = nn.Embedding(cfg.vocab, cfg.width)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.norm = RMSNorm(cfg.width, cfg.eps)


# ------------------------------------------------------------------------------------------- transformer

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
        self.checkpointing = 0                     # number of blocks that the backward recomputes

    def init_weights(self):
        """Xavier matrices and small embeddings. The last matrix of each branch is zero, so that every block
        starts as the identity; so are the read-out and its modulation, so that the first output is zero."""
        self.pos_embed.copy_(position_table(self.cfg)[None])
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))   # flatten is a view: this fills the weight
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for block in self.llm.layers:
            nn.init.zeros_(block.self_attn.o_proj.weight)
            nn.init.zeros_(block.mlp.down_proj.weight)
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.zeros_(self.final_layer.adaLN_modulation[1].weight)
        return self

    # -------------------------------------------------------------------- where a token stands

    def positions(self, rows, columns):
        """(rows * columns, D): the centre crop of the position table."""
        grid = self.cfg.grid
        if max(rows, columns) > grid:
            raise InputError(f"an image of {rows} x {columns} tokens; this model takes {grid} x {grid}")
        top = (grid - rows) // 2
        left = (grid - columns) // 2
        table = self.pos_embed.view(grid, grid, -1)[top:top + rows, left:left + columns]
        return table.flatten(0, 1).to(self.x_embedder.proj.weight.dtype)

    def rope(self, position, long):
        """position (B, T); long (B,), rows of the long factors -> cos and signed sin, (B, 1, T, E)."""
        cfg = self.cfg
        half = cfg.width // cfg.heads // 2
        exponent = -torch.arange(half, device=position.device, dtype=torch.float32) / half
        frequency = cfg.rope_theta ** exponent                                      # (E/2,)
        scale = 1.0
        if cfg.long_factor is not None:
            factors = torch.tensor([cfg.short_factor, cfg.long_factor], device=position.device)  # (2, E/2)
            frequency = frequency / factors[long.long()][:, None]                   # (B, 1, E/2)
            # the magnitude belongs to the model, not to the sequence: it stays when the short factors are in
            # use
            ratio = cfg.max_positions / cfg.original_positions
            scale = math.sqrt(1 + math.log(ratio) / math.log(cfg.original_positions))
        angle = (position[..., None] * frequency)[:, None]                          # (B, 1, T, E/2)
        cos = angle.cos() * scale
        sin = angle.sin() * scale
        return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)        # (B, 1, T, E) each

    # -------------------------------------------------------------------- in and out

    def embed_condition(self, condition, N):
        """-> x (B, L, D); its RoPE; positions (B, 1 + N) of the time token and the target, which follow it;
        long (B,), True = a row that needs the long RoPE factors."""
        device = condition.ids.device
        P = self.cfg.patch
        x = self.llm.embed_tokens(condition.ids)                                    # (B, L, D)
        # embedded even without any image, so that all processes of a sharded model have gradients of the
        # same parameters
        patches = [x.new_zeros(0, self.input_x_embedder.proj.weight[0].numel())]
        where = [x.new_zeros(0, x.shape[2])]
        for stack in condition.images:                                              # (k, C, h, w)
            patches.append(patchify(stack, P).flatten(0, 1))                        # (k*h*w / P**2, C*P*P)
            where.append(self.positions(stack.shape[2] // P, stack.shape[3] // P).repeat(len(stack), 1))
        embedded = self.input_x_embedder(torch.cat(patches))                        # (all image tokens, D)
        embedded = embedded + torch.cat(where)
        slots = (condition.kind > TEXT).flatten().nonzero()[:, 0].to(device, non_blocking=True)
        x = x.flatten(0, 1).index_copy(0, slots, embedded.to(x.dtype)).view_as(x)   # (B, L, D)

        real = condition.kind.to(device, non_blocking=True) != PADDING              # (B, L)
        length = real.sum(dim=1) + condition.gap                                    # (B,)
        long = length + 1 + N > self.cfg.original_positions                         # (B,)
        rope = self.rope((real.cumsum(dim=1) - 1).clamp(min=0), long)
        return x, rope, length[:, None] + torch.arange(1 + N, device=device), long

    def embed_target(self, x_t, t, masked=None, mask_token=None):
        """-> x (B, 1 + N, D), the time token first, and the features of the time (B, 256)."""
        P = self.cfg.patch
        x = self.x_embedder(patchify(x_t, P))                                       # (B, N, D)
        if masked is not None:                            # Eq. 4: replaced; its position, added below, stays
            x = torch.where(masked[:, :, None], mask_token[:, None].to(x.dtype), x)
        # float32 where the weights are, also under autocast; the stream stays so
        x = x + self.positions(x_t.shape[2] // P, x_t.shape[3] // P)
        features = timestep_features(t * self.cfg.time_scale).to(self.pos_embed.dtype)  # (B, 256)
        time = self.time_token(features)[:, None].to(x.dtype)                       # (B, 1, D)
        return torch.cat([time, x], dim=1), features                                # (B, 1 + N, D), (B, 256)

    def read_out(self, x, features, x_t):
        """x (B, 1 + N, D) -> the output of the network, in the shape of x_t."""
        x = self.final_layer(self.llm.norm(x[:, 1:]), self.t_embedder(features))    # (B, N, P*P*C)
        P = self.cfg.patch
        return rearrange(x.float(), "b (h w) (p q c) -> b c (h p) (w q)", h=x_t.shape[2] // P, p=P, q=P)

    def runs(self, condition, N, device):
        """The attention rule for the whole sequence, as runs of queries that see the same keys.
        queries(runs, a, b) keeps those of the tokens a:b (common/attention.py)."""
        B, L = condition.kind.shape
        time = torch.full((B, 1), TEXT)
        target = (condition.kind.max(dim=1, keepdim=True)[0] + 1).clamp(min=1).expand(B, N)  # one more image
        return attention_runs(torch.cat([condition.kind, time, target], dim=1), L, device, attention_rule)

    # -------------------------------------------------------------------- training

    def forward(self, x_t, t, condition, masked=None, mask_token=None):
        """x_t (B, C, h, w), t (B,) -> what `prediction` says, (B, C, h, w): condition and target in one pass.

        masked (B, N), True = masked: the embedding of that token is replaced by mask_token (B, D) (Eq. 4)."""
        target, features = self.embed_target(x_t, t, masked, mask_token)            # (B, 1 + N, D)
        N = target.shape[1] - 1
        x, rope, position, long = self.embed_condition(condition, N)                # (B, L, D)
        L = x.shape[1]
        rope = [torch.cat(pair, dim=2) for pair in zip(rope, self.rope(position, long))]  # (B, 1, S, E) each
        x = torch.cat([x, target.to(x.dtype)], dim=1)                               # (B, S, D)
        runs = self.runs(condition, N, x.device)
        *blocks, last = range(len(self.llm.layers))
        for number in blocks:
            x, _ = self.run_block(number, x, rope, runs)                                  # (B, S, D)
        # of the last layer only the time token and the target are read
        x, _ = self.run_block(last, x, rope, queries(runs, L, L + 1 + N), None, L)        # (B, 1 + N, D)
        return self.read_out(x, features, x_t)

    def run_block(self, number, *inputs):
        block = self.llm.layers[number]
        if number < self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    # -------------------------------------------------------------------- sampling

    @torch.no_grad()
    def encode(self, condition, N):
        """Condition -> Cache for targets of N tokens; it is the same for every t and x_t."""
        x, rope, position, long = self.embed_condition(condition, N)                # (B, L, D)
        L = x.shape[1]
        runs = self.runs(condition, N, x.device)
        layers = []
        own = queries(runs, 0, L)
        for block in self.llm.layers[:-1]:
            x, pair = block(x, rope, own)                           # (B, L, D)
            # copied at once: the values are a view that would keep the layer's queries in memory
            layers.append(tuple(F.pad(value, (0, 0, 0, 1 + N)) for value in pair))  # (B, H, S, E) each
        _, pair = self.llm.layers[-1](x, rope, None)             # of the last layer nothing else is needed
        layers.append(tuple(F.pad(value, (0, 0, 0, 1 + N)) for value in pair))
        return Cache(layers, self.rope(position, long), queries(runs, L, L + 1 + N))

    @torch.no_grad()
    def denoise(self, x_t, t, cache):
        """`forward` with the condition already encoded."""
        x, features = self.embed_target(x_t, t)                                     # (B, 1 + N, D)
        for block, past in zip(self.llm.layers, cache.layers):
            x, _ = block(x, cache.rope, cache.runs, past)                           # (B, 1 + N, D)
        return self.read_out(x, features, x_t)
