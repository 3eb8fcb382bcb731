import json
import os
import shutil

import numpy as np
import pytest
import torch
from helpers import SMALL, call, run, tiny_model
from PIL import Image

import data
import sample
from common.devices import processes
from common.files import InputError, finished
from common.rows import below
from data import Shapes, Words, make_condition, world_words
from tools import pairs
from sample import euler, generate, noise, select


def test_euler_is_exact_on_a_straight_path():
    x0, x1 = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    for steps in (1, 3, 50):
        torch.testing.assert_close(euler(lambda x, t: x1 - x0, x0, steps), x1)
    times = []
    euler(lambda x, t: times.append(t) or x, x0, 4)
    assert times == [0, 0.25, 0.5, 0.75]


def test_the_last_step_of_a_toy_is_longer():
    x0, x1 = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    for steps in (1, 2, 5):
        torch.testing.assert_close(euler(lambda x, t: x1 - x0, x0, steps, jump=0.6), x1)
    times = []
    euler(lambda x, t: times.append(t) or x, x0, 4, jump=0.6)
    assert times == pytest.approx([0, 0.2, 0.4, 0.6])


def setup(B=2):
    words = Words(world_words())
    samples = [Shapes("shapes").sample(k) for k in range(B)]
    prompts = [data.make_prompt(words, s.instruction, 1) for s in samples]
    return tiny_model(vocab=len(words)), words, prompts, [[data.to_tensor(s.images[0])] for s in samples], noise((3, 16, 16), range(B), "cpu")


def velocity(model, words, prompts, images, x, t):
    condition = make_condition(words, prompts, images, model.cfg.patch)
    return model(x, torch.full((len(x),), t), condition)


