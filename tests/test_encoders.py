"""CLIP and DINO against what transformers computes from tiny checkpoints of the released formats."""
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import read_safetensors
from PIL import Image

from common.files import InputError
from pretrained import encoders
from pretrained.encoders import (CLIP, CLIP_NAMES, DINO_NAMES, ClipTokenizer, ViT, load_clip, load_dino,
                                 released_name)

FOLDER = Path(__file__).parent / "fixtures/metrics_tiny"
REFERENCE = read_safetensors(FOLDER / "metrics_reference.safetensors")
FACTS = json.loads((FOLDER / "metrics_reference.json").read_text(encoding="utf-8"))
IMAGES = [Image.fromarray(REFERENCE[f"image/{name}/u8"].numpy()) for name in FACTS["images"]]


def cosines(a, b):
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T


def test_clip():
    pytest.importorskip("safetensors"), pytest.importorskip("tokenizers")
    model, tokenizer = load_clip(FOLDER / "clip")
    x = torch.stack([encoders.clip_pixels(image, 32) for image in IMAGES])
    torch.testing.assert_close(x, REFERENCE["clip/pixel_values"], atol=1e-5, rtol=0)
    ids, cut = tokenizer([row["text"] for row in FACTS["texts"]])
    assert ids.equal(REFERENCE["clip/input_ids"]) and cut == 0
    image, text = model.image_features(x), model.text_features(ids)
    torch.testing.assert_close(image, REFERENCE["clip/image_features"], atol=1e-4, rtol=0)
    torch.testing.assert_close(text, REFERENCE["clip/text_features"], atol=1e-4, rtol=0)
    torch.testing.assert_close(cosines(image, image), REFERENCE["clip/image_image_cosine"], atol=1e-5, rtol=0)
    torch.testing.assert_close(cosines(image, text), REFERENCE["clip/image_text_cosine"], atol=1e-5, rtol=0)
    logits = model.logit_scale.exp() * cosines(image, text)
    torch.testing.assert_close(logits, REFERENCE["clip/logits_per_image"], atol=1e-4, rtol=0)


def test_a_long_caption_keeps_its_end_token_and_is_counted():
    pytest.importorskip("tokenizers")
    ids, cut = ClipTokenizer(FOLDER / "clip")(["cat " * 100, "cat"])
    assert ids.shape == (2, 77) and cut == 1 and (ids[:, -1] == 573).all() and ids[0, 75] != 573


def test_dino():
    pytest.importorskip("safetensors")
    model = load_dino(FOLDER / "dino", eps=1e-12)
    squares = [image.resize((32, 32), Image.Resampling.BILINEAR) for image in IMAGES]
    x = torch.stack([encoders.to_tensor(image) for image in squares])
    x = (x - encoders.IMAGENET_MEAN) / encoders.IMAGENET_STD
    torch.testing.assert_close(x, REFERENCE["dino/pixel_values"], atol=1e-5, rtol=0)
    features = model.image_features(x)
    torch.testing.assert_close(features, REFERENCE["dino/cls"], atol=1e-4, rtol=0)
    expected = REFERENCE["dino/image_image_cosine"]
    torch.testing.assert_close(cosines(features, features), expected, atol=1e-5, rtol=0)


def test_the_original_file_of_dino_gives_the_same_features(tmp_path):
    """With heads of width 64 as in the release: made from random weights, stored under both sets of names."""
    pytest.importorskip("safetensors")
    torch.manual_seed(0)
    cfg = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 256,
           "image_size": 16, "patch_size": 8, "layer_norm_eps": 1e-6}
    model = ViT(cfg).requires_grad_(False)
    for p in model.parameters():
        p.normal_(std=0.2)
    state = {released_name(key, encoders.DINO_PTH_NAMES): value for key, value in model.state_dict().items()}
    for key in [key for key in state if ".attn.q." in key]:
        parts = [state.pop(key.replace(".q.", f".{part}.")) for part in "qkv"]
        state[key.replace(".q.", ".qkv.")] = torch.cat(parts)
    torch.save(state, tmp_path / "dino.pth")
    x = torch.randn(2, 3, 16, 16)
    assert load_dino(tmp_path / "dino.pth").image_features(x).equal(model.image_features(x))


def names_of(model, names):
    return {released_name(key, names): list(value.shape) for key, value in model.state_dict().items()}


