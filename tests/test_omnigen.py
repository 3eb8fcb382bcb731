"""The transformer against what OmniGen-v1's own code computes from a tiny checkpoint of the released format."""
import json
from pathlib import Path

import pytest
import torch
from helpers import read_safetensors

import magd
from model import PADDING, Condition, Config, Transformer, attention_rule

FOLDER = Path(__file__).parent / "fixtures/omnigen_tiny"
REFERENCE = read_safetensors(FOLDER / "omnigen_reference.safetensors")
FACTS = json.loads((FOLDER / "omnigen_reference.json").read_text())


def released_model(**changes):
    config = json.loads((FOLDER / "config.json").read_text())
    model = Transformer(Config(vocab=576, width=48, layers=2, heads=2, mlp=96, short_factor=config["rope_scaling"]["short_factor"],
                               long_factor=config["rope_scaling"]["long_factor"], **changes)).init_weights()
    weights = read_safetensors(FOLDER / "model_without_pos_embed.safetensors")
    model.load_state_dict({**weights, "pos_embed": model.pos_embed}, strict=True)         # the table is ours, a formula
    return model.eval()


def condition_of(case):
    ids, facts = REFERENCE[f"forward/{case}/input_ids"], FACTS["forward"][case]
    kind = torch.zeros_like(ids)
    for b, row in enumerate(facts["rows"]):
        kind[b, :ids.shape[1] - len(row["unpadded_ids"])] = PADDING
        for k, (start, stop) in enumerate(facts["spans"].get(str(b), []), 1):
            kind[b, start:stop] = k
    images = [REFERENCE[f"forward/{case}/ref_{k}"][0] for k in range(len(facts["refs_in_sequence_order"]))]
    return Condition(ids, kind, images)


@torch.no_grad()
@pytest.mark.parametrize("case, t", [(case, t) for case in ("t2i", "ref1", "batch2", "ref1_long") for t in (0.0, 0.3, 0.9)])
def test_velocities(case, t):
    long = dict(original_positions=32, max_positions=1024) if case == "ref1_long" else {}
    inputs = case.removesuffix("_long")
    condition = condition_of(inputs)
    x = torch.cat([REFERENCE[f"forward/{inputs}/x_{b}"] for b in range(len(condition.ids))])
    v = released_model(**long)(x, torch.full((len(x),), t), condition)
    expected = torch.cat([REFERENCE[f"forward/{case}/v_{b}/t={t}"] for b in range(len(x))])
    torch.testing.assert_close(v, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_velocities_at_two_times_in_one_batch():
    x = torch.cat([REFERENCE[f"forward/batch2/x_{b}"] for b in range(2)])
    v = released_model()(x, torch.tensor([0.9, 0.3]), condition_of("batch2"))
    expected = torch.cat([REFERENCE[f"forward/batch2/v_{b}/t=mixed"] for b in range(2)])
    torch.testing.assert_close(v, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ["t2i", "ref1", "batch2", "mixed"])
def test_the_attention_rule_is_omnigens(case):
    kind = condition_of(case).kind
    L = kind.shape[1]
    expected = REFERENCE[f"forward/{case}/attention_mask"][:, :L, :L].bool()
    real = (kind != PADDING)[:, :, None]
    assert (attention_rule(kind) & real).equal(expected & real)


def test_loss_and_gradients():
    model = released_model()
    draws = magd.Draws(REFERENCE["train/x0"], REFERENCE["train/t"], None, None, None)
    loss, _ = magd.magd_loss(model, REFERENCE["train/x1"], condition_of("batch2"), draws)
    torch.testing.assert_close(loss, REFERENCE["train/loss_per_sample"], atol=1e-5, rtol=0)
    loss.mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    expected = {name.removeprefix("train/grad/"): value for name, value in REFERENCE.items() if name.startswith("train/grad/")}
    assert len(expected) == 9
    for name, value in expected.items():
        torch.testing.assert_close(gradients[name], value, atol=1e-5, rtol=0, msg=name)