@torch.no_grad()
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.5)])
def test_guidance_is_the_formula_of_instruct_pix2pix(interval):
    """v = v_u + s_img (v_img - v_u) + s_txt (v_full - v_img), every branch computed without a cache, at every step of the interval."""
    model, words, prompts, images, x0 = setup()
    got = generate(model, words, prompts, images, x0, 3, 2.5, 1.5, interval=interval, bf16=False)
    x = x0
    for t in (0, 1 / 3, 2 / 3):
        full = velocity(model, words, prompts, images, x, t)
        if not interval[0] <= t <= interval[1]:
            x = x + full / 3
            continue
        image = velocity(model, words, ["<img><|image_1|></img>"] * 2, images, x, t)
        nothing = velocity(model, words, ["<cfg>"] * 2, [[], []], x, t)
        x = x + (nothing + 1.5 * (image - nothing) + 2.5 * (full - image)) / 3
    torch.testing.assert_close(got, x, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_guidance_without_images():
    model, words, prompts, images, x0 = setup()
    got = generate(model, words, ["a red circle"] * 2, [[], []], x0, 1, 3.0, 1.5, bf16=False)
    full, nothing = (velocity(model, words, [text] * 2, [[], []], x0, 0.0) for text in ("a red circle", "<cfg>"))
    torch.testing.assert_close(got, x0 + nothing + 3.0 * (full - nothing), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_branches_together_equal_branches_one_by_one_and_rows_alone():
    model, words, prompts, images, x0 = setup()
    together = generate(model, words, prompts, images, x0, 3, bf16=False)
    apart = generate(model, words, prompts, images, x0, 3, low_memory=True, bf16=False)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)
    alone = generate(model, words, prompts[:1], images[:1], x0[:1], 3, bf16=False)
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_pause_tokens_stand_at_the_end_and_zero_of_them_change_nothing():
    model, words, prompts, images, x0 = setup(1)
    samples = [Shapes("shapes").sample(0)]
    text = data.make_prompt(words, samples[0].instruction, 1, pauses=8)
    ids = make_condition(words, [text], images, 4).ids[0].tolist()
    pause = words.ids["<pause>"]
    assert ids[-8:] == [pause] * 8 and pause not in ids[:-8]
    assert data.make_prompt(words, samples[0].instruction, 1, pauses=0) == prompts[0]
    assert not torch.allclose(generate(model, words, [text], images, x0, 2), generate(model, words, prompts, images, x0, 2))


def test_guidance_without_images_runs_two_branches(monkeypatch):
    words = Words(world_words())
    model, rows, denoise = tiny_model(vocab=len(words)), [], sample.Transformer.denoise
    monkeypatch.setattr(sample.Transformer, "denoise", lambda self, x, *rest: rows.append(len(x)) or denoise(self, x, *rest))
    for images in ([], [torch.zeros(3, 16, 16)]):
        generate(model, words, [data.make_prompt(words, "a red circle", len(images))], [images], noise((3, 16, 16), [0], "cpu"), 1)
    assert rows == [2, 3]


def test_selection_by_threshold_then_adherence():
    scores = [{"adherence": a, "faithfulness": f} for a, f in [(1.0, 0.5), (0.5, 0.95), (0.7, 0.91), (0.7, 1.0)]]
    assert select(scores, 0.9) == (3, True)                # the more faithful of the two best that pass
    assert select(scores, 0.92) == (3, True)
    assert select(scores[:3], 0.99) == (1, False)          # none passes: the most faithful
    assert select([{"adherence": a, "faithfulness": 0.5} for a in (0, 1, 1)], 0.9) == (1, False)       # ties: adherence, then order
    assert select([{"adherence": 1, "faithfulness": 1}] * 2, 0.9) == (0, True)


# ------------------------------------------------------------------------------------------- the command

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "toy"
    run("train.py", *SMALL, "--steps", 2, "--out", out, check=0)
    return out / "last.pt"


@pytest.fixture
def picture(tmp_path):
    example = Shapes("shapes").sample(0)
    Image.fromarray(example.images[0]).save(tmp_path / "in.png")
    return tmp_path / "in.png", example.instruction


def test_the_command_writes_an_edit_a_sheet_and_a_line_per_candidate(checkpoint, picture, tmp_path):
    path, instruction = picture
    done = run("sample.py", "--ckpt", checkpoint, "--image", path, "--prompt", instruction, "--pauses", "0,8", "--seeds", "0,1",
               "--steps", 2, "--out", tmp_path / "edit.png", check=0)
    assert Image.open(tmp_path / "edit.png").size == (16, 16)
    lines = [json.loads(line) for line in open(tmp_path / "edit.jsonl")]
    assert [(line["pauses"], line["seed"]) for line in lines] == [(0, 0), (0, 1), (8, 0), (8, 1)]
    assert sum(line["chosen"] for line in lines) == 1 and all(0 <= line["adherence"] <= 1 for line in lines)
    assert Image.open(tmp_path / "edit_sheet.png").width > 4 * 160
    assert "chose" in done.stdout


def test_a_large_jpeg_is_resized_and_said_so(checkpoint, picture, tmp_path):
    Image.open(picture[0]).resize((64, 48)).save(tmp_path / "large.jpg", quality=95)
    done = run("sample.py", "--ckpt", checkpoint, "--image", tmp_path / "large.jpg", "--prompt", "change the background to black",
               "--steps", 1, "--out", tmp_path / "edit.png", check=0)
    assert "resized from 64 x 48 to the model's 16 x 16" in done.stdout


def test_text_to_image_needs_no_image(checkpoint, tmp_path):
    call(sample, "--ckpt", checkpoint, "--prompt", "a red circle", "--steps", 1, "--out", tmp_path / "made.png")
    assert Image.open(tmp_path / "made.png").size == (16, 16)


def one_line(done, script, *words):
    assert done.returncode != 0
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(script), done.stderr
    for word in words:
        assert word in lines[0], lines[0]


def test_bad_input_is_one_clear_line(checkpoint, picture, tmp_path, capsys, monkeypatch):
    """One process per case would take a minute: main() is called in this one, the way the script calls it."""
    path, instruction = picture
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "broken.pt").write_bytes(checkpoint.read_bytes()[:5000])
    state = torch.load(checkpoint, weights_only=True)
    torch.save({**state, "config": {**state["config"], "width": 64}}, tmp_path / "shape.pt")
    torch.save({**state, "words": None}, tmp_path / "omnigen.pt")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    torch.save({**state, "words": state["words"][1:]}, tmp_path / "words.pt")
    torch.save({**state, "config": {**state["config"], "heads": "2"}}, tmp_path / "layers.pt")
    for name, place, value in (("nan", slice(0, 1), torch.nan), ("large", slice(0, 48), 1e38)):
        state["ema"]["final_layer.linear.bias"][place] = value
        torch.save(state, tmp_path / f"{name}.pt")
    good = {"--ckpt": checkpoint, "--image": path, "--prompt": instruction, "--out": tmp_path / "edit.png", "--steps": 1}
    cases = [({"--prompt": "make the teal circle blue"}, "unknown word 'teal'"), ({"--image": tmp_path / "none.png"}, "no such image"),
             ({"--negative-prompt": "", "--guidance-interval": "0,0.5", "--image-scale": 2}, "the prompt is empty"),
             ({"--image": tmp_path / "text.png"}, "not an image"), ({"--ckpt": tmp_path / "none.pt"}, "no such checkpoint"),
             ({"--ckpt": tmp_path / "omnigen.pt"}, "add --init omnigen:FOLDER"),
             ({"--ckpt": tmp_path / "broken.pt"}, "not a checkpoint that can be read"), ({"--ckpt": tmp_path / "shape.pt"}, "do not fit"),
             ({"--ckpt": tmp_path / "other.pt"}, "not a checkpoint of train.py"), ({"--pauses": "many"}, "not a list of numbers"),
             ({"--guidance-interval": "0.9,0.1"}, "is not two times from 0"), ({"--guidance-interval": "0.5"}, "is not two times from 0"),
             ({"--pauses": "-1"}, "different numbers from 0 to 4096"), ({"--steps": 0}, "0 is not in [1, "), ({"--out": tmp_path / "no/folder/edit.png"}, "folder"),
             ({"--prompt": "make the circle a square a red blue"}, "does not know the instruction"),
             ({"--ckpt": tmp_path / "nan.pt"}, "final_layer.linear.bias: 1 of 48 values are not finite"), ({"--seeds": 2**63}, "numbers from 0 to"),
             ({"--ckpt": tmp_path / "large.pt"}, "the sample is not finite"), ({"--text-scale": 1e38}, "is not in [0, 1000]"),
             ({"--ckpt": tmp_path / "words.pt"}, "do not fit the model"), ({"--ckpt": tmp_path / "layers.pt"}, "no model can be made"),
             ({"--pauses": "3,3"}, "different numbers"), ({"--out": path}, "would overwrite the source"),
             ({"--prompt": "remove the <image_1>"}, "looks like an image tag")]
    for change, message in cases:
        arguments = [str(part) for pair in {**good, **change}.items() for part in pair]
        monkeypatch.setattr("sys.argv", ["sample.py", *arguments])
        with pytest.raises((InputError, SystemExit)) as error:
            sample.main()
        assert message in str(error.value) and "\n" not in str(error.value), (change, str(error.value))
    one_line(run("sample.py", "--ckpt", tmp_path / "none.pt", "--prompt", "x"), "sample.py:", "no such checkpoint")


