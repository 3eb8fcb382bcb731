"""Everything pretrained against what OmniGen-v1's own code and diffusers compute from a tiny checkpoint of the released format."""
import hashlib
import json
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import omnigen_folder, read_safetensors, tiny_model
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import magd
import pretrained.vae
from common.devices import autocast
from common.files import InputError
from data import make_prompt, to_tensor, tokenize
from model import PADDING, Condition, Config, Transformer, attention_rule
from pretrained.omnigen import BPE, export, load_omnigen, prepare, read_config, save_omnigen
from pretrained.vae import VAE, load_vae
from sample import generate

FOLDER = Path(__file__).parent / "fixtures/omnigen_tiny"
REFERENCE = read_safetensors(FOLDER / "omnigen_reference.safetensors")
FACTS = json.loads((FOLDER / "omnigen_reference.json").read_text(encoding="utf-8"))


def released_model(**changes):
    config = json.loads((FOLDER / "config.json").read_text())
    model = Transformer(Config(vocab=576, width=48, layers=2, heads=2, mlp=96, short_factor=config["rope_scaling"]["short_factor"],
                               long_factor=config["rope_scaling"]["long_factor"], **changes)).init_weights()
    weights = read_safetensors(FOLDER / "model_without_pos_embed.safetensors")
    model.load_state_dict({**weights, "pos_embed": model.pos_embed}, strict=True)         # the table is ours, a formula
    return model.eval()


def condition_of(case):
    ids, facts = REFERENCE[f"forward/{case}/input_ids"], FACTS["forward"][case]
    kind = torch.zeros_like(ids)
    for b, row in enumerate(facts["rows"]):
        kind[b, :ids.shape[1] - len(row["unpadded_ids"])] = PADDING
        for k, (start, stop) in enumerate(facts["spans"].get(str(b), []), 1):
            kind[b, start:stop] = k
    images = [REFERENCE[f"forward/{case}/ref_{k}"] for k in range(len(facts["refs_in_sequence_order"]))]
    return Condition(ids, kind, images)


VELOCITIES = [(case, t) for case in ("t2i", "ref1", "batch2", "ref1_long") for t in (0.0, 0.3, 0.9)]


@torch.no_grad()
def check_velocity(case, t, device="cpu", dtype=torch.float32, bound=1e-4):
    """Here and on a GPU (tests/test_gpu.py), as the two below."""
    long = dict(original_positions=32, max_positions=1024) if case == "ref1_long" else {}
    inputs = case.removesuffix("_long")
    condition = condition_of(inputs)
    x = torch.cat([REFERENCE[f"forward/{inputs}/x_{b}"] for b in range(len(condition.ids))]).to(device)
    with autocast(device, dtype == torch.bfloat16):
        v = released_model(**long).to(device, dtype)(x, torch.full((len(x),), t, device=device), condition.to(device))
    expected = torch.cat([REFERENCE[f"forward/{case}/v_{b}/t={t}"] for b in range(len(x))])
    torch.testing.assert_close(v.cpu(), expected, atol=bound, rtol=0)


@pytest.mark.parametrize("case, t", VELOCITIES)
def test_velocities(case, t):
    check_velocity(case, t)


@torch.no_grad()
def test_velocities_at_two_times_in_one_batch():
    x = torch.cat([REFERENCE[f"forward/batch2/x_{b}"] for b in range(2)])
    v = released_model()(x, torch.tensor([0.9, 0.3]), condition_of("batch2"))
    expected = torch.cat([REFERENCE[f"forward/batch2/v_{b}/t=mixed"] for b in range(2)])
    torch.testing.assert_close(v, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ["t2i", "ref1", "batch2", "mixed"])
def test_the_attention_rule_is_omnigens(case):
    kind = condition_of(case).kind
    L = kind.shape[1]
    expected = REFERENCE[f"forward/{case}/attention_mask"][:, :L, :L].bool()
    real = (kind != PADDING)[:, :, None]
    assert (attention_rule(kind) & real).equal(expected & real)


