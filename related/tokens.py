"""Masked diffusion on tokens, and four systems that build on it: network, objectives, samplers.

magd.py corrupts an image with noise, then masks some of its tokens. Mask any share of them and leave out the
noise, and it is masked diffusion: a token is one of finitely many patches, or masked, and the network gives
every patch a probability at every masked token. What the systems do on the toy world: related/README.md.

Letters as in model.py, and K patches in the codebook. CPU only.
"""
import math
from dataclasses import replace
from functools import lru_cache
from itertools import count, islice

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from common.files import InputError
from data import Shapes, to_tensor
from model import Transformer, patchify
from toy.oracle import templates
from toy.world import BACKGROUNDS, COLORS, WORLDS, Scene, Thing, render

WORLD = WORLDS["simple"]
P = 4                                     # side of a patch in pixels
SIDE = WORLD.size // P                    # tokens of a side: 4
N = SIDE**2                               # tokens of an image: 16

# ------------------------------------------------------------------------------------------- tokens, network

@lru_cache(None)
def codebook():
    """Every patch that a drawing of this world can have -> (K, C*P*P), as patchify writes it. K is 3,831."""
    scenes = [Scene(ground, "day", "filled", (Thing(shape, color, (0, 0), size, y, x),))
              for ground in BACKGROUNDS for color in COLORS
              for shape, size, y, x in templates(WORLD, "filled")[0]]
    images = to_tensor(np.stack([render(WORLD, scene) for scene in scenes]))        # (scenes, 3, h, w)
    return patchify(images, P).flatten(0, 1).unique(dim=0)


@lru_cache(None)
def numbers():
    """The bytes of a patch -> its number in the codebook."""
    return {patch.tobytes(): k for k, patch in enumerate(codebook().numpy())}


def quantise(x):
    """Images (B, 3, h, w) in [-1, 1] -> codes (B, N). Nothing is lost, since the codebook has every patch."""
    try:
        patches = patchify(x, P).numpy()                                            # (B, N, C*P*P)
        return torch.tensor([[numbers()[patch.tobytes()] for patch in row] for row in patches])
    except KeyError:
        raise InputError("an image has a patch that is not in the codebook, which has those of the world "
                         "`simple`; draw the image with toy.world.render") from None


class ReadOut(nn.Linear):
    """A code's logit is x times its vector: learned, plus linear in its pixels, so what looks alike helps."""

    def __init__(self, width):
        super().__init__(width, len(codebook()))
        self.pixels = nn.Linear(codebook().shape[1], width, bias=False)

    def forward(self, x):                                                           # (B, N, D)
        return F.linear(x, self.weight + self.pixels(codebook()), self.bias)        # (B, N, K)


