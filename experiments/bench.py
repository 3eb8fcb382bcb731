"""How fast is the transformer, and how does its cost grow? A table and, with --json FILE, the same as JSON.

    python -m experiments.bench            the toy's size and a 384 wide one; on a large GPU OmniGen-v1's too
    python -m experiments.bench growth     an edit by OmniGen-v1, predicted, and checked at 384 wide
    python -m experiments.bench data       the start of a training on 500,000 rows: seconds, memory (Linux)

FLOPs count only the pairs of tokens that the attention rule allows, and nothing twice that the backward
recomputes. They are set against a matrix product of the model's sizes, (tokens, D) x (D, 2 mlp), timed in the
same run, and (mfu) against the peak of a GPU that scale/cost.py knows.
"""
import json
import multiprocessing
import os
import statistics
import tempfile
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from common.charts import markdown
from common.cli import COUNT, add_device, parser, run_script
from common.devices import autocast, compile_blocks, fast_bf16, processes
from common.files import InputError, write_json
from common.muon import Muon
from data import MicroBatches, Words, make_loader, split_words
from magd import Draws, draw, magd_loss
from model import PADDING, TEXT, Condition, Config, Transformer
from pretrained.latents import Latents, fingerprint
from pretrained.vae import VAE
from sample import euler
from scale.cost import flops, peak_tflops
from train import PRESETS

TOY = {key: PRESETS["toy"][key] for key in ("width", "layers", "heads", "mlp", "patch")}
# name: configuration, (h, w) of the target and of a reference, tokens of text, batch of training
SIZES = {"toy": (Config(vocab=80, channels=3, grid=4, qk_norm=True, **TOY), (16, 16), 8, 64),
         "384 wide": (Config(vocab=1000, width=384, layers=6, heads=6, mlp=1024), (32, 64), 64, 1),
         "OmniGen-v1": (Config(), (128, 128), 64, 1)}
STEPS = 50                                # of the sampler, in an edit