def test_names_and_shapes_of_the_released_files():
    def sizes(width, heads):
        return {"hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": 12,
                "intermediate_size": 4 * width}

    clip_config = {"projection_dim": 512,
                   "vision_config": {**sizes(768, 12), "image_size": 224, "patch_size": 32},
                   "text_config": {**sizes(512, 8), "vocab_size": 49408, "max_position_embeddings": 77}}
    with torch.device("meta"):
        clip = names_of(CLIP(clip_config), CLIP_NAMES)
        dino = names_of(ViT({**sizes(384, 6), "image_size": 224, "patch_size": 16}), DINO_NAMES)
    assert len(clip) == 2 * 12 * 16 + 14
    assert len(dino) == 12 * 16 + 6
    for key, shape in {"text_model.embeddings.token_embedding.weight": [49408, 512],
                       "text_model.embeddings.position_embedding.weight": [77, 512],
                       "vision_model.embeddings.class_embedding": [768],
                       "vision_model.embeddings.patch_embedding.weight": [768, 3, 32, 32],
                       "vision_model.embeddings.position_embedding.weight": [50, 768],
                       "vision_model.pre_layrnorm.weight": [768],
                       "vision_model.post_layernorm.bias": [768],
                       "text_model.final_layer_norm.bias": [512],
                       "visual_projection.weight": [512, 768],
                       "text_projection.weight": [512, 512],
                       "logit_scale": [],
                       "vision_model.encoder.layers.11.mlp.fc1.weight": [3072, 768],
                       "text_model.encoder.layers.11.self_attn.out_proj.bias": [512]}.items():
        assert clip[key] == shape, key
    for key, shape in {"embeddings.cls_token": [1, 1, 384],
                       "embeddings.position_embeddings": [1, 197, 384],
                       "layernorm.weight": [384],
                       "embeddings.patch_embeddings.projection.weight": [384, 3, 16, 16],
                       "embeddings.patch_embeddings.projection.bias": [384],
                       "encoder.layer.11.attention.attention.query.weight": [384, 384],
                       "encoder.layer.0.intermediate.dense.weight": [1536, 384],
                       "encoder.layer.0.output.dense.weight": [384, 1536],
                       "encoder.layer.3.layernorm_after.bias": [384]}.items():
        assert dino[key] == shape, key