class MaskedTransformer(Transformer):
    """model.Transformer on codes (B, N), each of 0 to K - 1 or `mask` -> logits (B, N, K)."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.mask = len(codebook())                                               # the code of a masked token
        self.mask_token = nn.Parameter(torch.zeros(1, cfg.width))
        self.final_layer.linear = ReadOut(cfg.width)
        self.register_buffer("log_w", torch.zeros(N))                               # (N,) see draw_order

    def images(self, codes):
        """(B, N) -> (B, 3, h, w) in [-1, 1]; a masked patch is a chequerboard."""
        chequers = 0.4 * (-1.0) ** (torch.arange(P)[:, None] + torch.arange(P)).repeat(3, 1, 1).view(1, -1)
        patches = torch.cat([codebook(), chequers])[codes]                          # (B, N, C*P*P)
        return rearrange(patches, "b (h w) (c p q) -> b c (h p) (w q)", h=SIDE, p=P, q=P)

    def embed_target(self, codes, t, masked=None, mask_token=None):
        masked = codes == self.mask                                   # (B, N) not given: the codes say it
        mask_token = self.mask_token.expand(len(codes), -1)                         # (B, D)
        return super().embed_target(self.images(codes), t, masked, mask_token)      # Eq. 4 of MADI

    def read_out(self, x, features, codes):
        return self.final_layer(self.llm.norm(x[:, 1:]), self.t_embedder(features))             # (B, N, K)

    def time(self, codes):
        """(B,) share of visible tokens: 0 = all are masked, 1 = the image, as in magd.py."""
        return (codes != self.mask).float().mean(dim=1)

    def logits(self, codes, condition):
        return self(codes, self.time(codes), condition)                             # (B, N, K)

    def log_p(self, codes, cache):
        """For sampling, with the condition encoded -> log-probabilities (B, N, K)"""
        return self.denoise(codes, self.time(codes), cache).log_softmax(dim=2)


class Scenes(Shapes):
    """The world `simple`, but every other instruction to add a thing leaves its place open."""
    def __init__(self, split, seed, captions):
        super().__init__("simple", split, seed)
        self.world = replace(WORLD, captions=captions)

    def sample(self, index):
        sample = super().sample(index)
        if sample.task == "add" and index % 2:
            sample.task = "choice"
            sample.instruction = " ".join(sample.instruction.split()[:4])           # add a red circle
        return sample


def held_out(kind, seed, n):
    """The first n held-out samples that are captions, edits, or additions with a choice of places."""
    stream = map(Scenes("iid", seed, float(kind == "captions")).sample, count())
    return list(islice((sample for sample in stream if (sample.task == "choice") == (kind == "choice")), n))


# ------------------------------------------------------------------------------------------- objectives

def draw_order(B, log_w, generator):
    """-> rank (B, N) of each position in an order of revealing them.

    2511.19152: position i has a noise schedule of its own, alpha_i = 1 - s^w_i, for s from 0, the image,
    to 1, all masked. It is masked at s if u_i < s^w_i, so it is revealed at s = u_i^(1 / w_i), large w early:
    in the order of the Exp(1) variables -log u_i, divided by w_i."""
    e = torch.empty(B, len(log_w)).exponential_(generator=generator)                # (B, N)
    return (e / log_w.exp()).argsort(dim=1).argsort(dim=1)


def bound(ce, masked, log_w):
    """One sample of the objective. ce (B, N); masked (B, N) is what is left after the first k positions of an
    order, k uniform in 0 to N - 1 -> nats (B,) of an image.

    2511.19152: the integral over s of the sum over masked i of -alpha_i' / (1 - alpha_i) CE_i, where the
    quotient is w_i / s. Along an order that is the sum over k of the expected CE of the next position, which
    is i with probability w_i / sum of masked w. Equal w: N times the usual mean over masked tokens."""
    weight = masked * log_w.exp()                                                   # (B, N)
    return ce.shape[1] * (weight * ce).sum(dim=1) / weight.sum(dim=1)


def order_log_prob(rank, k, log_w):
    """log-probability (B,) of the first k (B,) positions of an order of draw_order."""
    ordered = log_w[rank.argsort(dim=1)]                                            # (B, N)
    left = ordered.flip(1).logcumsumexp(dim=1).flip(1)                            # (B, N) log sum of masked w
    first = torch.arange(rank.shape[1]) < k[:, None]                                # (B, N)
    return ((ordered - left) * first).sum(dim=1)


def cross_entropy(logits, codes):
    ce = F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="none")   # (B*N,)
    return ce.view_as(codes)                                                        # (B, N)


def teacher_loss(model, codes, condition, generator):
    """Masked cross-entropy; in an eighth of the samples cross-entropy of the visible tokens, a quarter of
    them another image's. FreeCorrection reads visible tokens, and masks alone never train them."""
    B = len(codes)
    k = torch.randperm(B, generator=generator) % N                                  # (B,) tokens revealed
    masked = draw_order(B, model.log_w, generator) >= k[:, None]                    # (B, N)
    checked = torch.rand(B, 1, generator=generator) < 1 / 8                         # (B, 1)
    wrong = checked & (torch.rand(B, N, generator=generator) < 1 / 4)               # (B, N)
    shown = torch.where(wrong, codes.roll(1, 0), codes).masked_fill(masked, model.mask)
    ce = cross_entropy(model.logits(shown, condition), codes)
    visible = (ce * ~masked).sum(dim=1) / k.clamp(min=1)                            # (B,)
    return torch.where(checked[:, 0], visible, bound(ce, masked, model.log_w) / N).mean()