def condition_of(cfg, texts, images, device="cpu"):
    """Rows of texts[k] text tokens with images[k], a list of (h, w), in the middle of each -> Condition."""
    rows = []
    latents = []
    for text, sizes in zip(texts, images):
        row = [TEXT] * (text // 2)
        for number, (h, w) in enumerate(sizes, 1):
            row += [number] * (h * w // cfg.patch**2)
            latents.append(torch.randn(1, cfg.channels, h, w))
        rows.append(row + [TEXT] * (text - text // 2))
    L = max(map(len, rows))
    kind = torch.tensor([[PADDING] * (L - len(row)) + row for row in rows])               # (B, L)
    return Condition(torch.randint(3, cfg.vocab, kind.shape), kind, latents).to(device)


def branches(cfg, text, image, references=1, pauses=0, device="cpu"):
    """The three branches of guidance of one edit: prompt and images, images alone, nothing."""
    texts = [text + pauses, text // 4, text // 4]
    return condition_of(cfg, texts, [[image] * references, [image] * references, []], device)


def edit_flops(cfg, condition, N):
    """-> FLOPs of encoding a condition, and of one step of the sampler over it."""
    encode = 0
    step = 0
    for kind in condition.kind:
        L = int((kind != PADDING).sum())
        time_token = cfg.layers * (8 * cfg.width**2 + 6 * cfg.width * cfg.mlp + 4 * cfg.width * (L + 1))
        alone = flops(cfg, kind, 0) - time_token
        encode += alone
        step += flops(cfg, kind, N) - alone
    return encode, step


def fresh(cfg, device, dtype):
    """A transformer with random weights, made in place: OmniGen's fits no second copy."""
    cfg.short_factor = cfg.long_factor = [1.0] * (cfg.width // cfg.heads // 2)
    with torch.device("meta"):
        model = Transformer(cfg)
    model = model.to_empty(device=device).to(dtype)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    torch.nn.init.zeros_(model.pos_embed)
    return model


def seconds(function, device, repeats):
    """-> median time of `repeats` calls, and that of a first call before them."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = []
    for _ in range(1 + repeats):
        wait()
        start = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]), times[0]


def product_rate(tokens, cfg, device, dtype, repeats):
    """FLOP/s of a matrix product; of twenty at once, so that waiting for a GPU does not count."""
    a = torch.randn(tokens, cfg.width, device=device, dtype=dtype)
    b = torch.randn(cfg.width, 2 * cfg.mlp, device=device, dtype=dtype)
    out = a @ b
    took, _ = seconds(lambda: [torch.mm(a, b, out=out) for _ in range(20)], device, repeats)
    return 20 * 2 * a.numel() * b.shape[1] / took


def speed(name, device, repeats, compiled):
    """Times of one size -> records."""
    cfg, image, text, batch = SIZES[name]
    dtype = torch.bfloat16 if name == "OmniGen-v1" else torch.float32
    half = torch.bfloat16 if fast_bf16(device) else torch.float32
    model = fresh(cfg, device, dtype)
    if compiled:
        compile_blocks(model)
    N = image[0] * image[1] // cfg.patch**2
    one = condition_of(cfg, [text] * batch, [[image]] * batch, device)
    three = branches(cfg, text, image, device=device)
    x = torch.randn(max(3, batch), cfg.channels, *image, device=device)
    t = torch.full((len(x),), 0.5, device=device)
    product = product_rate(batch * (one.kind.shape[1] + 1 + N), cfg, device, half, repeats)
    dense = peak_tflops(torch.cuda.get_device_name()) if device == "cuda" else None
    records = []

    def record(what, function, work, images=None, count=repeats):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        took, first = seconds(function, device, count)
        peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
        records.append({"size": name, "what": what, "ms": 1000 * took, "first_s": first,
                        "images_per_s": images and images / took, "tflops": work / took / 1e12,
                        "of_product": work / took / product, "mfu": dense and work / took / 1e12 / dense,
                        "peak_gb": peak})

    with torch.no_grad(), autocast(device):
        encode, step = edit_flops(cfg, three, N)
        record("encode three branches", lambda: model.encode(three, N), encode)
        cache = model.encode(three, N)
        record("sampling step, three branches", lambda: model.denoise(x[:3], t[:3], cache), step)
        cache = None                                                   # its memory is not that of training
    draws = Draws(*(values.to(device) for values in draw(x.shape[1:], N, range(batch))))

    def train(optimizers=()):
        model.zero_grad(set_to_none=True)
        with autocast(device):
            magd_loss(model, x[:batch], one, draws)[0].mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    work = 3 * batch * flops(cfg, one.kind[0], N)
    record(f"training, forward and backward, batch {batch}", train, work, batch)
    if name == "OmniGen-v1":
        model.checkpointing = cfg.layers
        record("the same, all blocks recomputed", train, work, batch)
    if name == "toy":                                                  # AdamW alone is hardly any arithmetic
        matrices = [p for p in model.llm.layers.parameters() if p.ndim == 2]
        rest = [p for p in model.parameters() if all(p is not m for m in matrices)]
        optimizers = Muon(matrices, 1e-3, dtype=half), torch.optim.AdamW(rest, 1e-3, fused=True)
        for short, long in (sorted(m.shape) for m in matrices):        # five times x x^T, a a, a x
            work += 5 * 2 * (2 * short * short * long + short**3)
        record(f"training step with Muon, batch {batch}", lambda: train(optimizers), work, batch)
    model.zero_grad(set_to_none=True)
    if name == "OmniGen-v1":
        edit = whole_edit(model, three, x[:1], N)
        record(f"an edit of {STEPS} steps with the autoencoder", edit, encode + STEPS * step, 1, count=1)
    return records


def whole_edit(model, condition, noise, N):
    """-> a function: encode an image with the SDXL autoencoder, edit it, decode."""
    device = noise.device
    vae = VAE().to(device).eval()
    image = torch.rand(1, 3, 8 * noise.shape[2], 8 * noise.shape[3], device=device) * 2 - 1

    @torch.no_grad()
    def edit():
        vae.encode(image)
        with autocast(device):
            cache = model.encode(condition, N)

            def velocity(z, t):
                return model.denoise(torch.cat([z] * 3), torch.full((3,), t, device=device), cache)[:1]
            z = euler(velocity, noise, STEPS)
        vae.decode(z)
    return edit


def cell(value):
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def growth(repeats):
    """What an edit by OmniGen-v1 costs, predicted; the prediction checked at 384 wide."""
    full = SIZES["OmniGen-v1"][0]
    small = SIZES["384 wide"][0]
    model = fresh(small, "cpu", torch.float32)
    cases = [("1024 x 1024 pixels", 1024, 1, 0)]
    cases += [(f"{side} x {side} pixels", side, 1, 0) for side in (512, 768, 1536)]
    cases += [(f"{k} reference images", 1024, k, 0) for k in (0, 2, 3)]
    cases += [(f"{k} pause tokens", 1024, 1, k) for k in (16, 32)]
    rows = []
    base = None
    for name, side, references, pauses in cases:
        image = (side // 8, side // 8)
        encode, step = edit_flops(full, branches(full, 64, image, references, pauses), (side // 16)**2)
        little = (side // 32, side // 32)                              # a sixteenth of the tokens of a kind
        condition = branches(small, 4, little, references, pauses // 16)
        small_encode, small_step = edit_flops(small, condition, (side // 64)**2)
        measured = edit_seconds(model, condition, little, repeats)
        cost = (encode + STEPS * step, small_encode + STEPS * small_step, measured)
        base = base or cost
        relative = [f"{own / first:.3f}" for own, first in zip(cost, base)]
        rows.append([name, f"{cost[0] / 1e15:.3f}", f"{encode / cost[0]:.1%}", *relative])
    print(markdown(["an edit", "PFLOP", "of it encoding", "relative to the first", "the same, 384 wide",
                    "measured, 384 wide"], rows))


def edit_seconds(model, condition, image, repeats):
    N = image[0] * image[1] // 4
    x = torch.randn(3, 4, *image)
    t = torch.full((3,), 0.5)
    with torch.no_grad():
        cache = model.encode(condition, N)
        encode, _ = seconds(lambda: model.encode(condition, N), "cpu", repeats)
        step, _ = seconds(lambda: model.denoise(x, t, cache), "cpu", repeats)
    return encode + STEPS * step


# ------------------------------------------------------------------------------------------- data

RANKS, WORKERS = 2, 4
INSTRUCTION = "make the small boat behind the old house blue and leave the sky above the sea as it is"
SHAPE = (8, 128, 128)                     # mean and deviation of a 1024 x 1024 image


def make_data(folder, n):
    """n rows and the latents of their 2 n images. The images are empty files (links to one
    a folder), the latents all the same."""
    latent = np.zeros(SHAPE, np.float16).tobytes()
    cache = folder / "pairs.latents"
    write_json(cache / "cache.json", {})
    (cache / "0.f16").write_bytes(latent)
    row = {"instruction": INSTRUCTION, "source_caption": INSTRUCTION, "target_caption": INSTRUCTION,
           "task": "color"}
    line = {"file": "0.f16", "offset": 0, "shape": SHAPE, "version": 1, "crc32": zlib.crc32(latent)}
    with open(folder / "pairs.jsonl", "w") as rows, open(cache / "0.jsonl", "w") as index:
        for k in range(n):
            own = folder / "images" / f"{k // 1000:04d}"
            if k % 1000 == 0:
                own.mkdir(parents=True)
                (own / "empty").touch()
                made_of = [fingerprint(own / "empty")]
            names = [f"images/{own.name}/{k:07d}_{kind}.jpg" for kind in ("source", "target")]
            rows.write(json.dumps({**row, "input_images": names[:1], "output_image": names[1]}) + "\n")
            for name in names:
                os.link(own / "empty", folder / name)
                index.write(json.dumps({"key": name, **line, "made_of": made_of}) + "\n")


def memory(pid):
    """MB of a process: all that it sees, with its share of what several have in common, its own alone."""
    lines = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    kb = {line[0]: int(line[1]) for line in lines}
    return kb["Rss:"] / 1e3, kb["Pss:"] / 1e3, (kb["Private_Clean:"] + kb["Private_Dirty:"]) / 1e3


def first_batch(rank, folder, step, start, together, results):
    """A process of a training of 128 samples a step, without the model: its data from `step` on."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)               # workers as those of train.py
    dataset = Latents(folder / "pairs.jsonl", folder / "pairs.latents", {})
    flags = SimpleNamespace(seed=0, p_drop=0.1, p_plan=0.5, p_masked_source=0.5, max_gap=0, max_pauses=0,
                            lora=0, t_mean=0.0, steps=step + 3, workers=WORKERS)
    items = MicroBatches(flags, dataset, Words(split_words(INSTRUCTION)), SIZES["OmniGen-v1"][0])
    batches = make_loader(flags, items, 1, 128 // RANKS, step, rank, RANKS, torch.device("cpu"))
    next(batches)
    took = time.time() - start, time.process_time()
    for _ in range(128 // RANKS):
        next(batches)
    together.wait()                                        # what they share, they share now
    pid = os.getpid()
    workers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    results.put((*took, *memory(pid), *max(memory(worker) for worker in workers)))
    together.wait()


def data(n):
    """Seconds from the start of the processes to the first batch, memory after a step more."""
    if not Path("/proc/self/smaps_rollup").exists():
        raise InputError("the memory of a process is read from /proc/PID/smaps_rollup, which Linux has")
    context = multiprocessing.get_context("spawn")
    rows = []
    with tempfile.TemporaryDirectory() as few, tempfile.TemporaryDirectory() as many:
        make_data(Path(few), 8)
        make_data(Path(many), n)
        for name, folder, step in (("8 rows", few, 0), (f"{n:,} rows, first start", many, 0),
                                   ("second start", many, 0), ("at step 3,000", many, 3000)):
            together = context.Barrier(RANKS)
            results = context.Queue()
            common = (Path(folder), step, time.time(), together, results)
            processes = [context.Process(target=first_batch, args=(rank, *common)) for rank in range(RANKS)]
            for process in processes:
                process.start()
            found = [results.get() for _ in processes]
            for process in processes:
                process.join()
            rows.append([name, *(cell(max(values)) for values in zip(*found))])
    print(markdown(["start", "s to the first batch", "CPU s of a rank", "rank: MB", "its share", "its own",
                    "worker: MB", "its share", "its own"], rows))


def main():
    p = parser(__doc__)
    p.add_argument("what", nargs="?", choices=("speed", "growth", "data"), default="speed")
    p.add_argument("--sizes", nargs="+", choices=SIZES, help="all that fit here if not given")
    p.add_argument("--threads", type=COUNT, help="of the CPU")
    p.add_argument("--compile", action="store_true", help="torch.compile the blocks; first_s is its cost")
    p.add_argument("--rows", type=COUNT, default=500_000, help="of data")
    p.add_argument("--repeats", type=COUNT, default=5)
    add_device(p)
    p.add_argument("--json", help="write the records of speed to this file too")
    flags = p.parse_args()
    torch.manual_seed(0)
    if flags.threads:
        torch.set_num_threads(flags.threads)
    device = processes(flags.device)[2].type
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {where}, bf16 products: {fast_bf16(device)}\n")
    if flags.what == "data":
        return data(flags.rows)
    if flags.what == "growth":
        return growth(flags.repeats)
    fits = device == "cuda" and torch.cuda.get_device_properties(0).total_memory > 60e9
    records = []
    for name in flags.sizes or [name for name in SIZES if name != "OmniGen-v1" or fits]:
        records += speed(name, device, flags.repeats, flags.compile)
    keys = [key for key in records[0] if any(record[key] is not None for record in records)]
    print(markdown(keys, [[cell(record[key]) for key in keys] for record in records]))
    if flags.json:
        write_json(flags.json, records)


if __name__ == "__main__":
    run_script(main)
