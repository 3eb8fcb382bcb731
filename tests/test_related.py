"""Masked diffusion on the toy (related/): what holds whatever the weights are."""
import itertools
import math

import pytest
import torch
from helpers import TINY, call

import related.masked
import related.tokens
from common.files import InputError
from data import make_condition, to_tensor
from model import Config
from related.masked import WORDS, is_exact
from related.tokens import (N, MaskedTransformer, Scenes, bound, dimo_loss, distillation, draw, draw_order,
                            held_out, order_log_prob, order_loss, punt, quantise, unmask)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    model = MaskedTransformer(Config(**{**TINY, "vocab": len(WORDS)})).init_weights()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    model.log_w.zero_()
    return model.requires_grad_(False)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def captions(n):
    return make_condition(WORDS, ["a red circle", "two squares", "a cross above a circle"][:n], [[]] * n, 4)


def test_nothing_is_lost_in_the_codes_of_500_scenes(model):
    samples = [Scenes("iid", 0, 0.5).sample(k) for k in range(500)]
    x = torch.stack([to_tensor(sample.target) for sample in samples])
    images = model.images(quantise(x))
    assert images.equal(x)
    assert all(is_exact(sample, image) for sample, image in zip(samples, images))


def test_an_image_that_is_no_drawing_is_refused():
    with pytest.raises(InputError, match="not in the codebook"):
        quantise(torch.rand(1, 3, 16, 16))


def test_held_out_sets():
    assert not any(sample.images for sample in held_out("captions", 0, 20))
    assert {sample.instruction.count(" ") for sample in held_out("choice", 0, 20)} == {3}       # add a COLOR SHAPE
    assert {sample.task for sample in held_out("edits", 0, 40)} == {"add", "remove", "color", "local", "background"}


def test_codes_behind_a_mask_do_not_matter_and_visible_ones_do(model):
    codes = torch.randint(model.mask, (1, N), generator=generator())
    masked = torch.arange(N)[None] >= 8
    other = codes.where(~masked, (codes + 1) % model.mask)
    changed = codes.where(masked, (codes + 1) % model.mask)
    a, b, c = (model.logits(x.masked_fill(masked, model.mask), captions(1)) for x in (codes, other, changed))
    assert a.equal(b) and not torch.allclose(a, c)


def test_the_cache_gives_the_same_probabilities(model):
    codes = torch.randint(model.mask + 1, (3, N), generator=generator())
    torch.testing.assert_close(model.step(codes, model.encode(captions(3), N)), model.logits(codes, captions(3)).log_softmax(2))


def test_with_equal_schedules_the_objective_is_the_plain_one():
    ce, masked = torch.rand(64, N), draw_order(64, torch.zeros(N), generator()) >= torch.arange(64)[:, None] % N
    plain = N * (ce * masked).sum(dim=1) / masked.sum(dim=1)
    for log_w in (0.0, -1.0, 2.0):
        torch.testing.assert_close(bound(ce, masked, torch.full((N,), log_w)), plain)


def test_the_three_forms_of_the_objective_agree():
    """Integral over time, sum along random orders, and `bound` at a random place of one; 2511.19152."""
    log_w = torch.tensor([0.0, 1.0, -0.5])
    w = log_w.exp()
    masks = torch.tensor(list(itertools.product([False, True], repeat=3))[1:])              # (7, 3) not the empty one
    ce = torch.rand(7, 3)
    s = (torch.arange(100000) + 0.5)[:, None] / 100000
    p = torch.stack([torch.where(mask, s**w, 1 - s**w).prod(dim=1) for mask in masks])      # (7, times)
    integral = (p[:, :, None] * masks[:, None] * w / s * ce[:, None]).sum(dim=(0, 2)).mean()
    orders = torch.tensor(list(itertools.permutations(range(3))))
    whole = order_log_prob(orders.argsort(dim=1), torch.full((6,), 3), log_w).exp()
    along = places = 0
    for order, rank, share in zip(orders, orders.argsort(dim=1), whole):
        for k in range(3):
            row = (masks == (rank >= k)).all(dim=1).nonzero().item()
            along += share * ce[row, order[k]]
            places += share * bound(ce[row:row + 1], masks[row:row + 1], log_w)[0] / 3
    assert whole.sum().item() == pytest.approx(1)
    assert along.item() == pytest.approx(integral.item(), rel=1e-3)
    assert places.item() == pytest.approx(integral.item(), rel=1e-3)


