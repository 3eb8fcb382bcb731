import json

import numpy as np
import pytest
import torch
from PIL import Image

import data
from common.files import InputError
from common.images import open_image
from data import Shapes, Words, make_batch, make_condition, make_prompt, read_rows, tokenize, training_prompt
from model import PADDING
from toy.world import world_words


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
