"""Comparisons of runs: what the arms of an experiment share, and the tables made of their results."""
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, SMALL, call, tiny_model

import metrics
import sample
import train
from data import Shapes, Words, world_words
from model import Config, InputError
from sample import evaluate

sys.path.insert(0, str(ROOT / "tools"))
import study  # noqa: E402
from study import compare, interval  # noqa: E402

FLAGS = ["--data", "simple", *SMALL, "--steps", "1", "--warmup", "0", "--lr", "1e-30", "--muon-lr", "0", "--ema", "0"]


@pytest.fixture
def parsed(monkeypatch):
    def parse(*flags):
        monkeypatch.setattr(sys, "argv", ["train.py", *flags])
        return train.parse_flags()
    return parse


def test_arms_share_data_order_noise_and_times(parsed):
    """What the network is asked is drawn before any option of the paper is looked at: a plan only makes a prompt longer."""
    dataset = Shapes("hard")
    tokenizer, cfg = Words(dataset.words), Config(patch=4, channels=3)
    arms = [(), ("--p-magd", "0"), ("--p-plan", "0.5"), ("--tau", "0", "--r-mask", "0.5"), ("--corruption", "mask"),
            ("--corruption", "mask-noise", "--mask-token", "zero"), ("--prediction", "x")]
    batches = [train.MicroBatches(parsed("--preset", "small", *arm), dataset, tokenizer, cfg)[tuple(range(16))] for arm in arms]
    for (batch, draws, _), arm in zip(batches[1:], arms[1:]):
        assert batch.x1.equal(batches[0][0].x1) and all(a.equal(b) for a, b in zip(draws, batches[0][1]))
        assert all(a.equal(b) for a, b in zip(batch.condition.images, batches[0][0].condition.images, strict=True))
        if "--p-plan" not in arm:
            assert batch.condition.ids.equal(batches[0][0].condition.ids)
    assert batches[2][0].condition.ids.shape[1] > batches[0][0].condition.ids.shape[1]     # the plans are there


def test_arms_start_from_the_same_weights(tmp_path):
    """With a learning rate of almost nothing, a step leaves the initial weights: from scratch, and from another run."""
    def weights(name, *flags):
        call(train, *FLAGS, *flags, "--out", tmp_path / name)
        return torch.load(tmp_path / name / "last.pt", weights_only=True)["model"]
    fresh, masked = weights("fresh", "--p-magd", "0"), weights("masked", "--p-magd", "0.5")
    assert all((fresh[key] - masked[key]).abs().max() < 1e-20 for key in fresh)
    other = weights("other", "--seed", "1")
    assert not other["x_embedder.proj.weight"].equal(fresh["x_embedder.proj.weight"])
    tuned = weights("tuned", "--data", "hard", "--init", str(tmp_path / "other" / "last.pt"))
    assert all((tuned[key] - other[key]).abs().max() < 1e-20 for key in other)


def test_other_weights_to_start_from_are_refused(tmp_path):
    call(train, *FLAGS, "--out", tmp_path / "one")
    for flags, message in ((["--heads", "4"], "heads 2 instead of 4"), (["--prediction", "x"], "prediction velocity instead of x")):
        with pytest.raises(InputError, match=message):
            call(train, *FLAGS, *flags, "--init", tmp_path / "one" / "last.pt", "--out", tmp_path / "two")
    with pytest.raises(InputError, match="no such checkpoint"):
        call(train, *FLAGS, "--init", tmp_path / "none.pt", "--out", tmp_path / "three")


@pytest.mark.parametrize("flags, message", [(["--corruption", "mask-noise"], "needs --mask-token zero"),
                                            (["--corruption", "mask", "--prediction", "noise"], "needs --prediction velocity")])
def test_corruptions_that_make_no_sense_are_refused(flags, message, parsed):
    with pytest.raises(SystemExit, match=message):
        parsed(*flags)


@pytest.fixture
def arms(tmp_path):
    values = {"plain": {0: 0.50, 1: 0.70, 2: 0.60}, "magd": {0: 0.54, 1: 0.75, 2: 0.66}, "late": {0: 0.50, 1: 0.60}, "one": {2: 0.50}}
    for arm, seeds in values.items():
        for seed, value in seeds.items():
            (tmp_path / arm / str(seed)).mkdir(parents=True)
            scores = {"exact": value, "adherence": 2 * value}
            (tmp_path / arm / str(seed) / "result.json").write_text(json.dumps({"iid": {"all": scores}, "novel": {"all": scores}}))
    return tmp_path


def test_candidates_differ_by_their_seed_and_nothing_else():
    model, words = tiny_model(vocab=len(Words(world_words()))), Words(world_words())
    dataset = Shapes("simple", "iid")
    first, again, other = (evaluate(model, words, dataset, [0, 1], steps=1, seed=seed, progress=False) for seed in (0, 0, 1))
    assert all((a["output"] == b["output"]).all() and (a["output"] != c["output"]).any() for a, b, c in zip(first, again, other))
    assert all(a["sample"].instruction == c["sample"].instruction for a, c in zip(first, other))


