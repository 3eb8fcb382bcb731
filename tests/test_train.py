import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import ROOT, SMALL, call, run
from PIL import Image, ImageFilter

import train
from common.files import InputError
from common.muon import Muon
from sample import load_checkpoint
from tools import pairs


def weights(path):
    return torch.load(path, weights_only=True)


def assert_same_run(a, b):
    """Equal bit for bit: weights, averages, optimizer states, step."""
    def compare(x, y, where):
        if isinstance(x, torch.Tensor):
            assert x.equal(y), where
        elif isinstance(x, dict):
            assert x.keys() == y.keys()
            for key in x:
                compare(x[key], y[key], f"{where}.{key}")
        elif isinstance(x, (list, tuple)):
            assert len(x) == len(y)
            for k, pair in enumerate(zip(x, y)):
                compare(*pair, f"{where}.{k}")
        elif not isinstance(x, float) or "flags" not in where:
            assert x == y, where
    for key in ("step", "config", "words", "model", "ema", "mask_tokens", "optimizers"):
        compare(a[key], b[key], key)


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    """kill -9 twice, at whatever moment it comes: once between saves, once when a new file is half-way."""
    flags = [*SMALL, "--steps", "60", "--save-every", "5", "--log-every", "5"]
    run("train.py", *flags, "--out", tmp_path / "whole", check=0)
    out = tmp_path / "killed"
    command = [sys.executable, "train.py", *flags, "--out", str(out)]

    def start_and_kill(extra, ready):
        process = subprocess.Popen(command + extra, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
        while not ready() and process.poll() is None:
            time.sleep(0.001)
        process.kill()
        process.wait()
        assert not (out / "result.json").exists()          # it really was interrupted

    start_and_kill([], lambda: (out / "last.pt").exists())
    first = weights(out / "last.pt")["step"]
    start_and_kill(["--resume"], lambda: (out / "last.pt.tmp").exists())
    assert weights(out / "last.pt")["step"] >= first       # whole, whatever the kill hit
    run("train.py", *flags, "--out", out, "--resume", check=0)
    assert_same_run(weights(tmp_path / "whole/last.pt"), weights(out / "last.pt"))
    for name in ("whole", "killed"):
        steps = [json.loads(line)["step"] for line in open(tmp_path / name / "log.jsonl")]
        assert steps == list(range(5, 61, 5))              # nothing twice, nothing missing


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "train.py", *SMALL, "--steps", "5000", "--log-every", "1", "--out", str(out)],
                               cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (out / "log.jsonl").exists() or not (out / "log.jsonl").read_text():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in printed
    assert 0 < weights(out / "last.pt")["step"] < 5000


def test_one_process_and_two_give_the_same_weights(tmp_path):
    flags = [*SMALL, "--steps", "20", "--no-bf16", "--p-masked-source", "0.5", "--p-plan", "0.5"]
    run("train.py", *flags, "--out", tmp_path / "one", check=0)
    run("train.py", *flags, "--out", tmp_path / "two", check=0, processes=2)
    one, two = weights(tmp_path / "one/last.pt"), weights(tmp_path / "two/last.pt")
    for part in ("model", "mask_tokens"):
        for name in one[part]:
            torch.testing.assert_close(one[part][name], two[part][name], atol=1e-5, rtol=0, msg=name)
    logged = [json.loads((tmp_path / name / "log.jsonl").read_text()) for name in ("one", "two")]
    for key in ("loss", "loss_by_t", "masked_samples", "masked_tokens"):   # sums over all processes
        assert logged[0][key] == pytest.approx(logged[1][key], abs=1e-5), key


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path):
    flags = [*SMALL, "--log-every", "1", "--save-every", "1", "--steps", "3", "--out", tmp_path]
    call(train, *flags)
    state = weights(tmp_path / "last.pt")
    state["step"], state["model"]["final_layer.linear.bias"] = 1, torch.full((48,), 1e30)     # its square is infinite
    torch.save(state, tmp_path / "last.pt")
    before = (tmp_path / "last.pt").read_bytes()
    done = run("train.py", *flags, "--resume")
    assert done.returncode == 1 and "the first loss is not finite, before a weight was changed" in done.stderr.splitlines()[-1]
    assert (tmp_path / "last.pt").read_bytes() == before
    with pytest.raises(InputError, match="not finite near step 2; .* Try a lower --lr"):
        call(train, *flags[:-2], "--eval-steps", 1, "--lr", 1e30, "--warmup", 0, "--out", tmp_path / "fast")


