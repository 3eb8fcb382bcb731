import random

import numpy as np
import pytest

from common.files import InputError
from data import Shapes
from toy.oracle import carried_out, judge, kept, parse, shows
from toy.world import WORLDS, Edit, Scene, Thing, random_scene, render


def same(a, b):
    return a[:3] == b[:3] and sorted(a.things) == sorted(b.things)


@pytest.mark.parametrize("name, n", [("shapes", 2000), ("shapes64", 150)])
def test_a_drawn_scene_is_read_back_with_and_without_noise(name, n):
    world = WORLDS[name]
    for k in range(n):
        rng = random.Random(k)
        scene = random_scene(world, rng, rng.randint(1, world.objects))
        image = render(world, scene)
        read, error = parse(world, image)
        assert same(read, scene) and error.max() < 0.06
        noisy = image / 255 + np.random.default_rng(k).normal(0, 0.05, image.shape)
        assert same(parse(world, noisy)[0], scene)


@pytest.mark.slow
def test_two_thousand_large_scenes_are_read_back():
    test_a_drawn_scene_is_read_back_with_and_without_noise("shapes64", 2000)


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("split", ["iid", "novel"])
def test_the_two_ends_of_the_scale(name, split):
    """The target is exact; the source, unedited, is faithful and carries nothing out."""
    dataset = Shapes(name, split)
    for index in range(60):
        sample = dataset.sample(index)
        source = sample.images[0] if sample.images else None
        assert judge(dataset.world, source, sample.instruction, sample.target) == {"exact": True, "adherence": 1, "faithfulness": 1}
        if sample.images:
            assert judge(dataset.world, source, sample.instruction, source) == {"exact": False, "adherence": 0, "faithfulness": 1}


TOY = WORLDS["shapes"]
RED, BLUE = Thing("circle", "red", (0, 0), 6, 0, 0), Thing("square", "blue", (1, 1), 7, 1, 0)
BEFORE = Scene("white", "day", "filled", (RED, BLUE))


def score(instruction, *things, background="white", spoil=None):
    """Scores of the scene with these things, out of 5 facts to keep: the background and four cells."""
    image = render(TOY, Scene(background, "day", "filled", things))
    if spoil:
        rows, columns = (slice(8 * k, 8 * k + 8) for k in spoil)
        image[rows, columns] = np.random.default_rng(0).integers(0, 255, (8, 8, 3))
    scores = judge(TOY, render(TOY, BEFORE), instruction, image)
    return scores["adherence"], scores["faithfulness"]


@pytest.mark.parametrize("instruction, things, expected", [
    ("make the red circle green", (RED._replace(color="green"), BLUE), (1, 1)),
    ("make the red circle green", (RED._replace(color="green", x=1), BLUE), (1, 1)),           # a pixel is forgiven ...
    ("make the red circle green", (RED._replace(color="green", x=2), BLUE), (1, 0.8)),         # ... two are not,
    ("make the red circle green", (RED._replace(color="green"), BLUE._replace(y=0)), (1, 0.8)),    # nor one elsewhere
    ("make the red circle green", (RED._replace(color="yellow"), BLUE), (0, 1)),
    ("make the red circle green", (RED._replace(color="green"), BLUE._replace(color="green")), (1, 0.8)),
    ("make the red circle green", (BLUE,), (0, 0.8)),
    ("make the red circle a triangle", (RED._replace(shape="triangle"), BLUE), (1, 1)),
    ("make the red circle a triangle", (RED._replace(shape="triangle", color="cyan"), BLUE), (0, 0.8)),
    ("remove the red circle", (BLUE,), (1, 1)),
    ("remove the red circle", (), (1, 0.8)),                                                    # too much
    ("remove the red circle", (RED._replace(cell=(0, 1)), BLUE), (0, 0.8)),                     # only moved away
    ("add a red square top right", (RED, BLUE, Thing("square", "red", (0, 1), 6, 2, 2)), (1, 1)),
    ("add a red square top right", (RED, BLUE, Thing("square", "red", (1, 0), 6, 2, 2)), (0, 1)),
    ("add a red square", (RED, BLUE, Thing("square", "red", (1, 0), 6, 2, 2)), (1, 1)),
    ("add a red square", (RED, Thing("square", "red", (1, 1), 6, 2, 2)), (0, 0.8)),             # in place of the blue one
    ("add a red square", (RED, BLUE, Thing("square", "red", (1, 0), 6, 2, 2), Thing("star", "red", (0, 1), 6, 0, 0)), (1, 0.8)),
    ("make the red circle green and remove the blue square", (RED._replace(color="green"), BLUE), (0.5, 1)),
    ("remove the red circle and add a cyan cross top left", (Thing("cross", "cyan", (0, 0), 7, 0, 0), BLUE), (1, 1)),    # in its place
    ("remove the red circle and add a cyan cross top right", (Thing("cross", "cyan", (0, 0), 7, 0, 0), BLUE), (0.5, 1)),
    ("remove the red circle and add a cyan cross top left", (Thing("cross", "blue", (0, 0), 7, 0, 0), BLUE), (0, 0.8))])
