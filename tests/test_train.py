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
    assert done.returncode == 1 and "not finite near step 2" in done.stderr.splitlines()[-1]
    assert (tmp_path / "last.pt").read_bytes() == before


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
        flags = vars(train.parse_flags())
        assert {key: flags[key] for key in values} == values
        monkeypatch.setattr("sys.argv", ["train.py", "--preset", preset, *real, "--steps", "7"])
        assert train.parse_flags().steps == 7


def test_bad_flags_are_one_clear_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    cases = [(["--steps", "-3"], "-3 is not in [1, inf]"), (["--tau", "1.5"], "1.5 is not in [0, 1]"), (["--batch", "many"], "--batch"),
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