def loss_of(model):
    """Of the two samples of training; their gradients are in the model then."""
    device = model.pos_embed.device
    nothing = torch.ones(len(REFERENCE["train/t"]))        # is masked
    draws = magd.Draws(REFERENCE["train/x0"], REFERENCE["train/t"], nothing, nothing[:, None], nothing)
    draws = magd.Draws(*(drawn.to(device) for drawn in draws))
    loss, _ = magd.magd_loss(model, REFERENCE["train/x1"].to(device), condition_of("batch2").to(device), draws)
    loss.mean().backward()
    return loss.detach().cpu()


def check_gradients(device="cpu", bound=1e-5):
    model = released_model().to(device)
    torch.testing.assert_close(loss_of(model), REFERENCE["train/loss_per_sample"], atol=bound, rtol=0)
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters()}
    expected = {name.removeprefix("train/grad/"): value for name, value in REFERENCE.items() if name.startswith("train/grad/")}
    assert len(expected) == 9
    for name, value in expected.items():
        torch.testing.assert_close(gradients[name], value, atol=bound, rtol=0, msg=name)


def test_loss_and_gradients():
    check_gradients()


# ------------------------------------------------------------------------------------------- files

def fingerprint(model):
    """md5 of all names and of all names with shapes: the rule by which this checkpoint is recognised elsewhere."""
    state = model.state_dict()
    names = sorted([*state, *(f"{key}:{'_'.join(map(str, value.shape))}" for key, value in state.items())])
    return len(state), hashlib.md5(",".join(names).encode()).hexdigest()


def test_names_and_shapes_of_the_full_size_checkpoints():
    with torch.device("meta"):
        assert fingerprint(Transformer(Config())) == (211, "61cbcbc7ac11f169c5949223efa960d1")
        assert fingerprint(VAE()) == (248, "13115dd45a6e1c39860f91ab073b8a78")


@pytest.fixture
def folder(tmp_path):
    pytest.importorskip("safetensors")
    return omnigen_folder(tmp_path / "omnigen")


def test_loading_and_saving_is_the_identity(folder, tmp_path):
    model = load_omnigen(folder)
    for key, value in released_model().state_dict().items():
        assert model.state_dict()[key].equal(value), key
    save_omnigen(model, tmp_path / "saved")
    again = load_omnigen(tmp_path / "saved")
    assert again.cfg == model.cfg
    assert all(value.equal(again.state_dict()[key]) for key, value in model.state_dict().items())
    assert load_omnigen(folder, torch.bfloat16).llm.norm.weight.dtype == torch.bfloat16


def test_shards_are_read_too(folder):
    safetensors = pytest.importorskip("safetensors.torch")
    weights = safetensors.load_file(folder / "model.safetensors")
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[:7], "model-00002-of-00002.safetensors": names[7:]}
    for file, keys in parts.items():
        safetensors.save_file({key: weights[key] for key in keys}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {k: f for f, keys in parts.items() for k in keys}}))
    whole = load_omnigen(folder)
    assert all(value.equal(weights[key]) for key, value in whole.state_dict().items())


@pytest.mark.parametrize("change, message", [
    (lambda w: w.pop("llm.norm.weight"), "llm.norm.weight is missing"),
    (lambda w: w.update(lm_head=torch.zeros(2)), "lm_head is unknown"),
    (lambda w: w.update({"llm.norm.weight": torch.zeros(47)}), r"llm.norm.weight has the shape \(47,\) instead of \(48,\)")])
def test_weights_that_do_not_fit_are_named(folder, change, message):
    safetensors = pytest.importorskip("safetensors.torch")
    weights = safetensors.load_file(folder / "model.safetensors")
    change(weights)
    safetensors.save_file(weights, folder / "model.safetensors")
    with pytest.raises(InputError, match=message):
        load_omnigen(folder)


def test_truncated_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(InputError, match="model.safetensors: not a whole .safetensors file"):
        load_omnigen(folder)