def test_scores_by_hand(instruction, things, expected):
    things = tuple(t._replace(shape="cross") if t.shape == "star" else t for t in things)    # the small world has no star
    assert score(instruction, *things) == pytest.approx(expected)


def test_the_background_by_hand():
    assert score("change the background to black", RED, BLUE, background="black") == (1, 1)
    assert score("change the background to black", RED, BLUE, background="gray") == (0, 1)
    assert score("remove the red circle", BLUE, background="gray") == (1, 0.8)


def test_what_cannot_be_read_counts_for_nothing():
    assert score("remove the red circle", BLUE, spoil=(0, 0)) == (0, 0.8)
    assert score("remove the red circle", BLUE, spoil=(0, 1)) == (1, 0.8)


def test_global_edits_by_hand():
    world, readable = WORLDS["shapes64"], np.ones((4, 4), bool)
    edits = [Edit("global", value="night")]
    assert carried_out(world, edits[0], BEFORE, BEFORE._replace(light="night"), readable)
    assert kept(world, edits, BEFORE, BEFORE._replace(light="night"), readable) == 1
    assert kept(world, edits, BEFORE, BEFORE._replace(light="night", style="striped"), readable) == pytest.approx(17 / 18)


@pytest.mark.parametrize("caption, yes", [
    ("a circle", True), ("a star", False), ("a circle and a square", True), ("a circle and a star", False), ("one circle", False),
    ("a red circle", True), ("a blue circle", False), ("a circle left of a square", True), ("a circle above a square", True),
    ("a square left of a circle", False), ("a red circle and a blue square", True), ("a blue circle and a red square", False)])
def test_the_six_kinds_of_caption(caption, yes):
    assert shows(caption, BEFORE, np.ones((2, 2), bool)) == yes


def test_counting():
    stars = [Thing("star", color, (0, k), 10, 0, 0) for k, color in enumerate(("red", "blue", "cyan"))]
    scenes = {n: Scene("white", "day", "filled", tuple(stars[:n])) for n in (1, 2, 3)}
    everything = np.ones((4, 4), bool)
    assert shows("two stars", scenes[2], everything) and not shows("two stars", scenes[3], everything)
    assert shows("one star", scenes[1], everything) and not shows("two stars", scenes[1], everything)
    hidden = everything.copy()
    hidden[0, 2] = False
    assert shows("two stars", scenes[3], hidden)


def test_what_the_oracle_cannot_judge_is_said():
    source = render(TOY, BEFORE)
    with pytest.raises(InputError, match="has no green circle: it shows red circle, blue square"):
        judge(TOY, source, "make the green circle red", source)
    with pytest.raises(InputError, match="does not know the instruction"):
        judge(TOY, source, "paint a masterpiece", source)



def test_an_image_of_another_size_is_named():
    with pytest.raises(InputError, match="an image of 32 x 16 pixels cannot be read: this toy world has 16 x 16"):
        parse(WORLDS["shapes"], np.zeros((16, 32, 3), np.uint8))
