"""Each data set in miniature, in its published layout, through tools/prepare.py."""
import io
import json
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import helpers
import numpy as np
import pytest
from PIL import Image

from common.files import InputError
from common.images import open_image
from common.rows import Rows
from tools import prepare


def picture(color, size=(8, 6), kind="png"):
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, kind)
    return file.getvalue()


def hole(size=(8, 6), box=(2, 1, 5, 4)):
    """A mask as MagicBrush has it: a bright photo in which the region to edit is transparent."""
    image = Image.new("RGBA", size, (255, 250, 252, 255))
    image.paste((10, 20, 30, 0), box)
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def put(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(value, bytes):
        path.write_bytes(value)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(line) + "\n" for line in value))
    else:
        path.write_text(value if isinstance(value, str) else json.dumps(value))


@pytest.fixture(params=["pyarrow", "rows"])
def parquet(request, monkeypatch):
    """A function: write a Parquet file; without pyarrow an empty one, and read_parquet gives the rows."""
    if request.param == "pyarrow":
        pa = pytest.importorskip("pyarrow")
        pq = pytest.importorskip("pyarrow.parquet")

        def write(path, rows):
            put(path, b"")
            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
        return write
    stored = {}
    monkeypatch.setattr(prepare, "read_parquet", lambda path: iter(stored[path]))

    def write(path, rows):
        put(path, b"")
        stored[path] = rows
    return write


def run(monkeypatch, capsys, *arguments):
    """The command -> (exit message or 0, lines of its output)."""
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, arguments)])
    try:
        prepare.main()
        code = 0
    except (SystemExit, InputError) as end:
        code = str(end)
    return code, capsys.readouterr().out.splitlines()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def is_color(path, color):
    return np.asarray(open_image(path))[0, 0].tolist() == list(color)


def outputs(path):
    """Where the outputs of the rows of a JSONL file go, for 8 pauses and seed 3."""
    return [row["save_as"].format(pauses=8, seed=3) for row in lines(path)]


RED = (255, 0, 0)
GREEN = (0, 255, 0)
BLUE = (0, 0, 255)
SHARD = "{}-0000{}-of-00002-0a1b2c.parquet"


# ------------------------------------------------------------------------------------------- MagicBrush

def magicbrush_folder(root, split="dev"):
    """Two sessions: 7 with two turns, 9 with one."""
    turns = [{"input": "7-input.png", "output": "7-output1.png", "instruction": "add a hat"},
             {"input": "7-output1.png", "output": "7-output2.png", "instruction": " make it red "},
             {"input": "9-input.png", "output": "9-output1.png", "instruction": "remove it"}]
    for turn, mask in zip(turns, ("7-mask1.png", "7-mask2.png", "9-mask1.png")):
        turn["mask"] = mask
    put(root / split / "edit_turns.json", turns)
    put(root / split / "edit_sessions.json", {"7": turns[:2], "9": turns[2:]})
    put(root / split / "global_descriptions.json",
        {"7": {"7-input.png": "a man", "7-output1.png": "a man in a hat"}})
    put(root / split / "local_descriptions.json", {"7": {"7-output1.png": "a hat"}})
    for name, color in (("7-input", RED), ("7-output1", GREEN), ("7-output2", BLUE),
                        ("9-input", GREEN), ("9-output1", RED)):
        put(root / split / "images" / name[0] / f"{name}.png", picture(color))
    for name in ("7-mask1", "7-mask2", "9-mask1"):
        put(root / split / "images" / name[0] / f"{name}.png", hole())
    return root


def test_magicbrush_folder(tmp_path, monkeypatch, capsys):
    source = magicbrush_folder(magicbrush_folder(tmp_path / "from"), "test")
    code, out = run(monkeypatch, capsys, "magicbrush", source, tmp_path / "deep" / "to")
    path = tmp_path / "deep" / "to" / "magicbrush-dev.jsonl"
    test = path.with_name("magicbrush-test.jsonl")
    assert code == 0
    assert out == [f"{path}: 3 rows, 3 with a mask", f"{test}: 3 rows, 3 with a mask", "0 rows skipped"]
    rows = [row for _, row in Rows(path)]
    assert [(r["id"], r["turn"], r["turns"], r["split"], r["instruction"]) for r in rows] == [
        ("7-1", 1, 2, "dev", "add a hat"), ("7-2", 2, 2, "dev", "make it red"),
        ("9-1", 1, 1, "dev", "remove it")]
    for row, source_color, target_color in zip(rows, (RED, GREEN, GREEN), (GREEN, BLUE, RED)):
        assert is_color(row["input_images"][0], source_color) and is_color(row["output_image"], target_color)
    assert [rows[0][key] for key in ("source_caption", "target_caption", "local_caption")] == [
        "a man", "a man in a hat", "a hat"]
    assert rows[1]["source_caption"] == "a man in a hat"
    assert not {"target_caption", "local_caption"} & set(rows[1])
    assert lines(path)[0]["input_images"] == ["../../from/dev/images/7/7-input.png"]       # not copied
    assert all(p.name.endswith("-mask.png") for p in (path.parent / "images").rglob("*.*"))
    assert outputs(path) == [
        "pauses8_seed3/7/7_1.png", "pauses8_seed3/7/7_inde_2.png", "pauses8_seed3/9/9_1.png"]


