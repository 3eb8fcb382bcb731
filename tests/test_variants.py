"""What the experiments put in the place of the method's own parts."""
from collections import Counter

import pytest
import torch
from helpers import TINY, tiny_model

import data
import magd
from common.files import InputError
from data import Shapes, Words, make_condition
from experiments.variants import VARIANTS, Deeper, Registers, places, shuffled_words
from model import Config
from toy.oracle import judge
from toy.world import WORLDS, example, read_instruction, world_words

PLAN = ["the red circle top left vanishes", "keep the blue cross bottom right"]


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    for owner, name in ((data.Shapes, "sample"), (data, "make_prompt"), (data.Words, "pause"), (magd, "magd_loss")):
        monkeypatch.setattr(owner, name, getattr(owner, name))


def batch(n=4):
    words = Words(world_words())
    samples = [s for s in map(Shapes("shapes").sample, range(n))]
    images = [[data.to_tensor(s.images[0])] for s in samples]
    condition = make_condition(words, [data.make_prompt(words, s.instruction, 1) for s in samples], images, 4)
    x1 = torch.stack([data.to_tensor(s.target) for s in samples])
    return x1, condition, magd.draw((3, 16, 16), 16, range(n))


def test_finite_data_repeats_and_held_out_data_does_not():
    VARIANTS["finite-512"]()
    train = [Shapes("shapes").sample(k).target.tobytes() for k in range(1024)]
    assert Counter(train[:512]) == Counter(train[512:]) and train[:512] != train[512:]     # each epoch in another order
    held_out = Shapes("shapes", "iid")
    assert held_out.sample(0).instruction != held_out.sample(512).instruction


def test_a_wrong_plan_is_another_edits_plan():
    right = [Shapes("hard").sample(k).plan for k in range(60)]
    VARIANTS["wrong-plan"]()
    wrong = [Shapes("hard").sample(k).plan for k in range(60)]
    assert all(bool(a) == bool(b) and (a != b or not a) for a, b in zip(right, wrong))     # captions have none


def test_plans_say_less_in_as_many_words_or_only_where():
    shuffled = shuffled_words(PLAN)
    assert Counter(" ".join(shuffled).split()) == Counter(" ".join(PLAN).split()) and shuffled != PLAN
    assert [len(step.split()) for step in shuffled] == [len(step.split()) for step in PLAN]
    assert places(PLAN) == ["top left", "bottom right"]


def test_a_plan_can_stand_before_the_image():
    VARIANTS["plan-first"]()
    words = Words(world_words())
    assert data.make_prompt(words, "remove the red circle", 1, PLAN[:1]) == \
        "remove the red circle the red circle top left vanishes <pause> <img><|image_1|></img>"
    for text in ("", "a red circle", "<cfg>"):
        assert data.make_prompt(words, text, 0) == text


@pytest.mark.parametrize("name", ["two-plain", "mdt", "mc-dit"])
def test_two_passes_are_the_mean_of_two_losses(name):
    x1, condition, draws = batch()
    network, tokens = tiny_model(len(Words(world_words()))), magd.MaskTokens(32)
    one = magd.magd_loss
    VARIANTS[name]()
    losses, masked = magd.magd_loss(network, x1, condition, draws, 0.5, 0.7, 0.25, tokens, None, "velocity", "noise-mask")
    plain, _ = one(network, x1, condition, draws)
    other = draws._replace(x0=draws.x0.roll(1, 0), t=draws.t.roll(1, 0))
    p = {"two-plain": dict(p_magd=0.0), "mdt": dict(p_magd=1.0, tau=0.0, r_mask=0.3),
         "mc-dit": dict(p_magd=1.0, tau=0.0, r_mask=0.5, corruption="mask")}[name]
    second, expected = one(network, x1, condition, other, mask_tokens=tokens, **p)
    assert losses.equal((plain + second) / 2) and masked.equal(expected) and masked.any() == (name != "two-plain")
    with torch.no_grad():                                                          # as train.py validates
        assert magd.magd_loss(network, x1, condition, draws, prediction="velocity")[0].equal(plain)


def test_more_layers_begin_as_the_model_without_them():
    x1, condition, draws = batch()
    cfg = Config(vocab=len(Words(world_words())), **TINY)
    base = tiny_model(cfg.vocab)
    deeper = Deeper(cfg).init_weights()
    deeper.load_state_dict(base.state_dict())
    assert len(deeper.llm.layers) == len(base.llm.layers) + 3
    assert deeper(draws.x0, draws.t, condition).equal(base(draws.x0, draws.t, condition))


def test_registers_are_sampled_as_they_are_trained():
    x1, condition, draws = batch()
    cfg = Config(vocab=len(Words(world_words())), **TINY)
    network = Registers(cfg).init_weights()
    network.load_state_dict(tiny_model(cfg.vocab).state_dict())                  # without registers of its own
    with torch.no_grad():
        whole = network(draws.x0, draws.t, condition)
        assert (whole - network.denoise(draws.x0, draws.t, network.encode(condition, 16))).abs().max() < 1e-5
        network.registers.mul_(100)
        assert (whole - network(draws.x0, draws.t, condition)).abs().max() > 1e-3      # the target looks at them


def test_the_thing_beside_another_is_the_one_that_changes():
    world = WORLDS["refer"]
    for split in ("train", "iid", "novel"):
        for own in (example(world, split, 0, index) for index in range(40)):
            [edit] = read_instruction(own["instruction"])
            assert edit.beside and not edit.shape and " one " in own["instruction"]
            assert judge(world, own["images"][0], own["instruction"], own["target"])["exact"]
            assert not judge(world, own["images"][0], own["instruction"], own["images"][0])["exact"]


def test_an_instruction_that_fits_two_things_or_none_is_refused():
    source = example(world := WORLDS["refer"], "iid", 0, 0)["images"][0]
    with pytest.raises(InputError, match="0 things are"):
        judge(world, source, "remove the one above the purple triangle", source)
