import json

import numpy as np
import pytest
import torch
from PIL import Image

import data
import metrics
from data import (EDITS, WORLDS, Shapes, Words, combinations, held_out, make_batch, make_condition, make_prompt,
                  open_image, phrase, read_instruction, read_rows, related, tokenize, training_prompt, world_words)
from model import PADDING, InputError


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
    assert tasks == {*own.edits, *(data.CAPTIONS if own.captions else ())} and complexities == set(range(1, own.complexity + 1))


def test_novel_samples_show_what_training_never_does():
    def shown(split, index):
        sample = Shapes("shapes", split).sample(index)
        edits = read_instruction(sample.instruction)
        if edits[0].task == "background":                                  # then everything in the scene counts
            from metrics import parse
            things = parse(WORLDS["shapes"], sample.images[0])[0]
            return list(combinations(edits, things))
        return list(combinations(edits, None))
    for index in range(200):
        assert not any(held_out(*c) for c in shown("train", index))
        assert any(held_out(*c) for c in shown("novel", index))
    for task in EDITS:                                                     # no shape and no colour is missing from training
        free = [(s, c) for s in data.SHAPES for c in data.COLORS if not held_out(task, s, c)]
        assert {s for s, _ in free} == set(data.SHAPES) and {c for _, c in free} == set(data.COLORS)


def test_related():
    assert related((0, 0), "left of", (0, 2)) and not related((0, 2), "left of", (0, 0))
    assert related((0, 1), "above", (2, 1)) and related((2, 1), "below", (0, 1)) and related((1, 3), "right of", (1, 0))
    assert not related((0, 0), "left of", (3, 1))                          # mostly above


def test_an_unknown_word_is_named_with_its_neighbours():
    with pytest.raises(InputError, match="unknown word 'circel'.*circle"):
        Words(world_words()).encode("make the red circel blue")


def test_images_stand_where_their_tags_are():
    words = Words(["put", "on"])
    ids, kind, order = tokenize(words, "put <img><|image_2|></img> on <img><|image_1|></img> <|image_2|>", [2, 3])
    assert order == [1, 0, 1]
    assert kind == [0, 0, 1, 1, 1, 0, 0, 0, 2, 2, 0, 3, 3, 3]
    assert [i for i, k in zip(ids, kind) if k == 0] == words.encode("put <img> </img> on <img> </img>")
    images = [torch.full((3, 4, 8), 1.0), torch.full((3, 4, 12), 2.0)]
    condition = make_condition(words, ["put", "put <|image_2|> on <|image_1|>", "put <|image_1|>"], [[], images, images[:1]], 4)
    assert [stack[:, 0, 0, 0].tolist() for stack in condition.images] == [[2.0], [1.0, 1.0]]          # neighbours of one shape
    assert condition.kind.tolist() == [[PADDING] * 6 + [0], [0, 1, 1, 1, 0, 2, 2], [PADDING] * 4 + [0, 1, 1]]


@pytest.mark.parametrize("text, n", [("swap <|image_1|> and <|image_3|>", 3), ("look at <|image_1|>", 2), ("look at <|image_1|>", 0)])
def test_tags_and_images_have_to_fit(text, n):
    with pytest.raises(InputError, match="names images"):
        make_prompt(Words([]), text, n)


def test_plans_and_pauses():
    words = Words([])
    assert make_prompt(words, "do it", 1) == "do it <img><|image_1|></img>"
    assert make_prompt(words, "do it", 0, plan=["a b", "c"]) == "do it a b <pause> c <pause>"          # Eq. 7
    assert make_prompt(words, "do it", 0, pauses=3) == "do it <pause><pause><pause>"                   # Eq. 8
    assert make_prompt(words, "do it", 0, pauses=0) == "do it"


def test_shares_of_emptied_prompts_plans_and_masked_sources():
    import random
    words, sample, n = Words(world_words()), Shapes("shapes").sample(0), 4000
    count = {"nothing": 0, "image": 0, "plan": 0, "masked": 0}
    for k in range(n):
        prompt, images = training_prompt(words, sample, random.Random(k), 0.1, 0.5, 0.5)
        count["nothing"] += prompt == "<cfg>" and not images
        count["image"] += prompt == "<img><|image_1|></img>" and len(images) == 1
        count["plan"] += "<pause>" in prompt
        if len(images) == 2:
            count["masked"] += 1
            hidden = images[1][:, torch.from_numpy(sample.mask)]
            assert (hidden - 0.5 / 127.5).abs().max() < 1e-6 and images[1][:, torch.from_numpy(~sample.mask)].equal(
                images[0][:, torch.from_numpy(~sample.mask)])
    for key, share in {"nothing": 0.05, "image": 0.05, "plan": 0.45, "masked": 0.45}.items():
        assert count[key] / n == pytest.approx(share, abs=4 * (share * (1 - share) / n) ** 0.5), key


