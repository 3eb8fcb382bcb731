"""Comparisons of runs: what the arms of an experiment share, and the tables made of their results."""
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from helpers import ROOT, SMALL, call, tiny_model

import metrics
import train
from common.files import InputError
from data import MicroBatches, Shapes, Words
from experiments import study, tables
from experiments.tables import compare, interval
from experiments.variants import VARIANTS
from metrics import evaluate
from model import Config
from toy.world import world_words

FLAGS = ["--data", "simple", *SMALL, "--steps", "1", "--warmup", "0", "--lr", "1e-30", "--muon-lr", "0", "--ema", "0"]


@pytest.fixture
def parsed(monkeypatch):
    def parse(*flags):
        monkeypatch.setattr(sys, "argv", ["train.py", *flags])
        return train.parse_flags(train.PRESETS, train.LORA)
    return parse


def test_arms_share_data_order_noise_and_times(parsed):
    """What the network is asked is drawn before any option of the paper is looked at: a plan only makes a prompt longer."""
    dataset = Shapes("hard")
    tokenizer, cfg = Words(dataset.words), Config(patch=4, channels=3)
    arms = [(), ("--p-magd", "0"), ("--p-plan", "0.5"), ("--tau", "0", "--r-mask", "0.5"), ("--corruption", "mask"),
            ("--corruption", "mask-noise", "--mask-token", "zero"), ("--prediction", "x")]
    batches = [MicroBatches(parsed("--preset", "toy", *arm), dataset, tokenizer, cfg)[tuple(range(16))] for arm in arms]
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
def arms(tmp_path, monkeypatch):
    """Folders ./ARM/SEED/result.json, which study.py keep has put into experiments/results.jsonl too."""
    monkeypatch.chdir(tmp_path)
    values = {"plain": {0: 0.50, 1: 0.70, 2: 0.60}, "magd": {0: 0.54, 1: 0.75, 2: 0.66}, "late": {0: 0.50, 1: 0.60}, "one": {2: 0.50}}
    for arm, seeds in values.items():
        for seed, value in seeds.items():
            (tmp_path / arm / str(seed)).mkdir(parents=True)
            scores = {"exact": value, "adherence": 2 * value}
            (tmp_path / arm / str(seed) / "result.json").write_text(json.dumps({"iid": {"all": scores}, "novel": {"all": scores}}))
    call(study, "keep", ".")
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
    monkeypatch.setattr(metrics, "generate", lambda model, words, prompts, images, x0, *_, **__: asked.extend(prompts) or x0)
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


def test_table(arms, capsys):
    def lines(*flags):
        capsys.readouterr()
        call(study, "table", *flags)
        return capsys.readouterr().out.splitlines()
    own = lines("plain", "magd", "late", "--columns", "iid/all/exact")
    assert own[2:5] == ["| plain | 0.600 ± 0.248 |", "| magd | **0.650 (+0.050 ± 0.025)** |", "| late | 0.550 (-0.050 ± 0.635) |"]
    assert "2 to 3 seeds" in own[6]
    own = lines("one", "plain", "--columns", "iid/all/exact")              # one seed has no interval
    assert own[2:4] == ["| one | 0.500 |", "| plain | 0.600 (+0.100) |"]
    own = lines("plain", "magd:late", "--columns", "iid/all/exact", "iid/all/adherence", "novel/all/exact")
    assert own[0] == "|  | plain | magd against late |"                    # more columns than rows: turned
    assert own[2] == "| iid, all, exact | 0.600 ± 0.248 | 0.645 (+0.095 ± 0.699) |"
    own = lines("plain", "magd", "--within", "--columns", "iid/all/exact", "twice:iid/all/adherence")
    assert own[0] == "|  | iid, all, exact | twice |" and own[3] == "| magd | 0.650 ± 0.262 | **1.300 (+0.650 ± 0.262)** |"
    assert own[5] == "*3 seeds; mean ± 95% interval; in brackets the paired difference to iid, all, exact; bold: zero is outside.*"