def test_drawn_orders_have_their_probability():
    log_w = torch.tensor([1.0, 0.0, -1.0])
    rank = draw_order(20000, log_w, generator())
    for first in range(3):
        assert (rank[:, first] == 0).float().mean().item() == pytest.approx(log_w.softmax(0)[first].item(), abs=0.015)


def test_the_position_that_tells_the_others_is_learned_to_come_first():
    class Teller:
        mask = 5
        log_w = torch.zeros(N, requires_grad=True)

        def logits(self, shown, condition):               # certain once position 3 is visible; the first guess costs log 5
            return 9.0 * torch.nn.functional.one_hot(torch.zeros_like(shown), 5) * (shown[:, 3:4, None] != 5)

    teller = Teller()
    order_loss(teller, torch.zeros(4096, N, dtype=torch.long), None, generator()).backward()
    assert teller.log_w.grad.argmin() == 3 and teller.log_w.grad[3] < 0


def maskgit(model, cache, B, generator, steps):
    """MaskGIT, as short as it gets."""
    codes = torch.full((B, N), model.mask)
    for step in range(1, steps + 1):
        p = model.step(codes, cache).exp()
        drawn = draw(p, generator)
        left = int(N * math.cos(math.pi / 2 * step / steps)) if step < steps else 0
        for b in range(B):
            hidden = [i for i in range(N) if codes[b, i] == model.mask]
            hidden.sort(key=lambda i: -p[b, i, drawn[b, i]].item())
            for i in hidden[:len(hidden) - left]:
                codes[b, i] = drawn[b, i]
    return codes


@pytest.mark.parametrize("steps", [1, 3, 8, 16])
def test_without_remasking_free_correction_is_the_plain_sampler_bit_for_bit(model, steps):
    cache = model.encode(captions(3), N)
    plain = maskgit(model, cache, 3, generator(), steps)
    own, forwards = unmask(model, cache, 3, generator(), steps, remask=(0, 0, 0))
    assert own[-1].equal(plain) and forwards.tolist() == 3 * [steps]


def test_free_correction_reveals_as_many_tokens_as_the_plain_sampler_and_changes_some(model):
    cache = model.encode(captions(3), N)
    plain, corrected = (unmask(model, cache, 3, generator(), 10, remask=remask)[0] for remask in ((0, 0, 0), (2, 1, 1)))
    for a, b in zip(plain, corrected):
        assert (a == model.mask).sum(dim=1).equal((b == model.mask).sum(dim=1))
    back = [(a != model.mask) & (b == model.mask) for a, b in itertools.pairwise(corrected)]
    assert [int(some.sum()) for some in back] == [0, 0, 0, 6, 6, 3, 3, 3, 0]       # steps 5 to 9 of 3 images


def test_punt_reveals_one_token_at_a_time_or_all(model):
    cache = model.encode(captions(3), N)
    for eps, rounds in ((0.0, range(N, 0, -1)), (math.inf, [N])):
        steps, forwards = punt(model, cache, 3, generator(), eps)
        assert (steps[-1] < model.mask).all()
        assert forwards.tolist() == [sum(1 + math.ceil(math.log2(n)) for n in rounds)] * 3


def test_the_gradient_of_dimo_is_zero_when_auxiliary_and_teacher_agree(model):
    z = torch.randn(2, N, 7, requires_grad=True)
    p, q = torch.randn(2, 2, N, 7).softmax(dim=3)
    distillation(z, p, q).sum().backward()
    torch.testing.assert_close(z.grad, p - q)
    student = MaskedTransformer(model.cfg)
    student.load_state_dict(model.state_dict())
    dimo_loss(student, model, model, torch.zeros(3, N), captions(3), generator()).backward()
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())


def test_a_run_goes_on_and_what_is_missing_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(related.masked.ARMS, "teacher", dict(loss=related.tokens.teacher_loss, steps=2, images=4, times=1, captions=0.5, muon_lr=1e-2, rates=(1e-3, 1e-2)))
    with pytest.raises(InputError, match="0 of 2 steps.*train teacher"):
        call(related.masked, "compare", "samplers", "--out", tmp_path)
    call(related.masked, "train", "teacher", "--out", tmp_path)
    first = torch.load(tmp_path / "teacher/0/last.pt", weights_only=True)
    assert first["step"] == 2
    call(related.masked, "train", "teacher", "--out", tmp_path)                    # it has ended: nothing changes
    assert torch.load(tmp_path / "teacher/0/last.pt", weights_only=True)["ema"].keys() == first["ema"].keys()
