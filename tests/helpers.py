"""What several test files share."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from model import PADDING, TEXT, Config, Transformer, position_table

ROOT = Path(__file__).parent.parent
TINY = dict(width=32, layers=2, heads=2, mlp=48, channels=3, patch=4, grid=4, grid_step=16.0, time_scale=1000.0, qk_norm=True)
SMALL = ["--width", "32", "--layers", "2", "--heads", "2", "--mlp", "48", "--batch", "8", "--eval-examples", "0"]


def tiny_model(vocab=80, **changes):
    """A small model with random weights everywhere: the zero last layer of a fresh one would hide mistakes."""
    model = Transformer(Config(**{**TINY, "vocab": vocab, **changes})).init_weights()
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.eval()


def layout(*rows):
    """kind (B, L) from rows such as "..11t" : '.' padding, 't' text, digits the images."""
    code = {".": PADDING, "t": TEXT}
    return torch.tensor([[code.get(c) if c in code else int(c) for c in row] for row in rows])


def run(*command, check=None, cwd=ROOT, processes=1, **env):
    """Run one of the scripts -> CompletedProcess with text output; check: the expected exit code."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(29500 + os.getpid() % 400)]
    done = subprocess.run([*start, *map(str, command)], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **env})
    if check is not None:
        assert done.returncode == check, done.stdout + done.stderr
    return done


def call(module, *command):
    """Run a script's main() in this process: a new one takes seconds to import torch."""
    before, sys.argv = sys.argv, [module.__file__, *map(str, command)]
    try:
        module.main()
    finally:
        sys.argv = before


def read_safetensors(path):
    """A .safetensors file -> {name: tensor}, so that these tests need no optional package: a header in JSON, then raw bytes."""
    raw = Path(path).read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    types = {"F32": torch.float32, "I64": torch.int64, "U8": torch.uint8}
    return {name: torch.frombuffer(bytearray(raw[end + info["data_offsets"][0]:end + info["data_offsets"][1]]),
                                   dtype=types[info["dtype"]]).reshape(info["shape"])
            for name, info in json.loads(raw[8:end]).items() if name != "__metadata__"}


def omnigen_folder(path):
    """The tiny checkpoint as a folder like the published one: with pos_embed, a formula, which the fixture leaves out."""
    from safetensors.torch import save_file
    fixture = ROOT / "tests/fixtures/omnigen_tiny"
    shutil.copytree(fixture, path)
    (path / "model_without_pos_embed.safetensors").unlink()
    weights = read_safetensors(fixture / "model_without_pos_embed.safetensors")
    save_file({**weights, "pos_embed": position_table(Config(width=48))[None]}, path / "model.safetensors")
    return path