def test_an_arm_is_a_name_in_the_results_or_a_folder_written_with_a_slash(arms, capsys):
    call(study, "table", "plain", "./magd", arms / "plain")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-5].startswith("| plain | 0.600 ± 0.248 |") and lines[-4].startswith("| ./magd | **0.650 (+0.050 ± 0.025)**")
    assert lines[-3].startswith(f"| {arms / 'plain'} | 0.600 (+0.000 ± 0.000)")
    shutil.rmtree("magd")
    call(study, "table", "magd")
    for flags, message in ((["./magd"], "./magd: no SEED/result.json in this folder"),
                           (["nothing"], "nothing: no result of this arm in experiments/results.jsonl"),
                           (["plain", "--kind", "curve"], "plain: no curve of this arm"),
                           (["plain", "--columns", "iid/local/exact"], "plain, result of seed 0: no 'local' of iid/local/exact; there are all"),
                           (["plain", "--columns", "iid/all"], "iid/all is not a number"),
                           (["plain", "--columns", "x:iid/all/exact", "x:novel/all/exact"], "two have one label among x")):
        with pytest.raises(InputError, match=re.escape(message)):
            call(study, "table", *flags)
    with pytest.raises(InputError, match="no seed in common: 0 in one arm, 7 in another"):
        compare({"0": 1.0}, {"7": 1.0})


def test_a_figure_is_made_of_the_same_bytes_each_time(arms):
    pytest.importorskip("matplotlib")
    for name in ("a.png", "b.png"):
        call(study, "table", "plain", "magd", "one", "--figure", f"figures/{name}")
    assert Path("figures/a.png").read_bytes() == Path("figures/b.png").read_bytes()
    columns = ["--columns", "0:iid/all/exact", "8:novel/all/exact"]
    for name in ("c.png", "d.png"):
        call(study, "table", "plain", "one", *columns, "--lines", f"figures/{name}", "pause tokens")
    assert Path("figures/c.png").read_bytes() == Path("figures/d.png").read_bytes()
    with pytest.raises(InputError, match="the label 'iid, all, exact' of a column is not a number"):
        call(study, "table", "plain", "--columns", "iid/all/exact", "--lines", "e.png", "x")
    with pytest.raises(InputError, match="nothing is compared"):
        call(study, "table", "plain", "--figure", "c.png")


def test_report_makes_the_tables_of_a_file_again(arms):
    text = "words\n\n<!-- table plain magd --columns iid/all/exact -->\n\n0.999 typed by hand\n\n<!-- end -->\nmore\n"
    Path("results.md").write_text(text)
    call(study, "report", "results.md")
    once = Path("results.md").read_text()
    assert "0.650 (+0.050" in once and "by hand" not in once and once.startswith("words\n") and once.endswith("-->\nmore\n")
    call(study, "report", "results.md")
    assert Path("results.md").read_text() == once
    Path("results.md").write_text("<!-- table plain -->\n")
    with pytest.raises(InputError, match="results.md: no <!-- end --> after <!-- table plain -->"):
        call(study, "report", "results.md")


