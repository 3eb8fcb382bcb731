"""Scores of real edits, the selection protocol of Table 3, and the averages of an MLLM's judgements."""
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import call
from PIL import Image

import metrics
import sample
from common.files import InputError
from pretrained.judges import load_judges, photo_scores
from sample import choose

FOLDER = Path(__file__).parent / "fixtures/metrics_tiny"
# three items, two candidates each
A = np.array([[0.10, 0.30], [0.20, 0.20], [0.05, 0.00]])
F = np.array([[0.95, 0.80], [0.90, 0.92], [0.99, 0.85]])


def test_the_rules_by_hand():
    table = metrics.protocol(A, F, 0.91, 0.09)
    means = {rule: (row["adherence"]["mean"], row["faithfulness"]["mean"], row["recall"]) for rule, row in table.items()}
    assert means["best adherence"] == pytest.approx(((0.30 + 0.20 + 0.05) / 3, (0.80 + 0.92 + 0.99) / 3, 1))     # a tie: the more faithful
    assert means["best faithfulness"] == pytest.approx(((0.10 + 0.20 + 0.05) / 3, (0.95 + 0.92 + 0.99) / 3, 1))
    assert means["best adherence, faithfulness >= 0.91"] == pytest.approx(((0.10 + 0.20 + 0.05) / 3, (0.95 + 0.92 + 0.99) / 3, 1))
    assert means["best faithfulness, adherence >= 0.09"] == pytest.approx(((0.10 + 0.20) / 2, (0.95 + 0.92) / 2, 2 / 3))
    strict = metrics.protocol(A, F, 0.94, 0.5)
    row = strict["best adherence, faithfulness >= 0.94"]
    assert (row["adherence"]["mean"], row["recall"]) == pytest.approx(((0.10 + 0.05) / 2, 2 / 3))
    assert strict["best faithfulness, adherence >= 0.5"]["recall"] == 0 and strict["best faithfulness, adherence >= 0.5"]["adherence"]["mean"] is None
    assert strict["threshold, else the most faithful"]["faithfulness"]["mean"] == pytest.approx((0.95 + 0.92 + 0.99) / 3)


def test_intervals_cover_the_mean_as_often_as_they_say():
    rng, inside = np.random.default_rng(1), 0
    for _ in range(200):
        row = metrics.protocol(rng.normal(0, 1, (60, 1)), np.ones((60, 1)), 0, -9, resamples=200)["best adherence"]
        inside += row["adherence"]["interval"][0] <= 0 <= row["adherence"]["interval"][1]
    assert 0.88 <= inside / 200 <= 0.99


def rows_of(A, F, pauses=(0, 8), seeds=(0, 1)):
    """Results for the grid pauses x seeds; score k of an item is that of (pauses[k], seed 0); other seeds are a little worse."""
    return [{"id": i, "pauses": p, "seed": s, "adherence": A[i, k] - 0.01 * s, "faithfulness": F[i, k] - 0.01 * s,
             "identity": {"adherence": 0.0, "faithfulness": 1.0}} for i in range(len(A)) for k, p in enumerate(pauses) for s in seeds]


