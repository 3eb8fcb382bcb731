"""The fast path of attention: the same answer as the dense rule of model.py, without computing what the rule
hides.

A sequence is cut into runs of queries that look at the same range of keys. Runs without a mask are what the
fast attention kernels want; they are used where all rows of a batch have one layout, and row by row where
rows are long. Short rows of different layouts get the dense mask. tests/test_model.py compares all of this
with the rule.

kind (B, L) as in model.Condition: below 0 padding, 0 text, k > 0 the k-th image of the row.
"""
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

LONG = 1000                              # tokens: longer rows of different layouts are attended to one by one

# without cuDNN's, which is reported to plan anew for every length; in training there are many (unmeasured)
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Run(NamedTuple):
    """Queries start:stop look at the keys up to `keys`: all, or those where `attend` is True."""
    start: int
    stop: int
    keys: int
    attend: torch.Tensor | None


class Rows(NamedTuple):
    """Rows of a batch with one layout: which, how many tokens of padding stand before them, their runs."""
    which: slice
    padding: int
    runs: list


def attention_runs(kind, L, device, rule):
    """kind (B, S), of which L tokens are the condition -> [Rows]. rule(kind) is the dense mask."""
    S = kind.shape[1]
    ragged = bool((kind != kind[:1]).any() or (kind < 0).any())
    if ragged and S < LONG:
        attend = rule(kind.to(device, non_blocking=True))[:, None]                  # (B, 1, S, S)
        return [Rows(slice(None), 0, [Run(0, L, L, attend[:, :, :L, :L]), Run(L, S, S, attend[:, :, L:])])]
    if not ragged:
        return [Rows(slice(None), 0, runs_of(kind[0].tolist(), L, device))]
    return [Rows(slice(b, b + 1), sum(value < 0 for value in row), runs_of(row, L, device))
            for b, row in enumerate(kind.tolist())]


def runs_of(row, L, device):
    padding = sum(value < 0 for value in row)
    runs = []
    start = 0
    for (_, value), group in groupby(enumerate(row), key=lambda item: (item[0] < L, item[1])):
        stop = start + len(list(group))
        if value > 0 or (value == 0 and stop == start + 1):  # an image, or one token of text
            runs.append(Run(start, stop, stop, None))
        elif value == 0:
            ones = torch.ones(stop - start, stop - padding, dtype=torch.bool, device=device)
            runs.append(Run(start, stop, stop, ones.tril(start - padding)))         # text looks back
        start = stop
    return runs


def queries(all_rows, start, stop):
    """The part of the runs whose queries are start:stop, counted from `start`."""
    return [rows._replace(runs=[run._replace(start=run.start - start, stop=run.stop - start)
                                for run in rows.runs if start <= run.start < stop]) for rows in all_rows]


def attend_to(q, k, v, attend):
    """softmax(q k^T / sqrt(E)) v. attend broadcasts to (B, H, queries, keys), True = may look, or is None."""
    if q.device.type == "cpu" and k.shape[2] <= 128:       # torch's fused kernel is slow here
        scores = (q * q.shape[-1]**-0.5) @ k.transpose(2, 3)                        # (B, H, queries, keys)
        if attend is not None:                                      # a sum costs nothing in the backward
            scores = scores + torch.zeros_like(attend, dtype=scores.dtype).masked_fill(~attend, -torch.inf)
        return scores.softmax(dim=-1) @ v
    with sdpa_kernel(KERNELS):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attend)


def attention(q, k, v, all_rows):
    """q (B, H, queries, E), k and v (B, H, keys, E) -> (B, H, queries, E), along the runs of all_rows."""
    outs = []
    for which, padding, runs in all_rows:
        out = []
        if runs[0].start > 0:
            out.append(q[which, :, :runs[0].start])                    # of padding, which nobody reads
        for start, stop, keys, attend in runs:
            seen = slice(padding, keys)
            out.append(attend_to(q[which, :, start:stop], k[which, :, seen], v[which, :, seen], attend))
        outs.append(out[0] if len(out) == 1 else torch.cat(out, dim=2))
    return outs[0] if len(outs) == 1 else torch.cat(outs)
