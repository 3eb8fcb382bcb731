"""Strict readers of released weights: a tensor that is missing, unknown or of another shape is an error."""
from functools import partial
from pathlib import Path

import torch

from common.files import InputError, optional, read_json
from scale.sharding import own_part

HINT = "docs/full-scale.md says which files are needed and where to get them"


def check_shapes(path, expected, found):
    """Compare {name: shape} of a model with that of a file; InputError names the tensors that do not fit."""
    wrong = [f"{key} is missing" for key in expected if key not in found]
    wrong += [f"{key} is unknown" for key in found if key not in expected]
    wrong += [f"{key} has the shape {found[key]} instead of {shape}"
              for key, shape in expected.items() if found.get(key, shape) != shape]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise InputError(f"{path}: the weights do not fit: {'; '.join(wrong[:3])}{more}")


def shards(path):
    """The files that hold the weights `path` stands for: those its index names, or `path` itself."""
    index = path.with_name(f"{path.name}.index.json")
    if not index.is_file():
        return [path]
    file_of = read_json(index).get("weight_map", {})                   # without it, no tensor is found
    return [path.with_name(name) for name in sorted(set(file_of.values()))]


def load_weights(model, path, dtype, device):
    """Give a model made on the device `meta` its weights from a .safetensors file or its shards -> the model.

    Memory peaks at one copy of the weights. Of a sharded model (FSDP2) each process keeps only its own rows.
    """
    safetensors = optional("safetensors")
    expected = model.state_dict()
    file_of = {}                                                       # {name of a tensor: its file}
    shapes = {}
    for file in shards(Path(path)):
        if not file.is_file():
            raise InputError(f"{file}: there is no such file. {HINT}")
        try:
            with safetensors.safe_open(file, "pt") as tensors:
                for key in tensors.keys():
                    file_of[key] = file
                    shapes[key] = tuple(tensors.get_slice(key).get_shape())
        except safetensors.SafetensorError as error:
            raise InputError(f"{file}: not a whole .safetensors file ({error}); get it again") from None
    check_shapes(path, {key: tuple(value.shape) for key, value in expected.items()}, shapes)
    weights = {}
    for key, file in file_of.items():
        with safetensors.safe_open(file, "pt") as tensors:             # closing it frees the pages it read
            weights[key] = own_part(tensors.get_tensor(key).to(device, dtype, copy=True), expected[key])
    model.load_state_dict(weights, assign=True)
    return model


def read_weights(path):
    """{name: tensor} of a folder's model.safetensors or pytorch_model.bin, or of a .pth file."""
    path = Path(path)
    files = [path / "model.safetensors", path / "pytorch_model.bin"] if path.is_dir() else [path]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise InputError(f"{path}: {' or '.join(file.name for file in files)} is not there. {HINT}")
    load = partial(torch.load, map_location="cpu", weights_only=True)
    if file.suffix == ".safetensors":
        load = optional("safetensors.torch").load_file
    try:
        return load(file)
    except Exception as error:                                         # broken files raise a dozen types
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{file}: these weights cannot be read ({reason})") from None