@pytest.mark.parametrize("out", ["to", "real/to"])                     # a link itself, and not
def test_images_are_found_through_linked_folders(tmp_path, out):
    magicbrush_folder(tmp_path / "a/from")
    (tmp_path / "a/b").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a/b")
    (tmp_path / "to").symlink_to(tmp_path / "a/b")
    prepare.prepare("magicbrush", tmp_path / "link/../from", tmp_path / out)
    _, row = Rows(tmp_path / out / "magicbrush-dev.jsonl")[0]
    assert is_color(row["input_images"][0], RED)


@pytest.mark.parametrize("size", [(8, 6), (16, 12)])
def test_a_transparent_mask_becomes_black_and_white_at_the_size_of_the_source(tmp_path, size):
    source = magicbrush_folder(tmp_path / "from")
    scale = size[0] // 8
    put(source / "dev/images/7/7-mask1.png", hole(size, tuple(scale * k for k in (2, 1, 5, 4))))
    prepare.prepare("magicbrush", source, tmp_path / "to")
    _, row = Rows(tmp_path / "to/magicbrush-dev.jsonl")[0]
    expected = np.zeros((6, 8), np.uint8)
    expected[1:4, 2:5] = 255
    assert (np.asarray(open_image(row["mask"])) == expected[:, :, None]).all()


def test_an_opaque_mask_marks_white_and_one_that_marks_nothing_is_left_out(tmp_path, monkeypatch, capsys):
    source = magicbrush_folder(tmp_path / "from")
    painted = Image.new("RGB", (8, 6), (255, 128, 0))
    painted.paste("white", (0, 0, 4, 6))
    painted.save(source / "dev/images/7/7-mask1.png")
    put(source / "dev/images/9/9-mask1.png", picture(RED))
    _, out = run(monkeypatch, capsys, "magicbrush", source / "dev", tmp_path)             # FROM is one split
    rows = [row for _, row in Rows(tmp_path / "magicbrush-dev.jsonl")]
    assert out[0].endswith("3 rows, 2 with a mask") and "mask" not in rows[2]
    assert (np.asarray(open_image(rows[0]["mask"]))[:, :, 0] == [255] * 4 + [0] * 4).all()


def test_magicbrush_without_caption_files_and_with_missing_pieces(tmp_path, monkeypatch, capsys):
    source = magicbrush_folder(tmp_path / "from")
    for name in ("global_descriptions.json", "local_descriptions.json", "images/7/7-output2.png"):
        (source / "dev" / name).unlink()
    turns = json.loads((source / "dev/edit_turns.json").read_text())
    del turns[2]["mask"]
    put(source / "dev/edit_turns.json",
        turns + [{**turns[0], "output": "7.png"}, "text", turns[0], {**turns[0], "instruction": 3}])
    code, out = run(monkeypatch, capsys, "magicbrush", source, tmp_path)
    file = source / "dev/edit_turns.json"
    assert code == 0 and out[1:] == [
        "6 rows skipped", f"{file} row 1: {source}/dev/images/7/7-output2.png: there is no such image",
        f"{file} row 2: the key 'mask' is missing or empty; there are input, instruction, output",
        f"{file} row 3: expected an output named ID-outputK.png, this is '7.png'",
        f"{file} row 4: expected an object with 'instruction', this is str",
        f"{file} row 5: its id 7-1 was there before",
        f"{file} row 6: expected an instruction, this is 3"]
    assert [sorted(row) for row in lines(tmp_path / "magicbrush-dev.jsonl")] == [
        ["benchmark", "id", "input_images", "instruction", "mask", "output_image", "save_as", "split", "turn",
         "turns"]]


def magicbrush_rows():
    return [{"img_id": "7", "turn_index": k, "instruction": f"edit {k}",
             "source_img": {"bytes": picture(RED), "path": "s.png"},
             "mask_img": {"bytes": hole(), "path": None},
             "target_img": {"bytes": picture(GREEN, kind="jpeg"), "path": None}} for k in (1, 2)]


