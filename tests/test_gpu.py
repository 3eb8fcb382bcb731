"""What only a GPU can show, in minutes on one CUDA GPU: `pytest -m gpu`. Not run on one yet."""
import gc
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import SMALL, call
from test_lora import check_adapter, world
from test_omnigen import FACTS, VELOCITIES, check_gradients, check_sampling, check_velocity, folder
from test_train import weights

import train
from common import attention
from common.devices import autocast, start_processes
from data import MicroBatches, Shapes, Words, make_loader, world_words
from experiments.bench import condition_of, fresh
from magd import Draws, draw, magd_loss
from model import Config
from pretrained.lora import add_lora
from pretrained.vae import VAE
from sample import Editor, edit
from scale.cost import memory, sampling_memory
from scale.sharding import shard, trained

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA GPU here")]

# a model shaped like OmniGen, of 210M parameters; all but 2% are the blocks'
MIDDLE = dict(vocab=len(Words(world_words())), width=1024, layers=16, heads=16, mlp=2816, grid=64)
PRECISIONS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])


def losses(*command, out):
    """Run train.py in this process -> the losses in its log."""
    call(train, *command, "--log-every", 1, "--out", out)
    return [json.loads(line)["loss"] for line in open(out / "log.jsonl")]


def peak(function):
    """-> bytes that a function needs beside those there before it, at the most; what it returns."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = function()
    return torch.cuda.max_memory_allocated() - before, result


# ------------------------------------------------------------------------------------------- the numbers

@PRECISIONS
@pytest.mark.parametrize("long", [0, 1000])                # attention row by row, in the kernels without a mask, or with one
@pytest.mark.parametrize("case, t", VELOCITIES)
def test_velocities_are_omnigens(case, t, long, dtype, monkeypatch):
    """In bf16 a CPU is up to 0.16 away, of values up to 5."""
    monkeypatch.setattr(attention, "LONG", long)
    check_velocity(case, t, DEVICE, dtype, 1e-4 if dtype == torch.float32 else 0.3)


@PRECISIONS
@pytest.mark.parametrize("low_memory", [True, False])
@pytest.mark.parametrize("case", FACTS["sampling"])
def test_samplings_are_omnigens(case, low_memory, dtype, folder, monkeypatch):
    """With cache, guidance and autoencoder. In bf16 a CPU is up to 0.6 away, of values up to 8."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)     # PyTorch's default for convolutions, not for products
    check_sampling(case, low_memory, folder, DEVICE, dtype, 1e-3 if dtype == torch.float32 else 1.2)


def test_gradients_are_omnigens_and_those_of_an_adapter_pefts():
    check_gradients(DEVICE, 1e-4)
    check_adapter(DEVICE, 1e-4)


# ------------------------------------------------------------------------------------------- training

TOY = [*SMALL, "--eval-steps", 1, "--steps", 8, "--warmup", 0, "--workers", 0]


def test_the_toy_trains_as_on_the_cpu_and_resumes(tmp_path):
    """Not bit for bit: kernels may add in another order, here or there."""
    exact = [*TOY, "--no-bf16"]
    cpu = losses(*exact, "--device", "cpu", out=tmp_path / "cpu")
    assert losses(*exact, "--device", DEVICE, "--keep-every", 4, out=tmp_path / "whole") == pytest.approx(cpu, rel=1e-3)
    (tmp_path / "again").mkdir()                           # killed after step 4
    shutil.copy(tmp_path / "whole/step_000004.pt", tmp_path / "again/last.pt")
    losses(*exact, "--device", DEVICE, "--resume", out=tmp_path / "again")
    whole, again = (weights(tmp_path / name / "last.pt") for name in ("whole", "again"))
    for part in ("model", "ema", "mask_tokens"):
        for name, value in whole[part].items():
            torch.testing.assert_close(again[part][name], value, atol=1e-4, rtol=0, msg=name)
    assert losses(*TOY, "--device", DEVICE, out=tmp_path / "bf16") == pytest.approx(cpu, rel=0.05)


def test_compiled_blocks_train_as_eager_ones(tmp_path):
    eager, compiled = (losses(*TOY, "--no-bf16", "--device", DEVICE, *more, out=tmp_path / f"run{len(more)}") for more in ([], ["--compile"]))
    assert compiled == pytest.approx(eager, rel=1e-3)


def test_batches_of_workers_are_pinned_and_train_the_same(tmp_path):
    dataset = Shapes("shapes")
    flags = SimpleNamespace(steps=3, workers=2, lora=0, seed=0, p_drop=0, p_plan=0, p_masked_source=0, max_gap=4, max_pauses=0, t_mean=0)
    items = MicroBatches(flags, dataset, Words(dataset.words), Config(patch=4, channels=3))
    for batch, draws, _ in make_loader(flags, items, 8, 1, 0, 0, 1, torch.device(DEVICE)):
        condition = batch.condition
        assert all(x.is_pinned() for x in (batch.x1, batch.source, batch.edit, condition.ids, condition.gap, *condition.images, *draws))
    none, two = (losses(*TOY, "--no-bf16", "--device", DEVICE, "--workers", n, out=tmp_path / f"{n}") for n in (0, 2))
    assert two == pytest.approx(none, rel=1e-5)