@pytest.mark.parametrize("index, message", [
    ({"metadata": {}}, "index.json: no weight_map"), ({"weight_map": []}, "index.json: no weight_map"),
    ({"weight_map": {"a": 3}}, "index.json: no weight_map"), ([], "index.json: a JSON dict is expected"),
    ({"weight_map": {"a": "../model.safetensors"}}, "index.json: no weight_map"),
    ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors: there is no such file"),
    ({"weight_map": {"a": "model.safetensors", "b": "copy.safetensors"}}, "is in copy.safetensors too")])
def test_an_index_that_names_no_files(folder, index, message):
    (folder / "copy.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=message):
        load_omnigen(folder)


@pytest.mark.parametrize("change, dtype, message", [
    (lambda w: w.flatten()[3:5].fill_(torch.nan), torch.float32, "2 of 2304 values are not finite"),
    (lambda w: w.double() * 1e300, torch.float32, "2304 of 2304 values are not finite"),
    (lambda w: w.fill_(1e30), torch.float16, "2304 of 2304 values are not finite"),
    (lambda w: w.to(torch.int8), torch.float32, "is of type int8"), (lambda w: w > 0, torch.float32, "is of type bool"),
    (lambda w: w.to(torch.float8_e4m3fn), torch.float32, "is of type float8_e4m3fn")])
def test_weights_that_are_no_finite_numbers_are_named(folder, change, dtype, message):
    """After the cast, too: what a smaller type cannot hold is infinite there."""
    safetensors = pytest.importorskip("safetensors.torch")
    name = "llm.layers.1.self_attn.o_proj.weight"
    weights = safetensors.load_file(folder / "model.safetensors")
    changed = change(weights[name])
    safetensors.save_file({**weights, name: weights[name] if changed.numel() == 2 else changed}, folder / "model.safetensors")
    with pytest.raises(InputError, match=f"model.safetensors: {name}:? {message}"):
        load_omnigen(folder, dtype)


@pytest.mark.parametrize("name, load", [("config.json", read_config), ("model.safetensors", load_omnigen), ("tokenizer.json", BPE),
                                        ("vae/config.json", lambda folder: load_vae(folder / "vae")),
                                        ("vae/diffusion_pytorch_model.safetensors", lambda folder: load_vae(folder / "vae"))])
def test_what_stands_in_the_place_of_a_file(folder, name, load):
    file = folder / name
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 15503126376\n")
    with pytest.raises(InputError, match=f"{name}: a Git LFS pointer, not the file itself; run `git lfs pull`"):
        load(folder)
    file.write_bytes(b"")
    with pytest.raises(InputError, match=f"{name}: the file is empty"):
        load(folder)
    file.unlink()
    with pytest.raises(InputError, match=f"{name}: there is no such file. docs/full-scale.md"):
        load(folder)
    file.mkdir()
    with pytest.raises(InputError, match=f"{name}: Is a directory"):
        load(folder)


def test_saved_weights_are_a_file_like_any_other(folder, tmp_path):
    """Read by the package, by whoever may read other new files; shards that were there before are not read again."""
    safetensors = pytest.importorskip("safetensors.torch")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "old.safetensors"}}')
    model = released_model().to(torch.bfloat16)
    model.llm.norm.float()                                 # a type of its own
    model.t_embedder.mlp[0].bias = torch.nn.Parameter(torch.ones(48, 2)[:, 0])         # not contiguous
    save_omnigen(model, folder)
    again = safetensors.load_file(folder / "model.safetensors")
    assert all(value.equal(again[key]) and value.dtype == again[key].dtype for key, value in model.state_dict().items())
    assert load_omnigen(folder, torch.bfloat16).t_embedder.mlp[0].bias.equal(torch.ones(48, dtype=torch.bfloat16))
    (tmp_path / "new").touch()
    assert (folder / "model.safetensors").stat().st_mode == (tmp_path / "new").stat().st_mode


