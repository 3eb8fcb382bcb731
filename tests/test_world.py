import itertools

import pytest

from data import Shapes, Words
from toy.oracle import parse
from toy.world import (BACKGROUNDS, CAPTIONS, COLORS, CORNERS, EDITS, LIGHTS, RELATIONS, SHAPES, STYLES, WORLDS, Edit,
                       combinations, example, held_out, phrase, read_instruction, related, world_words)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("split", ["train", "iid", "novel"])
def test_a_sample_is_a_pure_function_of_seed_and_index(world, split):
    a, b = Shapes(world, split, 3), Shapes(world, split, 3)
    b.sample(0)                                                            # what was drawn before does not matter
    for index in (5, 2):
        one, two = a.sample(index), b.sample(index)
        assert one.instruction == two.instruction and (one.target == two.target).all()
    other = [Shapes(world, split, 4).sample(5), Shapes(world, "iid" if split != "iid" else "train", 3).sample(5), a.sample(6)]
    assert not any(s.instruction == a.sample(5).instruction and (s.target == a.sample(5).target).all() for s in other)


@pytest.mark.parametrize("world", WORLDS)
def test_instructions_are_read_back_and_all_words_are_known(world):
    words = Words(world_words())
    tasks, complexities = set(), set()
    for index in range(400):
        sample = Shapes(world).sample(index)
        for text in [sample.instruction, sample.source_caption, sample.target_caption, *sample.plan]:
            words.encode(text)
        assert len(sample.plan) <= 5
        if sample.images:
            edits = read_instruction(sample.instruction)
            assert " and ".join(map(phrase, edits)) == sample.instruction
            assert len(edits) == sample.complexity
            assert ((sample.images[0] != sample.target).any(axis=2) == sample.mask).all() and sample.mask.any()
            tasks |= {edit.task for edit in edits}
            complexities.add(len(edits))
        else:
            tasks.add(sample.task)
    own = WORLDS[world]
    assert tasks == {*own.edits, *(CAPTIONS if own.captions else ())} and complexities == set(range(1, own.complexity + 1))


def test_novel_samples_show_what_training_never_does():
    def shown(split, index):
        sample = Shapes("shapes", split).sample(index)
        edits = read_instruction(sample.instruction)
        if edits[0].task == "background":                                  # then everything in the scene counts
            things = parse(WORLDS["shapes"], sample.images[0])[0]
            return list(combinations(edits, things))
        return list(combinations(edits, None))
    for index in range(200):
        assert not any(held_out(*c) for c in shown("train", index))
        assert any(held_out(*c) for c in shown("novel", index))
    for task in EDITS:                                                     # no shape and no colour is missing from training
        free = [(s, c) for s in SHAPES for c in COLORS if not held_out(task, s, c)]
        assert {s for s, _ in free} == set(SHAPES) and {c for _, c in free} == set(COLORS)


def test_related():
    assert related((0, 0), "left of", (0, 2)) and not related((0, 2), "left of", (0, 0))
    assert related((0, 1), "above", (2, 1)) and related((2, 1), "below", (0, 1)) and related((1, 3), "right of", (1, 0))
    assert not related((0, 0), "left of", (3, 1))                          # mostly above


def test_only_training_has_extra_scenes_in_one_colour():
    def share(split):
        scenes = [parse(WORLDS["shapes"], Shapes("shapes", split).sample(k).images[0])[0].things for k in range(300)]
        several = [{thing.color for thing in things} for things in scenes if len(things) > 1]
        return sum(len(colors) == 1 for colors in several) / len(several)
    assert 0.25 < share("train") < 0.5 and share("iid") < 0.2



def every_edit():
    names = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
    places = ["", *CORNERS, *itertools.product(RELATIONS, names)]
    for shape, color in itertools.product(SHAPES, COLORS):
        yield Edit("remove", shape, color)
        yield from (Edit("add", shape, color, where=place) for place in places)
        yield from (Edit("color", shape, color, value) for value in COLORS)
        yield from (Edit("local", shape, color, value) for value in SHAPES)
    for task, values in [("background", BACKGROUNDS), ("global", LIGHTS), ("style", STYLES)]:
        yield from (Edit(task, value=value) for value in values)


def test_reading_is_the_inverse_of_phrasing_for_every_edit():
    edits = list(every_edit())
    assert len({phrase(edit) for edit in edits}) == len(edits)
    assert all(read_instruction(phrase(edit)) == [edit] for edit in edits)


@pytest.mark.parametrize("text", [
    "", "and", "remove the circle", "remove the red circle and", "remove  the red circle", "add a red circle top",
    "add a red circle left of the blue", "make it filled", "redraw it day", "make the red circle a blue",
    "change the background to red", "please remove the red circle", "remove the red circle now"])
def test_what_is_no_instruction_of_the_world_is_not_read(text):
    assert read_instruction(text) is None


@pytest.mark.parametrize("name, index, instruction", [
    ("shapes", 0, "make the yellow cross a circle"), ("simple", 1, "a green circle"),
    ("hard", 0, "make the yellow cross a circle and add a cyan cross bottom right and add a green circle top left")])
def test_the_stream_is_the_one_that_the_results_were_made_with(name, index, instruction):
    assert example(WORLDS[name], "train", 0, index)["instruction"] == instruction