def test_fsdp2_with_one_process_and_an_adapter_train_tiny_omnigen(world, tmp_path, monkeypatch):
    flags = [*world[1], "--p-magd", 0, "--steps", 4, "--lr", 1e-3, "--workers", 0]
    cpu = losses(*flags, "--no-bf16", "--device", "cpu", out=tmp_path / "cpu")
    assert losses(*flags, "--no-bf16", "--device", DEVICE, out=tmp_path / "float32") == pytest.approx(cpu, rel=1e-3)
    bf16 = losses(*flags, "--device", DEVICE, "--checkpointing", 1, out=tmp_path / "bf16")
    assert bf16 == pytest.approx(cpu, rel=0.05)

    def look(path, model, mask_tokens, average, optimizers, **more):
        for name, p in model.named_parameters():
            assert (p.device.type, p.requires_grad) == (DEVICE, "lora_" in name)
            assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16)
    with monkeypatch.context() as patch:
        patch.setattr(train, "save_checkpoint", look)
        adapter = losses(*flags, "--device", DEVICE, "--lora", 4, out=tmp_path / "lora")
    assert adapter[0] == pytest.approx(bf16[0], rel=1e-6) and adapter[1:] != bf16[1:]        # step 0 is OmniGen itself


# ------------------------------------------------------------------------------------------- memory

@pytest.mark.parametrize("rank", [0, 8])                   # of adapters; 0: all weights are trained
def test_a_step_needs_the_memory_of_the_estimate_and_recomputed_blocks_less(rank):
    start_processes(True, DEVICE)
    needs, gradients = [], []
    try:
        for blocks in (0, 8, 16):
            need, (estimate, gradient) = peak(lambda: two_steps(blocks, rank))
            assert 0.6 < need / estimate < 1.2, (blocks, need, estimate)       # train.py leaves a fifth of a GPU free
            needs.append(need)
            gradients.append(gradient)
    finally:
        dist.destroy_process_group()
    assert needs[0] > 1.2 * needs[1] and needs[1] > 1.2 * needs[2], needs
    for recomputed in gradients[1:]:
        torch.testing.assert_close(recomputed, gradients[0], atol=0, rtol=0.02)


def two_steps(blocks, rank):
    """Edits of 768 x 768 pixels, trained on as train.py does, two micro-batches a step -> memory by the estimate, norms of the
    gradients of the first step."""
    device = torch.device(DEVICE)
    torch.manual_seed(0)
    model = add_lora(fresh(Config(**MIDDLE), DEVICE, torch.bfloat16 if rank else torch.float32), rank, rank)
    shard(model, device, bf16=True)
    model.checkpointing = blocks
    parameters = list(trained(model).values())
    optimizer = torch.optim.AdamW(parameters, 1e-4, fused=True)
    condition = condition_of(model.cfg, [64], [[(96, 96)]], DEVICE)
    x1, draws = torch.randn(1, 4, 96, 96).to(device), Draws(*(drawn.to(device) for drawn in draw((4, 96, 96), 48**2, [0])))
    norms = []
    for _ in range(2):
        for _ in range(2):
            with autocast(device):
                magd_loss(model, x1, condition, draws)[0].mean().backward()
        norms.append(torch.stack([p.grad.full_tensor().norm() for p in parameters]).cpu())
        optimizer.step()
        optimizer.zero_grad()
    return memory(model, condition.kind.numel() + 48**2, False, 1, blocks), norms[0]


@pytest.mark.parametrize("low_memory", [True, False])
@pytest.mark.parametrize("images", [0, 6])                 # the autoencoder needs most, or the transformer
def test_an_edit_needs_the_memory_of_the_estimate(images, low_memory):
    """At 1024 x 1024 pixels, as sample.py edits with OmniGen."""
    def run():
        model = fresh(Config(**MIDDLE), DEVICE, torch.bfloat16).eval()
        editor = Editor(model, Words(world_words()), VAE().to(DEVICE).eval(), None, None)
        flags = SimpleNamespace(size=(1024, 1024), steps=2, text_scale=2.5, image_scale=1.5, negative_prompt=None, low_memory=low_memory,
                                guidance_interval=(0.0, 1.0))
        edit(editor, flags, [np.zeros((1024, 1024, 3), np.uint8)] * images, "make it blue", 0, 0, torch.device(DEVICE), progress=False)
        return sampling_memory(model, 1024**2, images, low_memory)
    need, estimate = peak(run)
    assert 0.6 < need / estimate < 1.15, (need, estimate)