def write(folder, rows):
    folder.mkdir(exist_ok=True)
    (folder / "results.0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_candidate_sets_and_their_control():
    sets, kept, undefined = metrics.candidate_sets(rows_of(A, F), "adherence", "faithfulness")
    assert list(sets) == ["pause counts 0, 8", "seeds 0, 1 (control)", "0 pauses alone", "8 pauses alone"]
    np.testing.assert_allclose(sets["pause counts 0, 8"][0], A)
    np.testing.assert_allclose(sets["seeds 0, 1 (control)"][1], np.stack([F[:, 0], F[:, 0] - 0.01], 1))
    np.testing.assert_allclose(sets["8 pauses alone"][0], A[:, 1:])
    rows = rows_of(A, F)
    rows[0]["adherence"] = None
    _, kept, undefined = metrics.candidate_sets(rows, "adherence", "faithfulness")
    assert [next(iter(item.values()))["id"] for item in kept] == [1, 2] and undefined == 1
    with pytest.raises(InputError, match="item 2 has no candidate of 8 pauses, seed 0"):
        metrics.candidate_sets([row for row in rows_of(A, F) if (row["id"], row["pauses"]) != (2, 8)], "adherence", "faithfulness")


def test_order_of_samples_and_candidates_does_not_matter(tmp_path):
    rng = np.random.default_rng(0)
    rows = rows_of(rng.random((40, 3)).round(1), rng.random((40, 3)).round(1), (0, 8, 16), (0, 1, 2))    # rounded: many ties
    results = []
    for k in range(3):
        folder = write(tmp_path / str(k), rows)
        call(metrics, "select", folder)
        results.append((folder / "selection.json").read_text())
        random.Random(k).shuffle(rows)
    assert results[0] == results[1] == results[2]
    table = (folder / "selection.md").read_text()
    assert "(control)" in table and "| output = source | as it is | 0.0000 | 1.0000 | 1.000 |" in table
    pytest.importorskip("matplotlib")
    picture = np.asarray(Image.open(folder / "selection.png").convert("RGB"))
    assert (picture == (0x1f, 0x77, 0xb4)).all(axis=2).sum() > 100     # lines are drawn


@pytest.fixture
def edits(tmp_path):
    """A folder like that of sample.py --data: a copy, a perfect edit, a row without target captions."""
    rng = np.random.default_rng(0)
    rows = []
    for k in range(3):
        source, target = (rng.integers(0, 256, (40, 60, 3), dtype=np.uint8) for _ in range(2))
        for name, image in (("source", source), ("target", target), ("output", source if k == 0 else target)):
            Image.fromarray(image).save(tmp_path / f"{k}_{name}.png")
        rows.append({"id": k, "pauses": 0, "seed": 0, "task": "color" if k else "add", "source_caption": "a photo of a cat",
                     "target_caption": "a red hat", **{key: f"{k}_{key}.png" for key in ("source", "target", "output")}})
    rows[2]["target_caption"] = rows[2]["source_caption"]
    return write(tmp_path, rows)


@pytest.fixture
def dino(tmp_path):
    """The fixture's takes 32 pixels; the protocol needs 224 and 785 positions."""
    safetensors = pytest.importorskip("safetensors.torch")
    pytest.importorskip("tokenizers")
    dino = tmp_path / "dino"
    shutil.copytree(FOLDER / "dino", dino)
    config = json.loads((dino / "config.json").read_text())
    (dino / "config.json").write_text(json.dumps({**config, "image_size": 224}))
    weights = safetensors.load_file(dino / "model.safetensors")
    positions = weights["embeddings.position_embeddings"][:, :1].repeat(1, 785, 1)
    safetensors.save_file({**weights, "embeddings.position_embeddings": positions}, dino / "model.safetensors")
    return dino


def test_scores_of_a_folder(edits, dino, capsys):
    call(metrics, "score", edits, "--clip", FOLDER / "clip", "--dino", dino)
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in open(edits / "scores.jsonl")]
    copy, perfect, alike = rows
    assert copy["copied"] == 1 and copy["clip_dir"] == 0 and copy["identity"]["l1"] == copy["l1"] > 0.1
    assert perfect["copied"] == 0 and perfect["l1"] == 0 and perfect["clip_i"] == pytest.approx(1) and perfect["dino"] == pytest.approx(1)
    assert perfect["identity"]["clip_i"] < 1 and perfect["identity"]["copied"] == 1 and -1 <= perfect["clip_dir"] <= 1
    assert alike["clip_dir"] is None and alike["clip_t"] is not None
    assert "undefined for 1 of 3" in " ".join(printed.split()) and "output against target" in printed and "CLIP clip" in printed
    table = {line.split(" | ")[0]: line.split(" | ") for line in (edits / "scores.md").read_text().splitlines()}
    assert table["| color"][1] == "2" and table["| color"][6] == "0.0000"              # l1
    assert table["| all, output = source"][8] == "1.0000 |"                            # copied
    call(metrics, "score", edits, "--clip", FOLDER / "clip", "--dino", dino, "--against", "source")
    assert json.loads(open(edits / "scores.jsonl").readline())["l1"] == 0              # Emu-Edit's way: the copy is perfect
    lines = (edits / "results.0.jsonl").read_text()
    (edits / "results.1.jsonl").write_text(lines.splitlines()[0] + "\n")                      # an edit made after the scores
    with pytest.raises(InputError, match="scores of 3 edits, but there are 4"):
        metrics.read_results(edits)


# ------------------------------------------------------------------------------------------- sample.py's choice

def photos(*pairs, names=("clip_dir", "dino")):
    return [dict(zip(names, pair)) for pair in pairs]


def test_the_choice_among_photographs_follows_table_3():
    """The most adherent of those with DINO >= 0.91; a tie goes to the more faithful one, then to the earlier."""
    assert choose(photos((0.1, 0.95), (0.3, 0.90), (0.2, 0.92)), None) == (2, True)
    assert choose(photos((0.1, 0.95), (0.3, 0.90), (0.2, 0.92)), 0.9) == (1, True)
    assert choose(photos((0.2, 0.92), (0.2, 0.95), (0.2, 0.95)), None) == (1, True)
    assert choose(photos((0.3, 0.50), (0.1, 0.80), (0.2, 0.70)), None) == (1, False)        # none passes: the most faithful
    assert choose(photos((-0.1, 0.95)), None) == (0, True) and choose(photos((0.5, 0.2)), None) == (0, False)
    assert choose(photos((0.2, 0.92), (0.3, 0.95), names=("clip_t", "dino")), None) == (1, True)
    assert choose(photos((0.2,), (0.3,), names=("clip_t",)), None) == (1, True)             # no source: all are faithful
    assert choose(photos((1, 0.9), (0.5, 1), names=("adherence", "faithfulness")), None) == (0, True)
    assert choose([{"pauses": 0}], None) is None