def test_the_result_holds_what_it_should(tmp_path):
    call(train, *SMALL[:-2], "--steps", 3, "--eval-examples", 6, "--eval-steps", 1, "--sample-every", 2, "--log-every", 20, "--seed", 5,
         "--out", tmp_path / "run")
    result = json.load(open(tmp_path / "run/result.json"))
    for split in ("iid", "novel"):
        assert set(result[split]["all"]) == {"number", "exact", "adherence", "faithfulness"} and result[split]["all"]["number"] == 6
    assert result["steps"] == 3 and result["images"] == 24 and result["seed"] == 5 and result["flags"]["p_magd"] == 0.5
    model = weights(tmp_path / "run/last.pt")["model"]
    assert result["parameters"] == sum(p.numel() for name, p in model.items() if name != "pos_embed")
    assert result["seconds"] > 0 and result["device"] and result["preset"] == "toy"
    line = json.loads(open(tmp_path / "run/log.jsonl").readline())
    assert len(line["loss_by_t"]) == 4 and 0 <= line["masked_tokens"] <= line["masked_samples"] <= 1 and line["images_per_s"] > 0
    assert (tmp_path / "run/samples/step_000002.png").exists() and (tmp_path / "run/samples/final.png").exists()
    pytest.importorskip("matplotlib")
    assert Image.open(tmp_path / "run/loss.png").width > 400


def test_every_preset_names_only_flags_and_overrides_work(monkeypatch):
    for preset, values in train.PRESETS.items():
        real = ["--init", "omnigen:folder", "--data", "pairs.jsonl"] if preset == "omnigen" else []
        monkeypatch.setattr("sys.argv", ["train.py", "--preset", preset, *real])
        flags = vars(train.parse_flags(train.PRESETS, train.LORA))
        assert {key: flags[key] for key in values} == values
        monkeypatch.setattr("sys.argv", ["train.py", "--preset", preset, *real, "--steps", "7"])
        assert train.parse_flags(train.PRESETS, train.LORA).steps == 7


def test_bad_flags_are_one_clear_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    cases = [(["--steps", "-3"], "-3 is not in [1, "), (["--tau", "1.5"], "1.5 is not in [0, 1]"), (["--batch", "many"], "--batch"),
             (["--size", "18", "--data", "x.jsonl"], "not a multiple of --patch"), (["--heads", "5"], "twice --heads"),
             (["--out", str(tmp_path / "file/run")], "cannot write there"), (["--data", str(tmp_path / "none.jsonl")], "no such file"),
             (["--resume", "--out", str(tmp_path)], "no such checkpoint"), (["--preset", "large"], "invalid choice")]
    for arguments, message in cases:
        monkeypatch.setattr("sys.argv", ["train.py", "--out", str(tmp_path / "run"), *arguments])
        with pytest.raises((InputError, SystemExit)) as error:
            train.main()
        assert message in str(error.value) and "\n" not in str(error.value), (arguments, str(error.value))


def test_a_run_is_neither_overwritten_nor_resumed_as_another(tmp_path):
    start = [*SMALL, "--steps", 2, "--out", tmp_path / "run"]
    call(train, *start)
    with pytest.raises(InputError, match="already holds a run"):
        call(train, *start)
    with pytest.raises(InputError, match="started with --tau 0.7"):
        call(train, *start, "--tau", 0.5, "--resume")
    state = weights(tmp_path / "run/last.pt")
    torch.save({**state, "words": state["words"][::-1]}, tmp_path / "run/last.pt")
    with pytest.raises(InputError, match="shapes has changed since it was started"):
        call(train, *start, "--resume")


