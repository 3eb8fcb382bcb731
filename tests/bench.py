"""How fast is the transformer, and how does its cost grow? As a table and, with --json FILE, as JSON.

    python tests/bench.py                    on a CPU: the toy preset's size and a 384 wide one; on a GPU also OmniGen-v1's
    python tests/bench.py growth             the cost of an edit and of training at OmniGen-v1's size, predicted; checked at 384 wide

FLOPs are exact: only pairs of tokens that the attention rule allows count. They are set against a matrix product of the model's own
sizes, (tokens, width) x (width, 2 mlp), timed in the same run. Where diffusers is installed its OmniGen transformer is timed beside
ours: it recomputes everything at every step, over a padded batch of the three branches of guidance with a dense mask; this code encodes the
condition once and then runs the target only.
"""
import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import magd  # noqa: E402
from metrics import markdown  # noqa: E402
from model import PADDING, TEXT, VAE, Condition, Config, Transformer, attention_rule, autocast, fast_bf16, flops  # noqa: E402
from sample import euler  # noqa: E402
from train import PRESETS, Muon  # noqa: E402

# name: configuration, target and reference (h, w) in latent pixels, text tokens, training batch
TOY = {key: PRESETS["toy"][key] for key in ("width", "layers", "heads", "mlp", "patch")}
SIZES = {"toy": (Config(vocab=80, channels=3, grid=4, qk_norm=True, **TOY), (16, 16), 8, PRESETS["toy"]["batch"]),
         "384 wide": (Config(vocab=1000, width=384, layers=6, heads=6, mlp=1024), (32, 64), 64, 1),
         "OmniGen-v1": (Config(), (128, 128), 64, 1)}