def test_files_that_do_not_fit_are_one_clear_line(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    pytest.importorskip("tokenizers")
    shutil.copytree(FOLDER / "dino", tmp_path / "dino")
    weights = safetensors.load_file(FOLDER / "dino/model.safetensors")
    del weights["layernorm.bias"]
    safetensors.save_file(weights, tmp_path / "dino/model.safetensors")
    with pytest.raises(InputError, match="layernorm.bias is missing"):
        load_dino(tmp_path / "dino")
    (tmp_path / "dino/model.safetensors").write_bytes(b"12345678 no")
    with pytest.raises(InputError, match="cannot be read"):
        load_dino(tmp_path / "dino")
    with pytest.raises(InputError, match="model_type 'vit'; a CLIP"):
        load_clip(tmp_path / "dino")
    (tmp_path / "dino/config.json").write_text('{"model_type": "vit", "hidden_size": 36}')
    shutil.copy(FOLDER / "dino/model.safetensors", tmp_path / "dino")
    with pytest.raises(InputError, match="config.json: the key 'patch_size' is missing"):
        load_dino(tmp_path / "dino")
    shutil.copy(FOLDER / "clip/vocab.json", tmp_path)
    with pytest.raises(InputError, match="merges.txt: there is no such file"):
        ClipTokenizer(tmp_path)


@pytest.fixture
def clip(tmp_path):
    pytest.importorskip("safetensors"), pytest.importorskip("tokenizers")
    return shutil.copytree(FOLDER / "clip", tmp_path / "clip")


def change_config(folder, *keys, **changes):
    """Set keys of config.json, or of the object in it that `keys` lead to; None removes one."""
    config = json.loads((folder / "config.json").read_text())
    place = config
    for key in keys:
        place = place[key]
    place.update(changes)
    for key in [key for key, value in changes.items() if value is None]:
        del place[key]
    (folder / "config.json").write_text(json.dumps(config))


def test_what_clips_config_leaves_out_has_transformers_defaults(clip, monkeypatch):
    """transformers 4 saves openai/clip-vit-base-patch32 like this; its network, then, and the weights that fit it."""
    sizes = {"intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224, "patch_size": 32}
    text = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8, "vocab_size": 49408,
            "max_position_embeddings": 77}
    with torch.device("meta"):
        model = CLIP({"projection_dim": 512, "vision_config": {"hidden_size": 768, **sizes}, "text_config": text})
    weights = {released_name(key, CLIP_NAMES): value for key, value in model.state_dict().items()}
    monkeypatch.setattr(encoders, "read_weights", lambda path: dict(weights))
    for config in ({}, {"vision_config": {"model_type": "clip_vision_model"}, "text_config": {"model_type": "clip_text_model"}},
                   {"vision_config": None, "text_config_dict": text, "text_config": {"hidden_size": 5}}):
        (clip / "config.json").write_text(json.dumps({"model_type": "clip", **config}))
        filled, _ = load_clip(clip, "meta")
        assert [layer.heads for tower in (filled.vision, filled.text) for layer in tower.layers] == [12] * 12 + [8] * 12
        assert filled.size == 224 and filled.vision.norm.eps == 1e-5


@pytest.mark.parametrize("keys, change", [
    (["vision_config"], {"hidden_size": "32"}), (["vision_config"], {"num_hidden_layers": 10**9}), (["text_config"], {"hidden_size": 24.0}),
    (["text_config"], {"num_attention_heads": 0}), (["text_config"], {"num_attention_heads": 5}), (["vision_config"], {"patch_size": 7}),
    (["text_config"], {"layer_norm_eps": float("nan")}), (["vision_config"], {"image_size": True}), ([], {"projection_dim": -1}),
    (["text_config"], {"hidden_act": "gelu"}), ([], {"text_config": [1]}), (["text_config"], {"max_position_embeddings": 64})])
def test_values_of_clips_config(clip, keys, change):
    change_config(clip, *keys, **change)
    with pytest.raises(InputError, match=f"config.json: .*{next(iter(change))}"):
        load_clip(clip)


@pytest.mark.parametrize("change", [{"num_attention_heads": 5}, {"patch_size": 5}, {"hidden_size": "36"}, {"num_hidden_layers": 0},
                                    {"hidden_act": "relu"}, {"intermediate_size": None}])
def test_values_of_dinos_config(tmp_path, change):
    """Nothing is filled in: transformers leaves nothing out there, and the number of heads is not in the weights."""
    pytest.importorskip("safetensors")
    dino = shutil.copytree(FOLDER / "dino", tmp_path / "dino")
    change_config(dino, **change)
    with pytest.raises(InputError, match=f"config.json: .*{next(iter(change))}"):
        load_dino(dino)


def test_a_vit_for_images_of_another_size():
    pytest.importorskip("safetensors")
    with pytest.raises(InputError, match="images of 224 pixels need 785 positions, this ViT has 17"):
        load_dino(FOLDER / "dino").image_features(torch.zeros(1, 3, 224, 224))


def test_pytorch_files_of_several_kinds(clip):
    safetensors = pytest.importorskip("safetensors.torch")
    weights = safetensors.load_file(clip / "model.safetensors")
    (clip / "model.safetensors").unlink()
    file = clip / "pytorch_model.bin"
    expected = load_clip(FOLDER / "clip")[0].state_dict()
    for dtype in (torch.float64, torch.float16):
        counter = {"text_model.embeddings.position_ids": torch.arange(77)[None]}       # older releases of transformers saved it
        torch.save({**counter, **{key: value.to(dtype) for key, value in weights.items()}}, file)
        loaded = load_clip(clip)[0].state_dict()
        assert all(value.equal(expected[key].to(dtype).float()) for key, value in loaded.items())
    name = "visual_projection.weight"
    for content, message in (
            ({"state_dict": weights, "epoch": 3}, "'state_dict' has a dict"), ({**weights, name: None}, f"'{name}' has a NoneType"),
            (list(weights.values()), "a dict of tensors is expected, this is a list"), ({0: weights[name]}, "0 has a Tensor"),
            ({**weights, name: weights[name].to(torch.uint8)}, f"{name} is of type uint8"),
            ({**weights, name: weights[name].double() * 1e300}, f"{name}: 640 of 640 values are not finite"),
            ({**weights, name: weights[name].to_sparse()}, "these weights cannot be read"),
            ({**weights, name: Path("x")}, "cannot be read .it is damaged or holds more than tensors")):
        torch.save(content, file)
        with pytest.raises(InputError, match=f"pytorch_model.bin: .*{message}"):
            load_clip(clip)
    file.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match="pytorch_model.bin: a Git LFS pointer"):
        load_clip(clip)