def test_export_is_complete_or_one_line(folder, tmp_path):
    model = load_omnigen(folder)
    files = {name: (folder / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                                                             "vae/config.json", "vae/diffusion_pytorch_model.safetensors")}
    for target in (tmp_path / "new", folder):              # into the folder itself, too
        export(model, folder, target)
        assert all((target / name).read_bytes() == value for name, value in files.items())
        assert load_omnigen(target).cfg == model.cfg and not list(target.rglob("*.tmp"))
    resource = pytest.importorskip("resource")             # not on Windows
    before = (folder / "model.safetensors").read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limit[1]))                   # as on a full disk
    try:
        with pytest.raises(InputError, match="model.safetensors: cannot be written"):
            export(model, folder, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (folder / "model.safetensors").read_bytes() == before and not list(folder.rglob("*.tmp"))
    (folder / "vae/config.json").unlink()
    with pytest.raises(InputError, match="vae/config.json: there is no such file"):
        export(model, folder, tmp_path / "third")


def change_config(folder, **changes):
    """Set keys of config.json; None removes one."""
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


FACTORS = {key: json.loads((FOLDER / "config.json").read_text())["rope_scaling"][key] for key in ("short_factor", "long_factor")}
LONGROPE = {**FACTORS, "rope_type": "longrope"}
BESIDE = {"rope_theta": 10000.0, "original_max_position_embeddings": 4096}
ALONE = dict.fromkeys(BESIDE)                              # removes what stood beside


@pytest.mark.parametrize("spelling", [
    {"rope_scaling": {**FACTORS, "type": "longrope"}}, {"rope_scaling": LONGROPE}, {"rope_scaling": {**LONGROPE, "type": "su"}},
    {"rope_scaling": None, "rope_parameters": LONGROPE},
    {"rope_scaling": None, "rope_parameters": {**LONGROPE, **BESIDE, "type": "longrope", "partial_rotary_factor": 1.0}},
    {"rope_scaling": None, "rope_parameters": {**LONGROPE, **BESIDE}, **ALONE},
    {"rope_scaling": None, "rope_parameters": {"full_attention": {**LONGROPE, **BESIDE}, "sliding_attention": None}, **ALONE},
    {"rope_parameters": {**LONGROPE, **BESIDE}},           # under both names, the same
    {"rope_scaling": {**LONGROPE, "factor": 32, "attention_factor": 1.1902380714238083}}, {"partial_rotary_factor": 1}])
def test_every_spelling_of_rope_reads_the_same(folder, spelling):
    expected = read_config(folder)
    assert expected.long_factor == FACTORS["long_factor"] and expected.short_factor == FACTORS["short_factor"]
    change_config(folder, **spelling)
    assert read_config(folder) == expected


@pytest.mark.parametrize("spelling, message", [
    ({"rope_scaling": None}, "no RoPE factors"), ({"rope_scaling": {}}, "no RoPE factors"),
    ({"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, "no RoPE factors"),
    ({"rope_scaling": FACTORS}, "rope_scaling of type None"), ({"rope_scaling": {**FACTORS, "type": "yarn"}}, "type 'yarn'"),
    ({"rope_parameters": {**LONGROPE, "long_factor": FACTORS["short_factor"]}}, "long_factor of RoPE is given twice"),
    ({"rope_parameters": {**LONGROPE, "rope_theta": 1e6}}, "rope_theta of RoPE is given twice, as 10000.0 and as 1000000.0"),
    ({"rope_scaling": {**LONGROPE, "attention_factor": 1.0}}, "attention_factor of RoPE is 1.0; OmniGen-v1 has 1.19024"),
    ({"rope_scaling": {**LONGROPE, "factor": 4.0}}, "factor of RoPE is 4.0; OmniGen-v1 has 32"),
    ({"rope_scaling": {**LONGROPE, "long_mscale": 1.2}}, "long_mscale of RoPE is unknown"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor of RoPE is 0.5"), ({"head_dim": 32}, "2 heads of an even width, head_dim"),
    ({"rope_scaling": {**LONGROPE, "short_factor": [1.0] * 11 + ["2"]}}, "short_factor is .*12 RoPE factors"),
    ({"rope_scaling": {**LONGROPE, "short_factor": [0.0] * 12}}, "short_factor is .*12 RoPE factors"),
    ({"rope_scaling": [1]}, r"\[1\] stands where parameters of RoPE"), (ALONE, "the key '(rope_theta|original_max.*)' is missing"),
    ({"original_max_position_embeddings": 1}, "from 2 to"), ({"max_position_embeddings": 2048}, "4096; from 2 to .* 2048")])
def test_rope_that_this_model_does_not_compute_is_refused(folder, spelling, message):
    change_config(folder, **spelling)
    with pytest.raises(InputError, match=f"config.json: .*{message}"):
        read_config(folder)


@pytest.mark.parametrize("key, value", [
    ("hidden_size", "48"), ("hidden_size", 48.0), ("num_attention_heads", 0), ("num_hidden_layers", 10**9), ("vocab_size", -1),
    ("intermediate_size", True), ("rms_norm_eps", "1e-5"), ("rms_norm_eps", float("nan")), ("rope_theta", -1.0),
    ("max_position_embeddings", [131072]), ("num_attention_heads", 5)])
def test_values_of_the_config_that_no_model_has(folder, key, value):
    change_config(folder, **{key: value})
    with pytest.raises(InputError, match=f"config.json: ({key} is |5 heads|2 key-value heads for 5)"):
        load_omnigen(folder)


@pytest.mark.parametrize("change, message", [
    ({"model_type": "llama"}, "model_type is 'llama'"), ({"num_key_value_heads": 1}, "1 key-value heads for 2 heads"),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling of type 'linear'"), ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"hidden_size": 96}, r"24 heads|24 .*need|factors")])
def test_config_of_another_architecture(folder, change, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(InputError, match=f"config.json: .*({message})"):
        read_config(folder)


def test_what_the_format_cannot_hold_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot hold a model with another .*qk_norm"):
        save_omnigen(tiny_model(), tmp_path)
    model = released_model()
    model.cfg = replace(model.cfg, short_factor=None, long_factor=None)
    with pytest.raises(InputError, match="needs long and short RoPE factors"):         # read_config would refuse it
        save_omnigen(model, tmp_path)


# ------------------------------------------------------------------------------------------- images, latents, prompts

@pytest.mark.parametrize("name", ["a", "b", "odd", "big"])
def test_image_preparation(name):
    image = Image.fromarray(REFERENCE[f"image/{name}/u8"].numpy())
    pixels = to_tensor(prepare(image, 64 if name == "big" else 1024))
    torch.testing.assert_close(pixels, REFERENCE[f"image/{name}/pixels"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(1, 1), (3, 900), (9000, 60)])
def test_preparation_of_extreme_images(size):
    h, w, _ = prepare(Image.new("RGB", size), 64).shape
    assert h % 16 == w % 16 == 0 and min(h, w) >= 16


def test_vae(folder):
    vae = load_vae(folder / "vae")
    for name in "ab":
        mean, std = vae.encode(REFERENCE[f"image/{name}/pixels"][None])
        torch.testing.assert_close(mean / 0.13025, REFERENCE[f"vae/{name}/mean"].view_as(mean), atol=1e-4, rtol=0)
        logvar = REFERENCE[f"vae/{name}/logvar"].view_as(std)
        torch.testing.assert_close(std / 0.13025, (0.5 * logvar).exp(), atol=1e-4, rtol=0)
        decoded = vae.decode(REFERENCE[f"vae/{name}/z"] * 0.13025)
        torch.testing.assert_close(decoded, REFERENCE[f"vae/{name}/decoded"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("band", [1, 2000, 30000])
def test_bands_change_nothing(band, monkeypatch):
    torch.manual_seed(0)
    vae = VAE(channels=(8, 16, 16, 16), groups=4).requires_grad_(False)
    z = torch.randn(2, 4, 9, 7)
    monkeypatch.setattr(pretrained.vae, "BAND", 2**60)
    image = vae.decode(z)
    latent = vae.encode(image)
    monkeypatch.setattr(pretrained.vae, "BAND", band)
    torch.testing.assert_close(vae.decode(z), image, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(vae.encode(image), latent, atol=1e-6, rtol=1e-6)


class LiveBytes(TorchDispatchMode):
    """The most bytes that the tensors made inside take at once."""

    def __init__(self):
        super().__init__()
        self.tensors = {}                                              # storage: its bytes, the tensors on it
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in (x for x in tree_leaves(result) if isinstance(x, torch.Tensor)):
            storage = x.untyped_storage()
            self.tensors.setdefault(storage._cdata, (storage.nbytes(), []))[1].append(weakref.ref(x))
        self.tensors = {key: own for key, own in self.tensors.items() if any(x() is not None for x in own[1])}
        self.most = max(self.most, sum(size for size, _ in self.tensors.values()))
        return result


def test_the_autoencoder_of_a_megapixel_needs_two_gigabytes():
    with torch.device("meta"):                                         # shapes, without the numbers
        vae, z, image = VAE(), torch.empty(1, 4, 128, 128), torch.empty(1, 3, 1024, 1024)
    weights = sum(p.nbytes for p in vae.parameters())
    for run in (lambda: vae.decode(z), lambda: vae.encode(image)):
        with LiveBytes() as live:
            run()
        assert 1e9 < live.most + weights < 2.1e9


def test_encoding_a_condition_keeps_its_keys_and_values_and_nothing_else():
    model = tiny_model(layers=16)
    c = Condition(torch.ones(1, 200, dtype=torch.long), torch.zeros(1, 200, dtype=torch.long), [])
    with LiveBytes() as live:
        cache = model.encode(c, 4)
    kept = sum(value.nbytes for pair in cache.layers for value in pair)
    assert live.most < 2 * kept, live.most / kept        # beside them one block at work


@pytest.mark.parametrize("key, value", [
    ("scaling_factor", 0), ("scaling_factor", float("nan")), ("scaling_factor", "0.13025"), ("norm_num_groups", 0), ("norm_num_groups", 3),
    ("block_out_channels", [8, 8, 16]), ("block_out_channels", [8, 8, 16, 18]), ("block_out_channels", [8, 8, 16, "16"]),
    ("block_out_channels", 8), ("latent_channels", 16), ("latents_std", [1.0] * 4)])
def test_values_of_the_autoencoders_config(folder, key, value):
    change_config(folder / "vae", **{key: value})
    with pytest.raises(InputError, match=f"vae/config.json: .*{key}"):
        load_vae(folder / "vae")


def size_of(name):
    return REFERENCE[f"image/{name}/pixels"].shape[1] * REFERENCE[f"image/{name}/pixels"].shape[2] // 256


@pytest.mark.parametrize("case", FACTS["prompts"])
def test_prompts_become_omnigens_ids(case):
    pytest.importorskip("tokenizers")
    facts, tokenizer = FACTS["prompts"][case], BPE(FOLDER)
    ids, kind, order = tokenize(tokenizer, facts["instruction"], [size_of(name) for name in facts["images"]])
    assert ids == facts["ids"]
    spans = [[kind.index(k + 1), len(kind) - kind[::-1].index(k + 1)] for k in range(len(order))]
    assert spans == (facts["spans"] or [])


def test_texts_become_omnigens_ids():
    pytest.importorskip("tokenizers")
    tokenizer = BPE(FOLDER)
    for case in FACTS["tokenize"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]


@pytest.mark.parametrize("change, message", [
    (lambda t: t["model"].update(type="NewBPE"), "the installed tokenizers .* cannot read it .*pip install -U tokenizers"),
    (lambda t: t["model"].update(continuing_subword_prefix="x", vocab={"e": 0, "": 1}, merges=[["e", ""]]), "the .* cannot read it"),  # panics
    (lambda t: t["added_tokens"].pop(-3), "it lacks the token </img>"),
    (lambda t: [token.update(content="?") for token in t["added_tokens"] if token["content"] == "<|end|>"], "it lacks the token <.end.>"),
    (lambda t: t["added_tokens"].append({**t["added_tokens"][-1], "id": 573, "content": "<1>"}) or t["model"]["vocab"].update({"z" * 9: 600}),
     "its ids go to 600, vocab_size in config.json is 576")])
def test_a_tokenizer_of_another_release_or_model(folder, change, message):
    pytest.importorskip("tokenizers")
    value = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    change(value)
    (folder / "tokenizer.json").write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(InputError, match=f"tokenizer.json: {message}"):
        BPE(folder)


def test_a_byte_order_mark_is_skipped_and_other_encodings_are_named(folder):
    pytest.importorskip("tokenizers")
    config, ids = read_config(folder), BPE(folder).encode("a blue boat, \u00fc")
    for name in ("config.json", "tokenizer.json", "vae/config.json"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    load_vae(folder / "vae")
    assert read_config(folder) == config and BPE(folder).encode("a blue boat, \u00fc") == ids
    (folder / "config.json").write_text("{}", encoding="utf-16")
    with pytest.raises(InputError, match="config.json: this is UTF-16 text"):
        read_config(folder)


def test_pause_tokens_stand_before_the_end():
    pytest.importorskip("tokenizers")
    tokenizer = BPE(FOLDER)
    ids, _, _ = tokenize(tokenizer, make_prompt(tokenizer, "Make the boat blue.", 1, pauses=3), [12])
    pause, end = (tokenizer.tokenizer.token_to_id(token) for token in ("<|placeholder1|>", "<|end|>"))
    assert ids.count(pause) == 3 and ids[ids.index(end) - 3:ids.index(end)] == [pause] * 3
    with pytest.raises(InputError, match="'<pause>', the pause token, is not one of its tokens"):
        BPE(FOLDER, "<pause>")


def test_a_prompt_too_long_is_refused():
    pytest.importorskip("tokenizers")
    with pytest.raises(InputError, match="tokens with the images; the model takes at most 100"):
        tokenize(BPE(FOLDER, limit=100), "boat " * 100, [])


# ------------------------------------------------------------------------------------------- sampling

@torch.no_grad()
def check_sampling(case, low_memory, folder, device="cpu", dtype=torch.float32, bound=5e-4):
    facts, case = FACTS["sampling"][case], f"sampling/{case}"
    model, tokenizer = load_omnigen(folder, dtype, device), BPE(folder)
    for key, value in (facts["config_overrides"] or {}).items():
        ours = {"original_max_position_embeddings": "original_positions", "max_position_embeddings": "max_positions"}[key]
        model.cfg = replace(model.cfg, **{ours: value})
    vae, images = load_vae(folder / "vae", device), []
    for name in facts["images"]:
        mean, std = (value.cpu() for value in vae.encode(REFERENCE[f"image/{name}/pixels"][None].to(device)))
        eps = REFERENCE.get(f"{case}/posterior_eps_{name}")
        latent = mean if eps is None else mean + std * eps.view_as(std)
        torch.testing.assert_close(latent, REFERENCE[f"{case}/ref_latents_{name}"].view_as(latent), atol=1e-4, rtol=0)
        images.append(latent[0])
    noise = REFERENCE[f"{case}/noise"].view(1, 4, *[s // 8 for s in facts["target_px"]]).to(device)
    x = generate(model, tokenizer, [facts["prompt"]], [images], noise, facts["steps"], facts["guidance_scale"],
                 facts["img_guidance_scale"] or 1.0, facts["negative_prompt"], low_memory, bf16=dtype == torch.bfloat16)
    torch.testing.assert_close(x.cpu(), REFERENCE[f"{case}/latents"].view_as(x), atol=bound, rtol=0)
    if f"{case}/decoded" in REFERENCE:
        pixels = vae.decode(x).cpu()
        torch.testing.assert_close(pixels, REFERENCE[f"{case}/decoded"].view_as(pixels), atol=bound, rtol=0)


@pytest.mark.parametrize("case", FACTS["sampling"])
@pytest.mark.parametrize("low_memory", [True, False])
def test_sampling(case, low_memory, folder):
    check_sampling(case, low_memory, folder)


def test_a_missing_optional_package_is_named_with_the_command_that_installs_it(monkeypatch):
    import importlib

    def absent(name):
        raise ImportError(name)
    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(InputError, match="needs the optional package tokenizers: pip install tokenizers"):
        BPE(FOLDER)