def test_signals_save_and_a_longer_run_goes_on(tmp_path, capsys):
    """SLURM, spot machines and docker send SIGTERM or SIGUSR1; both do what Ctrl-C does."""
    start = [*SMALL, "--steps", 100000, "--save-every", 100000, "--sample-every", 100000, "--log-every", 5, "--out", tmp_path]
    steps = []
    for number, more in ((signal.SIGTERM, []), (signal.SIGUSR1, ["--resume"])):
        process = subprocess.Popen([sys.executable, "train.py", *map(str, start), *more], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        log, before = tmp_path / "log.jsonl", len(steps) and steps[-1]
        while not log.exists() or not (lines := log.read_text().splitlines()) or json.loads(lines[-1])["step"] <= before:
            time.sleep(0.1)
        process.send_signal(number)
        assert "is saved. Continue with --resume." in process.communicate(timeout=60)[0] and process.returncode == 130
        steps.append(weights(tmp_path / "last.pt")["step"])
    assert 0 < steps[0] < steps[1]


def test_checkpoints_that_stay_and_more_steps(tmp_path, capsys):
    start = [*SMALL, "--eval-steps", 1, "--save-every", 3, "--keep-every", 2, "--warmup", 1, "--out", tmp_path]
    call(train, *start, "--steps", 4)
    kept = {step: weights(tmp_path / f"step_{step:06d}.pt") for step in (2, 4)}
    assert [state["step"] for state in kept.values()] == [2, 4] and not (tmp_path / "step_000003.pt").exists()
    assert not kept[2]["model"]["x_embedder.proj.weight"].equal(kept[4]["model"]["x_embedder.proj.weight"])
    load_checkpoint(tmp_path / "step_000002.pt")
    call(train, *start, "--steps", 6, "--resume")
    assert "6 steps instead of 4: the learning rate goes from 0.00 to 0.35 of its highest value" in capsys.readouterr().out
    assert [json.loads(line)["step"] for line in open(tmp_path / "log.jsonl")][-1] == 6
    assert weights(tmp_path / "step_000002.pt")["step"] == 2
    with pytest.raises(InputError, match="started with --steps 6; resume it with the same"):
        call(train, *start, "--steps", 5, "--resume")


def pairs_of_two(folder, images=("a", "b", "b")):
    for name, color in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (16, 16), color).save(folder / f"{name}.png")
    rows = [{"instruction": "make it blue", "input_images": ["a.png"], "output_image": f"{name}.png"} for name in images]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pairs.jsonl"


def test_a_run_is_not_resumed_on_other_data(tmp_path):
    pairs = pairs_of_two(tmp_path)
    start = [*SMALL, "--eval-steps", 1, "--data", pairs, "--size", 16, "--steps", 1, "--out", tmp_path / "run"]
    call(train, *start)
    call(train, *start, "--resume")
    rows = pairs.read_text()
    for change in (rows + rows.splitlines()[0], rows.replace("b.png", "a.png", 1), rows.replace('{', '{"plan": ["make"], ', 1)):
        pairs.write_text(change)
        with pytest.raises(InputError, match="have changed since this run was started"):
            call(train, *start, "--resume")
    pairs.write_text(rows)
    Image.effect_noise((16, 16), 50).save(tmp_path / "a.png")              # another picture under the same name
    with pytest.raises(InputError, match="have changed since this run was started"):
        call(train, *start, "--resume")


