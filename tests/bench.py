"""How fast is the transformer? Times, FLOP/s, peak memory; beside diffusers' OmniGen transformer where that is installed.

    python tests/bench.py                                one CPU thread: hidden 384, 6 layers, 64 text + 512 reference + 512 target tokens
    python tests/bench.py --full                         on a GPU: OmniGen-v1's sizes, bf16, 1024 x 1024 pixels, random weights

FLOPs are exact: only pairs of tokens that the attention rule allows count. diffusers recomputes everything at every step, over a
padded batch of the three branches of guidance with a dense mask; this code encodes the condition once and then runs the target only.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import magd  # noqa: E402
from model import PADDING, TEXT, VAE, Condition, Config, Transformer, autocast, flops  # noqa: E402
from sample import euler  # noqa: E402


def condition_of(cfg, texts, image, device):
    """Rows of texts[k] text tokens, one reference image (h, w) or None in the middle of each."""
    rows, images = [], []
    for text, size in zip(texts, image):
        row = [TEXT] * (text // 2) + [1] * (size[0] * size[1] // cfg.patch**2 if size else 0) + [TEXT] * (text - text // 2)
        rows.append(row)
        images += [torch.randn(cfg.channels, *size)] if size else []
    L = max(map(len, rows))
    kind = torch.tensor([[PADDING] * (L - len(row)) + row for row in rows])
    return Condition(torch.randint(3, cfg.vocab, kind.shape), kind, images).to(device)


def seconds(function, device, repeats):
    times = []
    for _ in range(repeats + 1):                           # the first one warms up
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def report(name, took, work=None, peak=None):
    rate = f"   {work / took / 1e12:8.3f} TFLOP/s" if work else ""
    mfu = f"   {work / took / peak:.1%} of the peak" if work and peak else ""
    print(f"{name:<58}{took * 1000:10.1f} ms{rate}{mfu}", flush=True)


def theirs(cfg, device, dtype):
    """diffusers' transformer at the same sizes, or None."""
    try:
        from diffusers import OmniGenTransformer2DModel
    except ImportError:
        print("diffusers is not installed here: only our own times")
        return None
    with torch.device(device):
        return OmniGenTransformer2DModel(
            in_channels=cfg.channels, patch_size=cfg.patch, hidden_size=cfg.width, num_attention_heads=cfg.heads,
            num_key_value_heads=cfg.heads, intermediate_size=cfg.mlp, num_layers=cfg.layers, pad_token_id=0, vocab_size=cfg.vocab,
            pos_embed_max_size=cfg.grid, rope_scaling={"short_factor": cfg.short_factor, "long_factor": cfg.long_factor}).to(dtype)


def padded_inputs(cfg, condition, target):
    """The condition as diffusers' transformer takes it: one padded batch with a dense mask."""
    from model import attention_rule
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
    return dict(input_ids=condition.ids, input_img_latents=[image[None] for image in condition.images], input_image_sizes=sizes,
                attention_mask=attend.to(device), position_ids=(real.cumsum(1) - 1).clamp(min=0).to(device), return_dict=False)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--full", action="store_true", help="OmniGen-v1's sizes at 1024 pixels, on a GPU")
    p.add_argument("--repeats", type=int, default=5)
    flags = p.parse_args()
    torch.manual_seed(0)
    factors = [1.0] * (48 if flags.full else 32)
    if flags.full:
        cfg, device, dtype, size, text, peak = Config(), "cuda", torch.bfloat16, (128, 128), 64, 989e12
    else:
        torch.set_num_threads(1)
        cfg, device, dtype, size, text, peak = Config(vocab=1000, width=384, layers=6, heads=6, mlp=1024), "cpu", torch.float32, (32, 64), 64, None
    cfg.short_factor = cfg.long_factor = factors
    with torch.device("meta"):
        model = Transformer(cfg)
    model.to_empty(device=device).to(dtype)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    torch.nn.init.zeros_(model.pos_embed)
    N = size[0] * size[1] // cfg.patch**2
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters, {text} text + {N} reference + {N} target tokens, "
          f"{device}, {dtype}, torch {torch.__version__}")
    one = condition_of(cfg, [text], [size], device)
    three = condition_of(cfg, [text, text // 4, text], [size, size, None], device)
    x = torch.randn(3, cfg.channels, *size, device=device)
    t = torch.full((3,), 0.5, device=device)

    # ------------------------------------------------------------------ a sampling step: three branches of guidance
    with torch.no_grad(), autocast(device, flags.full):
        cache = model.encode(three, N)
        report("encode the condition of three branches, once an edit", seconds(lambda: model.encode(three, N), device, flags.repeats))
        work = 0
        for kind in three.kind:
            L = int((kind != PADDING).sum())
            work += flops(cfg, kind, N) - flops(cfg, kind, 0) + cfg.layers * 4 * cfg.width * L
        step = seconds(lambda: model.denoise(x, t, cache), device, flags.repeats)
        report("a sampling step after the first", step, work, peak)

    # ------------------------------------------------------------------ a training step: forward and backward, batch 1
    model.checkpointing = flags.full
    draws = magd.draw(tuple(x.shape[1:]), N, [0])
    draws = magd.Draws(*(d.to(device) for d in draws))

    def train():
        model.zero_grad(set_to_none=True)
        with autocast(device, flags.full):
            magd.magd_loss(model, x[:1], one, draws)[0].mean().backward()
    work = 3 * flops(cfg, one.kind[0], N)
    train_step = seconds(train, device, flags.repeats)
    report("a training step, forward and backward, batch 1", train_step, work, peak)
    if device == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
    model.zero_grad(set_to_none=True)

    other = theirs(cfg, device, dtype)
    if other is not None:
        inputs = {k: [i.to(dtype) for i in v] if k == "input_img_latents" else v for k, v in padded_inputs(cfg, three, size).items()}
        with torch.no_grad():
            took = seconds(lambda: other(x.to(dtype), t, **inputs), device, flags.repeats)
        report("diffusers: a sampling step", took)
        print(f"{'':<58}ours takes {step / took:.2f} of it")
        single = padded_inputs(cfg, one, size)

        def train():
            other.zero_grad(set_to_none=True)
            v = other(x[:1].to(dtype), t[:1], **single)[0]
            (v.float() - (x[:1] - draws.x0)).square().mean().backward()
        took = seconds(train, device, flags.repeats)
        report("diffusers: a training step", took)
        print(f"{'':<58}ours takes {train_step / took:.2f} of it")

    # ------------------------------------------------------------------ a whole edit
    if flags.full:
        vae = VAE().to(device).eval()
        image = torch.rand(1, 3, 8 * size[0], 8 * size[1], device=device) * 2 - 1
        torch.cuda.reset_peak_memory_stats()

        @torch.no_grad()
        def edit():
            vae.encode(image)
            with autocast(device):
                cache = model.encode(three, N)
                z = euler(lambda z, s: model.denoise(torch.cat([z] * 3), torch.full((3,), s, device=device), cache)[:1], x[:1], 50)
            vae.decode(z)
        report("an edit of 50 steps at 1024 x 1024, with the autoencoder", seconds(edit, device, 1))
        print(f"peak memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
        torch.cuda.reset_peak_memory_stats()
        vae.decode(x[:1])
        print(f"decoding alone adds {(torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()) / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