def test_a_finished_run_is_kept_once_whoever_keeps_it_at_the_same_time(arms):
    """A repeated run replaces its line; the key of a line comes from the folder."""
    for k in range(8):
        folder = arms / f"out{k}" / f"arm{k}" / "0"
        folder.mkdir(parents=True)
        (folder / "curve.json").write_text(json.dumps({"value": k, "seed": 99}))
    first = Path("experiments/results.jsonl").read_text()
    threads = [threading.Thread(target=tables.keep, args=[Namespace(folder=f"out{k % 8}", results="experiments/results.jsonl")])
               for k in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = [json.loads(line) for line in Path("experiments/results.jsonl").read_text().splitlines()]
    keys = [(row["arm"], row["kind"], row["seed"]) for row in rows]
    assert keys == sorted(set(keys)) and len(rows) == len(first.splitlines()) + 8
    assert {(row["arm"], row["seed"], row["value"]) for row in rows if row["kind"] == "curve"} == {(f"arm{k}", 0, k) for k in range(8)}
    (arms / "out3/arm3/0/curve.json").write_text(json.dumps({"value": 33}))
    call(study, "keep", "out3")
    rows = [json.loads(line) for line in Path("experiments/results.jsonl").read_text().splitlines()]
    assert len(rows) == len(keys) and [row["value"] for row in rows if row["arm"] == "arm3"] == [33]


PAGES = pytest.mark.parametrize("page", ["experiments/RESULTS.md", "related/README.md"])


@PAGES
def test_the_tables_of_the_repository_are_those_of_its_results(page, tmp_path, monkeypatch):
    """Its figures are another matter: they need matplotlib."""
    text = re.sub(r" --figure [^ ]+", "", (ROOT / page).read_text())
    assert "<!-- table" in text
    (tmp_path / "page.md").write_text(text)
    monkeypatch.chdir(ROOT)
    call(study, "report", tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == text


@pytest.mark.parametrize("page, least", [("experiments/RESULTS.md", 20), ("related/README.md", 6)])
def test_the_numbers_in_the_words_are_those_of_the_tables(page, least):
    text = (ROOT / page).read_text()
    words = re.sub(r"<!-- table .*?<!-- end -->", "", text, flags=re.S)
    effects = re.findall(r"[+-]\d\.\d{3} ± \d\.\d{3}", words)
    assert len(effects) > least and all(text.count(effect) > words.count(effect) for effect in effects)
    for picture in re.findall(r"\]\((.*?\.png)\)", text):
        assert ((ROOT / page).parent / picture).exists()


def test_the_shapes_of_the_toy_are_those_of_the_results():
    runs = [json.loads(line) for line in (ROOT / "experiments/results.jsonl").read_text().splitlines()]
    exact = {run["arm"]: f"{run['seed']} | {run['iid']['all']['exact']:.3f} | {run['novel']['all']['exact']:.3f}"
             for run in runs if run["arm"].startswith("width-depth")}
    rows = re.findall(r"\| (\d+) x (\d+) \| (\d+) \| .*?M \| .*? \| (\d) \| ([0-9,]+) \| (.*?) \| (.*?) \|",
                      (ROOT / "experiments/SPEED.md").read_text())
    assert len(rows) == len(exact) == 11
    for width, layers, heads, seed, steps, iid, novel in rows:
        assert exact[f"width-depth-{width}x{layers}-{heads}-heads-{steps.replace(',', '')}"] == f"{seed} | {iid} | {novel}"


FAKE = """#!/bin/bash
[ "$1" = -c ] && exit 0
echo "$@" >> calls.txt
[ "$2" = experiments.study ] && exit 0
out=$(sed 's/.*--out \\([^ ]*\\).*/\\1/' <<< "$*")
what=$(sed 's/.*experiments.measure \\([^ ]*\\) --ckpt \\([^ ]*\\)last.pt.*/\\2\\1.json/' <<< "$*")
case $* in *experiments.measure*) echo {} > "$what";; *"metrics toy"*|*"photographs score"*) echo {} > "$out";; *) [ -e fail ] && exit 1; echo {} > "$out/result.json"; touch "$out/last.pt";; esac
"""
KEEP = "-m experiments.study keep out/study --results experiments/results.jsonl"
REPORT = "-m experiments.study report experiments/RESULTS.md"


@pytest.fixture
def scripts(tmp_path):
    """The scripts of the experiments, with a Python that only notes how it is called."""
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments")
    (tmp_path / "python").write_text(FAKE)
    (tmp_path / "python").chmod(0o755)

    def start(*flags, code=0):
        (tmp_path / "calls.txt").write_text("")
        done = subprocess.run(["bash", "experiments/toy_all.sh", *flags], cwd=tmp_path, capture_output=True, text=True,
                              env={**os.environ, "PYTHON": str(tmp_path / "python"), "SEEDS": "3"})
        assert done.returncode == code, done.stdout + done.stderr
        return (tmp_path / "calls.txt").read_text().splitlines()
    return start


def test_the_scripts_train_every_arm_from_the_base_of_its_own_seed_and_width(scripts):
    calls = scripts()
    def flags(name):
        found = [call for call in calls if " --preset toy " in call and f"/{name}/3 " in call]
        assert len(found) == 1, name
        return found[0]
    assert "--seed 3 --eval-examples 1024 --out out/study/base/3 --data simple " in flags("base")
    assert "--init out/study/base/3/last.pt" in flags("magd") and flags("magd").startswith("-m train --preset toy ")
    assert flags("registers").startswith("-m experiments.variants registers train --preset toy ")
    for plain, magd in (("plain", "magd"), ("plain-1200", "magd-1200")):
        assert flags(plain).replace(plain, magd).replace("--p-magd 0", "--p-magd 0.5") == flags(magd)      # one difference
    assert sum("experiments.measure pauses" in call for call in calls) == 5 and calls[-2:] == [KEEP, REPORT]
    wrong = [call for call in calls if call.endswith("--plans") and "variants wrong-plan,plan-first metrics toy" in call]
    assert len(wrong) == 1 and "--ckpt out/study/plans-first/3/last.pt" in wrong[0]
    assert any("metrics toy --ckpt out/study/plain/3/last.pt" in call and call.endswith("--guidance-interval 0,0.5") for call in calls)
    assert flags("photo-magd").startswith("-m experiments.photographs train --preset toy --seed 3 ")
    assert any("photographs score --ckpt out/study/photo-plain/3/last.pt" in call and call.endswith("--pauses 8") for call in calls)
    named = {name for call in calls if "variants" in call for name in call.split()[2].split(",")}
    assert named == set(VARIANTS)                                          # each is there and each is used
    assert scripts() == [KEEP, REPORT]                                     # nothing is done twice


def test_the_scripts_make_only_the_parts_that_are_named(scripts):
    scripts("base", "masks")
    calls = scripts("guidance", "scaling")
    assert len(calls) == 4 + 3 + 2 and all("guidance-" in call for call in calls[:4]) and calls[-2:] == [KEEP, REPORT]
    assert scripts("table2", code=1) == []


def test_the_scripts_go_on_after_a_kill_and_stop_at_a_failure(scripts, tmp_path):
    (tmp_path / "out/study/base/3").mkdir(parents=True)
    (tmp_path / "out/study/base/3/last.pt").touch()
    assert "--out out/study/base/3 --resume --data simple" in scripts("base")[0]
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "fail").touch()
    *calls, last = scripts("base", "masks", code=124)                                       # 124: xargs says that a run failed
    assert calls and all("/base/" in call for call in calls) and last == KEEP      # what is finished is kept


def test_a_rehearsal_leaves_the_results_alone(scripts):
    calls = scripts("--steps", "5")
    assert all("out/rehearsal" in call and "out/study" not in call for call in calls)
    assert calls[-1] == "-m experiments.study keep out/rehearsal --results out/rehearsal/results.jsonl"
    assert all(call.endswith("--steps 5") for call in calls if "--preset toy" in call)


@pytest.mark.slow
def test_a_rehearsal_of_an_experiment(tmp_path):
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for folder in ("common", "toy", "scale", "pretrained", "experiments"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    done = subprocess.run(["bash", "experiments/toy_all.sh", "base", "masks", "pauses", "--layers", "2", "--keep-every", "1", "--steps", "2",
                           "--eval-examples", "2"], cwd=tmp_path,
                          capture_output=True, text=True, env={**os.environ, "SEEDS": "0", "PYTHON": sys.executable})
    assert done.returncode == 0, done.stdout + done.stderr
    runs = [json.loads(line) for line in (tmp_path / "out/rehearsal/results.jsonl").read_text().splitlines()]
    [own] = [run for run in runs if (run["arm"], run["kind"]) == ("magd", "pauses")]
    assert own["0 pauses"]["all"]["number"] == 4 * 8                       # four seeds
    weights = torch.load(tmp_path / "out/rehearsal/plans/0/last.pt", weights_only=True)["flags"]
    assert weights["p_plan"] == 0.5 and weights["init"] == "out/rehearsal/base/0/last.pt"
    assert (tmp_path / "experiments/results.jsonl").read_bytes() == (ROOT / "experiments/results.jsonl").read_bytes()
