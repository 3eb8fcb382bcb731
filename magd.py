"""Masking-augmented Gaussian diffusion (MAgD), the idea of MADI (arXiv 2507.13401): its Eq. 1 to 6.

A training image is corrupted twice. Gaussian noise comes first (Eq. 2); then, in some of the samples with
much noise, some of the noisy tokens are replaced by a mask token (Eq. 4). The network still predicts what it
would without masks, for every token (Eq. 5), so it has to infer the masked ones from their neighbours and
from the prompt.

Time t runs from noise (0) to data (1), so 1 - t is the noise level, and the paper's "t >= tau" (high noise)
is 1 - t >= tau. Letters: B batch, N target tokens, D width, (C, h, w) the image in the form the network sees:
pixels on the toy, the autoencoder's latent for OmniGen. condition: the prompt with its reference images
(model.Condition).
"""
import math
from typing import NamedTuple

import torch
import torch.nn as nn

PREDICTIONS = ("velocity", "noise", "x")                     # what the output of the network means
CORRUPTIONS = ("noise-mask", "mask-noise", "mask")           # the paper's, and two to compare it with


class Draws(NamedTuple):
    """The random numbers of the loss, from one seed per sample: sharing a batch out changes nothing."""
    x0: torch.Tensor                      # (B, C, h, w) noise
    t: torch.Tensor                       # (B,) time
    u: torch.Tensor                       # (B,) in [0, 1): a sample may be masked where u < p_magd (Eq. 6)
    u_token: torch.Tensor         # (B, N) in [0, 1): a masked sample's token is masked where u_token < r_mask
    u_pool: torch.Tensor                  # (B,) in [0, 1): which of the pool's mask tokens


def sample_t(generator, mean=0.0):
    """A logit-normal time, (): the sigmoid of N(mean, 1). OmniGen has mean 0; a lower one, more noise."""
    return (torch.randn((), generator=generator) + mean).sigmoid()


def draw(shape, N, seeds, t_mean=0.0):
    """Draws for one sample per seed; shape = (C, h, w). Masking settings change neither noise nor time."""
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        rows.append(Draws(x0=torch.randn(shape, generator=generator),
                          t=sample_t(generator, t_mean),
                          u=torch.rand((), generator=generator),
                          u_token=torch.rand(N, generator=generator),
                          u_pool=torch.rand((), generator=generator)))
    return Draws(*map(torch.stack, zip(*rows)))


def forward_process(x1, x0, t):
    """First corruption (Eq. 2), on OmniGen's straight path: x_t = t x1 + (1 - t) x0."""
    t = t[:, None, None, None]
    return t * x1 + (1 - t) * x0                                                    # (B, C, h, w)


def token_mask(draws, p_magd, tau, r_mask):
    """Second corruption: which tokens are masked, (B, N), True = masked.

    A sample is selected if u < p_magd and 1 - t >= tau (Eq. 6), then each of its tokens with chance r_mask
    (Eq. 4)."""
    noise_level = 1 - draws.t                                                       # (B,)
    selected = (draws.u < p_magd) & (noise_level >= tau)                            # (B,)
    return selected[:, None] & (draws.u_token < r_mask)                               # (B, N)


class MaskTokens(nn.Module):
    """The learned mask token (Table 7): one of 1,024 embeddings of width 256, drawn anew for each sample and
    step, then a two-layer MLP like that of the time embedding."""

    def __init__(self, width, pool=1024, pool_width=256):
        super().__init__()
        self.pool = nn.Embedding(pool, pool_width)
        self.mlp = nn.Sequential(nn.Linear(pool_width, width), nn.SiLU(), nn.Linear(width, width))
        nn.init.normal_(self.pool.weight, std=0.02)

    def forward(self, u_pool):                                                      # (B,) in [0, 1)
        return self.mlp(self.pool((u_pool * self.pool.num_embeddings).long()))      # (B, D)