def test_a_model_is_not_judged_on_images_of_another_size(monkeypatch):
    monkeypatch.setattr(metrics, "toy_model", lambda *_: (None, None, {"data": "simple", "size": 16, "seed": 0}))
    with pytest.raises(InputError, match="shapes64: its images have 64 pixels a side, those of model.pt 16"):
        call(metrics, "toy", "--ckpt", "model.pt", "--data", "shapes64")


def test_plans_can_be_given(monkeypatch):
    asked = []
    monkeypatch.setattr(sample, "generate", lambda model, words, prompts, images, x0, *_, **__: asked.extend(prompts) or x0)
    dataset = Shapes("hard", "iid")
    edit = next(s for s in map(dataset.sample, range(9)) if s.images)
    for plans in (False, True):
        evaluate(tiny_model(), Words(world_words()), dataset, range(9), plans=plans, progress=False)
    assert f"{edit.instruction} <img><|image_1|></img>" in asked[:9]
    assert f"{edit.instruction} <img><|image_1|></img> " + " ".join(f"{step} <pause>" for step in edit.plan) in asked[9:]


def test_intervals_are_of_paired_differences():
    mean, difference, half = compare({0: 0.54, 1: 0.75, 2: 0.66}, {2: 0.60, 1: 0.70, 0: 0.50})
    assert (mean, difference) == pytest.approx((0.65, 0.05))
    assert half == pytest.approx(4.303 * 0.01 / math.sqrt(3))              # deviation 0.01, two degrees of freedom
    assert compare({0: 1.0, 1: 3.0, 9: 50.0}, {0: 0.0, 1: 1.0})[:2] == (2.0, 1.5)          # of the seeds that both have
    assert math.isnan(interval([1.0])[1])


def test_table(arms, monkeypatch, capsys):
    monkeypatch.chdir(arms)
    call(study, "table", "plain", "magd", "late", "--columns", "iid/all/exact", "--figure", "figure.png")
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:5] == ["| plain | 0.600 ± 0.248 |", "| magd | **0.650 (+0.050 ± 0.025)** |", "| late | 0.550 (-0.050 ± 0.635) |"]
    assert "2 to 3 seeds" in lines[6] and Path("figure.png").exists()
    call(study, "table", "one", "plain", "--columns", "iid/all/exact")   # one seed has no interval
    assert capsys.readouterr().out.splitlines()[2:4] == ["| one | 0.500 |", "| plain | 0.600 (+0.100) |"]
    call(study, "table", "plain", "magd:late", "--columns", "iid/all/exact", "iid/all/adherence", "novel/all/exact")
    lines = capsys.readouterr().out.splitlines()                           # more columns than rows: turned
    assert lines[0] == "|  | plain | magd against late |"
    assert lines[2] == "| iid, all, exact | 0.600 ± 0.248 | 0.645 (+0.095 ± 0.699) |"
    call(study, "table", "plain", "magd", "--within", "--columns", "iid/all/exact", "twice:iid/all/adherence", "--figure", "figure.png")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "|  | iid, all, exact | twice |" and lines[3] == "| magd | 0.650 ± 0.262 | **1.300 (+0.650 ± 0.262)** |"
    assert lines[5] == "*3 seeds; mean ± 95% interval; in brackets the paired difference to iid, all, exact; bold: zero is outside.*"
    with pytest.raises(InputError, match="plain/0/result.json: no 'local' of iid/local/exact; there are all"):
        call(study, "table", "plain", "--columns", "iid/local/exact")
    with pytest.raises(InputError, match="no seed in common: 0 in one arm, 7 in the other"):
        compare({"0": 1.0}, {"7": 1.0})
    with pytest.raises(InputError, match="none/figure.png: there is no folder none"):
        call(study, "table", "plain", "--figure", "none/figure.png")
    with pytest.raises(InputError, match="two have one label among x"):
        call(study, "table", "plain", "--columns", "x:iid/all/exact", "x:novel/all/exact")
    call(study, "table", "plain", arms / "plain")                        # two folders of one name are two rows
    assert f"| {arms / 'plain'} |" in capsys.readouterr().out
    with pytest.raises(InputError, match="nothing: no result.json"):
        call(study, "table", "nothing")


def test_report_makes_the_tables_of_a_file_again(arms, monkeypatch):
    monkeypatch.chdir(arms)
    text = "words\n\n<!-- table plain magd --columns iid/all/exact -->\n\n0.999 typed by hand\n\n<!-- end -->\nmore\n"
    Path("results.md").write_text(text)
    call(study, "report", "results.md")
    once = Path("results.md").read_text()
    assert "0.650 (+0.050" in once and "by hand" not in once and once.startswith("words\n") and once.endswith("-->\nmore\n")
    call(study, "report", "results.md")
    assert Path("results.md").read_text() == once


