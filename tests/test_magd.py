import math

import pytest
import torch
from helpers import layout, tiny_model

import magd
from model import Condition


def batch(B=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    condition = Condition(torch.randint(1, 80, (B, 5), generator=generator), layout(*["ttttt"] * B), [])
    return torch.randn(B, 3, 8, 8, generator=generator), condition, magd.draw((3, 8, 8), 4, range(B))


def plain_loss(model, x1, condition, draws):
    """Flow matching, as short as it gets."""
    t = draws.t[:, None, None, None]
    v = model(t * x1 + (1 - t) * draws.x0, draws.t, condition)
    return (v - (x1 - draws.x0)).square().mean(dim=(1, 2, 3))


def test_no_masking_is_the_plain_loss_bit_for_bit():
    model, (x1, condition, draws) = tiny_model(), batch()
    expected = plain_loss(model, x1, condition, draws)
    for flags in ({"p_magd": 0.0}, {"p_magd": 1.0, "r_mask": 0.0}):
        loss, _ = magd.magd_loss(model, x1, condition, draws, **flags)
        assert loss.equal(expected)


def test_plain_and_masked_training_draw_the_same_noise_and_time():
    draws = magd.draw((3, 8, 8), 4, [7])
    generator = torch.Generator().manual_seed(7)
    assert draws.x0[0].equal(torch.randn(3, 8, 8, generator=generator))
    assert draws.t[0].equal(torch.randn((), generator=generator).sigmoid())


def test_shares_of_masked_samples_and_tokens():
    n, p, tau, r = 20000, 0.5, 0.7, 0.25
    draws = magd.draw((1, 1, 1), 16, range(n))
    masked = magd.token_mask(draws, p, tau, r)
    # s >= 0.7 is t <= 0.3: a normal below log(0.3 / 0.7)
    share = p * 0.5 * (1 + math.erf(math.log(0.3 / 0.7) / math.sqrt(2)))
    assert share == pytest.approx(0.099, abs=5e-4)                         # the 9.9 % of OmniGen's times
    active = (draws.u < p) & (1 - draws.t >= tau)
    assert active.float().mean().item() == pytest.approx(share, abs=4 * math.sqrt(share / n))
    tokens = masked[active].float().mean().item()
    assert tokens == pytest.approx(r, abs=4 * math.sqrt(r / (16 * n * share)))
    assert not masked[1 - draws.t < tau].any()                             # never at low noise
    assert not masked[draws.u >= p].any()


def test_always_and_never():
    draws = magd.draw((1, 1, 1), 16, range(50))
    assert magd.token_mask(draws, 1.0, 0.0, 1.0).all()
    assert not magd.token_mask(draws, 1.0, 1.0, 1.0).any()


@pytest.mark.parametrize("prediction", magd.PREDICTIONS)
def test_the_loss_of_an_oracle_is_zero_and_its_velocity_right(prediction):
    x1, condition, draws = batch()
    answer = {"velocity": x1 - draws.x0, "noise": draws.x0, "x": x1}[prediction]
    loss, _ = magd.magd_loss(lambda *_: answer, x1, condition, draws, prediction=prediction)
    assert loss.abs().max() == 0
    t = torch.linspace(0.1, 0.9, len(x1))
    x_t = magd.forward_process(x1, draws.x0, t)
    torch.testing.assert_close(magd.velocity(answer, x_t, t, prediction), x1 - draws.x0, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prediction", magd.PREDICTIONS)
def test_the_loss_is_on_all_tokens_and_on_the_stated_quantity(prediction):
    x1, condition, draws = batch()
    answer = {"velocity": x1 - draws.x0, "noise": draws.x0, "x": x1}[prediction].clone()
    answer[:, 0, 0, 0] += 2.0                                              # an error of 2 in one of 3 * 8 * 8 numbers
    loss, _ = magd.magd_loss(lambda *_: answer, x1, condition, draws, 1.0, 0.0, 0.5, prediction=prediction)
    scale = 1 / (1 - draws.t).clamp(min=0.05) ** 2 if prediction == "x" else 1.0
    torch.testing.assert_close(loss, (4 / 192 * scale) * torch.ones(6))


def test_masked_tokens_reach_the_model_as_the_mask_token():
    x1, condition, draws = batch()
    tokens = magd.MaskTokens(32)
    seen = []
    magd.magd_loss(lambda *inputs: seen.extend(inputs) or x1, x1, condition, draws, 1.0, 0.0, 0.5, tokens)
    x_t, t, _, masked, token = seen
    assert x_t.equal(magd.forward_process(x1, draws.x0, draws.t))          # noise first, then the mask, inside the model
    assert masked.equal(draws.u_token < 0.5)
    index = (draws.u_pool * 1024).long()
    assert token.equal(tokens.mlp(tokens.pool.weight[index])) and len(index.unique()) == 6


def test_masking_before_the_noise_leaves_nothing_but_noise_in_a_masked_patch():
    x1, condition, draws = batch()
    seen = []
    magd.magd_loss(lambda *inputs: seen.extend(inputs) or x1, x1, condition, draws, 1.0, 0.0, 0.5, corruption="mask-noise")
    x_t, t, _, masked, _ = seen
    assert masked is None and t.equal(draws.t)                             # the network is not told
    drawn, noisy = draws.u_token < 0.5, magd.forward_process(x1, draws.x0, draws.t)
    only_noise = (1 - draws.t)[:, None, None, None] * draws.x0
    for b in range(6):
        for n in range(4):
            where = (b, slice(None), slice(4 * (n // 2), 4 * (n // 2) + 4), slice(4 * (n % 2), 4 * (n % 2) + 4))
            torch.testing.assert_close(x_t[where], (only_noise if drawn[b, n] else noisy)[where])


def test_only_masking_is_the_masked_autoencoder_and_leaves_the_other_samples_alone():
    x1, condition, draws = batch()
    masked = magd.token_mask(draws, 0.5, 0.4, 0.5)
    active = masked.any(dim=1)
    assert 0 < active.sum() < 6
    seen = []

    def autoencoder(x_t, t, condition, masked, token):                     # right about every image, and about no velocity
        seen.extend((x_t, t, masked))
        return x1
    loss, _ = magd.magd_loss(autoencoder, x1, condition, draws, 0.5, 0.4, 0.5, corruption="mask")
    assert (loss[active] == 0).all()                                       # Eq. 1: reconstruct x from M(x)
    torch.testing.assert_close(loss[~active], draws.x0[~active].square().mean(dim=(1, 2, 3)))
    assert seen[0][active].equal(x1[active]) and (seen[1][active] == 1).all() and seen[2].equal(masked)
    plain = magd.forward_process(x1, draws.x0, draws.t)
    assert seen[0][~active].equal(plain[~active]) and seen[1][~active].equal(draws.t[~active])


def test_masking_gives_the_mask_tokens_a_gradient():
    model, (x1, condition, draws), tokens = tiny_model(), batch(), magd.MaskTokens(32)
    loss, _ = magd.magd_loss(model, x1, condition, draws, 1.0, 0.0, 0.5, tokens)
    loss.mean().backward()
    used = tokens.pool.weight.grad.abs().sum(dim=1) > 0
    assert used.nonzero()[:, 0].tolist() == sorted((draws.u_pool * 1024).long().tolist())


def test_edit_weight_by_hand():
    x1 = torch.zeros(4, 1, 2, 2)
    source = torch.tensor([[0, 0, 0, 0.4], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0.2, 0, 2.0]]).view(4, 1, 2, 2)
    weight = magd.edit_weight(x1, source, torch.tensor([True] * 4)).view(4, 4)
    torch.testing.assert_close(weight, torch.tensor([
        [1, 1, 1, 10.0],              # m = 0.1, so 1/m = 10 where d = 0.4 > 0.3
        [0, 0, 0, 0],                 # alike: teaches nothing
        [1, 1, 1, 1],                 # m = 1 > 0.8: all different
        [1, 1, 1, 5.0]]), atol=1e-3, rtol=0)                               # m = 0.55, 1/m = 1.8 is raised to 5
    assert magd.edit_weight(x1, source, torch.tensor([False] * 4)).eq(1).all()
    assert magd.edit_weight(x1[:1], source[:1] / 40, torch.tensor([True])).max() == 1.0     # m = 0.0025, nothing above 0.3
    tiny = torch.zeros(1, 1, 20, 20)
    tiny[0, 0, 0, 0] = 0.5                                                 # m = 0.00125: 1/m = 800 is cut to 64
    assert magd.edit_weight(torch.zeros_like(tiny), tiny, torch.tensor([True])).max() == 64
    x1, condition, draws = batch()
    weight = torch.rand_like(x1)
    loss, _ = magd.magd_loss(lambda *_: x1 - draws.x0 + 1, x1, condition, draws, weight=weight)
    torch.testing.assert_close(loss, weight.mean(dim=(1, 2, 3)))


def test_the_mean_of_the_training_times():
    for mean in (0.0, -0.8):
        t = torch.cat([magd.draw((1, 1, 1), 1, [seed], mean).t for seed in range(4000)])
        logit = (t / (1 - t)).log()
        assert abs(logit.mean() - mean) < 4 / 4000**0.5 and abs(logit.std() - 1) < 0.05