def edit_weight(x1, source, edit):
    """Weight of each element of an edit's loss, (B, C, h, w): more where the edit changes it (Sec. 9).

    With d = |x1 - source| and m = mean(d) of a sample: where d > 0.3 the weight is 1 / m, clamped to [5, 64];
    elsewhere it is 1. Equal images (m < 0.001) have nothing to teach and get 0. Entirely different ones
    (m > 0.8) have no region to favour and get 1. edit (B,): False = no source to compare with, weight 1."""
    d = (x1 - source).abs()
    m = d.mean(dim=(1, 2, 3), keepdim=True)                                         # (B, 1, 1, 1)
    weight = torch.where((d > 0.3) & (m <= 0.8), (1 / (m + 1e-6)).clamp(5, 64), 1.0)
    weight = torch.where(m < 0.001, 0.0, weight)
    return torch.where(edit[:, None, None, None], weight, 1.0)


def magd_loss(model, x1, condition, draws, p_magd=0.0, tau=0.7, r_mask=0.25, mask_tokens=None, weight=None,
              prediction="velocity", corruption="noise-mask"):
    """Eq. 6: masked loss (Eq. 5) for the samples that token_mask selects, plain loss (Eq. 3) for the others.

    Both share one batch and one forward pass. x1 (B, C, h, w) -> loss per sample (B,), masked (B, N).
    mask_tokens None: the mask token is zero. p_magd = 0 is exactly the plain loss. weight: see edit_weight.
    """
    masked = token_mask(draws, p_magd, tau, r_mask)                                 # (B, N)
    if corruption == "noise-mask":
        x0 = draws.x0
        t = draws.t
        x_t = forward_process(x1, x0, t)                                            # (B, C, h, w)  Eq. 2
        replaced = masked
    else:
        x_t, x0, t, replaced = other_corruption(x1, draws, masked, corruption)
    if mask_tokens is None:
        mask_token = x1.new_zeros(len(x1), 1)                                       # (B, 1), zero
    else:
        mask_token = mask_tokens(draws.u_pool)                                      # (B, D)
    output = model(x_t, t, condition, replaced, mask_token)                         # (B, C, h, w)  Eq. 4
    error = prediction_error(output, x1, x0, t, prediction)                         # on all tokens, Eq. 5
    squared = error.square() if weight is None else weight * error.square()
    return squared.mean(dim=(1, 2, 3)), masked                                      # (B,), (B, N)


def prediction_error(output, x1, x0, t, prediction):
    """The error that the loss squares, (B, C, h, w): of the noise, or of the velocity (Eq. 3, 5)."""
    if prediction == "noise":
        return output - x0
    if prediction == "x":       # output - x1 is the velocity's error times 1 - t; clamped as in velocity()
        return (output - x1) / (1 - t).clamp(min=0.05)[:, None, None, None]
    return output - (x1 - x0)


def velocity(output, x_t, t, prediction):
    """The velocity dx_t/dt = x1 - x0 that an output implies, for the sampler."""
    t = t[:, None, None, None]
    if prediction == "noise":             # x1 = (x_t - (1 - t) x0) / t
        return (x_t - output) / t.clamp(min=0.02)
    if prediction == "x":                 # x0 = (x_t - t x1) / (1 - t)
        return (output - x_t) / (1 - t).clamp(min=0.05)
    return output


def other_corruption(x1, draws, masked, corruption):
    """The corruptions to compare the paper's with -> x_t, x0, t, and the tokens (B, N) to replace, or None.

    mask-noise, as in the caption of Figure 1: masked patches are blanked in the image, then noise is added.
    mask: a masked sample gets no noise. With x0 = 0 and t = 1 its velocity x1 - x0 is the image itself, so
    its loss is the masked autoencoder's (Eq. 1). This fits the other samples: at t = 1 x_t tells nothing
    about x0, whose mean is 0."""
    x0 = draws.x0
    t = draws.t
    if corruption == "mask-noise":
        P = math.isqrt(x1.shape[2] * x1.shape[3] // masked.shape[1])                # side of a patch
        pixels = masked.view(len(x1), 1, x1.shape[2] // P, x1.shape[3] // P)
        pixels = pixels.repeat_interleave(P, 2).repeat_interleave(P, 3)             # (B, 1, h, w)
        return forward_process(torch.where(pixels, 0, x1), x0, t), x0, t, None
    selected = masked.any(dim=1)                                                    # (B,)
    x0 = torch.where(selected[:, None, None, None], 0, x0)
    t = torch.where(selected, 1, t)
    return forward_process(x1, x0, t), x0, t, masked
