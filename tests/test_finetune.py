"""Fine-tuning OmniGen on one's own images: the latent cache, batches of one size, and the whole way from files to an edit."""
import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import ROOT, SMALL, call, omnigen_folder, run, tiny_model
from PIL import Image
from test_model import condition

import train
from common.devices import start_processes
from common.files import InputError
from common.rows import BadRows
from data import make_batch, micro_batches, shuffled
from pretrained import latents
from pretrained.latents import Latents, bucket, cache_header, needed
from pretrained.omnigen import BPE, load_omnigen
from pretrained.vae import load_vae
from sample import load_checkpoint, load_editor
from scale.sharding import averaged, own_part, shard

SIZES = [(128, 128), (150, 100), (100, 150), (128, 96), (200, 128), (64, 64), (90, 130), (300, 200)]


def photographs(folder):
    """Eight pairs of textured images of different sizes, half of them with a mask -> the JSONL file."""
    rng, rows = np.random.default_rng(0), []
    for k, (width, height) in enumerate(SIZES):
        smooth = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        source = (np.asarray(smooth) + rng.normal(0, 6, (height, width, 1))).clip(0, 255).astype(np.uint8)
        mask = np.zeros((height, width), np.uint8)
        mask[:, width // 2:] = 255
        Image.fromarray(source).save(folder / f"{k}.jpg")
        Image.fromarray(np.where(mask[:, :, None] > 0, 255 - source, source)).save(folder / f"{k}_edited.png")
        Image.fromarray(mask).save(folder / f"{k}_mask.png")
        rows.append({"instruction": "invert the right half", "input_images": [f"{k}.jpg"], "output_image": f"{k}_edited.png",
                     "target_caption": f"picture {k}", "plan": ["find the right half", "invert it"]})
        if k % 2:
            rows[-1]["mask"] = f"{k}_mask.png"
    (folder / "0.jpg").rename(folder / "a without b.jpg")              # a name like the key of a masked source
    rows[0]["input_images"] = ["a without b.jpg"]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pairs.jsonl"


@pytest.fixture
def world(tmp_path):
    """A tiny OmniGen folder, image pairs, and their latents."""
    pytest.importorskip("safetensors"), pytest.importorskip("tokenizers")
    folder, pairs = omnigen_folder(tmp_path / "omnigen"), photographs(tmp_path)
    call(latents, pairs, "--init", f"omnigen:{folder}", "--size", 128, "--workers", 0)
    return folder, pairs, tmp_path / "pairs.latents"


def entry_of(data, key):
    """Where the numbers of a latent are, as the data set has it."""
    keys = [part for _, row in data.rows for part, _, _ in needed(row, data.root)]
    return data.latents[keys.index(key)]


def latent_of(data, key, generator):
    return data.latent(key, entry_of(data, key), generator)


def lines(cache):
    """The index of a cache -> {key: line}."""
    return {line["key"]: line for line in map(json.loads, (cache / "0.jsonl").read_text().splitlines())}


def test_buckets():
    assert bucket(1024, 1024, 1024) == (1024, 1024) and bucket(3000, 2000, 1024) == (1024, 704) and bucket(500, 375, 1024) == (512, 384)
    assert bucket(9000, 20, 1024) == (1024, 64) and bucket(1, 1, 1024) == (64, 64)


def test_the_cache_is_what_the_autoencoder_says(world):
    folder, pairs, cache = world
    data = Latents(pairs, cache, cache_header(folder / "vae", 128), p_edit=1.0)
    vae = load_vae(folder / "vae")
    image = torch.from_numpy(np.array(Image.open(pairs.parent / "5.jpg"))).permute(2, 0, 1)[None] / 127.5 - 1     # 64 x 64 as it is
    mean, std = vae.encode(image)
    generator = torch.Generator().manual_seed(3)
    eps = torch.randn(mean.shape[1:], generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(latent_of(data, "5.jpg", generator), (mean + std * eps)[0], atol=5e-3, rtol=0)
    blanked = image * 1.0
    blanked[:, :, :, 32:] = 128 / 127.5 - 1
    mean, _ = vae.encode(blanked)
    entry = lines(cache)["5.jpg without 5_mask.png"]
    stored = np.memmap(cache / entry["file"], np.float16, "r")[entry["offset"] // 2:][:int(np.prod(entry["shape"]))]
    torch.testing.assert_close(torch.from_numpy(stored.astype(np.float32)).view(entry["shape"])[:4], mean[0], atol=5e-3, rtol=0)


def test_an_interrupted_cache_continues(world, capsys):
    folder, pairs, cache = world
    whole = {path.name: path.read_bytes() for path in cache.iterdir()}
    lines = whole["0.jsonl"].decode().splitlines(keepends=True)
    (cache / "0.jsonl").write_text("".join(lines[:7]) + lines[7][:20])                    # killed while it wrote a line ...
    end = json.loads(lines[7])["offset"]
    (cache / "0.f16").write_bytes(whole["0.f16"][:end + 50])                              # ... and numbers without a line
    again = [pairs, "--init", f"omnigen:{folder}", "--size", 128, "--workers", 0]
    call(latents, *again)
    assert f"{len(lines) - 7} new latents, 7 were there" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == whole
    Image.new("RGB", (64, 64)).save(pairs.parent / "5.jpg")                               # an exchanged image is encoded again
    with pytest.raises(InputError, match="pairs.jsonl:6: 5.jpg has changed since its latent was made; run `python -m"):
        Latents(pairs, cache, cache_header(folder / "vae", 128))
    call(latents, *again)
    assert "2 new latents" in capsys.readouterr().out                                           # itself and its masked version
    for name in ("f16", "jsonl"):                                                               # as if process 1 of several had made it
        (cache / f"0.{name}").rename(cache / f"1.{name}")
    (cache / "1.jsonl").write_text((cache / "1.jsonl").read_text().replace("0.f16", "1.f16"))
    Image.linear_gradient("L").resize((64, 64)).save(pairs.parent / "5.jpg")
    call(latents, *again)
    assert "2 new latents" in capsys.readouterr().out
    data = Latents(pairs, cache, cache_header(folder / "vae", 128))
    assert data.names[entry_of(data, "5.jpg")["file"]] == "0.f16"                               # the newest counts
    call(latents, *again)
    assert "0 new latents" in capsys.readouterr().out


def test_a_latent_of_an_image_exchanged_for_one_of_equal_size_is_stale(world, capsys):
    folder, pairs, cache = world
    again = [pairs, "--init", f"omnigen:{folder}", "--size", 128, "--workers", 0]
    old, image = Latents(pairs, cache, cache_header(folder / "vae", 128)), pairs.parent / "3_edited.png"
    raw = image.read_bytes()
    os.utime(image, (1, 1))                                # another time, the same bytes: copied, say
    assert Latents(pairs, cache, cache_header(folder / "vae", 128)).checksum == old.checksum
    image.write_bytes(raw[:-20] + bytes(8) + raw[-12:])    # the last bytes of the pixels
    with pytest.raises(InputError, match="pairs.jsonl:4: 3_edited.png has changed since its latent was made"):
        Latents(pairs, cache, cache_header(folder / "vae", 128))
    Image.new("RGB", Image.open(pairs.parent / "3_edited.png").size).save(image)
    call(latents, *again)
    assert "1 new latents" in capsys.readouterr().out and Latents(pairs, cache, cache_header(folder / "vae", 128)).checksum != old.checksum
    image.unlink()                                         # training needs the latents, not the images
    Latents(pairs, cache, cache_header(folder / "vae", 128))


def test_bad_images_masks_and_latents_are_named_or_left_out(world, tmp_path, capsys, monkeypatch):
    folder, pairs, _ = world
    cache = tmp_path / "other"
    again = [pairs, "--init", f"omnigen:{folder}", "--size", 64, "--workers", 0, "--out", cache]
    Image.new("L", (300, 200), 1).save(tmp_path / "7_mask.png")
    (tmp_path / "2_edited.png").write_text("no picture")
    with pytest.raises(InputError, match="pairs.jsonl:3: .*2_edited.png: not an image"):
        call(latents, *again)
    call(latents, *again, "--skip-bad", 2)
    printed = capsys.readouterr().out
    assert "pairs.jsonl:8: " in printed and "7_mask.png: a mask that marks nothing: its brightest value is 1" in printed
    assert "2 bad rows skipped" in printed
    with pytest.raises(InputError, match="2_edited.png is not in"):
        Latents(pairs, cache, cache_header(folder / "vae", 64))
    data = Latents(pairs, cache, cache_header(folder / "vae", 64), bad=BadRows(2, print))
    assert len(data.edits) == 6 and "skipped: " in capsys.readouterr().out
    margin = np.zeros((200, 300), np.uint8)                # 300 x 200 becomes 64 x 64: the sides are cut off
    margin[:, :9] = 255
    Image.fromarray(margin).save(tmp_path / "7_mask.png")
    with pytest.raises(InputError, match="pairs.jsonl:8: .*7_mask.png: what it marks lies in the margin that is cut off"):
        call(latents, *again, "--skip-bad", 1)
    monkeypatch.setattr("pretrained.vae.VAE.encode", lambda self, image: (torch.full((1, 4, 8, 8), torch.nan),) * 2)
    with pytest.raises(InputError, match="pairs.jsonl:1: the latent of a without b.jpg is not finite: the autoencoder"):
        call(latents, *again[:-1], tmp_path / "third")


def test_a_cache_that_does_not_fit_is_refused(world, tmp_path):
    folder, pairs, cache = world
    header = cache_header(folder / "vae", 128)
    with pytest.raises(InputError, match="made at size 128, not 256"):
        Latents(pairs, cache, {**header, "size": 256})
    with pytest.raises(InputError, match="of another autoencoder"):
        Latents(pairs, cache, {**header, "vae": "0"})
    with pytest.raises(InputError, match="cache.json: there is no such file"):
        Latents(pairs, tmp_path / "none", header)
    data = Latents(pairs, cache, header)
    raw = bytearray((cache / "0.f16").read_bytes())
    raw[entry_of(data, "3.jpg")["offset"] + 9] ^= 1
    (cache / "0.f16").write_bytes(raw)
    with pytest.raises(InputError, match="the latent of 3.jpg is damaged"):
        latent_of(Latents(pairs, cache, header), "3.jpg", torch.Generator())
    pairs.write_text(pairs.read_text() + json.dumps({"instruction": "x", "input_images": [], "output_image": "0_mask.png"}))
    with pytest.raises(InputError, match=r"pairs.jsonl:9: .*0_mask.png is not in .*run `python -m pretrained.latents"):
        Latents(pairs, cache, header)


def test_the_mixture_of_edits_and_text_to_image(world):
    folder, pairs, cache = world
    for p_edit in (0.25, 0.5, 1.0):
        data = Latents(pairs, cache, cache_header(folder / "vae", 128), p_edit=p_edit)
        rows = [data.row(index)[1] for index in range(64)]
        assert sum(bool(row["input_images"]) for row in rows) == 64 * p_edit
        assert {row["instruction"] for row in rows if not row["input_images"]} == \
            ({f"picture {k}" for k in range(8)} if p_edit < 1 else set())
        edits = [row["output_image"] for row in rows if row["input_images"]]
        assert len(set(edits[:8])) == 8                                # each once in an epoch
    pairs.write_text("".join(line.replace("target_caption", "task") + "\n" for line in pairs.read_text().splitlines()))
    with pytest.raises(InputError, match="nothing for text-to-image, 50% .* --p-edit 1"):
        Latents(pairs, cache, cache_header(folder / "vae", 128))


def test_micro_batches_have_one_size_and_miss_no_sample(world):
    folder, pairs, cache = world
    data = Latents(pairs, cache, cache_header(folder / "vae", 128))
    stream = micro_batches(data, 3)
    groups = [next(stream) for _ in range(40)]
    assert all(len({tuple(data.bucket(index)) for index in group}) == 1 for group in groups)
    flat = sorted(sum(groups, ()))
    assert len(flat) == len(set(flat)) == 120 and flat[:100] == list(range(100))
    batch = make_batch(data, groups[0], BPE(folder), 2, 0, 0.0, 1.0, 1.0)
    assert batch.x1.shape == (3, 4, *data.bucket(groups[0][0])[1:])


def test_previews_and_recomputed_blocks_leave_the_training_alone(world, tmp_path):
    """FSDP2 keeps what it gathered for a preview or a validation of the averaged weights: the next step has to see the weights themselves."""
    folder, pairs, _ = world
    flags = ["--preset", "omnigen", "--init", f"omnigen:{folder}", "--data", pairs, "--size", 128, "--batch", 2, "--steps", 4, "--warmup", 0,
             "--lr", 1e-2, "--ema", 0.9, "--eval-steps", 1]
    for name, every, blocks, more in (("with", 2, 1, ["--val-data", pairs]), ("without", 9, 0, [])):
        call(train, *flags, *more, "--sample-every", every, "--checkpointing", blocks, "--out", tmp_path / name)
    log = [json.loads(line) for line in open(tmp_path / "with/log.jsonl")]
    assert [line["step"] for line in log if "val_loss" in line] == [2, 4]
    assert log[-1]["val_loss"] != log[-1]["val_loss_averaged"] and "val_exact" not in log[-1]
    a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("with", "without"))
    assert all(a["model"][key].equal(b["model"][key]) for key in a["model"])
    # any checkpoint can be sampled, with the folder it was started from
    editor = load_editor(SimpleNamespace(ckpt=tmp_path / "with/last.pt", init=f"omnigen:{folder}", pause_token="<|placeholder1|>", compile=False, lora=None),
                         torch.device("cpu"))
    assert all(p.equal(a["ema"][name]) for name, p in editor.model.named_parameters())
    with pytest.raises(InputError, match="last.pt: a fine-tuned OmniGen, .*: add --init omnigen:FOLDER"):
        load_checkpoint(tmp_path / "with/last.pt")


def test_averaged_weights_in_a_sharded_model_that_has_just_run():
    """FSDP2 keeps what the forward of a validation gathered; it must neither be swapped nor be used after the swap."""
    model = tiny_model()
    other = copy.deepcopy(model)
    average = [p.detach() + 0.1 for p in other.parameters()]
    c, x, t = condition(["tt1111t"]), torch.randn(1, 3, 8, 8), torch.tensor([0.4])
    start_processes(True, "cpu")
    try:
        shard(model, torch.device("cpu"), bf16=False)
        average = [own_part(mean, p) for mean, p in zip(average, model.parameters())]
        with torch.no_grad():
            v = model(x, t, c)
            with averaged(model, average):
                v_averaged = model(x, t, c)
            assert v.equal(other(x, t, c)) and model(x, t, c).equal(v)
            for p in other.parameters():
                p.add_(0.1)
            assert v_averaged.equal(other(x, t, c)) and not v_averaged.equal(v)
    finally:
        dist.destroy_process_group()


def test_bad_data_found_by_a_worker_is_one_clear_line(tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no picture")
    rows = [{"instruction": "x", "input_images": ["a.png"], "output_image": f"{name}.png"} for name in "ab"]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seed = next(seed for seed in range(99) if shuffled("ab", seed, 0) == "a")                 # the first sample is read before the workers start
    done = run("train.py", *SMALL, "--data", tmp_path / "pairs.jsonl", "--size", 16, "--workers", 1, "--steps", 3, "--batch", 1, "--seed", seed,
               "--out", tmp_path / "run")
    assert done.returncode == 1 and "pairs.jsonl:2:" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_from_photographs_to_an_edit(tmp_path):
    """The README's commands: latents, 30 steps on two processes, a process dies, resumed on one, exported, sampled."""
    pytest.importorskip("safetensors"), pytest.importorskip("tokenizers")
    folder, pairs = omnigen_folder(tmp_path / "omnigen"), photographs(tmp_path)
    run("-m", "tools.pairs", "check", pairs, check=0)
    run("-m", "pretrained.latents", pairs, "--init", f"omnigen:{folder}", "--size", 128, check=0, processes=2)
    flags = ["--preset", "omnigen", "--init", f"omnigen:{folder}", "--data", pairs, "--size", 128, "--batch", 8, "--steps", 30, "--warmup", 5,
             "--lr", 1e-2, "--save-every", 10, "--eval-steps", 2, "--workers", 1]
    run("train.py", *flags, "--out", tmp_path / "whole", check=0, processes=2)

    out = tmp_path / "killed"
    job = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29911", "train.py",
                            *map(str, flags), "--out", str(out)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (out / "last.pt").exists():
        assert job.poll() is None
        time.sleep(0.05)
    workers = [int(pid) for pid in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()]
    subprocess.run(["kill", "-9", str(workers[-1])], check=True)
    start = time.monotonic()
    printed, _ = job.communicate(timeout=60)                           # no hanging: over within a minute, with a message
    assert job.returncode != 0 and "FAILED" in printed and time.monotonic() - start < 60
    assert not (out / "result.json").exists()
    run("train.py", *flags, "--out", out, "--resume", check=0)         # on one process

    whole, resumed = load_omnigen(tmp_path / "whole/export"), load_omnigen(out / "export")
    start = load_omnigen(folder)
    for (name, a), b, before in zip(whole.state_dict().items(), resumed.state_dict().values(), start.state_dict().values()):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0, msg=name)
        assert name == "pos_embed" or not a.equal(before), name        # everything was trained
    edit = run("sample.py", "--init", f"omnigen:{out / 'export'}", "--image", pairs.parent / "7.jpg", "--prompt", "invert the right half",
               "--steps", 2, "--pauses", "0,2", "--out", tmp_path / "edit.png", check=0)
    assert "288 x 192 pixels; 2 candidates" in edit.stdout and "s a step" in edit.stdout
    assert Image.open(tmp_path / "edit.png").size == (288, 192)


def test_plans_that_cannot_be(tmp_path, world):
    folder, pairs, _ = world
    flags = ["--preset", "omnigen", "--data", pairs, "--size", 128, "--steps", 1, "--out", tmp_path / "run"]
    for more, message in ((["--init", f"omnigen:{folder}", "--batch", 6, "--micro-batch", 4], "--batch 6 is not a multiple of 1 processes x 4"),
                          ([], "--init omnigen:FOLDER"), (["--init", "omnigen:nowhere"], "nowhere/vae/.*no such file. The autoencoder")):
        with pytest.raises((InputError, SystemExit), match=message):
            call(train, *flags, *more)
        if dist.is_initialized():
            dist.destroy_process_group()
