import json

import numpy as np
import pytest
import torch
from PIL import Image

import data
from common.files import InputError
from common.images import open_image, open_mask
from common.rows import Rows
from data import Shapes, Words, make_batch, make_condition, make_prompt, tokenize, training_prompt
from model import PADDING, TEXT
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


@pytest.mark.parametrize("tag", ["<|image1|>", "<image_1>", "<img>", "<img>the cat</img>", "<|Image_1|>", "<| image_1 |>", "<image>", "<|image_1",
                                 "image_1|>", "<|img_1|>", "<IMG_1>", "< image 1 >", "<|image_one|>", "<|image_9999999|>", "</img>"])
def test_text_like_a_tag_is_an_error(tag):
    for text in (f"make {tag} blue", f"make {tag} like <img><|image_1|></img>"):
        with pytest.raises(InputError, match="looks like an image tag, but a tag is written"):
            make_prompt(Words([]), text, 1)


def test_text_unlike_a_tag_is_text():
    for text in ("make image 1 <b>blue</b>", "<imagine> it", "if x < 5, images of [image_1]", "<img> <|image_1|> </img>"):
        assert make_prompt(Words([]), text, 1).startswith(text)


def test_a_condition_with_bad_tags_is_refused_and_without_images_a_tag_is_text():
    words, image = Words(["put"]), torch.zeros(3, 4, 4)
    for prompt, message in (("put <|image_2|>", "names images"), ("put", "names none of its 1 images"), ("put <image_1>", "looks like")):
        with pytest.raises(InputError, match=message):
            make_condition(words, [prompt], [[image]], 4)
    words.encode = lambda text: [len(text)]
    assert tokenize(words, "no <|image_3|>", []) == ([14], [0], [])


def test_a_sample_whose_images_were_dropped_has_no_edit_to_weigh():
    dataset, words = Shapes("shapes"), Words(world_words())
    batch = make_batch(dataset, range(200), words, 4, 0, 1.0, 0.0, 0.0)            # every prompt is emptied
    kept = (batch.condition.kind == 1).any(dim=1)
    assert 60 < kept.sum() < 140 and batch.edit.equal(kept)


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


def test_gaps_are_even_and_change_nothing_else():
    dataset, words = Shapes("shapes"), Words(world_words())
    none, some = (make_batch(dataset, range(400), words, 4, 0, 0.1, 0.5, 0.5, max_gap) for max_gap in (0, 3))
    assert not none.condition.gap.any()
    assert all(70 < n < 130 for n in some.condition.gap.bincount().tolist()) and some.condition.gap.max() == 3
    assert some.seeds == none.seeds and some.condition.ids.equal(none.condition.ids) and some.x1.equal(none.x1)


def test_pauses_end_the_prompt_in_even_numbers_and_change_nothing_else():
    dataset, words = Shapes("shapes"), Words(world_words())
    none, some = (make_batch(dataset, range(400), words, 4, 0, 0.1, 0.0, 0.0, 3, most) for most in (0, 3))
    pause = (some.condition.ids == words.ids["<pause>"]) & (some.condition.kind == TEXT)
    number = pause.sum(dim=1)
    assert all(70 < n < 130 for n in number.bincount().tolist()) and number.max() == 3
    assert all(row[len(row) - n:].all() for row, n in zip(pause, number.tolist()))       # at the end
    for b, n in enumerate(number.tolist()):                     # what is before them is as it was
        with_pauses, without = (batch.condition.ids[b][batch.condition.kind[b] != PADDING] for batch in (some, none))
        assert with_pauses[:len(with_pauses) - n].equal(without)
    assert some.seeds == none.seeds and some.condition.gap.equal(none.condition.gap) and some.x1.equal(none.x1)


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


def test_the_first_picture_of_a_file_that_is_no_animation(tmp_path):
    for kind in ("TIFF", "MPO"):                           # pages; a phone's JPEG with a preview behind it
        Image.new("RGB", (8, 8), "blue").save(tmp_path / "a", kind, save_all=True, append_images=[Image.new("RGB", (4, 4), "red")])
        assert Image.open(tmp_path / "a").n_frames == 2 and open_image(tmp_path / "a").size == (8, 8)


@pytest.mark.parametrize("values, mode", [(np.linspace(0, 1, 16, dtype=np.float32), "F"), (np.arange(16, dtype=np.int32), "I"),
                                          (np.arange(70000, 70016, dtype=np.int32), "I"), (np.arange(16, dtype=np.uint16), "I;16")])
