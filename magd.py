"""Masking-augmented Gaussian diffusion: the idea of MADI (arXiv 2507.13401), Eq. 1-6 and 9, as pure functions.

A training image is corrupted twice: Gaussian noise first (Eq. 2), then, for some samples at high noise, some of its
noisy tokens are replaced by a mask token (Eq. 4). The network answers with the target of the unmasked problem, on all
tokens (Eq. 5), so it must fill the hidden ones from their neighbours and from the prompt.

Time t runs from noise (0) to data (1); s = 1 - t is the noise level. The paper's "t >= tau" (high noise) is s >= tau.
Letters: B batch, N target tokens, D width, (C, h, w) a latent.
"""
import math
from typing import NamedTuple

import torch
import torch.nn as nn

PREDICTIONS = ("velocity", "noise", "x")
CORRUPTIONS = ("noise-mask", "mask-noise", "mask")           # the paper's, and two others to compare it with: see corrupt


class Draws(NamedTuple):
    """Everything random in one training step. Drawn sample by sample, so the number of processes does not matter."""
    x0: torch.Tensor                      # (B, C, h, w) noise
    t: torch.Tensor                       # (B,) time
    u: torch.Tensor                       # (B,) in [0, 1): below p_magd the sample may be masked (the u of Eq. 6)
    hide: torch.Tensor                    # (B, N) in [0, 1): below r_mask the token is hidden if the sample is masked
    pick: torch.Tensor                    # (B,) in [0, 1): which of the mask tokens


def sample_t(generator, mean=0.0):
    """Logit-normal time, (): sigmoid of a normal of deviation 1. OmniGen has mean 0; below 0 there is more noise."""
    return (torch.randn((), generator=generator) + mean).sigmoid()


def draw(shape, tokens, seeds, t_mean=0.0):
    """Draws for one sample per seed; shape = (C, h, w). All are always drawn: plain and masked training share noise and time."""
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        rows.append((torch.randn(shape, generator=generator), sample_t(generator, t_mean), torch.rand((), generator=generator),
                     torch.rand(tokens, generator=generator), torch.rand((), generator=generator)))
    return Draws(*map(torch.stack, zip(*rows)))


def forward_process(x1, x0, t):
    """First corruption (Eq. 2), on OmniGen's straight path: x_t = t x1 + (1 - t) x0."""
    t = t[:, None, None, None]
    return t * x1 + (1 - t) * x0                                                          # (B, C, h, w)


def token_mask(draws, p_magd, tau, r_mask):
    """(B, N), True = hidden. Per sample: u < p_magd and s >= tau (Eq. 6); then each token with probability r_mask (Eq. 4)."""
    active = (draws.u < p_magd) & (1 - draws.t >= tau)                                    # (B,)
    return active[:, None] & (draws.hide < r_mask)                                        # (B, N)


class MaskTokens(nn.Module):
    """The learnable mask token (Table 7): one of 1,024 embeddings of width 256, drawn at random for each sample and step,
    through a two-layer MLP like the time embedding's."""

    def __init__(self, width, pool=1024, pool_width=256):
        super().__init__()
        self.pool = nn.Embedding(pool, pool_width)
        self.mlp = nn.Sequential(nn.Linear(pool_width, width), nn.SiLU(), nn.Linear(width, width))
        nn.init.normal_(self.pool.weight, std=0.02)

    def forward(self, pick):                                                              # (B,) in [0, 1)
        return self.mlp(self.pool((pick * self.pool.num_embeddings).long()))              # (B, D)


