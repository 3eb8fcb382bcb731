"""Files of many rows: rows parsed when their turn comes, a check that is remembered, and when it is not."""
import json
import os
import pickle
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from common.files import InputError
from common.rows import BadRows, Rows, good_rows
from data import shuffled
from pretrained import latents
from pretrained.latents import Index, Latents, fingerprint


@pytest.fixture
def pairs(tmp_path):
    """Five rows, the last two without input images, and a cache of their latents, as two processes write it."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/cache.json").write_text("{}")
    rows = []
    for k in range(5):
        for name in (f"{k}.jpg", f"{k}_new.jpg"):
            (tmp_path / name).write_text(f"the bytes of {name}")
            add_latent(tmp_path, name, k, (2, 1, k + 1), process=k % 2)
        rows.append({"instruction": f"édit {k}", "input_images": [f"{k}.jpg"] if k < 3 else [], "output_image": f"{k}_new.jpg"})
    (tmp_path / "pairs.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    return tmp_path / "pairs.jsonl"


def add_latent(folder, name, value, shape, version=1, process=0):
    """The latent of an image: mean `value`, no deviation."""
    numbers, index = (folder / f"cache/{process}.{end}" for end in ("f16", "jsonl"))
    data = np.full(shape, value, np.float16)
    data[1:] = 0
    entry = {"key": name, "file": numbers.name, "offset": numbers.stat().st_size if numbers.exists() else 0, "shape": shape,
             "made_of": [fingerprint(folder / name)], "version": version, "crc32": latents.zlib.crc32(data.tobytes())}
    for path, raw in ((numbers, data.tobytes()), (index, json.dumps(entry).encode() + b"\n")):
        with open(path, "ab") as file:
            file.write(raw)


def open_latents(pairs, bad=None):
    return Latents(pairs, pairs.parent / "cache", {}, bad=bad)


def content(data):
    """All that a training sees of it."""
    return [(sample.instruction, sample.target.tolist(), [image.tolist() for image in sample.images], data.bucket(k))
            for k in range(12) for sample in [data.sample(k)]]


@pytest.fixture
def checks(monkeypatch):
    """How often the rows are checked: a list that grows by one each time."""
    times = []
    check = Latents.check
    monkeypatch.setattr(Latents, "check", lambda self, bad: times.append(1) or check(self, bad))
    return times


def test_a_row_read_late_is_the_row_that_was_checked(tmp_path):
    path = tmp_path / "pairs.jsonl"
    line = '{"instruction": "%s", "output_image": "a.png"}'
    path.write_bytes("\ufeff".encode() + "\r\n \n".join(line % text for text in ("ä", "b", "\U0001f600", "d")).encode())
    rows = Rows(path)
    assert [(place[0], row) for place, row in good_rows(path)] == list(rows) == [rows[k] for k in range(4)]
    assert [number for number, _ in rows] == [1, 3, 5, 7] and rows[-1][1]["output_image"] == str(tmp_path / "a.png")
    with open(path, "ab") as file:
        file.write(b"\nmore")                              # what is added does not matter ...
    assert list(pickle.loads(pickle.dumps(rows))) == list(rows)
    path.write_bytes(path.read_bytes().replace(b'"b"', b'"c"'))
    assert rows[2][1]["instruction"] == "\U0001f600"
    with pytest.raises(InputError, match="pairs.jsonl:3: this line has changed since the program was started"):
        rows[1]                                            # ... and what is changed is not used
    with pytest.raises(InputError, match="pairs.jsonl:8: not JSON"):
        Rows(path)


def test_the_order_of_an_epoch_is_that_of_earlier_versions():
    order = [shuffled(range(9), 3, index) for index in range(18)]
    assert order == [random.Random(seed).sample(range(9), 9)[k] for seed in ("3/0", "3/1") for k in range(9)]


def test_a_second_start_parses_nothing_and_sees_the_same(pairs, checks, monkeypatch):
    first = open_latents(pairs)
    monkeypatch.setattr(latents, "good_rows", None)
    monkeypatch.setattr(latents, "json_lines", None)
    second = open_latents(pairs)
    assert len(checks) == 1 and second.checksum == first.checksum and content(second) == content(first)
    assert {str(first.sample(k).instruction) for k in range(12)} == {f"édit {k}" for k in range(5)}


def test_what_has_changed_is_checked_anew(pairs, checks, monkeypatch):
    cache, first = pairs.parent / "cache", open_latents(pairs)
    pairs.write_text(pairs.read_text().replace("dit 1", "dit 7"))
    second = open_latents(pairs)
    assert len(checks) == 2 and second.checksum != first.checksum and any("7" in second.sample(k).instruction for k in range(12))
    with open(cache / "0.jsonl", "a") as file:
        file.write('{"key": "half a li')                   # a process is writing
    assert open_latents(pairs).checksum == second.checksum and len(checks) == 3
    monkeypatch.setattr(latents, "CODE", "a release with other rules")
    assert open_latents(pairs).checksum == second.checksum and len(checks) == 4
    os.utime(pairs.parent / "1.jpg", (1, 1))               # copied, say: its bytes are read, once
    assert [open_latents(pairs).checksum for _ in range(2)] == [second.checksum] * 2 and len(checks) == 5
    (pairs.parent / "4_new.jpg").write_text("another one, 4_new.jpg")
    for _ in range(2):
        with pytest.raises(InputError, match="pairs.jsonl:9: 4_new.jpg has changed since its latent was made; run `python -m"):
            open_latents(pairs)


def test_the_checksum_is_of_the_images_not_of_the_cache(pairs):
    first = open_latents(pairs)
    for path in (pairs.parent / "cache").glob("[01].*"):
        path.unlink()
    for k in range(5):
        for name in (f"{k}_new.jpg", f"{k}.jpg"):
            add_latent(pairs.parent, name, k, (2, 1, k + 1), process=3)
    assert open_latents(pairs).checksum == first.checksum


def test_the_newest_version_of_a_latent_counts_in_whatever_order_it_is_read(pairs):
    for version, value, process in ((3, 30, 0), (2, 20, 1), (1, 10, 2)):
        add_latent(pairs.parent, "2_new.jpg", value, (2, 1, 7), version, process)
    index = Index(pairs.parent / "cache")
    assert len(index.entries) == 10 and index.entries["version"][index.find("2_new.jpg")] == 3 and index.find("5.jpg") is None
    data = open_latents(pairs)
    samples = [data.sample(k) for k in range(12) if data.row(k)[0] == 5]
    assert samples and all(sample.target.tolist() == [[[30.0] * 7]] for sample in samples)


def test_a_damaged_memory_is_not_trusted(pairs, checks):
    expected = content(open_latents(pairs))
    [kept] = (pairs.parent / "cache").glob("*.npz")
    raw = kept.read_bytes()
    for place in [*range(0, len(raw), 331), -1]:
        damaged = bytearray(raw)
        damaged[place] ^= 255
        kept.write_bytes(damaged)
        assert content(open_latents(pairs)) == expected
    assert len(checks) > 5
    for damaged in (b"", raw[:len(raw) // 2], pickle.dumps({"key": 1})):
        kept.write_bytes(damaged)
        checks.clear()
        assert content(open_latents(pairs)) == expected and len(checks) == 1


def test_what_cannot_be_remembered_is_checked_each_time_and_said(pairs, checks, capsys):
    (pairs.parent / "cache/pairs.jsonl.npz").mkdir()       # as a folder that cannot be written; root may write anywhere
    assert content(open_latents(pairs)) == content(open_latents(pairs)) and len(checks) == 2
    assert capsys.readouterr().out.count("the rows will be checked again at the next start") == 2
    assert sorted(path.name for path in (pairs.parent / "cache").iterdir()) == ["0.f16", "0.jsonl", "1.f16", "1.jsonl", "cache.json",
                                                                               "pairs.jsonl.npz"]


def test_bad_rows_are_refused_or_named_at_every_start(pairs, checks, capsys):
    pairs.write_text(pairs.read_text() + '{"instruction": 3}\n')
    for n in (1, 2):
        with pytest.raises(InputError, match="pairs.jsonl:10: the key 'output_image' is missing"):
            open_latents(pairs)
        bad = BadRows(1, print)
        data = open_latents(pairs, bad)
        assert bad.skipped == 1 and len(data.rows) == 5 and len(checks) == 2 * n
        assert capsys.readouterr().out.count("skipped: ") == 1


def test_several_processes_may_start_at_once(pairs):
    with ThreadPoolExecutor(4) as pool:                    # each writes a file of its own name; threads stand for processes
        contents = list(pool.map(lambda _: content(open_latents(pairs)), range(8)))
    assert all(one == contents[0] for one in contents)
    assert len(list((pairs.parent / "cache").iterdir())) == 6                                   # nothing is left behind


@pytest.mark.parametrize("line", [{"key": "a"}, {"crc32": "x"}, {"version": None}, {"shape": [4]}, {"made_of": [[None, 3]]}, {"crc32": -1}])
def test_a_line_of_an_index_that_is_none_is_named(pairs, line):
    index = pairs.parent / "cache/0.jsonl"
    whole = json.loads(index.read_text().splitlines()[0])
    index.write_text(index.read_text() + json.dumps({**whole, **line} if len(line) and "key" not in line else line) + "\n")
    with pytest.raises(InputError, match="0.jsonl:7: not a line of this version of the program"):
        open_latents(pairs)


def test_workers_share_the_places_of_the_rows(pairs):
    """What a worker gets is arrays: no object for each row, whose count of references would be written to."""
    data = open_latents(pairs)
    large = [value for value in [*vars(data).values(), *vars(data.rows).values()] if isinstance(value, (list, tuple, dict, set))]
    assert all(len(value) <= 5 for value in large) and torch.is_tensor(data.sample(0).target)