def test_bad_rows_are_left_out_only_as_far_as_the_flag_says(tmp_path, capsys):
    pairs = pairs_of_two(tmp_path, ("a", "broken", "b"))
    (tmp_path / "broken.png").write_text("no picture")
    pairs.write_text(pairs.read_text() + "{no row\n")
    start = [*SMALL, "--eval-steps", 1, "--data", pairs, "--size", 16, "--steps", 2, "--log-every", 1]
    with pytest.raises(InputError, match="pairs.jsonl:4: not JSON"):
        call(train, *start, "--out", tmp_path / "none")
    with pytest.raises(InputError, match="pairs.jsonl:4: not JSON .*; 1 bad rows were skipped before"):
        call(train, *start, "--skip-bad", 1, "--out", tmp_path / "one")
    capsys.readouterr()
    call(train, *start, "--skip-bad", 2, "--out", tmp_path / "two")
    printed = capsys.readouterr().out
    assert f"skipped: {pairs}:4: not JSON" in printed and f"skipped: {pairs}:2: {tmp_path}/broken.png" in printed
    assert json.load(open(tmp_path / "two/result.json"))["skipped_rows"] == 2
    assert json.loads(open(tmp_path / "two/log.jsonl").readline())["skipped_rows"] == 2


def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path):
    """A limit on the size of files fails the way a full disk does."""
    (tmp_path / "last.pt").write_text("old")
    code = """if True:
        import resource, signal, sys, torch
        from common.files import InputError, append, write_json, writing
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        def save():
            with writing("last.pt", "wb") as file:
                torch.save({"a": torch.zeros(10**6)}, file)
        for write in (save, lambda: write_json("new.json", "x" * 10**6), lambda: append("log.jsonl", "x" * 10**6)):
            try:
                write()
            except InputError as error:
                print(error)"""
    done = run("-c", code, check=0, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.stdout.splitlines() == ["last.pt: cannot be written (File too large); the one that was there is still whole",
                                        "new.json: cannot be written (File too large)",
                                        "log.jsonl: cannot be written (File too large); what was there is whole"]
    assert (tmp_path / "last.pt").read_text() == "old" and {path.name for path in tmp_path.iterdir()} <= {"last.pt", "log.jsonl"}


def test_space_for_checkpoints_is_looked_at_before_the_first_step(tmp_path, monkeypatch):
    call(train, *SMALL, "--eval-steps", 1, "--steps", 1, "--out", tmp_path / "run")
    two = 2 * (tmp_path / "run/last.pt").stat().st_size
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": two // 2}))
    with pytest.raises(InputError, match=f"0.00 GB are free there; two checkpoints, .* need {two / 1e9:.2f} GB"):
        call(train, *SMALL, "--steps", 1, "--out", tmp_path / "other")
    assert not (tmp_path / "other/log.jsonl").exists()


def textured_pairs(folder, n=16, size=32):
    """Pairs that look like photographs: smooth colour fields with grain, of different sizes, and three kinds of edit."""
    rng, rows = np.random.default_rng(0), []
    for k in range(n):
        height, width = rng.integers(size, 2 * size, 2)
        field = Image.fromarray(rng.integers(0, 255, (4, 4, 3)).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        image = Image.fromarray((np.asarray(field) + rng.normal(0, 6, (height, width, 3))).clip(0, 255).astype(np.uint8))
        name, edit = [("blur it", lambda i: i.filter(ImageFilter.GaussianBlur(2))), ("turn it around", lambda i: i.rotate(180)),
                      ("make it darker", lambda i: i.point(lambda v: v // 2)), ("swap its colors", lambda i: Image.merge("RGB", i.split()[::-1]))][k % 4]
        image.save(folder / f"{k}_in.png")
        edit(image).save(folder / f"{k}_out.png")
        rows.append(json.dumps({"instruction": name, "input_images": [f"{k}_in.png"], "output_image": f"{k}_out.png"}))
    (folder / "pairs.jsonl").write_text("\n".join(rows))


@pytest.mark.slow
def test_it_overfits_sixteen_pairs_of_images_and_sample_reproduces_the_edits(tmp_path):
    textured_pairs(tmp_path)
    run("train.py", "--data", tmp_path / "pairs.jsonl", "--size", 32, "--width", 96, "--mlp", 192, "--batch", 16, "--steps", 250,
        "--p-drop", 0, "--out", tmp_path / "run", check=0, OMP_NUM_THREADS="2")
    result = json.load(open(tmp_path / "run/result.json"))
    assert result["l1"] < 0.25 * result["l1_identity"] and result["l1"] < 0.05, result
    run("sample.py", "--ckpt", tmp_path / "run/last.pt", "--image", tmp_path / "1_in.png", "--prompt", "turn it around", "--out",
        tmp_path / "edit.png", check=0)
    edit, target, source = (np.asarray(Image.open(tmp_path / name).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC), float)
                            for name in ("edit.png", "1_out.png", "1_in.png"))
    assert np.abs(edit - target).mean() < 0.25 * np.abs(source - target).mean()


def test_muon_is_the_muon_of_torch():
    ours, theirs = ([torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(k)))
                     for k, shape in enumerate([(48, 16), (16, 16), (16, 32)])] for _ in range(2))
    optimizers = Muon(ours, 0.02, weight_decay=0.1, dtype=torch.bfloat16), torch.optim.Muon(theirs, 0.02, weight_decay=0.1, momentum=0.9)
    for step in range(3):
        for k, (p, q) in enumerate(zip(ours, theirs)):
            p.grad = q.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + k))
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, atol=5e-4, rtol=0)                # bf16 inside; a step moves by about 0.005