def edit_weight(x1, source, edit):
    """Weight of each element of an edit's loss, (B, C, h, w): OmniGen's, so that the changed region counts.

    With d = |x1 - source| and m = mean(d) of a sample: where d > 0.3 the weight is 1/m, kept in [5, 64], else 1. Two images
    alike (m < 0.001) teach nothing and weigh 0; two images all different (m > 0.8) have no region to favour and weigh 1.
    edit (B,), False = no source to compare with (text-to-image): weight 1.
    """
    d = (x1 - source).abs()
    m = d.mean(dim=(1, 2, 3), keepdim=True)                                               # (B, 1, 1, 1)
    weight = torch.where((d > 0.3) & (m <= 0.8), (1 / (m + 1e-6)).clamp(5, 64), 1.0)
    weight = torch.where(m < 0.001, 0.0, weight)
    return torch.where(edit[:, None, None, None], weight, 1.0)


def velocity(output, x_t, t, prediction):
    """The velocity dx_t/dt = x1 - x0 that the network's output implies; the bounds keep the divisions finite at both ends."""
    t = t[:, None, None, None]
    if prediction == "noise":                                # x1 = (x_t - (1 - t) x0) / t
        return (x_t - output) / t.clamp(min=0.02)
    if prediction == "x":                                    # x0 = (x_t - t x1) / (1 - t)
        return (output - x_t) / (1 - t).clamp(min=0.05)
    return output


def corrupt(x1, draws, masked, corruption):
    """Both corruptions of a batch, masked (B, N) -> x_t, x0, t, and the tokens that the network has to replace, or None.

    noise-mask: noise, then the network sees a mask token in the place of a noisy one (Eq. 4). mask-noise, as in the caption of
    Figure 1: a hidden patch of the image is blanked before the noise is added. mask: a masked sample gets no noise at all, so that
    its loss is the masked autoencoder's (Eq. 1): with x0 = 0 and t = 1 the velocity x1 - x0 is the image. (That agrees with the other
    samples: at t = 1 nothing is left to see of x0, whose mean is 0.)
    """
    x0, t, seen = draws.x0, draws.t, x1
    if corruption == "mask":
        active = masked.any(dim=1)                                                        # (B,)
        x0, t = torch.where(active[:, None, None, None], 0, x0), torch.where(active, 1, t)
    if corruption == "mask-noise":
        P = math.isqrt(x1.shape[2] * x1.shape[3] // masked.shape[1])
        hidden = masked.view(len(x1), 1, x1.shape[2] // P, x1.shape[3] // P).repeat_interleave(P, 2).repeat_interleave(P, 3)
        seen, masked = torch.where(hidden, 0, x1), None                                   # hidden (B, 1, h, w)
    return forward_process(seen, x0, t), x0, t, masked


def magd_loss(model, x1, condition, draws, p_magd=0.0, tau=0.7, r_mask=0.25, mask_tokens=None, weight=None,
              prediction="velocity", corruption="noise-mask"):
    """Eq. 6: the masked loss (Eq. 5) for the samples that token_mask selects, the plain loss (Eq. 3) for the others.

    Both are one batch and one forward. x1 (B, C, h, w) -> loss per sample (B,) and masked (B, N), True = hidden.
    The error is taken on the velocity; for `noise` on the noise itself, as Eq. 3 and 5 are printed.
    mask_tokens None: the mask token is zero. p_magd = 0 is the plain loss, bit for bit. weight: see edit_weight.
    """
    masked = token_mask(draws, p_magd, tau, r_mask)                                       # (B, N)
    x_t, x0, t, replace = corrupt(x1, draws, masked, corruption)
    mask_token = x1.new_zeros(len(x1), 1) if mask_tokens is None else mask_tokens(draws.pick)             # (B, D) or (B, 1)
    output = model(x_t, t, condition, replace, mask_token)                                # (B, C, h, w)
    if prediction == "noise":
        error = output - x0
    elif prediction == "x":      # the error of the velocity is that of x1 over 1 - t; the bound is that of velocity()
        error = (output - x1) / (1 - t).clamp(min=0.05)[:, None, None, None]
    else:
        error = output - (x1 - x0)
    squared = error.square() if weight is None else weight * error.square()
    return squared.mean(dim=(1, 2, 3)), masked                                            # (B,), (B, N)