def test_gray_of_an_unknown_range_is_refused(tmp_path, values, mode):
    Image.fromarray(values.reshape(4, 4)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=f"a.tif: gray of the mode {mode} with values from {values[0]:g} to {values[-1]:g}; save it"):
        open_image(tmp_path / "a.tif")


def test_sixteen_bits_are_read_right_in_every_format(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 1 1 65535\n\x80\x00")
    for name in ("b.png", "c.tif", "d.jp2"):
        Image.fromarray(np.full((4, 4), 32768, np.uint16)).save(tmp_path / name)
    for path in tmp_path.iterdir():
        assert np.asarray(open_image(path)).mean() == 128, path
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "e.png")
    assert np.asarray(open_image(tmp_path / "e.png")).max() == 0           # black is black in any range


def test_masks_keep_what_they_mark_or_are_refused(tmp_path):
    image = Image.new("RGB", (128, 64))
    mask = np.zeros((64, 128), np.uint8)
    mask[0, 0] = 255
    Image.fromarray(mask).save(tmp_path / "a.png")
    assert np.argwhere(np.asarray(open_mask(tmp_path / "a.png", image))).tolist() == [[0, 0]]
    tiny = np.asarray(open_mask(tmp_path / "a.png", image.resize((8, 4))))
    assert np.argwhere(tiny).tolist() == [[0, 0]]                          # one pixel of 256 is not averaged away
    mask[:2, :2] = 255
    Image.fromarray(mask[::2, ::2]).save(tmp_path / "b.png")
    assert np.asarray(open_mask(tmp_path / "b.png", image)).sum() == 4 * 255
    Image.fromarray(mask[:, :64]).save(tmp_path / "c.png")
    with pytest.raises(InputError, match="a mask of 64 x 64 pixels for an image of 128 x 64"):
        open_mask(tmp_path / "c.png", image)
    for value in (0, 1, 127):
        Image.fromarray(mask // 255 * np.uint8(value)).save(tmp_path / "d.png")
        with pytest.raises(InputError, match=f"marks nothing: its brightest value is {value}, and white"):
            open_mask(tmp_path / "d.png", image)


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
    ('{"instruction": "<|image_2|>", "input_images": ["a.png"], "output_image": "a.png"}', "names images"),
    ('{"instruction": "x", "input_images": "a.png", "output_image": "a.png"}', "input_images should be a list"),
    ('{"instruction": "x", "input_images": "", "output_image": "a.png"}', "input_images should be a list"),
    ('{"instruction": "x", "input_images": false, "output_image": "a.png"}', "input_images should be a list"),
    ('{"instruction": "x", "input_images": [""], "output_image": "a.png"}', "the path of an image is empty"),
    ('{"instruction": "x", "output_image": ""}', "the path of an image is empty"),
    ('{"instruction": "x", "output_image": "a.png", "mask": ""}', "the path of an image is empty"),
    ('{"instruction": " ", "output_image": "a.png"}', "neither an instruction nor an image"),
    ('{"instruction": "x", "output_image": "a.png", "plan": ["see <|image_1|>"]}', "an image tag outside the instruction"),
    ('{"instruction": "x", "output_image": "a.png", "target_caption": "<image_1>"}', "looks like an image tag"),
    ('{"instruction": "x", "output_image": "a.png", "save_as": 3}', "save_as should be a str"),
    ('{"a": ' + "[" * 3000 + "]" * 3000 + "}", "nested too deeply"), ('{"a": ' + "9" * 5000 + "}", "not JSON"),
    ('{"instruction": "half \\ud83d", "output_image": "a.png"}', "half of a surrogate pair")])
def test_bad_rows_are_named_by_line(tmp_path, line, message):
    png(tmp_path / "a.png")
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"instruction": "x", "input_images": [], "output_image": "a.png"}\n\n' + line + "\n")
    with pytest.raises(InputError, match=message) as error:
        Rows(file)
    assert f"{file}:3:" in str(error.value)


def test_no_images_is_an_empty_list(tmp_path):
    png(tmp_path / "a.png")
    for inputs in ("", '"input_images": null, ', '"input_images": [], '):
        (tmp_path / "pairs.jsonl").write_text('{' + inputs + '"instruction": "x", "output_image": "a.png"}')
        [(_, row)] = Rows(tmp_path / "pairs.jsonl")
        assert row["input_images"] == []


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