def condition_of(cfg, texts, images, device):
    """Rows of texts[k] text tokens with images[k], a list of (h, w), in the middle of each -> Condition."""
    rows, latents = [], []
    for text, sizes in zip(texts, images):
        row = [TEXT] * (text // 2)
        for number, (h, w) in enumerate(sizes, 1):
            row += [number] * (h * w // cfg.patch**2)
            latents.append(torch.randn(1, cfg.channels, h, w))
        rows.append(row + [TEXT] * (text - text // 2))
    L = max(map(len, rows))
    kind = torch.tensor([[PADDING] * (L - len(row)) + row for row in rows])
    return Condition(torch.randint(3, cfg.vocab, kind.shape), kind, latents).to(device)


def branches(cfg, text, size, references=1, pauses=0, device="cpu"):
    """The three branches of guidance of one edit: prompt and images, images alone, nothing."""
    return condition_of(cfg, [text + pauses, text // 4, text // 4], [[size] * references] * 2 + [[]], device)


def edit_flops(cfg, condition, N):
    """-> FLOPs of encoding a condition, and of one step of the sampler over it."""
    encode = step = 0
    for kind in condition.kind:
        L = int((kind != PADDING).sum())
        whole, alone = flops(cfg, kind, N), flops(cfg, kind, 0)
        time_token = cfg.layers * (8 * cfg.width**2 + 6 * cfg.width * cfg.mlp + 4 * cfg.width * (L + 1))
        encode, step = encode + alone - time_token, step + whole - alone + time_token
    return encode, step


def seconds(function, device, repeats, warm=1):
    """Median time of a call, after `warm` calls that do not count."""
    times = []
    for _ in range(warm + repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[warm:])


def theirs(cfg, device, dtype):
    """diffusers' transformer at the same sizes, or None."""
    try:
        from diffusers import OmniGenTransformer2DModel
    except ImportError:
        return None
    with torch.device(device):
        return OmniGenTransformer2DModel(
            in_channels=cfg.channels, patch_size=cfg.patch, hidden_size=cfg.width, num_attention_heads=cfg.heads,
            num_key_value_heads=cfg.heads, intermediate_size=cfg.mlp, num_layers=cfg.layers, pad_token_id=0, vocab_size=cfg.vocab,
            pos_embed_max_size=cfg.grid, rope_scaling={"short_factor": cfg.short_factor, "long_factor": cfg.long_factor}).to(dtype)


def padded_inputs(cfg, condition, target, dtype):
    """The condition as diffusers' transformer takes it: one padded batch with a dense mask."""
    B, L = condition.kind.shape
    N = target[0] * target[1] // cfg.patch**2
    S = L + 1 + N
    attend = torch.zeros(B, S, S, dtype=torch.long)
    attend[:, :L, :L] = attention_rule(condition.kind)
    attend[:, L:, :L] = (condition.kind != PADDING)[:, None]
    attend[:, L, L] = 1
    attend[:, L + 1:, L:] = 1
    real = torch.cat([condition.kind != PADDING, torch.ones(B, 1 + N, dtype=torch.bool)], dim=1)
    sizes, device = {}, condition.ids.device
    for b, row in enumerate(condition.kind.tolist()):
        if 1 in row:
            sizes[b] = [[row.index(1), len(row) - row[::-1].index(1)]]
    return dict(input_ids=condition.ids, input_img_latents=[image.to(dtype) for image in condition.images], input_image_sizes=sizes,
                attention_mask=attend.to(device), position_ids=(real.cumsum(1) - 1).clamp(min=0).to(device), return_dict=False)


def fresh_meta(cfg):
    with torch.device("meta"):
        return Transformer(cfg)


def fresh(cfg, device, dtype):
    """A transformer with random weights, made in place: OmniGen's fits no second copy."""
    model = fresh_meta(cfg).to_empty(device=device).to(dtype)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    torch.nn.init.zeros_(model.pos_embed)
    return model


def speed(name, device, repeats, compiled):
    """Times of one size -> records."""
    cfg, size, text, batch = SIZES[name]
    full = name == "OmniGen-v1"
    dtype = torch.bfloat16 if full else torch.float32
    cfg.short_factor = cfg.long_factor = [1.0] * (cfg.width // cfg.heads // 2)
    model, N, records = fresh(cfg, device, dtype), size[0] * size[1] // cfg.patch**2, []
    if compiled:
        model.compile_blocks()
    half = torch.bfloat16 if fast_bf16(device) else torch.float32
    one, three = condition_of(cfg, [text] * batch, [[size]] * batch, device), branches(cfg, text, size, device=device)
    x = torch.randn(max(3, batch), cfg.channels, *size, device=device)
    t = torch.full((len(x),), 0.5, device=device)

    a, b = (torch.randn(*shape, device=device, dtype=half) for shape in ((batch * (one.kind.shape[1] + 1 + N), cfg.width),
                                                                         (cfg.width, 2 * cfg.mlp)))
    c = a @ b

    def products():                                        # twenty, so that the waiting of `seconds` for a GPU does not count
        for _ in range(20):
            torch.mm(a, b, out=c)
    product = 20 * 2 * a.numel() * b.shape[1] / seconds(products, device, repeats)

    def measure(function, count=repeats):
        """-> seconds, those of the first call, peak memory in GB"""
        first = seconds(function, device, 1, warm=0)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return seconds(function, device, count, warm=0), first, torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None

    def note(what, measured, work=None, images=None):
        took, first, peak = measured
        records.append({"size": name, "what": what, "ms": 1000 * took, "first_s": first, "images_per_s": images and images / took,
                        "tflops": work and work / took / 1e12, "of_product": work and work / took / product,
                        "peak_gb": peak, "of_diffusers": None})

    with torch.no_grad(), autocast(device):
        encode, step = edit_flops(cfg, three, N)
        note("encode three branches", measure(lambda: model.encode(three, N)), encode)
        cache = model.encode(three, N)
        note("sampling step, three branches", measure(lambda: model.denoise(x[:3], t[:3], cache)), step)
        cache = None                                       # its memory is not that of training

    shape = tuple(x.shape[1:])
    draws = magd.Draws(*(d.to(device) for d in magd.draw(shape, N, range(batch))))

    def train():
        model.zero_grad(set_to_none=True)
        with autocast(device):
            magd.magd_loss(model, x[:batch], one, draws)[0].mean().backward()
    work = 3 * batch * flops(cfg, one.kind[0], N)
    note(f"training, forward and backward, batch {batch}", measure(train), work, batch)
    model.zero_grad(set_to_none=True)

    if name == "toy":                                      # with its optimizers; OmniGen's is AdamW alone, which is no arithmetic to speak of
        matrices = {id(p): p for p in model.llm.layers.parameters() if p.ndim == 2}
        optimizers = [Muon(matrices.values(), 1e-3, dtype=half),
                      torch.optim.AdamW([p for p in model.parameters() if id(p) not in matrices], 1e-3, fused=True)]

        def step():
            train()
            for optimizer in optimizers:
                optimizer.step()
        for m in matrices.values():                        # five steps of Newton-Schulz: x x^T, a a, a x
            r, c = sorted(m.shape)
            work += 5 * 2 * (2 * r * r * c + r**3)
        note(f"training step with Muon, batch {batch}", measure(step), work, batch)

    if full:                                               # a whole edit: autoencoder, encode, 50 steps, autoencoder
        vae = VAE().to(device).eval()
        image = torch.rand(1, 3, 8 * size[0], 8 * size[1], device=device) * 2 - 1

        @torch.no_grad()
        def edit():
            vae.encode(image)
            with autocast(device):
                cache = model.encode(three, N)
                z = euler(lambda z, s: model.denoise(torch.cat([z] * 3), torch.full((3,), s, device=device), cache)[:1], x[:1], 50)
            vae.decode(z)
        note("an edit of 50 steps with the autoencoder", measure(edit, 1), encode + 50 * step, 1)

    other = None if name == "toy" else theirs(cfg, device, dtype)      # last: its memory is not ours
    if other is not None:
        single, inputs = padded_inputs(cfg, one, size, dtype), padded_inputs(cfg, three, size, dtype)

        def train_theirs():
            other.zero_grad(set_to_none=True)
            v = other(x[:1].to(dtype), t[:1], **single)[0]
            (v.float() - (x[:1] - draws.x0)).square().mean().backward()
        with torch.no_grad(), autocast(device):
            reference = seconds(lambda: other(x[:3].to(dtype), t[:3], **inputs), device, repeats)
        for record, took in ((records[1], reference), (records[2], seconds(train_theirs, device, repeats))):
            record["of_diffusers"] = record["ms"] / 1000 / took
    return records


def show(records):
    keys = ["size", "what", "ms", "first_s", "images_per_s", "tflops", "of_product", "of_diffusers", "peak_gb"]
    keys = [key for key in keys if any(record[key] is not None for record in records)]

    def text(value):
        return "" if value is None else value if isinstance(value, str) else f"{value:.3g}" if value < 100 else f"{value:.0f}"
    print(markdown(keys, [[text(record[key]) for key in keys] for record in records]))


# ------------------------------------------------------------------------------------------- growth

GPU = {"flops": 0.4 * 989e12, "inside": 450e9, "between": 50e9}     # of an H100: what training may reach; NVLink; 400 Gbit/s a GPU, in bytes/s


def growth(repeats):
    """Predicted cost of an edit (50 steps, three branches) and of training, at OmniGen-v1's size; the prediction checked at 384 wide."""
    full, small = SIZES["OmniGen-v1"][0], SIZES["384 wide"][0]
    small.short_factor = small.long_factor = [1.0] * 32
    model = fresh(small, "cpu", torch.float32)
    cases = [(f"{side} x {side} pixels", side, 1, 0) for side in (512, 768, 1024, 1536)]
    cases += [(f"{k} reference images", 1024, k, 0) for k in (0, 2, 3)] + [(f"{k} pause tokens", 1024, 1, k) for k in (16, 32)]
    rows, base = [], None
    for name, side, references, pauses in sorted(cases, key=lambda case: case[0] != "1024 x 1024 pixels"):
        size, N = (side // 8, side // 8), (side // 16)**2
        encode, step = edit_flops(full, branches(full, 64, size, references, pauses), N)
        little, n = (side // 32, side // 32), (side // 64)**2
        condition = branches(small, 4, little, references, pauses // 16)          # a sixteenth of the tokens, of every kind
        expected = sum(w * k for w, k in zip(edit_flops(small, condition, n), (1, 50)))
        x, t = torch.randn(3, 4, *little), torch.full((3,), 0.5)
        with torch.no_grad():
            cache = model.encode(condition, n)
            took = seconds(lambda: model.encode(condition, n), "cpu", repeats) + 50 * seconds(lambda: model.denoise(x, t, cache), "cpu", repeats)
        cost = (encode + 50 * step, expected, took)
        base = base or cost
        rows.append([name, f"{cost[0] / 1e15:.3f}", f"{encode / cost[0]:.1%}", f"{cost[0] / base[0]:.3f}", f"{cost[1] / base[1]:.3f}", f"{took / base[2]:.3f}"])
    print(markdown(["an edit", "PFLOP", "of it encoding", "relative to the first", "the same, 384 wide", "measured, 384 wide"], rows))

    edit, caption = ((flops(full, condition_of(full, [64], [own], "cpu").kind[0], 4096)) for own in ([(128, 128)], []))
    sample, parameters = 4 * (edit + caption) / 2, sum(p.numel() for p in fresh_meta(full).parameters())      # 4: recomputed forward
    rows = []
    for gpus, batch in ((8, 128), (64, 128), (512, 128), (512, 512)):
        if batch < gpus:
            rows.append([gpus, batch, "-", "-", "-", "-", f"does not run: more GPUs than samples, at most {batch}"])
            continue
        micro = batch // gpus
        compute = micro * sample / GPU["flops"]
        # FSDP2: of each micro-batch the bf16 weights are gathered twice, the float32 gradients scattered once
        moved = micro * parameters * (2 + 2 + 4) * (gpus - 1) / gpus
        wires = moved / GPU["inside" if gpus <= 8 else "between"]
        rows.append([gpus, batch, micro, f"{compute:.2f}", f"{wires:.2f}", f"{16 * parameters / gpus / 1e9:.1f}",
                     "hidden behind the arithmetic" if wires < compute else "the wires decide"])
    print()
    print(markdown(["GPUs", "batch", "samples each", "arithmetic, s a step", "traffic, s a step", "GB of states each", ""], rows))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", nargs="?", choices=("speed", "growth"), default="speed")
    p.add_argument("--sizes", nargs="+", choices=SIZES, help="all that fit here if not given")
    p.add_argument("--threads", type=int, help="of the CPU")
    p.add_argument("--compile", action="store_true", help="torch.compile the blocks; first_s is what that costs at the start")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--json", help="write the records of speed to this file too")
    flags = p.parse_args()
    torch.manual_seed(0)
    if flags.threads:
        torch.set_num_threads(flags.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if device == 'cuda' else f'CPU, {torch.get_num_threads()} threads'}, "
          f"bf16 products: {fast_bf16(device)}\n")
    if flags.what == "growth":
        return growth(flags.repeats)
    fits = device == "cuda" and torch.cuda.get_device_properties(0).total_memory > 60e9
    records = []
    for name in flags.sizes or [name for name in SIZES if name != "OmniGen-v1" or fits]:
        records += speed(name, device, flags.repeats, flags.compile)
    show(records)
    if flags.json:
        Path(flags.json).write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