def test_magicbrush_parquet_in_several_shards(tmp_path, parquet):
    first, second = magicbrush_rows()
    parquet(tmp_path / "data" / SHARD.format("train", 0), [first])
    parquet(tmp_path / "data" / SHARD.format("train", 1), [second])
    parquet(tmp_path / "data" / SHARD.format("dev", 0), [first])
    counts, skipped = prepare.prepare("magicbrush", tmp_path, tmp_path / "to")
    train = tmp_path / "to/magicbrush-train.jsonl"
    dev = tmp_path / "to/magicbrush-dev.jsonl"
    assert counts == {dev: (1, 1), train: (2, 2)} and skipped == []
    rows = [row for _, row in Rows(train)]
    assert [(r["id"], r["turn"], r["instruction"], r["split"]) for r in rows] == [
        ("7-1", 1, "edit 1", "train"), ("7-2", 2, "edit 2", "train")]
    assert is_color(rows[1]["input_images"][0], RED) and rows[1]["output_image"].endswith(".jpg")
    assert np.asarray(open_image(rows[1]["mask"]))[:, :, 0].sum() == 9 * 255
    images = [str(p) for row in rows for p in (row["input_images"][0], row["output_image"], row["mask"])]
    assert len(set(images)) == 6                                       # each image has its own file
    assert outputs(train) == ["pauses8_seed3/7/7_1.png", "pauses8_seed3/7/7_inde_2.png"]


def test_a_second_run_writes_only_what_is_missing_or_torn(tmp_path, parquet):
    parquet(tmp_path / "train.parquet", magicbrush_rows())
    prepare.prepare("magicbrush", tmp_path, tmp_path / "to")
    before = {path: path.read_bytes() for path in (tmp_path / "to").rglob("*.*") if path.is_file()}
    assert len(before) == 7
    images = sorted(path for path in before if path.suffix != ".jsonl")
    torn, gone, *kept = images
    torn.write_bytes(before[torn][:20])
    gone.unlink()
    times = {path: path.stat().st_mtime_ns for path in kept}
    prepare.prepare("magicbrush", tmp_path, tmp_path / "to")
    assert {path: path.read_bytes() for path in before} == before
    assert {path: path.stat().st_mtime_ns for path in kept} == times
    assert not list((tmp_path / "to").glob("*.tmp"))


