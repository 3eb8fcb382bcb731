"""Adapters: exact beside the frozen model, as PEFT computes them, small in memory, and the whole way from a run to an edit."""
import copy
import functools
import gc
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import SMALL, call, omnigen_folder, read_safetensors, run, tiny_model
from test_finetune import photographs
from test_model import condition
from test_omnigen import REFERENCE, condition_of, loss_of, released_model
from test_train import assert_same_run, weights

import magd
import sample
import train
from common.files import InputError
from data import MicroBatches, Shapes, Words
from model import Config, Transformer
from pretrained import latents
from pretrained.lora import Adapted, add_lora, load_lora, merge_lora, save_lora
from pretrained.omnigen import load_omnigen
from sample import load_checkpoint, load_editor
from scale.cost import memory
from scale.sharding import trained

PEFT = Path(__file__).parent / "fixtures/peft_tiny"        # an adapter that PEFT wrote, and what PEFT computes with it


def moved(model, std=0.05):
    """A model whose adapters are not zero any more."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in trained(model).values():
            p.copy_(std * torch.randn(p.shape, generator=generator))
    return model


@torch.no_grad()
def velocity(model):
    device = model.pos_embed.device
    x = torch.cat([REFERENCE[f"forward/batch2/x_{b}"] for b in range(2)]).to(device)
    return model(x, torch.tensor([0.9, 0.3], device=device), condition_of("batch2").to(device)).cpu()


@pytest.mark.parametrize("mlp", [False, True])
def test_a_new_adapter_changes_nothing_and_only_it_is_trained(mlp):
    base = tiny_model()
    model = add_lora(copy.deepcopy(base), 3, 6, mlp)
    c, x, t = condition(["tt1111t", "t1111"]), torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.7])
    assert model(x, t, c).equal(base(x, t, c)) and model.denoise(x, t, model.encode(c, 4)).equal(base.denoise(x, t, base.encode(c, 4)))
    model.checkpointing = 1
    model(x, t, c).square().mean().backward()
    names = {"qkv_proj", "o_proj"} | ({"gate_up_proj", "down_proj"} if mlp else set())
    assert {name.split(".")[-3] for name in trained(model)} == names and len(trained(model)) == 2 * 2 * len(names)
    for name, p in model.named_parameters():
        assert (p.grad is None) == (name in dict(base.named_parameters())), name
        assert p.grad is None or p.grad.any() == ("lora_B" in name), name              # B is zero, so A has no gradient yet
    A = torch.cat([p.detach().flatten() for name, p in trained(model).items() if "lora_A" in name])
    assert A.std() == pytest.approx(1 / 3, rel=0.15) and abs(A.mean()) < 0.06


def test_an_adapter_is_a_matrix_of_low_rank_and_merges_into_its_own():
    adapted = moved(Adapted(torch.nn.Parameter(torch.randn(12, 8), requires_grad=False), rank=2, alpha=5))
    change = adapted.lora_B.weight @ adapted.lora_A.weight
    x = torch.randn(3, 4, 8)
    torch.testing.assert_close(adapted(x), x @ (adapted.weight + 5 / 2 * change).T)
    model, base = moved(add_lora(released_model(), 4, 6, mlp=True)), released_model()
    v = velocity(model)
    merged = merge_lora(model)
    assert list(merged.state_dict()) == list(base.state_dict()) and len(trained(merged)) == len(list(base.parameters()))
    torch.testing.assert_close(velocity(merged), v, atol=1e-5, rtol=0)
    assert (velocity(base) - v).abs().max() > 0.1


# ------------------------------------------------------------------------------------------- PEFT

def check_adapter(device="cpu", bound=1e-5):
    """Velocities, loss, gradients -> the model. Here and on a GPU (tests/test_gpu.py)."""
    expected = read_safetensors(PEFT / "reference.safetensors")
    model = released_model()
    load_lora(model, PEFT)
    model.to(device)
    torch.testing.assert_close(velocity(model), expected["velocity"], atol=1e-4, rtol=0)
    torch.testing.assert_close(loss_of(model), expected["loss"], atol=bound, rtol=0)
    assert all((p.grad is None) == ("lora_" not in name) for name, p in model.named_parameters())
    for name, p in trained(model).items():
        torch.testing.assert_close(p.grad.cpu(), expected[f"grad/base_model.model.{name}"], atol=bound, rtol=0, msg=name)
    return model


def test_it_computes_what_peft_computes(tmp_path):
    """And what is written is what PEFT wrote: names and tensors."""
    model = check_adapter()
    save_lora(model, tmp_path, "omnigen:OmniGen-v1")
    written, theirs = (read_safetensors(folder / "adapter_model.safetensors") for folder in (tmp_path, PEFT))
    assert written.keys() == theirs.keys() and all(value.equal(theirs[name]) for name, value in written.items())
    config, their_config = (json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path, PEFT))
    assert config.keys() <= their_config.keys() and set(config["target_modules"]) == set(their_config["target_modules"])
    assert all(config[key] == their_config[key] for key in ("peft_type", "r", "lora_alpha", "bias", "lora_dropout", "task_type"))
    assert config["base_model_name_or_path"] == "OmniGen-v1"


@pytest.mark.parametrize("change, message", [
    ({"peft_type": "IA3"}, "peft_type is 'IA3'"), ({"use_rslora": True}, "use_rslora of PEFT is unknown"), ({"r": 8}, "has the shape"),
    ({"rank_pattern": {"o_proj": 2}}, "rank_pattern of PEFT"), ({"r": "4"}, "r is '4'; a whole number"),
    ({"lora_alpha": 0}, "lora_alpha is 0"), ({"eva_config": {"rho": 2}}, "eva_config of PEFT"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4' of PEFT")])
def test_an_adapter_that_means_something_else_is_refused(tmp_path, change, message):
    pytest.importorskip("safetensors")
    folder = shutil.copytree(PEFT, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(InputError, match=message):
        load_lora(released_model(), folder)


def test_an_adapter_of_another_model_or_none_is_refused(tmp_path):
    pytest.importorskip("safetensors")
    with pytest.raises(InputError, match="adapter_model.safetensors: the weights do not fit: .* has the shape"):
        load_lora(tiny_model(), PEFT)
    with pytest.raises(InputError, match="adapter_config.json: there is no such file"):
        load_lora(tiny_model(), tmp_path)


# ------------------------------------------------------------------------------------------- memory

def test_memory_of_the_full_size():
    """An adapter of rank 8 at 1024 pixels: an edit with a masked source has 3 x 4096 image tokens."""
    with torch.device("meta"):
        model = Transformer(Config())
    tokens = 3 * 4096 + 200
    assert memory(model, tokens, False, 1, 32) / 1e9 == pytest.approx(65, abs=0.1)
    add_lora(model.bfloat16(), 8, 8)
    assert sum(p.numel() for p in trained(model).values()) == 32 * 8 * (3072 + 9216 + 3072 + 3072)
    assert memory(model, tokens, False, 1, 32) < 0.8 * 24e9              # as few recomputed as fit there: not all
    assert memory(model, tokens, False, 1, 0) > 24e9


def test_the_backward_through_frozen_weights_costs_one_forward_less():
    dataset, flags = Shapes("shapes"), dict(seed=0, p_drop=0, p_plan=0, p_masked_source=0, max_gap=0, max_pauses=0, t_mean=0)
    cfg = Config(patch=4, channels=3)
    flop = [MicroBatches(SimpleNamespace(lora=rank, **flags), dataset, Words(dataset.words), cfg)[0, 1][2] for rank in (0, 8)]
    assert flop[1] == pytest.approx(2 / 3 * flop[0])


# ------------------------------------------------------------------------------------------- runs

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny OmniGen folder, image pairs with their latents, and the flags of a run on them."""
    pytest.importorskip("safetensors"), pytest.importorskip("tokenizers")
    path = tmp_path_factory.mktemp("lora")
    folder, pairs = omnigen_folder(path / "omnigen"), photographs(path)
    call(latents, pairs, "--init", f"omnigen:{folder}", "--size", 64, "--workers", 0)
    return folder, ["--preset", "omnigen", "--init", f"omnigen:{folder}", "--data", pairs, "--size", 64, "--batch", 2, "--warmup", 0,
                    "--eval-steps", 1, "--p-magd", 1, "--tau", 0]


