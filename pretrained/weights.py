"""Strict readers of released files, and the writer of weights. What is missing, unknown, of another type,
shape or size, or not a finite number is an InputError of one line that names the file."""
import json
import pickle
import reprlib
from contextlib import contextmanager
from pathlib import Path

import torch

from common.devices import check_finite
from common.files import InputError, optional, read_json, writing
from scale.sharding import own_part

HINT = "docs/full-scale.md says which files are needed and where to get them"
FLOATS = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}
POINTER = b"version https://git-lfs"


def released(path):
    """The path of a released file that is there and is the file itself."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(len(POINTER))
    except (OSError, ValueError) as error:               # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or error
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else reason
        raise InputError(f"{path}: {reason}. {HINT}") from None
    if start == POINTER:
        raise InputError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` there")
    if not start:
        raise InputError(f"{path}: the file is empty; get it again")
    return path


def positive(value):
    return type(value) in (int, float) and 1e-30 < value < 1e30


def check_numbers(where, found, sizes, reals=()):
    """Of the keys of a config.json, `sizes` have to be whole numbers from 1 on, `reals` any above 0."""
    for key in (*sizes, *reals):
        if key not in found:
            raise InputError(f"{where}: the key {key!r} is missing")
        value = found[key]
        most = 1000 if "layers" in key else 2**18        # a model far larger could not even be made empty
        if key in sizes and not (type(value) is int and 1 <= value <= most):
            raise InputError(f"{where}: {key} is {reprlib.repr(value)}; a whole number from 1 to {most} is "
                             f"expected")
        if key in reals and not positive(value):
            raise InputError(f"{where}: {key} is {reprlib.repr(value)}; a number above 0 is expected")


def read_tokenizer(path, needed):
    """tokenizer.json -> a Tokenizer of the package tokenizers that has the tokens `needed`."""
    package = optional("tokenizers")
    text = json.dumps(read_json(released(path)))         # its own reader stops at a byte order mark
    try:
        tokenizer = package.Tokenizer.from_str(text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode("two cats, 1 dog")              # some faults show only here
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:                       # a panic of its Rust code is no Exception
        raise InputError(f"{path}: the installed tokenizers {package.__version__} cannot read it "
                         f"({first_line(error)}); pip install -U tokenizers, or get the file again") from None
    missing = [token for token in needed if tokenizer.token_to_id(token) is None]
    if missing:
        raise InputError(f"{path}: it lacks the token {', '.join(missing)}: the tokenizer of another model")
    return tokenizer


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def check_shapes(path, expected, found):
    """Compare {name: shape} of a model with that of a file; InputError names the tensors that do not fit."""
    wrong = [f"{key} is missing" for key in expected if key not in found]
    wrong += [f"{key} is unknown" for key in found if key not in expected]
    wrong += [f"{key} has the shape {found[key]} instead of {shape}"
              for key, shape in expected.items() if found.get(key, shape) != shape]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise InputError(f"{path}: the weights do not fit: {'; '.join(wrong[:3])}{more}")


def usable(file, key, tensor, dtype=torch.float32, device="cpu", copy=False):
    """A tensor of a file as a model takes it. Looked at after the cast, which may overflow."""
    if tensor.dtype not in FLOATS:
        raise InputError(f"{file}: {key} is of type {str(tensor.dtype).removeprefix('torch.')}; weights are "
                         f"float16, bfloat16, float32 or float64 here: get the model that is not quantized")
    tensor = tensor.to(device, dtype, copy=copy)
    check_finite(f"{file}: {key}", tensor)
    return tensor


@contextmanager
def opened(file):
    """A .safetensors file, open."""
    safetensors = optional("safetensors")
    try:
        with safetensors.safe_open(released(file), "pt") as tensors:
            yield tensors
    except safetensors.SafetensorError as error:
        raise InputError(f"{file}: not a whole .safetensors file, it cannot be read ({first_line(error)}); "
                         f"get it again") from None


def shards(path):
    """The files that hold the weights `path` stands for: those its index names, or `path` itself."""
    index = path.with_name(f"{path.name}.index.json")
    if not index.exists():
        return [path]
    file_of = read_json(released(index)).get("weight_map")
    names = list(file_of.values()) if isinstance(file_of, dict) else []
    if not names or not all(isinstance(name, str) and name == Path(name).name > "" for name in names):
        raise InputError(f"{index}: no weight_map with a file of this folder for each tensor; get it again")
    return [path.with_name(name) for name in sorted(set(names))]


def load_weights(model, path, dtype, device):
    """Give a model made on the device `meta` its weights from a .safetensors file or its shards -> the model.

    Memory peaks at one copy of the weights. Of a sharded model (FSDP2) each process keeps only its own rows.
    """
    # adapters (pretrained/lora.py) are not there
    expected = {name: value for name, value in model.state_dict().items() if value.is_meta}
    file_of = {}                                                       # {name of a tensor: its file}
    shapes = {}
    for file in shards(Path(path)):
        with opened(file) as tensors:
            for key in tensors.keys():
                if key in file_of:
                    raise InputError(f"{file}: {key} is in {file_of[key].name} too; get both again")
                file_of[key] = file
                shapes[key] = tuple(tensors.get_slice(key).get_shape())
    check_shapes(path, {key: tuple(value.shape) for key, value in expected.items()}, shapes)
    weights = {}
    for key, file in file_of.items():
        with opened(file) as tensors:                                  # closing it frees the pages it read
            value = usable(file, key, tensors.get_tensor(key), dtype, device, copy=True)
            weights[key] = own_part(value, expected[key])
    model.load_state_dict(weights, strict=False, assign=True)
    return model


def read_weights(path):
    """{name: float32 tensor} of a folder's model.safetensors or pytorch_model.bin, or of a .pth file."""
    path = Path(path)
    files = [path / "model.safetensors", path / "pytorch_model.bin"] if path.is_dir() else [path]
    file = next((file for file in files if file.exists()), None)
    if file is None:
        raise InputError(f"{path}: {' or '.join(file.name for file in files)} is not there. {HINT}")
    released(file)
    try:
        if file.suffix == ".safetensors":
            with opened(file) as tensors:
                found = {key: tensors.get_tensor(key) for key in tensors.keys()}
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(found, dict):
            raise InputError(f"{file}: a dict of tensors is expected, this is a {type(found).__name__}")
        for key, value in found.items():
            if not isinstance(key, str) or not isinstance(value, torch.Tensor):
                raise InputError(f"{file}: names with tensors are expected, {reprlib.repr(key)} has a "
                                 f"{type(value).__name__}; from a checkpoint, save the weights alone")
        return {key: usable(file, key, value) for key, value in found.items()
                if not key.endswith("position_ids")}                   # a counter of older files
    except InputError:
        raise
    except Exception as error:                                         # broken files raise a dozen types
        more = "it is damaged or holds more than tensors"
        reason = more if isinstance(error, pickle.UnpicklingError) else first_line(error)
        raise InputError(f"{file}: these weights cannot be read ({reason})") from None


def write_weights(path, weights):
    """{name: tensor} -> a .safetensors file: length of the header, header in JSON, bytes of all tensors.

    The package's own writers make a second copy in memory, or a new file that only its owner may read."""
    names = sorted(weights, key=lambda name: -weights[name].itemsize)  # so that no tensor is misaligned
    header = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        value = weights[name]
        header[name] = {"dtype": FLOATS[value.dtype], "shape": list(value.shape),
                        "data_offsets": [end, end + value.nbytes]}
        end += value.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with writing(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(weights[name].contiguous().flatten().view(torch.uint8).numpy())