# ------------------------------------------------------------------------------------------- validation

STILL = [*SMALL, "--steps", "2", "--warmup", "0", "--lr", "1e-30", "--muon-lr", "0"]


def validated(folder, *flags):
    call(train, *STILL, "--sample-every", "2", "--log-every", "9", *flags, "--out", folder)
    return [json.loads(line) for line in open(folder / "log.jsonl")]


def test_equal_weights_have_equal_validation_losses_in_every_run(tmp_path):
    """Whatever the seed, the masks, the batch and the noise of training are."""
    call(train, *SMALL, "--steps", "5", "--warmup", "0", "--out", tmp_path / "base")          # a fresh one's output is zero
    init = ["--init", tmp_path / "base/last.pt"]
    one = validated(tmp_path / "one", *init, "--seed", "1")
    two = validated(tmp_path / "two", *init, "--seed", "2", "--p-magd", "0", "--max-pauses", "8", "--batch", "4", "--max-gap", "0")
    assert one[0]["loss"] != two[0]["loss"]
    values = {line[key] for line in one + two for key in ("val_loss", "val_loss_averaged")}
    assert len(values) == 1 and all(line["val_exact"] == 0 for line in one + two)
    other = validated(tmp_path / "other", "--seed", "3")                                   # other weights
    assert other[0]["val_loss"] not in values


def test_a_file_can_be_held_out(tmp_path, capsys):
    call(pairs, "export", "--n", 12, "--out", tmp_path)
    data = ["--data", tmp_path / "pairs.jsonl", "--size", 16]
    rows = (tmp_path / "pairs.jsonl").read_text().splitlines()
    (tmp_path / "few.jsonl").write_text("\n".join(rows[:4]))
    log = validated(tmp_path / "run", *data, "--val-data", tmp_path / "few.jsonl")
    assert all(line["val_loss"] > 0 and "val_exact" not in line for line in log)
    assert "val_loss" in capsys.readouterr().err                                            # in the bar
    assert not any("val_loss" in line for line in validated(tmp_path / "none", *data))      # nothing is held out
    (tmp_path / "odd.jsonl").write_text(json.dumps({**json.loads(rows[0]), "instruction": "make it greenish"}))
    with pytest.raises(InputError, match="unknown word 'greenish'"):
        validated(tmp_path / "odd", *data, "--val-data", tmp_path / "odd.jsonl")
