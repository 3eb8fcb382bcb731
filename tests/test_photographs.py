"""The world of photographs: its edits, its crops and its score."""
import sys

import numpy as np
import pytest
from helpers import SMALL, call

import data
import train
from common.files import InputError, optional, read_json
from experiments import photographs
from experiments.photographs import PICTURES, Photographs, breakdown, difference, judge, open_photographs, targets

pytest.importorskip("skimage")


@pytest.fixture(scope="module")
def held_out():
    dataset = Photographs("held_out")
    return [dataset.sample(index) for index in range(64)]


def test_every_target_differs_from_all_others(held_out):
    for sample in held_out:
        images = np.stack(list(targets(sample.images[0]).values()))
        closest = [difference(images[k + 1:], images[k]).min() for k in range(len(images) - 1)]
        assert min(closest) > 0.3                         # of 255, among 78
    tasks = {sample.task for sample in held_out}
    assert len(tasks) > 20 and {sample.complexity for sample in held_out} == {1, 2}


def test_an_image_depends_on_seed_and_index_alone(held_out):
    again = Photographs("held_out")
    for index in (5, 3):
        sample = again.sample(index)
        assert (sample.target == held_out[index].target).all() and sample.instruction == held_out[index].instruction
    assert (Photographs("held_out", seed=1).sample(3).images[0] != held_out[3].images[0]).any()


def test_no_held_out_picture_is_trained_on():
    names = {split: set(files.split()) for split, files in PICTURES.items()}
    assert not names["train"] & names["held_out"]
    train_pictures, held_out_pictures = ([p.resize((32, 32)) for p in Photographs(split).pictures] for split in PICTURES)
    for picture in held_out_pictures:
        assert difference(np.stack(train_pictures), np.asarray(picture)).min() > 20
    assert Photographs("train").checksum != Photographs("held_out").checksum


def test_the_true_target_is_right_and_the_source_is_wrong(held_out):
    perfect = breakdown([judge(sample, sample.target) for sample in held_out])
    assert all(group["accuracy"] == 1 and group["l1"] == 0 for group in perfect.values())
    assert perfect["all"]["number"] == 64 == perfect["complexity 1"]["number"] + perfect["complexity 2"]["number"]
    unchanged = breakdown([judge(sample, sample.images[0]) for sample in held_out])["all"]
    assert unchanged["accuracy"] < 0.2 and unchanged["l1"] == unchanged["l1_source"] > 0.05


def test_an_instruction_of_two_edits_is_carried_out_in_order():
    source = np.zeros((32, 32, 3), np.uint8)
    source[:, :16] = 100, 200, 0
    target = targets(source)["right negative", "mirrored"]
    assert (target[:, :16] == 255).all() and (target[:, 16:] == (100, 200, 0)).all()


def test_train_then_score(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "open_data", data.open_data)              # `train` replaces it for its process
    flags = [*SMALL, "--layers", "1", "--batch", "2", "--steps", "1", "--eval-steps", "1", "--out", tmp_path]
    call(photographs, "train", *flags)
    call(photographs, "score", "--ckpt", tmp_path / "last.pt", "--examples", "3", "--steps", "1", "--pauses", "2")
    scores = read_json(tmp_path / "photographs.json")
    assert scores["pauses"] == 2 and scores["train"]["all"]["number"] == scores["held_out"]["all"]["number"] == 3
    assert (tmp_path / "photographs_held_out.png").exists()


def test_only_its_own_data_and_size_are_taken():
    for name, size in (("hard", 32), ("photographs", 16)):
        with pytest.raises(InputError, match="leave out --data and --size"):
            open_photographs(name, "train", size, 0)


def test_without_the_package_one_line_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    with pytest.raises(InputError, match="pip install scikit-image$"):
        optional("skimage.data", "scikit-image")