@pytest.mark.parametrize("state", [
    {}, {"pos_embed": torch.zeros(3), "patch_embed.proj.weight": torch.zeros(64, 3, 8, 8), "blocks.0.mlp.fc1.weight": torch.zeros(64, 64)},
    {"pos_embed": torch.zeros(1, 0, 64), "patch_embed.proj.weight": torch.zeros(64, 3, 8, 8), "blocks.0.mlp.fc1.weight": torch.zeros(64, 64),
     "blocks.0.attn.qkv.bias": torch.zeros(())}])
def test_a_file_that_is_not_the_original_dino(tmp_path, state):
    torch.save(state, tmp_path / "dino.pth")
    with pytest.raises(InputError, match="dino.pth: (not DINO's original file|num_hidden_layers is 0|image_size is 0)"):
        load_dino(tmp_path / "dino.pth")


def test_one_tokenizer_in_all_its_files(clip):
    """tokenizer.json, or vocab.json and merges.txt; with a byte order mark, with the line ends of Windows."""
    texts = ["A red cat's 3 hats!", "caf\u00e9"]
    expected, _ = ClipTokenizer(clip)(texts)
    for name in ("vocab.json", "merges.txt"):
        raw = (clip / name).read_bytes()
        (clip / name).write_bytes(b"\xef\xbb\xbf" + raw.replace(b"\n", b"\r\n"))
    tokenizer = ClipTokenizer(clip)
    assert tokenizer(texts)[0].equal(expected)
    tokenizer.bpe.enable_padding(length=9)
    tokenizer.bpe.enable_truncation(3)
    whole = json.loads(tokenizer.bpe.to_str())
    (clip / "tokenizer.json").write_text("\ufeff" + json.dumps(whole), encoding="utf-8")
    assert ClipTokenizer(clip)(texts)[0].equal(expected)
    whole["model"]["type"] = "BPE of tomorrow"
    (clip / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(InputError, match="tokenizer.json: the installed tokenizers .* cannot read it .*pip install -U tokenizers"):
        ClipTokenizer(clip)


@pytest.mark.parametrize("name, change, message", [
    ("merges.txt", lambda text: text + "one two three\n", "merges.txt: it does not fit vocab.json"),
    ("merges.txt", lambda text: text + "qqq zzz\n", "merges.txt: it does not fit vocab.json"),
    ("vocab.json", lambda text: text.replace("endoftext", "theend"), "merges.txt: it does not|vocab.json: it lacks the token <.endoftext"),
    ("vocab.json", lambda text: text.replace("startoftext", "begin"), "vocab.json: it lacks the token <.startoftext"),
    ("vocab.json", lambda text: text.replace(": 573", ": 20"), "<.endoftext.> is not the last token"),
    ("vocab.json", lambda text: text.replace(": 573", ": 600"), "ids go to 600, vocab_size in config.json is 574"),
    ("vocab.json", lambda text: text.replace(": 573", ": 573.5"), "merges.txt: it does not fit vocab.json")])
def test_a_vocabulary_that_does_not_fit(clip, name, change, message):
    before = (clip / name).read_text(encoding="utf-8")
    assert change(before) != before
    (clip / name).write_text(change(before), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        load_clip(clip)


def test_transforms():
    image = Image.new("RGB", (100, 50), (255, 0, 0))
    image.paste((0, 255, 0), (0, 0, 22, 50))              # the left end: only a resize to a square keeps it
    cropped = encoders.clip_pixels(image)
    square = encoders.direction_pixels(image)
    assert cropped.shape == square.shape == encoders.dino_pixels(image).shape == (3, 224, 224)
    cropped = cropped * encoders.CLIP_STD + encoders.CLIP_MEAN
    square = square * encoders.CLIP_STD + encoders.CLIP_MEAN
    torch.testing.assert_close(cropped[:, 112, 112], torch.tensor([1.0, 0, 0]), atol=1e-6, rtol=0)
    assert cropped[1].max() < 0.1 and square[1, :, :46].min() > 0.99


def test_direction_by_hand():
    e = torch.eye(3)
    source = e[:1]
    output = e[1:2] * 5                                                # the length does not matter
    for captions, cosine in (((e[:1], e[1:2]), 1.0), ((e[1:2], e[:1] * 2), -1.0), ((e[:1], e[2:]), 0.5)):
        torch.testing.assert_close(encoders.direction(source, output, *captions), torch.tensor([cosine]))
    assert encoders.direction(source, output, e[:1], e[:1]).isnan().all()          # captions alike: undefined
    assert encoders.direction(source, source, e[:1], e[1:2]).tolist() == [0.0]     # nothing was done