@pytest.fixture
def candidates(edits, dino, monkeypatch):
    """sample.py with an editor that gives four outputs known beforehand: a copy, two mixtures, the target."""
    source, target = (np.asarray(Image.open(edits / f"1_{name}.png")) for name in ("source", "target"))
    outputs = [source, *(np.uint8((1 - k) * source + k * target) for k in (0.2, 0.6)), target]
    monkeypatch.setattr(sample, "load_editor", lambda *_: sample.Editor(None, None, None, 0, None))
    monkeypatch.setattr(sample, "open_source", lambda path, size: np.asarray(Image.open(path)))
    monkeypatch.setattr(sample, "edit", lambda editor, flags, sources, text, pauses, seed, *_, **__: outputs[seed])
    judges = load_judges(FOLDER / "clip", dino, "cpu")
    def scores(*captions):
        return [photo_scores(judges, source, output, *captions) for output in outputs]
    return scores, ["--init", "omnigen:none", "--seeds", "0,1,2,3", "--clip", FOLDER / "clip", "--dino", dino]


def test_a_photograph_is_chosen_by_clip_and_dino(candidates, edits, capsys):
    scores, command = candidates
    command += ["--image", edits / "1_source.png", "--prompt", "<img><|image_1|></img> a red hat", "--out", edits / "edit.png"]
    captions = ["--source-caption", "a photo of a cat", "--target-caption", "a red hat"]
    for more, expected in ((captions, scores("a photo of a cat", "a red hat")), ([], scores(None, "  a red hat")),
                           ([captions[0], "a red hat", *captions[2:]], scores("a red hat", "a red hat"))):
        least = sorted(own["dino"] for own in expected)[1]                     # three of four pass
        call(sample, *command, *more, "--threshold", least)
        rows = [json.loads(line) for line in open(edits / "edit.jsonl")]
        assert [{key: row[key] for key in own} for row, own in zip(rows, expected)] == expected
        name = "clip_dir" if more == captions else "clip_t"
        assert [row["chosen"] for row in rows].index(True) == choose(expected, least)[0] and name in expected[0]
        printed = capsys.readouterr().out
        assert ("adherence is CLIP-T" in printed) == (name == "clip_t") and f"{name} " in printed and "dino " in printed
    assert expected[0]["dino"] == pytest.approx(1, abs=1e-5)                   # the copy is the most faithful


def test_rows_of_a_file_are_judged_and_chosen(candidates, edits, monkeypatch):
    scores, command = candidates
    monkeypatch.setattr(sample, "omnigen_folder", lambda _: FOLDER / "clip")                # has a config.json
    row = {"instruction": "make it a hat", "input_images": ["1_source.png"], "output_image": None, "source_caption": "a cat"}
    rows = [{**row, "target_caption": "a red hat"}, row]
    (edits / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    call(sample, *command, "--data", edits / "rows.jsonl", "--out", edits / "out")
    chosen = [json.loads(line) for line in open(edits / "out/chosen.0.jsonl")]
    for own, expected in zip(chosen, (scores("a cat", "a red hat"), scores("a cat", "make it a hat")), strict=True):
        best, passed = choose(expected, None)
        assert own["seed"] == best and own["passed"] == passed and own["dino"] == expected[best]["dino"]


def test_one_judge_alone_is_refused(candidates):
    with pytest.raises(SystemExit, match="give both or none"):
        call(sample, "--init", "omnigen:none", "--prompt", "a", "--clip", "folder")


def test_l1_and_l2_by_hand():
    a, b = Image.new("RGB", (2, 2), (255, 0, 0)), Image.new("RGB", (4, 4), (0, 0, 0))
    assert metrics.distance(a, b) == pytest.approx((1 / 3, 1 / 3)) and metrics.distance(Image.new("RGB", (4, 4), (51, 51, 51)), b) == pytest.approx((0.2, 0.04))


def test_bad_input_is_one_clear_line(tmp_path):
    for rows, message in (([], "no results there"), ([{"x": 1}], "results.0.jsonl:1: no id, pauses and seed")):
        with pytest.raises(InputError, match=message):
            metrics.read_results(write(tmp_path / "r", rows))