def test_a_batch_does_not_depend_on_who_else_is_in_it():
    dataset, words = Shapes("shapes"), Words(world_words())
    whole = make_batch(dataset, range(4, 8), words, 4, 0, 0.1, 0.5, 0.5)
    half = make_batch(dataset, range(5, 8, 2), words, 4, 0, 0.1, 0.5, 0.5)
    assert half.x1.equal(whole.x1[1::2]) and half.seeds == whole.seeds[1::2]
    assert half.source.equal(whole.source[1::2])


# ------------------------------------------------------------------------------------------- files

def png(path, size=(8, 6), mode="RGB", color=None):
    Image.new(mode, size, color or 0).save(path)
    return path


def test_every_common_kind_of_image_is_read_as_upright_rgb(tmp_path):
    transparent = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    transparent.save(tmp_path / "a.png")
    assert np.asarray(open_image(tmp_path / "a.png")).min() == 255         # fully transparent red is white
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "b.jpg")
    assert np.asarray(open_image(tmp_path / "b.jpg"))[0, 0].tolist()[0] > 200
    Image.fromarray(np.full((4, 4), 32768, np.uint16)).save(tmp_path / "c.png")
    assert np.asarray(open_image(tmp_path / "c.png"))[0, 0].tolist() == [128] * 3
    turned = Image.new("RGB", (8, 4), "white")
    exif = turned.getexif()
    exif[0x0112] = 6                                                       # the camera was held upright
    turned.save(tmp_path / "d.jpg", exif=exif)
    assert open_image(tmp_path / "d.jpg").size == (4, 8)
    Image.new("P", (4, 4)).save(tmp_path / "e.png")
    assert open_image(tmp_path / "e.png").mode == "RGB"


def test_bad_images_are_named(tmp_path):
    (tmp_path / "text.png").write_text("this is no picture")
    whole = png(tmp_path / "whole.png", (64, 64)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:len(whole) // 2])
    Image.new("RGB", (4, 4)).save(tmp_path / "film.gif", save_all=True, append_images=[Image.new("RGB", (4, 4), "red")])
    png(tmp_path / "huge.png", (10000, 10000), "1")
    for name, message in [("text.png", "not an image"), ("cut.png", "not an image"), ("none.png", "no such image"),
                          ("film.gif", "animation of 2 frames"), ("huge.png", "10000 x 10000 pixels are too many")]:
        with pytest.raises(InputError, match=message) as error:
            open_image(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("line, message", [
    ("{not json", "not JSON"), ("[1]", "a row is a JSON object"), ('{"instruction": "x", "input_images": []}', "'output_image' is missing"),
    ('{"instruction": 3, "input_images": [], "output_image": "a.png"}', "instruction should be a str"),
    ('{"instruction": null, "input_images": [], "output_image": "a.png"}', "instruction should be a str"),
    ('{"instruction": "x", "input_images": [], "output_image": null}', "output_image is null"),
    ('{"instruction": "x", "input_images": [3], "output_image": "a.png"}', "list of strings"),
    ('{"instruction": "<|image_2|>", "input_images": ["a.png"], "output_image": "a.png"}', "names images")])
def test_bad_rows_are_named_by_line(tmp_path, line, message):
    png(tmp_path / "a.png")
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"instruction": "x", "input_images": [], "output_image": "a.png"}\n\n' + line + "\n")
    with pytest.raises(InputError, match=message) as error:
        read_rows(file)
    assert f"{file}:3:" in str(error.value)


def test_rows_are_shuffled_anew_each_epoch_and_each_is_shown_once(tmp_path):
    rows = []
    for k in range(5):
        png(tmp_path / f"{k}.png", color=(40 * k, 0, 0))
        rows.append(json.dumps({"instruction": f"n{k}", "input_images": [], "output_image": f"{k}.png"}))
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    pairs = data.Pairs(tmp_path / "pairs.jsonl", 4)
    epochs = [[pairs.sample(5 * e + k).instruction for k in range(5)] for e in range(3)]
    assert all(sorted(epoch) == [f"n{k}" for k in range(5)] for epoch in epochs) and len(set(map(tuple, epochs))) > 1
    assert pairs.words == [f"n{k}" for k in range(5)]


def test_only_training_has_extra_scenes_in_one_colour():
    def share(split):
        scenes = [metrics.parse(WORLDS["shapes"], Shapes("shapes", split).sample(k).images[0])[0].things for k in range(300)]
        several = [{thing.color for thing in things} for things in scenes if len(things) > 1]
        return sum(len(colors) == 1 for colors in several) / len(several)
    assert 0.25 < share("train") < 0.5 and share("iid") < 0.2