def test_the_tables_of_the_repository_are_those_of_its_results(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "results", tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    for name in ("RESULTS.md", "README.md"):
        text = (ROOT / name).read_text()
        assert "<!-- table" in text
        Path(name).write_text(text)
        call(study, "report", name)
        assert Path(name).read_text() == text


FAKE = """#!/bin/bash
[ "$1" = -c ] && exit 0
echo "$@" >> calls.txt
[ "$1" = tools/study.py ] && [ "$2" = report ] && exit 0
out=$(sed 's/.*--out \\([^ ]*\\).*/\\1/' <<< "$*")
case $out in *.json) echo {} > "$out"; touch "${out%.json}.png";; *.png) echo {} > "${out%.png}.json";; *) [ -e fail ] && exit 1; echo {} > "$out/result.json"; touch "$out/last.pt";; esac
"""


@pytest.fixture
def scripts(tmp_path):
    """The scripts of the experiments, with a Python that only notes how it is called."""
    shutil.copytree(ROOT / "runs", tmp_path / "runs")
    (tmp_path / "python").write_text(FAKE)
    (tmp_path / "python").chmod(0o755)

    def start(*flags, code=0):
        (tmp_path / "calls.txt").write_text("")
        done = subprocess.run(["bash", "runs/toy_all.sh", *flags], cwd=tmp_path, capture_output=True, text=True,
                              env={**os.environ, "PYTHON": str(tmp_path / "python"), "SEEDS": "3"})
        assert done.returncode == code, done.stdout + done.stderr
        return (tmp_path / "calls.txt").read_text().splitlines()
    return start


def test_the_scripts_train_every_arm_from_the_base_of_its_own_seed_and_width(scripts, tmp_path):
    calls = scripts()
    def flags(name):
        found = [call for call in calls if call.startswith("train.py") and f"/{name}/3 " in call]
        assert len(found) == 1, name
        return found[0]
    assert "--seed 3 --out out/study/base/3 --data simple --steps 2000 --p-magd 0" in flags("base")
    assert flags("magd").endswith("--steps 400 --lr 3e-3 --muon-lr 0.015 --init out/study/base/3/last.pt --p-magd 0.5")
    assert flags("plain-steps-100").endswith("--p-magd 0 --steps 100")                     # the last of two --steps counts
    assert "--init out/study/base-width-192/3/last.pt --width 192" in flags("plain-width-192")
    for plain, magd in (("plain", "magd"), ("plain-steps-800", "magd-steps-800"), ("plain-width-64", "magd-width-64")):
        assert flags(plain).replace(plain, magd).replace("--p-magd 0", "--p-magd 0.5") == flags(magd)      # one difference
    assert sum("tools/study.py pauses" in call for call in calls) == 4 and calls[-1] == "tools/study.py report RESULTS.md README.md"
    assert sum(call.endswith("--plans") for call in calls) == 2
    assert any("out/study/base-on-hard/3/" in call and call.endswith("--data hard") for call in calls)
    assert any("metrics.py toy --ckpt out/study/plain/3/last.pt" in call and call.endswith("--guidance-interval 0,0.5") for call in calls)
    assert (tmp_path / "results/magd/3/result.json").exists() and (tmp_path / "results/magd/3/pauses.png").exists()
    assert scripts() == ["tools/study.py report RESULTS.md README.md"]         # nothing is done twice


def test_the_scripts_go_on_after_a_kill_and_stop_at_a_failure(scripts, tmp_path):
    (tmp_path / "out/study/base/3").mkdir(parents=True)
    (tmp_path / "out/study/base/3/last.pt").touch()
    assert "train.py --preset small --seed 3 --out out/study/base/3 --resume --data simple" in scripts()[0]
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "fail").touch()
    assert all("/base/" in call for call in scripts(code=124))             # 124: xargs says that a run failed


def test_a_rehearsal_leaves_the_results_alone(scripts, tmp_path):
    calls = scripts("--steps", "5")
    assert all("out/rehearsal/" in call and "out/study" not in call for call in calls)
    assert not (tmp_path / "results").exists() and all(call.endswith("--steps 5") for call in calls if call.startswith("train.py"))


@pytest.mark.slow
def test_a_rehearsal_of_an_experiment(tmp_path):
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for folder in ("runs", "tools"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for script in ("table2", "pauses"):
        done = subprocess.run(["bash", f"runs/{script}.sh", "--steps", "2", "--eval-examples", "2"], cwd=tmp_path, capture_output=True,
                              text=True, env={**os.environ, "SEEDS": "0", "PYTHON": sys.executable})
        assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "out/rehearsal/results/magd/0/pauses.json").read_text())
    assert result["0 pauses"]["all"]["number"] == 4 * 8                    # four seeds
    weights = torch.load(tmp_path / "out/rehearsal/plans/0/last.pt", weights_only=True)["flags"]
    assert weights["p_plan"] == 0.5 and weights["init"] == "out/rehearsal/base/0/last.pt"