def test_a_whole_file_is_edited_and_an_interrupted_run_continues(checkpoint, tmp_path):
    run("-m", "tools.pairs", "export", "--n", 4, "--out", tmp_path / "pairs", check=0)
    command = ["sample.py", "--ckpt", checkpoint, "--data", tmp_path / "pairs/pairs.jsonl", "--pauses", "0,2", "--steps", 1, "--out", tmp_path / "edits"]
    run(*command, check=0, processes=2)                    # two processes share the rows
    files = [tmp_path / f"edits/results.{rank}.jsonl" for rank in range(2)]
    rows = [json.loads(line) for file in files for line in open(file)]
    assert sorted((row["id"], row["pauses"]) for row in rows) == [(i, p) for i in range(1, 5) for p in (0, 2)]
    example = Shapes("shapes", "iid").sample(2)
    row = next(row for row in rows if row["id"] == 3)
    assert row["instruction"] == example.instruction and row["identity"]["faithfulness"] == 1 and "exact" in row
    assert np.asarray(Image.open(tmp_path / "edits" / row["source"])).tolist() == example.images[0].tolist()
    before = {path: path.read_bytes() for path in (tmp_path / "edits").rglob("*.png")}
    files[1].write_text(files[1].read_text()[:-30])        # killed within a line
    done = run(*command, check=0)
    assert "1 new edits, 8 in all" in done.stdout
    assert {path: path.read_bytes() for path in (tmp_path / "edits").rglob("*.png")} == before      # the same edit again
    with pytest.raises(InputError, match="holds results of"):
        call(sample, *command[1:], "--text-scale", 2)
    other = shutil.copy(tmp_path / "pairs/pairs.jsonl", tmp_path / "pairs/other.jsonl")
    with pytest.raises(InputError, match="holds results of"):
        call(sample, *command[1:], "--data", other)


def test_a_result_belongs_to_its_instruction_and_images(checkpoint, tmp_path):
    call(pairs, "export", "--n", 3, "--out", tmp_path / "pairs")
    file = tmp_path / "pairs/pairs.jsonl"
    command = ["--ckpt", checkpoint, "--data", file, "--steps", 1, "--out", tmp_path / "edits"]
    rows = file.read_text().splitlines(keepends=True)
    file.write_text(rows[0] + rows[1])
    call(sample, *command)
    file.write_text("".join(rows))                         # a row at the end is new, the others are done
    call(sample, *command)
    assert [row["id"] for row in finished(tmp_path / "edits/results.0.jsonl")] == [1, 2, 3]
    for changed in (rows[2] + rows[0] + rows[1], rows[0].replace("source.png", "target.png") + "".join(rows[1:]), rows[0]):
        file.write_text(changed)
        with pytest.raises(InputError, match="holds a result of this line for another instruction or other images"):
            call(sample, *command)
    file.write_text("".join(rows))
    copy = shutil.copy(checkpoint, tmp_path / "other.pt")
    call(sample, "--ckpt", copy, *command[2:-1], tmp_path / "other")
    os.utime(copy, (1, 1))                                 # trained on, under the same name
    with pytest.raises(InputError, match="holds results of"):
        call(sample, "--ckpt", copy, *command[2:-1], tmp_path / "other")
    Image.new("RGB", (16, 16)).save(tmp_path / "pairs/00001_source.png")       # another picture under the same name
    with pytest.raises(InputError, match="pairs.jsonl:2: .*other images"):
        call(sample, *command)