def live_bytes():
    """Bytes of all tensors that are alive, each storage once."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    tensors = [x._local_tensor if hasattr(x, "_local_tensor") else x for x in tensors]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors if x.device.type == "cpu"}.values())


def test_from_a_run_to_an_edit(world, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "preview", functools.partial(sample.preview, n=1))
    folder, flags = world
    lora = [*flags, "--lora", 4, "--lora-alpha", 6, "--lora-mlp", "--checkpointing", 1, "--lr", 1e-2, "--ema", 0.9, "--steps", 4]
    call(train, *lora, "--keep-every", 2, "--sample-every", 3, "--out", tmp_path / "whole")
    last = weights(tmp_path / "whole/last.pt")
    assert len(last["model"]) == 16 and all("lora_" in name for name in last["model"])           # the base is elsewhere
    assert not last["mask_tokens"]["mlp.2.bias"].equal(weights(tmp_path / "whole/step_000002.pt")["mask_tokens"]["mlp.2.bias"])

    (tmp_path / "again").mkdir()                           # killed after step 2, resumed
    shutil.copy(tmp_path / "whole/step_000002.pt", tmp_path / "again/last.pt")
    call(train, *lora, "--resume", "--out", tmp_path / "again")
    assert_same_run(last, weights(tmp_path / "again/last.pt"))

    def editor(**given):
        return load_editor(SimpleNamespace(**{"ckpt": None, "init": f"omnigen:{folder}", "lora": None, "compile": False,
                                              "pause_token": "<|placeholder1|>", **given}), torch.device("cpu")).model
    v = velocity(editor(lora=tmp_path / "whole/adapter"))
    assert velocity(editor(ckpt=tmp_path / "whole/last.pt")).equal(v)
    torch.testing.assert_close(velocity(editor(init=f"omnigen:{tmp_path / 'whole/export'}")), v, atol=1e-5, rtol=0)
    assert (velocity(editor()) - v).abs().max() > 0.05
    call(sample, "--init", f"omnigen:{folder}", "--lora", tmp_path / "whole/adapter", "--prompt", "a boat", "--size", "32x32", "--steps", 1,
         "--out", tmp_path / "edit.png")


def test_frozen_weights_have_no_gradient_no_optimizer_state_and_no_float32_copy(world, tmp_path, monkeypatch):
    folder, flags = world
    for module in ("train", "common.devices"):
        monkeypatch.setattr(f"{module}.fast_bf16", lambda device: True)
    seen = {}

    def count(path, model, mask_tokens, average, optimizers, **more):
        gradients = [name for name, p in model.named_parameters() if p.grad is not None]
        moments = [p for optimizer in optimizers for state in optimizer.state.values() for p in state.values()]
        assert all(p.requires_grad for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
        seen.update(model=model, gradients=gradients, moments=sum(p.nbytes for p in moments if p.ndim), live=live_bytes(),
                    masks=sum(p.nbytes for p in mask_tokens.parameters()), average=sum(p.nbytes for p in average))
    monkeypatch.setattr(train, "save_checkpoint", count)
    monkeypatch.setattr(train, "preview", lambda *_: (0, 0))
    before = live_bytes()
    call(train, *flags, "--lora", 4, "--ema", 0.9, "--batch", 1, "--steps", 1, "--out", tmp_path)
    model = seen["model"]
    adapters = sum(p.nbytes for p in trained(model).values())
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    assert adapters == 4 * sum(p.numel() for p in trained(model).values()) and seen["average"] == adapters
    assert frozen == 2 * sum(p.numel() for p in load_omnigen(folder).parameters()) and not seen["gradients"]
    assert seen["moments"] == 2 * (adapters + seen["masks"])
    # weights, adapters with moments and average, mask tokens with moments, the position table, the autoencoder
    autoencoder = (folder / "vae/diffusion_pytorch_model.safetensors").stat().st_size
    known = frozen + 4 * adapters + 3 * seen["masks"] + model.pos_embed.nbytes + autoencoder
    assert seen["live"] - before < known + frozen / 2      # a float32 copy would be twice `frozen`


def test_on_the_toy(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "exact_share", lambda *_: 0)
    tiny = [*SMALL, "--eval-steps", 1]
    call(train, *tiny, "--steps", 3, "--out", tmp_path / "base")
    base = ["--init", tmp_path / "base/last.pt"]
    lora = [*tiny, *base, "--lora", 4, "--steps", 3, "--warmup", 0]
    call(train, *lora, "--keep-every", 2, "--out", tmp_path / "run")
    printed = capsys.readouterr().out
    assert not (tmp_path / "run/export").exists() and "0.00M trained)" in printed and f"wrote {tmp_path / 'run/adapter'}, an adapter for sample.py --lora" in printed
    state = weights(tmp_path / "run/last.pt")
    assert state["flags"]["lr"] == 3e-4 and state["flags"]["lora_alpha"] == 4 and len(state["optimizers"]) == 1
    (tmp_path / "again").mkdir()                           # killed after step 2, resumed
    shutil.copy(tmp_path / "run/step_000002.pt", tmp_path / "again/last.pt")
    call(train, *lora, "--resume", "--out", tmp_path / "again")
    assert_same_run(state, weights(tmp_path / "again/last.pt"))
    (ours, _), (plain, _) = (load_checkpoint(tmp_path / name / "last.pt") for name in ("run", "base"))
    differ = {name for name, value in ours.model.state_dict().items() if not value.equal(plain.model.state_dict()[name])}
    assert differ == {f"llm.layers.{k}.self_attn.{name}.weight" for k in range(2) for name in ("qkv_proj", "o_proj")}
    load_lora(plain.model, tmp_path / "run/adapter")
    for name, value in merge_lora(plain.model).state_dict().items():
        torch.testing.assert_close(value, ours.model.state_dict()[name], msg=name)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"instruction": "make the red circle blue", "input_images": [], "output_image": None}))
    edits = ["--ckpt", tmp_path / "base/last.pt", "--lora", tmp_path / "run/adapter", "--data", rows, "--steps", 1, "--out", tmp_path / "edits"]
    call(sample, *edits)
    os.utime(tmp_path / "run/adapter/adapter_config.json", (0, 2**32))
    with pytest.raises(InputError, match="it holds results of"):                   # of the adapter as it was
        call(sample, *edits)
    with pytest.raises(InputError, match=f"started with --init {tmp_path}/base/last.pt; resume it with the same"):
        call(train, *lora, "--init", tmp_path / "run/last.pt", "--resume", "--out", tmp_path / "run")
    call(train, *tiny, "--init", tmp_path / "run/last.pt", "--lora", 2, "--steps", 1, "--out", tmp_path / "third")      # an adapter on it
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(InputError, match="run/last.pt: .*base/last.pt: there is no such checkpoint"):
        load_checkpoint(tmp_path / "run/last.pt")


@pytest.mark.parametrize("flags, message", [
    (["--lora", 8], "--lora RANK adapts the model that --init names"), (["--lora-mlp"], "--lora RANK"), (["--lora-alpha", 8], "go with it"),
    (["--lora", "x"], "argument --lora: invalid whole number value: 'x'"), (["--lora", -1], "argument --lora: -1 is not in")])
def test_flags_that_go_together(flags, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        call(train, *SMALL, *flags, "--out", tmp_path)


@pytest.mark.slow
def test_two_processes_give_the_adapters_of_one(world, tmp_path):
    """Rank 1, too, of which one process has nothing."""
    _, flags = world
    for rank in (1, 4):
        more = [*flags, "--lora", rank, "--lora-mlp", "--lr", 1e-2, "--steps", 6, "--ema", 0.9, "--checkpointing", 1]
        for name, processes in (("one", 1), ("two", 2)):
            run("train.py", *more, "--out", tmp_path / f"{name}{rank}", check=0, processes=processes)
        one, two = (weights(tmp_path / f"{name}{rank}/last.pt") for name in ("one", "two"))
        for part in ("model", "ema"):
            assert one[part].keys() == two[part].keys()
            for name in one[part]:
                torch.testing.assert_close(one[part][name], two[part][name], atol=1e-5, rtol=0, msg=name)
        # what the mask tokens come to: where a gradient is nothing but rounding, AdamW makes a step of it
        tokens = [magd.MaskTokens(len(own["mask_tokens"]["mlp.2.bias"])) for own in (one, two)]
        for own, state in zip(tokens, (one, two)):
            own.load_state_dict(state["mask_tokens"])
        u = torch.arange(1024) / 1024
        torch.testing.assert_close(tokens[0](u), tokens[1](u), atol=1e-5, rtol=0)