def order_loss(model, codes, condition, generator):
    """2511.19152: `bound`, whose gradient reaches w through its weights and, by the score function, through
    the order. The batch is the same images twice, with two orders: the other's loss is the baseline."""
    B = len(codes)
    k = torch.randperm(B // 2, generator=generator).repeat(2) % N                   # (B,)
    rank = draw_order(B, model.log_w, generator)                                    # (B, N)
    masked = rank >= k[:, None]
    ce = cross_entropy(model.logits(codes.masked_fill(masked, model.mask), condition), codes)
    nats = bound(ce, masked, model.log_w)                                           # (B,)
    worse = (nats - nats.roll(B // 2)).detach()                                     # (B,)
    return (nats + worse * order_log_prob(rank, k, model.log_w)).mean() / N


def student_input(B, mask, generator):
    """Di[M]O (2503.15457), start of the one step: 60 % masked, 40 % random tokens, which are its noise."""
    masked = torch.rand(B, N, generator=generator).argsort(dim=1) < round(0.6 * N)
    return torch.randint(mask, (B, N), generator=generator).masked_fill(masked, mask)


def dimo_loss(student, auxiliary, teacher, codes, condition, generator):
    """Di[M]O: the student's logits z get the gradient p_auxiliary - p_teacher where its own image is masked
    again. The auxiliary model learns the student's images, by masked cross-entropy. No data but prompts."""
    B = len(codes)
    z = student.logits(student_input(B, student.mask, generator), condition)        # (B, N, K)
    made = draw(z.detach().softmax(dim=2), generator)                             # (B, N) the student's image
    share = torch.rand(B, 1, generator=generator).arccos() / (math.pi / 2)   # (B, 1) as MaskGIT: mostly many
    rank = torch.rand(B, N, generator=generator).argsort(dim=1)                     # (B, N)
    masked = rank < (N * share).round().clamp(min=1)
    shown = made.masked_fill(masked, student.mask)
    with torch.no_grad():
        p = teacher.logits(shown, condition).softmax(dim=2)
    logits = auxiliary.logits(shown, condition)
    loss = distillation(z, logits.detach().softmax(dim=2), p)                       # (B, N)
    return (loss + cross_entropy(logits, made))[masked].mean()


def distillation(z, p_auxiliary, p_teacher):
    """(B, N, K) each -> (B, N), whose gradient with respect to z is p_auxiliary - p_teacher."""
    return 0.5 * (z - z.detach() + p_auxiliary - p_teacher).square().sum(dim=2)


def naive_loss(student, teacher, codes, condition, generator):
    """The control for Di[M]O: cross-entropy of the student's one step with images that the teacher makes."""
    B = len(codes)
    made = unmask(teacher, teacher.encode(condition, N), B, generator, 8)[0][-1]    # (B, N)
    logits = student.logits(student_input(B, student.mask, generator), condition)   # (B, N, K)
    return cross_entropy(logits, made).mean()


# ------------------------------------------------------------------------------------------- samplers

def draw(p, generator):
    """One code of each distribution: p (B, N, K) -> (B, N)."""
    u = torch.rand(*p.shape[:2], 1, generator=generator)
    return torch.searchsorted(p.cumsum(dim=2), u).clamp(max=p.shape[2] - 1)[:, :, 0]


def at(p, codes):
    """The value of p (B, N, K) at the codes (B, N) -> (B, N)."""
    return p.gather(2, codes[:, :, None])[:, :, 0]


def chosen(score, n):
    """True at the n highest of each row."""
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, score.topk(n, dim=1).indices, True)


def unmask(model, cache, B, generator, steps, order="confidence", remask=(0, 0, 0)):
    """MaskGIT (2202.04200): draw all masked tokens; of these reveal those drawn with the highest probability,
    or random ones, as many as a cosine schedule says, at least one -> [codes (B, N) by step], forwards (B,).

    remask: FreeCorrection (2602.02927). A decided token's confidence is its probability given itself and all
    others, averaged over the steps since it was revealed. From 40 % of the steps on each masks the remask[0]
    least confident again, from 60 and 80 % [1] and [2]; as many more are revealed, and their history ends."""
    codes, result = torch.full((B, N), model.mask), []
    total, times = torch.zeros(2, B, N)                                 # sum of the confidences, their number
    for step in range(1, steps + 1):
        masked = codes == model.mask                                                # (B, N)
        p = model.log_p(codes, cache).exp()                                         # (B, N, K)
        drawn = draw(p, generator)
        confidence = at(p, torch.where(masked, drawn, codes))                       # (B, N)
        total += confidence * ~masked
        times += ~masked
        before = int(masked[0].sum())                                               # masked tokens
        after = max(0, min(before - 1, int(N * math.cos(math.pi / 2 * step / steps))))
        fifth = 5 * (step - 1) // steps                             # 0 to 4: which fifth of the steps
        back = min(remask[fifth - 2], after, N - before) if fifth >= 2 else 0
        score = torch.rand(B, N, generator=generator) if order == "random" else confidence
        reveal = chosen(score.masked_fill(~masked, -1), before + back - after)
        again = chosen(-(total / times.clamp(min=1)).masked_fill(masked, 2), back)  # masked ones come last
        codes = torch.where(reveal, drawn, codes).masked_fill(again, model.mask)
        total[again] = times[again] = 0
        result.append(codes)
    return result, torch.full((B,), float(steps))


def punt(model, cache, B, generator, eps):
    """PUNT (2510.21961): reveal at once only what is independent -> [codes (B, N) by step], forwards (B,).

    Masked tokens are ranked by confidence. For each bit of the rank, from the highest, those kept that have
    bit 0 are shown, as anchors; one with bit 1 is kept unless KL(p(x_i | x) || p(x_i | x, anchors)) > eps.
    Two ranks differ in a highest bit: there the less confident is tested with the other shown."""
    codes, forwards, result = torch.full((B, N), model.mask), torch.zeros(B), []
    while (masked := codes == model.mask).any():
        log_p = model.log_p(codes, cache)                                           # (B, N, K)
        drawn = draw(log_p.exp(), generator)
        confidence = at(log_p, drawn).masked_fill(~masked, -torch.inf)              # (B, N)
        rank = confidence.argsort(dim=1, descending=True).argsort(dim=1)            # (B, N)
        number = masked.sum(dim=1)                                                  # (B,)
        kept = masked
        for bit in reversed(range((int(number.max()) - 1).bit_length())):
            later = (rank >> bit) % 2 == 1                                          # (B, N)
            log_q = model.log_p(torch.where(kept & ~later, drawn, codes), cache)    # (B, N, K)
            kl = (log_p.exp() * (log_p - log_q)).sum(dim=2)                         # (B, N)
            kept = kept & ~(later & (kl > eps))
        forwards += (number > 0) + number.clamp(min=1).log2().ceil()
        codes = torch.where(kept, drawn, codes)
        result.append(codes)
    return result, forwards


def one_step(model, cache, B, generator):
    p = model.log_p(student_input(B, model.mask, generator), cache).exp()           # (B, N, K)
    return [draw(p, generator)], torch.ones(B)                                      # [(B, N)], (B,)