def test_a_killed_run_leaves_the_old_file_whole(tmp_path, monkeypatch):
    source = magicbrush_folder(tmp_path / "from")
    put(tmp_path / "magicbrush-dev.jsonl", ["the old file"])

    def killed(raw, *rest):
        if raw["output"] == "9-output1.png":
            raise KeyboardInterrupt
        return convert(raw, *rest)
    convert = prepare.SETS["magicbrush"]
    monkeypatch.setitem(prepare.SETS, "magicbrush", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare("magicbrush", source, tmp_path)
    assert lines(tmp_path / "magicbrush-dev.jsonl") == ["the old file"] and not list(tmp_path.glob("*.tmp"))


# ------------------------------------------------------------------------------------------- UltraEdit

def test_ultraedit_both_splits(tmp_path, parquet):
    free = {"edit_prompt": "add rain", "source_caption": "a street", "target_caption": "a wet street",
            "source_image": {"bytes": picture(RED)}, "edited_image": {"bytes": picture(BLUE)}, "idx": 5,
            "clip_sim_dir": 0.3}
    broken = {**free, "source_image": {"bytes": b"no image"}}
    parquet(tmp_path / SHARD.format("FreeForm", 0), [free, broken, free])
    region = {**free, "mask_image": {"bytes": picture((255,) * 3)}, "source_caption": None}
    parquet(tmp_path / SHARD.format("RegionBase", 0), [region])
    counts, skipped = prepare.prepare("ultraedit", tmp_path, tmp_path / "to")
    reason, = skipped
    assert "FreeForm-00000-of-00002-0a1b2c.parquet row 1: not an image that can be read" in reason
    one, two = (row for _, row in Rows(tmp_path / "to/ultraedit-FreeForm.jsonl"))
    assert one["instruction"] == "add rain" and one["target_caption"] == "a wet street" and "mask" not in one
    assert one["idx"] == two["idx"] == 5 and one["id"] != two["id"]    # idx need not be unique
    assert is_color(one["input_images"][0], RED) and is_color(one["output_image"], BLUE)
    (_, region), = Rows(tmp_path / "to/ultraedit-RegionBase.jsonl")
    assert is_color(region["mask"], (255,) * 3)
    assert "source_caption" not in region and region["target_caption"] == "a wet street"
    assert not {"save_as", "save_also"} & set(region)                                     # not a benchmark
    assert list(counts.values()) == [(2, 0), (1, 1)]


def test_plain_bytes_and_image_paths_in_parquet(tmp_path, parquet):
    put(tmp_path / "FreeForm/a.png", picture(GREEN))
    parquet(tmp_path / "FreeForm/0000.parquet",
            [{"edit_prompt": "x", "source_image": picture(RED), "edited_image": "a.png"}])
    parquet(tmp_path / "FreeForm/0001.parquet",
            [{"edit_prompt": "y", "source_image": {"bytes": None, "path": "a.png"},
              "edited_image": {"bytes": picture(BLUE), "path": "a.png"}}])
    prepare.prepare("ultraedit", tmp_path, tmp_path / "to")
    one, two = lines(tmp_path / "to/ultraedit-FreeForm.jsonl")
    assert one["output_image"] == "../FreeForm/a.png" and two["input_images"] == ["../FreeForm/a.png"]
    assert is_color(tmp_path / "to" / one["input_images"][0], RED)
    assert is_color(tmp_path / "to" / two["output_image"], BLUE)


@pytest.mark.parametrize("kind, ending", [
    ("JPEG", "jpg"), ("MPO", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("JPEG2000", "jp2")])
def test_images_are_named_by_what_they_are(tmp_path, parquet, kind, ending):
    file = io.BytesIO()
    small = Image.new("RGB", (4, 3), BLUE)                             # behind the photo, in a phone's MPO
    more = {"save_all": True, "append_images": [small]} if kind == "MPO" else {}
    Image.new("RGB", (8, 6), GREEN).save(file, kind, **more)
    image = {"bytes": file.getvalue()}
    parquet(tmp_path / "FreeForm/0000.parquet",
            [{"edit_prompt": "x", "source_image": image, "edited_image": image}])
    prepare.prepare("ultraedit", tmp_path, tmp_path / "to")
    (_, row), = Rows(tmp_path / "to/ultraedit-FreeForm.jsonl")
    assert row["input_images"][0].endswith(f"-source.{ending}")
    assert open_image(row["input_images"][0]).size == (8, 6)


# ------------------------------------------------------------------------------------------- AURORA

def test_aurora(tmp_path, monkeypatch, capsys):
    source = tmp_path / "AURORA"
    kubric = {"instruction": ["turn it", "rotate it"], "input": "data/kubric/images/rotate/0001/image0.jpg",
              "output": "data/kubric/images/rotate/0001/image1.jpg"}
    brush = {"instruction": "add a dog", "input": "data/magicbrush/images/0-input.png", "mask": "0-mask.png",
             "output": "data/magicbrush/images/0-output.png", "img_id": "327726"}
    ag = {"instruction": "sit down", "input": "data/ag/images/a_left.png",
          "output": "data/ag/images/a_right.png"}
    put(source / "data/kubric/train.json",
        [kubric, {**kubric, "output": "data/kubric/images/rotate/0002/image1.jpg"},
         {**kubric, "instruction": []}])
    put(source / "data/magicbrush/train.json", [brush, {**brush, "mask": "1-mask.png"}])
    put(source / "data/ag/train.json",
        [ag, {**ag, "instruction": "{}"}, {k: ag[k] for k in ("instruction", "input")}])
    for row in (kubric, brush, ag):
        put(source / row["input"], picture(RED))
        put(source / row["output"], picture(GREEN))
    put(source / "data/magicbrush/images/0-mask.png", hole())
    code, out = run(monkeypatch, capsys, "aurora", source, tmp_path / "to")
    assert code == 0 and out == [
        f"{tmp_path}/to/aurora-ag.jsonl: 1 rows, 0 with a mask",
        f"{tmp_path}/to/aurora-kubric.jsonl: 1 rows, 0 with a mask",
        f"{tmp_path}/to/aurora-magicbrush.jsonl: 2 rows, 1 with a mask", "4 rows skipped",
        f"{source}/data/ag/train.json row 1: expected an instruction, this is '{{}}'",
        f"{source}/data/ag/train.json row 2: the key 'output' is missing or empty; "
        "there are input, instruction",
        f"{source}/data/kubric/train.json row 1: {source}/data/kubric/images/rotate/0002/image1.jpg: "
        "there is no such image",
        f"{source}/data/kubric/train.json row 2: expected an instruction, this is []"]
    (_, row), = Rows(tmp_path / "to/aurora-kubric.jsonl")
    # of a list of instructions, the first
    assert (row["instruction"], row["task"], row["split"]) == ("turn it", "rotate", "kubric")
    assert is_color(row["input_images"][0], RED) and is_color(row["output_image"], GREEN)
    (_, row), (_, plain) = Rows(tmp_path / "to/aurora-magicbrush.jsonl")
    assert np.asarray(open_image(row["mask"]))[:, :, 0].sum() == 9 * 255 and "mask" not in plain
    assert Rows(tmp_path / "to/aurora-ag.jsonl")[0][1]["task"] == "ag"


# ------------------------------------------------------------------------------------------- Emu-Edit

def emu_row(split, task="add", idx=3, **more):
    return {"instruction": f"{task} a cat", "image": {"bytes": picture(RED)}, "task": task, "split": split,
            "idx": idx, "hash": "h", "input_caption": "a room", "output_caption": "a cat in a room", **more}


def test_emu_edit(tmp_path, parquet):
    parquet(tmp_path / SHARD.format("test", 0), [emu_row("test"), emu_row("test", "remove"), emu_row("test")])
    parquet(tmp_path / SHARD.format("validation", 0), [emu_row("validation")])
    counts, skipped = prepare.prepare("emu-edit", tmp_path, tmp_path / "to")
    one, two = rows = lines(tmp_path / "to/emu-edit-test.jsonl")
    assert [(r["id"], r["idx"], r["task"], r["split"]) for r in rows] == [
        ("add-3", 3, "add", "test"), ("remove-3", 3, "remove", "test")]
    assert one["output_image"] is None and "edited_image" not in one   # an evaluation set: there is no target
    assert (one["source_caption"], one["target_caption"]) == ("a room", "a cat in a room")
    assert is_color(tmp_path / "to" / one["input_images"][0], RED)
    assert lines(tmp_path / "to/emu-edit-validation.jsonl")[0]["split"] == "validation"
    assert skipped == [f"{tmp_path / SHARD.format('test', 0)} row 2: its id add-3 was there before"]


def test_the_splits_of_emu_edits_generations_are_swapped(tmp_path, parquet):
    made = {"edited_image": {"bytes": picture(BLUE)}, "model": "emu"}
    parquet(tmp_path / SHARD.format("test", 0), [emu_row("test", "local", **made)])
    parquet(tmp_path / SHARD.format("validation", 0), [emu_row("validation", "style", **made)])
    prepare.prepare("emu-edit", tmp_path, tmp_path / "to", split="test")
    assert not (tmp_path / "to/emu-edit-validation.jsonl").exists()
    row, = lines(tmp_path / "to/emu-edit-test.jsonl")
    assert (row["task"], row["split"], row["output_image"]) == ("style", "test", None)
    assert is_color(tmp_path / "to" / row["edited_image"], BLUE)
    assert is_color(tmp_path / "to" / row["input_images"][0], RED)


# ------------------------------------------------------------------------------------------- Complex-Edit

def complex_row(k, **more):
    return {"edit": {"sequence": [{"name": f"op {c}", "instruction": f"step {c}"} for c in range(8)],
                     "compound": [{"reasoning": "r", "compound_instruction": f"image {k} level {c}"}
                                  for c in range(1, 9)]}, **more}


def test_complex_edit_parquet(tmp_path, parquet):
    rows = [complex_row(k, image={"bytes": picture((k, 0, 0))}) for k in range(3)]
    rows[1]["edit"]["compound"] = rows[1]["edit"]["compound"][:3]
    parquet(tmp_path / "data" / SHARD.format("test_real", 0), rows[:2])
    parquet(tmp_path / "data" / SHARD.format("test_real", 1), rows[2:])
    counts, skipped = prepare.prepare("complex-edit", tmp_path, tmp_path / "to")
    rows = lines(tmp_path / "to/complex-edit-test_real.jsonl")
    assert [(r["complexity"], r["instruction"], r["id"]) for r in rows] == [
        (c, f"image {k} level {c}", f"0000{k}-{c}") for k in (0, 2) for c in range(1, 9)]
    assert rows[1]["operations"] == ["op 0", "op 1"] and all(r["output_image"] is None for r in rows)
    assert is_color(tmp_path / "to" / rows[15]["input_images"][0], (2, 0, 0))
    assert rows[15]["input_images"] == rows[8]["input_images"]
    reason, = skipped
    assert reason.endswith("row 1: edit.compound has 3 instructions, 8 are needed: see --complexity")
    assert outputs(tmp_path / "to/complex-edit-test_real.jsonl")[7:9] == [
        "pauses8_seed3/complexity_8/00000.png", "pauses8_seed3/complexity_1/00002.png"]


def test_complex_edit_jsonl_and_complexity(tmp_path, monkeypatch, capsys):
    put(tmp_path / "a.png", picture(BLUE))
    lists = {"sequence": {"name": ["op 0", "op 1"]}, "compound": {"compound_instruction": ["one", "two"]}}
    put(tmp_path / "test_syn.jsonl",
        [complex_row(0, image="a.png"), {"image": "a.png", "edit": lists}, {"image": "a.png"}])
    code, out = run(monkeypatch, capsys, "complex-edit", tmp_path, tmp_path / "to", "--complexity", 2)
    rows = lines(tmp_path / "to/complex-edit-test_syn.jsonl")
    assert [r["instruction"] for r in rows] == ["image 0 level 1", "image 0 level 2", "one", "two"]
    assert rows[0]["input_images"] == ["../a.png"] and rows[3]["operations"] == ["op 0", "op 1"]
    file = tmp_path / "test_syn.jsonl"
    assert out[1:] == [
        "1 rows skipped", f"{file} row 2: the key 'edit' is missing or empty; there are image"]
    for wrong in (["complex-edit", tmp_path, tmp_path, "--complexity", 9],
                  ["geneval", tmp_path, tmp_path, "--complexity", 2]):
        code, _ = run(monkeypatch, capsys, *wrong)
        assert code.startswith("prepare.py: ") and "--complexity" in code and "\n" not in code


# ---------------------------------------------------------------------------------------- IDEA-Bench, GenEval

def test_idea_bench(tmp_path, monkeypatch, capsys):
    for case in ("logo_0001", "logo_0002", "poster_0001", "icon_0001", "icon_0002", "icon_0003"):
        put(tmp_path / case / "instruction.txt", f"design {case}\n")
        put(tmp_path / case / "meta.json", {"task_name": case[:-5], "uid": "0042", "other": 1})
        put(tmp_path / case / "eval.json", {})
    put(tmp_path / "logo_0001/instruction.txt", b"\xef\xbb\xbfdesign logo_0001 \xc3\xa9")
    put(tmp_path / "icon_0003/instruction.txt", b"design\nit \xe9")                        # not UTF-8
    for name in ("logo_0001/0002.jpg", "logo_0001/0001.jpg", "logo_0002/0001.png", "icon_0001/0001.jpg",
                 "icon_0002/0001.jpg", "icon_0003/0001.jpg"):
        put(tmp_path / name, picture(RED))
    (tmp_path / "icon_0001/instruction.txt").unlink()
    put(tmp_path / "icon_0002/meta.json", {"task_name": "icon"})
    code, out = run(monkeypatch, capsys, "idea-bench", tmp_path, tmp_path / "to")
    rows = lines(tmp_path / "to/idea-bench.jsonl")
    assert [(r["id"], r["instruction"], r["task_name"], r["uid"], r["output_image"]) for r in rows] == [
        ("logo_0001", "design logo_0001 \xe9", "logo", "0042", None),
        ("logo_0002", "design logo_0002", "logo", "0042", None)]
    assert rows[0]["input_images"] == ["../logo_0001/0001.jpg", "../logo_0001/0002.jpg"]
    assert "split" not in rows[0]
    assert outputs(tmp_path / "to/idea-bench.jsonl") == [
        "pauses8_seed3/logo_0001/0001.jpg", "pauses8_seed3/logo_0002/0001.jpg"]
    assert out[1:] == ["4 rows skipped", f"{tmp_path}/icon_0001: instruction.txt is missing",
                       f"{tmp_path}/icon_0002: the key 'uid' is missing or empty; there are task_name",
                       f"{tmp_path}/icon_0003: instruction.txt: not UTF-8 text: byte 0xe9 at line 2, byte 4; "
                       "save it as UTF-8",
                       f"{tmp_path}/poster_0001: no input image 0001.jpg: a text-to-image case; "
                       "only cases with input images become rows"]
    code, _ = run(monkeypatch, capsys, "idea-bench", tmp_path, tmp_path / "to2", "--split", "test")
    assert code == f"--split test: {tmp_path} has no splits" and not (tmp_path / "to2").exists()


def test_braces_in_the_name_of_a_case_are_kept_in_its_path(tmp_path):
    put(tmp_path / "{seed}_0001/instruction.txt", "design it")
    put(tmp_path / "{seed}_0001/meta.json", {"task_name": "logo", "uid": "1"})
    put(tmp_path / "{seed}_0001/0001.jpg", picture(RED))
    prepare.prepare("idea-bench", tmp_path, tmp_path / "to")
    assert outputs(tmp_path / "to/idea-bench.jsonl") == ["pauses8_seed3/{seed}_0001/0001.jpg"]


def test_geneval(tmp_path, monkeypatch, capsys):
    metadata = [{"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "two {cats}"},
                {"tag": "colors"},
                {"tag": "colors", "include": [{"class": "dog", "count": 1}], "prompt": "a red dog"}]
    put(tmp_path / "prompts/evaluation_metadata.jsonl", metadata)
    code, out = run(monkeypatch, capsys, "geneval", tmp_path, tmp_path)
    one, two = lines(tmp_path / "geneval.jsonl")
    assert one == {"instruction": "two {cats}", "input_images": [], "output_image": None, "task": "counting",
                   "tag": "counting", "id": "00000", "benchmark": "geneval",
                   "save_as": "pauses{pauses}/00000/samples/{seed:04d}.png",
                   "save_also": {"pauses{pauses}/00000/metadata.jsonl": metadata[0]}}
    assert two["id"] == "00002"                                        # the skipped line counts
    assert two["save_also"] == {"pauses{pauses}/00002/metadata.jsonl": metadata[2]}
    assert outputs(tmp_path / "geneval.jsonl") == [
        "pauses8/00000/samples/0003.png", "pauses8/00002/samples/0003.png"]
    assert out[1:] == ["1 rows skipped", f"{tmp_path}/prompts/evaluation_metadata.jsonl row 1: "
                       "the key 'prompt' is missing or empty; there are tag"]


# ------------------------------------------------------------------------------------------- wrong input

@pytest.mark.parametrize("name, expected", [
    ("magicbrush", "edit_turns.json or "), ("ultraedit", ".parquet"), ("emu-edit", ".parquet"),
    ("aurora", "data/*/train.json"), ("complex-edit", ".jsonl"), ("idea-bench", "*_[0-9]"),
    ("geneval", "prompts/evaluation_metadata.jsonl")])
def test_a_folder_of_another_layout(tmp_path, monkeypatch, capsys, name, expected):
    put(tmp_path / "readme.txt", "text")
    code, _ = run(monkeypatch, capsys, name, tmp_path, tmp_path / "to")
    assert code.startswith(f"{tmp_path}: this is not {name} as published: expected ") and expected in code
    assert code.endswith("found readme.txt") and "\n" not in code and not (tmp_path / "to").exists()


def test_parquet_files_of_another_data_set(tmp_path, parquet):
    parquet(tmp_path / "test.parquet", [emu_row("test")])
    message = "test.parquet: this is not ultraedit .* columns hash, idx, .* missing: edit_prompt, ed"
    with pytest.raises(InputError, match=message):
        prepare.prepare("ultraedit", tmp_path, tmp_path / "to")


def test_a_torn_shard_is_reported_and_the_others_are_read(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist([emu_row("test")]), tmp_path / SHARD.format("test", 0))
    put(tmp_path / SHARD.format("test", 1), (tmp_path / SHARD.format("test", 0)).read_bytes()[:-20])
    counts, (skipped,) = prepare.prepare("emu-edit", tmp_path, tmp_path / "to")
    assert list(counts.values()) == [(1, 0)]
    torn = tmp_path / SHARD.format("test", 1)
    assert skipped.startswith(f"{torn} row 0: the file cannot be read from here on")


def test_what_comes_before_the_break_in_a_shard_is_kept(tmp_path, monkeypatch):
    def batches(batch_size):
        yield SimpleNamespace(to_pylist=lambda: [emu_row("test")])
        raise OSError("unexpected end of stream")
    file = nullcontext(SimpleNamespace(iter_batches=batches))
    monkeypatch.setattr(prepare, "optional", lambda name: SimpleNamespace(ParquetFile=lambda path: file))
    put(tmp_path / "test.parquet", b"")
    counts, skipped = prepare.prepare("emu-edit", tmp_path, tmp_path / "to")
    assert list(counts.values()) == [(1, 0)] and skipped == [
        f"{tmp_path}/test.parquet row 1: the file cannot be read from here on: download it again "
        "(unexpected end of stream)"]


def test_without_pyarrow(tmp_path, monkeypatch, capsys):
    put(tmp_path / "test.parquet", b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    code, _ = run(monkeypatch, capsys, "emu-edit", tmp_path, tmp_path / "to")
    assert code == "this needs the optional package pyarrow: pip install pyarrow"


def test_nothing_could_be_read(tmp_path, monkeypatch, capsys):
    put(tmp_path / "data/ag/train.json", [{"instruction": "sit", "input": "a.png", "output": "b.png"}])
    code, out = run(monkeypatch, capsys, "aurora", tmp_path, tmp_path / "to")
    assert code == f"{tmp_path}: no row could be read" and not list((tmp_path / "to").iterdir())
    assert out == [
        "1 rows skipped", f"{tmp_path}/data/ag/train.json row 0: {tmp_path}/a.png: there is no such image"]


@pytest.mark.parametrize("text, message", [
    ("[", "not JSON"), ("{}", "a JSON list is expected, this is a dict")])
def test_a_broken_json_file(tmp_path, monkeypatch, capsys, text, message):
    put(tmp_path / "data/ag/train.json", text)
    code, _ = run(monkeypatch, capsys, "aurora", tmp_path, tmp_path / "to")
    assert code.startswith(f"{tmp_path}/data/ag/train.json: {message}")


def test_wrong_arguments(tmp_path, monkeypatch, capsys):
    source = magicbrush_folder(tmp_path / "from")
    file = source / "dev/edit_turns.json"
    for arguments, message in (
            (["magicbrush", tmp_path / "none", tmp_path], f"{tmp_path}/none: there is no such folder"),
            (["magicbrush", source, tmp_path, "--split", "train"], f"--split train: {source} has dev"),
            (["cifar", source, tmp_path], "prepare.py: argument NAME: invalid choice: 'cifar'"),
            (["magicbrush", source, file], f"{file}: cannot write there (File exists)")):
        code, _ = run(monkeypatch, capsys, *arguments)
        assert code.startswith(message) and "\n" not in code


def test_an_image_that_cannot_be_written_stops_the_run_and_is_named(tmp_path):
    source = magicbrush_folder(tmp_path / "from")
    put(source / "dev/images/7/7-mask1.png", picture(RED))             # marks nothing: the first row is fine
    put(tmp_path / "images", b"a file where a folder is needed")
    put(tmp_path / "magicbrush-dev.jsonl", ["the old file"])
    with pytest.raises(InputError, match="/images/magicbrush/dev: cannot be read or written"):
        prepare.prepare("magicbrush", source, tmp_path)
    assert lines(tmp_path / "magicbrush-dev.jsonl") == ["the old file"]


@pytest.mark.parametrize("change, why", [
    ({"idx": float("nan")}, "not JSON compliant"), ({"idx": b"3"}, "bytes"),
    ({"source_caption": 3}, "should be a str, not int"), ({"edit_prompt": ["x"]}, "expected an instruction"),
    ({"source_image": [1]}, "expected an image")])
def test_values_of_another_type_skip_their_row(tmp_path, monkeypatch, change, why):
    row = {"edit_prompt": "x", "source_image": picture(RED), "edited_image": picture(RED), "idx": 1}
    put(tmp_path / "FreeForm.parquet", b"")
    monkeypatch.setattr(prepare, "read_parquet", lambda path: iter([row, {**row, **change}, row]))
    counts, (skipped,) = prepare.prepare("ultraedit", tmp_path, tmp_path / "to")
    assert list(counts.values()) == [(2, 0)] and "FreeForm.parquet row 1: " in skipped and why in skipped


def test_captions_of_another_type_skip_their_rows(tmp_path):
    source = magicbrush_folder(tmp_path / "from")
    put(source / "dev/global_descriptions.json", {"7": ["a man"]})
    counts, skipped = prepare.prepare("magicbrush", source, tmp_path / "to")
    assert list(counts.values()) == [(1, 1)] and len(skipped) == 2
    assert skipped[0].endswith("row 0: not a row as published ('list' object has no attribute 'get')")


def test_a_broken_file_after_a_good_one_is_named_and_leaves_the_old_rows(tmp_path, monkeypatch, capsys):
    source = magicbrush_folder(magicbrush_folder(tmp_path / "from"), "test")
    put(source / "test/edit_turns.json", b'[\n"\xff"]')
    put(tmp_path / "to/magicbrush-dev.jsonl", ["the old file"])
    code, _ = run(monkeypatch, capsys, "magicbrush", source, tmp_path / "to")
    assert code.startswith(f"{source}/test/edit_turns.json: not UTF-8 text: byte 0xff at line 2, byte 2")
    assert lines(tmp_path / "to/magicbrush-dev.jsonl") == ["the old file"]
    assert [path.name for path in (tmp_path / "to").iterdir() if path.is_file()] == ["magicbrush-dev.jsonl"]


def test_image_tags_that_do_not_fit_are_refused(tmp_path):
    put(tmp_path / "data/ag/a.png", picture(RED))
    put(tmp_path / "data/ag/train.json",
        [{"instruction": "put it on <|image_2|>", "input": "data/ag/a.png", "output": "data/ag/a.png"}])
    _, skipped = prepare.prepare("aurora", tmp_path, tmp_path / "to")
    assert len(skipped) == 1 and "row 0: the instruction names images [2]" in skipped[0]


def test_the_script_runs_by_itself(tmp_path):
    done = helpers.run("-m", "tools.prepare", "geneval", tmp_path, tmp_path / "to", check=1)
    assert done.stderr.splitlines()[-1].startswith(
        f"prepare.py: {tmp_path}: this is not geneval as published: expected prompts/")
    assert "Traceback" not in done.stderr
