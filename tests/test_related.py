"""Masked diffusion on the toy (related/): what holds whatever the weights are."""
import argparse
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


def test_pixels_of_a_masked_patch_do_not_matter_and_visible_ones_do(model, monkeypatch):
    codes = torch.randint(model.mask, (1, N), generator=generator())
    masked = torch.arange(N)[None] >= 8
    shown, changed = (x.masked_fill(masked, model.mask) for x in (codes, (codes + 1) % model.mask))
    a, b = (model.logits(x, captions(1)) for x in (shown, changed))
    images = model.images

    def spoilt(codes):
        patches = related.tokens.patchify(images(codes), 4).masked_fill((codes == model.mask)[:, :, None], 7.0)
        return related.tokens.rearrange(patches, "b (h w) (c p q) -> b c (h p) (w q)", h=4, p=4, q=4)
    monkeypatch.setattr(model, "images", spoilt)
    assert model.logits(shown, captions(1)).equal(a) and not torch.allclose(a, b)


def test_the_cache_gives_the_same_probabilities(model):
    codes = torch.randint(model.mask + 1, (3, N), generator=generator())
    own = model.log_p(codes, model.encode(captions(3), N))
    torch.testing.assert_close(own, model.logits(codes, captions(3)).log_softmax(2))


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
        p = model.log_p(codes, cache).exp()
        drawn = draw(p, generator)
        for b in range(B):
            hidden = [i for i in range(N) if codes[b, i] == model.mask]
            left = min(len(hidden) - 1, int(N * math.cos(math.pi / 2 * step / steps)))
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


def test_as_many_steps_as_tokens_reveal_one_at_a_time(model):
    steps, _ = unmask(model, model.encode(captions(1), N), 1, generator(), N)
    assert [int((codes == model.mask).sum()) for codes in steps] == [*range(N - 1, -1, -1)]


class Stub:
    """A network whose probabilities are a function of codes -> (B, N, K)."""
    def __init__(self, p, K):
        self.p, self.mask = p, K

    def log_p(self, codes, cache):
        return self.p(codes).log()


def test_the_token_that_has_become_improbable_is_masked_again():
    def p(codes):                                    # code 0 everywhere, but once visible that of place 5 looks wrong
        p = torch.tensor([0.9, 0.1]).repeat(len(codes), N, 1)
        p[:, 5] = torch.where(codes[:, 5:6] == 2, torch.tensor([1.0, 0.0]), torch.tensor([0.1, 0.9]))
        return p
    steps, _ = unmask(Stub(p, 2), None, 1, generator(), 10, remask=(1, 1, 1))
    back = [(a != 2) & (b == 2) for a, b in itertools.pairwise(steps)]
    assert [some.nonzero()[:, 1].tolist() for some in back][3] == [5]


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


def test_punt_reveals_at_once_what_is_independent_and_no_two_that_are_equal():
    def p(codes):                                    # places 2 i and 2 i + 1 have the same code, all else is free
        other = codes.view(-1, N // 2, 2).flip(2).view(-1, N)
        known = torch.nn.functional.one_hot(other.clamp(max=3), 4) * 0.9997 + 0.000075
        return torch.where((other == 4)[:, :, None], torch.tensor(0.25), known)
    steps, forwards = punt(Stub(p, 4), None, 64, generator(), 0.1)
    pairs = steps[-1].view(64, N // 2, 2)
    assert (pairs[:, :, 0] == pairs[:, :, 1]).float().mean() > 0.99
    assert forwards.tolist() == 64 * [(1 + 4) + (1 + 3)]


def test_the_gradient_of_dimo_is_zero_when_auxiliary_and_teacher_agree(model):
    z = torch.randn(2, N, 7, requires_grad=True)
    p, q = torch.randn(2, 2, N, 7).softmax(dim=3)
    distillation(z, p, q).sum().backward()
    torch.testing.assert_close(z.grad, p - q)
    student = MaskedTransformer(model.cfg)
    student.load_state_dict(model.state_dict())
    dimo_loss(student, model, model, torch.zeros(3, N), captions(3), generator()).backward()
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())


def test_dimo_goes_to_where_the_teacher_is():
    class Constant:
        mask = 3

        def __init__(self, z):
            self.z = torch.tensor(z).repeat(8, N, 1).requires_grad_()

        def logits(self, shown, condition):
            return self.z
    student, auxiliary, teacher = Constant([0.0, 0.0, 0.0]), Constant([0.0, 0.0, 0.0]), Constant([2.0, 0.0, 0.0])
    dimo_loss(student, auxiliary, teacher, torch.zeros(8, N), None, generator()).backward()
    grad = student.z.grad.flatten(0, 1)
    assert (grad[:, 0] <= 0).all() and grad[:, 0].any() and (grad[:, 1:] >= 0).all()
    assert not grad.any(dim=1).all()                                 # what is not masked again has none


def test_a_run_goes_on_and_its_average_is_loaded(tmp_path, monkeypatch):
    arm = dict(loss=related.tokens.teacher_loss, steps=2, images=4, captions=0.5, muon_lr=1e-2, rates=(1e-3, 1e-2))
    monkeypatch.setitem(related.masked.ARMS, "teacher", arm)
    monkeypatch.setattr(related.masked, "learning_rate", lambda *_, **more: 1.0)
    with pytest.raises(InputError, match="0 of 2 steps.*train teacher"):
        call(related.masked, "compare", "samplers", "--out", tmp_path / "a")
    call(related.masked, "train", "teacher", "--out", tmp_path / "a")
    arm["steps"] = 1
    call(related.masked, "train", "teacher", "--out", tmp_path / "b")
    arm["steps"] = 2
    call(related.masked, "train", "teacher", "--out", tmp_path / "b")
    a, b = (torch.load(tmp_path / f"{name}/teacher/0/last.pt", weights_only=True) for name in "ab")
    own = related.masked.load("teacher", argparse.Namespace(out=tmp_path / "a", seed=0)).state_dict()
    assert a["step"] == b["step"] == 2
    for name, value in own.items():
        assert a["model"][name].equal(b["model"][name])
        assert value.equal(a["ema"].get(name, a["model"][name])) and value.equal(b["ema"].get(name, value))
    assert not own["mask_token"].equal(a["model"]["mask_token"])     # the average is not the last