def test_two_outputs_never_share_a_path(checkpoint, tmp_path, capsys):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    row = {"instruction": "remove the red circle", "input_images": ["a.png"], "output_image": None}
    same = "would be the output of line 2, 0 pauses, seed 0 and the output of line 1"
    for save_as, message in ((["x.png", "X.png"], same), (["x/../y.png", "y.png"], same), (["../a.png"], "leads out"),
                             (["a.txt"], "not the path of a .png or .jpg"), (["{turn}.png"], "is not a path with the fields")):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps({**row, "save_as": name}) + "\n" for name in save_as))
        with pytest.raises(InputError, match=message):
            call(sample, "--ckpt", checkpoint, "--data", tmp_path / "rows.jsonl", "--steps", 1, "--out", tmp_path / "edits")
        with pytest.raises(SystemExit):                    # check, which edits nothing, sees it too
            call(pairs, "check", tmp_path / "rows.jsonl")
        assert message.split(",")[0] in capsys.readouterr().out and not list(tmp_path.glob("edits/*"))
    with pytest.raises(InputError, match="would be the output of line 1, 0 pauses, seed 1 and the output of line 1, 0 pauses, seed 0"):
        (tmp_path / "rows.jsonl").write_text(json.dumps({**row, "save_as": "x.png"}))
        call(sample, "--ckpt", checkpoint, "--data", tmp_path / "rows.jsonl", "--seeds", "0,1", "--out", tmp_path / "edits")
    with pytest.raises(InputError, match="would be the output of line 1, 0 pauses, seed 0 and an image of the data"):
        (tmp_path / "rows.jsonl").write_text(json.dumps({**row, "save_as": "a.png"}))
        call(sample, "--ckpt", checkpoint, "--data", tmp_path / "rows.jsonl", "--out", tmp_path)


def test_bad_rows_of_a_file_are_left_out_and_named(checkpoint, tmp_path, capsys):
    call(pairs, "export", "--n", 2, "--out", tmp_path)
    good = (tmp_path / "pairs.jsonl").read_text()
    (tmp_path / "pairs.jsonl").write_text(good + "{no row\n" + good.splitlines()[0].replace("remove", "make").replace("00000_source", "none"))
    command = ["--ckpt", checkpoint, "--data", tmp_path / "pairs.jsonl", "--seeds", f"0,{2**63 - 1}", "--steps", 1, "--out", tmp_path / "edits"]
    with pytest.raises(InputError, match="pairs.jsonl:4: .*none.png: there is no such image; 1 bad rows were skipped before"):
        call(sample, *command, "--skip-bad", 1)
    capsys.readouterr()
    call(sample, *command, "--skip-bad", 2)
    printed = capsys.readouterr().out
    assert printed.count("skipped: ") == 2 and "6 in all; 2 bad rows skipped" in printed
    assert {row["seed"] for row in finished(tmp_path / "edits/results.0.jsonl")} == {0, 2**63 - 1}


def test_a_device_that_is_not_there_is_refused(checkpoint, tmp_path, monkeypatch):
    command = ["--ckpt", checkpoint, "--prompt", "a red circle", "--steps", 1, "--out", tmp_path / "a.png"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for device in ("cuda", "mps"):
        with pytest.raises(InputError, match=f"--device {device}: PyTorch finds no such device here; there are cpu"):
            call(sample, *command, "--device", device)
    call(sample, *command, "--device", "cpu")
    assert (tmp_path / "a.png").exists()


def test_auto_is_cuda_where_it_is_and_never_mps(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for there, expected in ((True, torch.device("cuda", 3)), (False, torch.device("cpu"))):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        monkeypatch.setenv("LOCAL_RANK", "3")
        assert processes()[2] == expected
    assert processes("mps")[2].type == "mps"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="--device mps: 2 processes"):
        processes("mps")


def test_a_row_says_where_its_output_goes(tmp_path):
    assert below(tmp_path, "pauses{pauses}/a{{b/{seed:04d}.png", 8, 3) == tmp_path / "pauses8/a{b/0003.png"
    for name, message in (("../{seed}.png", "leads out of the folder"), ("{turn}.png", "not a path"), ("a{.png", "not a path")):
        with pytest.raises(InputError, match=message):
            below(tmp_path, name, 8, 3)
