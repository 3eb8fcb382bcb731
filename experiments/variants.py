"""What the experiments change in the method itself: each a few lines, in place for one run of a script.

    python -m experiments.variants registers train --preset toy --seed 0 --out out/registers/0
    python -m experiments.variants finite-512,dropout train --preset toy --out out/dropout/0

A model with other parts is sampled under its name too. The six scripts know nothing of this.
"""
import itertools
import random
import re
import runpy
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import magd
import model
from common.cli import run_script
from common.files import InputError

# ------------------------------------------------------------------------------------------- data

def finite(n):
    """The first n training samples again and again, shuffled in each epoch; noise stays fresh."""
    def sample(self, index):
        if self.split == "train":
            index = data.shuffled(range(n), self.seed, index)
        return endless(self, index)
    endless = data.Shapes.sample
    data.Shapes.sample = sample


def wrong_plan():
    """Instead of an edit's plan, that of the next edit."""
    def sample(self, index):
        own = right(self, index)
        if own.plan:
            own.plan = next(plan for k in itertools.count(index + 1) if (plan := right(self, k).plan))
        return own
    right = data.Shapes.sample
    data.Shapes.sample = sample


# ------------------------------------------------------------------------------------------- prompts

def filler():
    """As many words "the" instead of pause tokens."""
    data.Words.pause = "the "


def plan(change):
    """change(steps) in the place of the plan's steps."""
    def make_prompt(tokenizer, instruction, n_images=0, plan=(), pauses=0):
        return usual(tokenizer, instruction, n_images, change(list(plan)), pauses)
    usual = data.make_prompt
    data.make_prompt = make_prompt


def shuffled_words(steps):
    """The words of a plan in an order that means nothing; as many words in each step as before."""
    words = " ".join(steps).split()
    random.Random(" ".join(steps)).shuffle(words)
    words = iter(words)
    return [" ".join(next(words) for _ in step.split()) for step in steps]


def places(steps):
    """Where something happens or stays, and nothing else: top left."""
    return [match for step in steps for match in re.findall("(?:top|bottom) (?:left|right)", step)]


def plan_first():
    """The plan before the image."""
    def make_prompt(tokenizer, instruction, n_images=0, plan=(), pauses=0):
        text = data.place_images(instruction, n_images, tokenizer.images_first)
        head, tag, images = text.partition("<img>")
        steps = "".join(f" {step} {tokenizer.pause}" for step in plan)
        return usual(tokenizer, f"{head.strip()}{steps} {tag}{images}".strip(), n_images, (), pauses)
    usual = data.make_prompt
    data.make_prompt = make_prompt


# ------------------------------------------------------------------------------------------- loss

def two_passes(second):
    """The mean of two losses for each sample: the plain one, and `second` with noise and times of its own.

    Validation, which has no gradients, keeps the plain one."""
    def loss(model, x1, condition, draws, p_magd=0.0, tau=None, r_mask=None, mask_tokens=None, weight=None,
             prediction="velocity", corruption=None):
        first, masked = one(model, x1, condition, draws, 0.0, weight=weight, prediction=prediction)
        if not torch.is_grad_enabled():
            return first, masked
        other = draws._replace(x0=draws.x0.roll(1, 0), t=draws.t.roll(1, 0))       # of the sample before
        own, masked = one(model, x1, condition, other, mask_tokens=mask_tokens, weight=weight,
                          prediction=prediction, **second)
        return (first + own) / 2, masked
    one = magd.magd_loss
    magd.magd_loss = loss


# ------------------------------------------------------------------------------------------- model

def dropout(rate=0.1):
    """Dropout in the hidden layer of each feed-forward, in training."""
    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        hidden = F.silu(gate) * up
        return self.down_proj(F.dropout(hidden, rate, training=torch.is_grad_enabled()))
    model.FeedForward.forward = forward


class Grown(model.Transformer):
    """A Transformer with new parts, which a checkpoint without them leaves as they began."""

    def load_state_dict(self, state, **more):
        return super().load_state_dict({**self.state_dict(), **state}, **more)


class Registers(Grown):
    """16 learned tokens between the time token and the target; they see what the target sees."""
    n = 16

    def __init__(self, cfg):
        super().__init__(cfg)
        self.registers = nn.Parameter(torch.randn(self.n, cfg.width) * 0.02)

    def embed_target(self, x_t, t, masked=None, mask_token=None):
        x, features = super().embed_target(x_t, t, masked, mask_token)             # (B, 1 + N, D)
        registers = self.registers.to(x.dtype).expand(len(x), -1, -1)              # (B, n, D)
        return torch.cat([x[:, :1], registers, x[:, 1:]], dim=1), features         # (B, 1 + n + N, D)

    def read_out(self, x, features, x_t):
        return super().read_out(x[:, self.n:], features, x_t)     # its first token is not read, whichever

    def encode(self, condition, N):
        return super().encode(condition, N + self.n)


class Deeper(Grown):
    """Three more layers at the end, which begin as the identity: the cost of 16 more tokens in the prompt."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.llm.layers.extend(model.Block(cfg) for _ in range(3))


def grow(kind):
    model.Transformer = kind


VARIANTS = {
    "finite-512": lambda: finite(512),
    "finite-4096": lambda: finite(4096),
    "wrong-plan": wrong_plan,
    "filler": filler,
    "plan-first": plan_first,
    "plan-shuffled": lambda: plan(shuffled_words),
    "plan-places": lambda: plan(places),
    "two-plain": lambda: two_passes(dict(p_magd=0.0)),
    # a masked pass of each sample
    "mdt": lambda: two_passes(dict(p_magd=1.0, tau=0.0, r_mask=0.3)),
    # clean patches from clean ones
    "mc-dit": lambda: two_passes(dict(p_magd=1.0, tau=0.0, r_mask=0.5, corruption="mask")),
    "dropout": dropout,
    "registers": lambda: grow(Registers),
    "deeper": lambda: grow(Deeper),
}


def main():
    if len(sys.argv) < 3:
        raise InputError("two names are needed: of variants, joined by commas, and of a script, e.g. train")
    _, names, script, *flags = sys.argv
    for name in names.split(","):
        if name not in VARIANTS:
            raise InputError(f"no variant {name!r}; there are {', '.join(VARIANTS)}")
        VARIANTS[name]()
    sys.argv = [script, *flags]
    runpy.run_module(script, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    run_script(main)
