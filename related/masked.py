"""Train and compare the systems of related/tokens.py on the toy world.

    python -m related.masked train teacher                    out/related/teacher/0; most others need it
    python -m related.masked sample --prompt "a green circle" images as their tokens are revealed
    python -m related.masked compare samplers                 scores, in out/related/ARM/0/result.json
    python -m related.masked figures                          the figures of related/README.md

`bash related/all.sh` runs everything, for three seeds. A killed run goes on from where it was saved.
"""
import math
import textwrap
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from tqdm import tqdm

from common.charts import line_charts
from common.cli import SEED, add_command, parser, run_script, utf8_text
from common.files import InputError, append, finished, make_folder, rows_of, write_json, write_jsonl
from common.images import sheet
from data import Sample, Words, make_batch, make_condition, make_prompt, to_array, to_tensor
from experiments.tables import interval
from model import Config
from related.tokens import (SIDE, WORLD, MaskedTransformer, N, P, Scenes, at, dimo_loss, draw_order, held_out,
                            naive_loss, one_step, order_loss, punt, quantise, student_input, teacher_loss,
                            unmask)
from scale.checkpoints import config_of, read_checkpoint, restore, save_checkpoint
from toy.oracle import judge
from toy.world import world_words
from train import learning_rate, make_optimizers

WORDS = Words(world_words())
SCRATCH = dict(muon_lr=0.03, rates=(6e-3, 0.03))          # learning rates of AdamW, Muon
STUDENT = dict(muon_lr=0.0, rates=(3e-4, 2e-3))           # of the student's AdamW, of the auxiliary model's
# what trains: its loss, steps, different images in a batch of 64, share of captions
ARMS = {"teacher": dict(loss=teacher_loss, steps=5000, images=64, captions=0.5, **SCRATCH),
        "one-order": dict(loss=order_loss, steps=1200, images=32, captions=1.0, **SCRATCH),
        "learned-order": dict(loss=order_loss, steps=1200, images=32, captions=1.0, **SCRATCH),
        "dimo": dict(loss=dimo_loss, steps=800, images=64, captions=0.5, **STUDENT),
        "twice-dimo": dict(loss=dimo_loss, steps=1600, images=64, captions=0.5, **STUDENT),
        "naive": dict(loss=naive_loss, steps=800, images=64, captions=0.5, **STUDENT)}
EXAMPLES = {"captions": 512, "choice": 256, "edits": 256}    # held out; choice: add a thing, no word on where
STEPS = (1, 2, 4, 8, 16)
REMASK = {"early": (1, 0, 0), "each": (1, 1, 1), "two": (2, 1, 1)}     # FreeCorrection's, see unmask

# ------------------------------------------------------------------------------------------- training

def load(arm, flags):
    """The averaged weights of an arm that is trained."""
    path = Path(flags.out) / arm / str(flags.seed) / "last.pt"
    state = read_checkpoint(path) if path.exists() else {"step": 0}
    if state["step"] < ARMS[arm]["steps"]:
        raise InputError(f"{path}: {state['step']} of {ARMS[arm]['steps']} steps are trained; first run "
                         f"python -m related.masked train {arm} --seed {flags.seed} --out {flags.out}")
    model = MaskedTransformer(config_of(state))
    model.load_state_dict(state["model"] | state["ema"])
    return model.requires_grad_(False)


def start(arm, flags):
    """-> the model to train, a second one to train beside it or None, the models that its loss needs."""
    if arm in ("dimo", "twice-dimo", "naive"):
        teacher, model, auxiliary = (load("teacher", flags) for _ in range(3))
        model.requires_grad_(True)
        if arm == "naive":
            return model, None, [teacher]
        return model, auxiliary.requires_grad_(True), [auxiliary, teacher]
    cfg = Config(len(WORDS), 128, 4, 4, 256, 3, P, SIDE, grid_step=64 / SIDE, time_scale=1000.0, qk_norm=True)
    model = MaskedTransformer(cfg).init_weights()
    if arm == "learned-order":
        model.log_w = torch.nn.Parameter(model.log_w)
    return model, None, []


def train(flags):
    """Train one arm. A killed run goes on; one that has ended does nothing."""
    torch.manual_seed(flags.seed)
    vars(flags).update(ARMS[flags.arm], weight_decay=0.0)               # make_optimizers reads it
    model, second, others = start(flags.arm, flags)
    data = Scenes("train", flags.seed, flags.captions)
    out = make_folder(Path(flags.out) / flags.arm / str(flags.seed))
    weights = list(model.parameters())
    average = [p.detach().clone() for p in weights]                    # what is used in the end
    optimizers = [own for m in (model, second) if m for own in make_optimizers(flags, m, None, bf16=False)]
    updated = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    first = 0
    if (out / "last.pt").exists():
        state = read_checkpoint(out / "last.pt")
        restore(state, model, second, average, optimizers)
        first = state["step"]
    write_jsonl(out / "log.jsonl", [line for line in finished(out / "log.jsonl") if line["step"] <= first])
    for step in (bar := tqdm(range(first, flags.steps), flags.arm, flags.steps, initial=first)):
        for optimizer, full_rate in zip(optimizers, flags.rates):
            for group in optimizer.param_groups:
                group["lr"] = full_rate * learning_rate(step, flags.steps, warmup=50)
        generator = torch.Generator().manual_seed((10**9 * flags.seed + step) % 2**63)
        indices = [*range(step * flags.images, (step + 1) * flags.images)] * (64 // flags.images)
        batch = make_batch(data, indices, WORDS, P, flags.seed, p_drop=0, p_plan=0, p_masked_source=0)
        loss = flags.loss(model, *others, quantise(batch.x1), batch.condition, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(updated, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(average, weights, 1 - min(0.99, (step + 1) / (step + 10)))
        done = step + 1
        if done % 20 == 0:
            append(out / "log.jsonl", {"step": done, "loss": loss.item()})
            bar.set_postfix_str(f"loss {loss.item():.3f}")
        if done % 200 == 0 or done == flags.steps:
            save_checkpoint(out / "last.pt", model, second, average, optimizers, step=done, words=WORDS.words,
                            flags={"arm": flags.arm, "seed": flags.seed, "steps": flags.steps})


# ------------------------------------------------------------------------------------------- measuring

def encode(model, samples):
    prompts = [make_prompt(WORDS, sample.instruction, len(sample.images)) for sample in samples]
    images = [[to_tensor(image) for image in sample.images] for sample in samples]
    return model.encode(make_condition(WORDS, prompts, images, P), N)


def true_codes(samples):
    return quantise(torch.stack([to_tensor(sample.target) for sample in samples]))  # (B, N)


def is_exact(sample, x):
    source = sample.images[0] if sample.images else None
    return judge(WORLD, source, sample.instruction, to_array(x))["exact"]


def score(model, samples, seed, sampler):
    """-> the share that is exact; forwards and steps an image; bits of entropy of the codes drawn"""
    exact, forwards, changes, drawn = [], [], [], []
    for begin in range(0, len(samples), 128):
        some = samples[begin:begin + 128]
        generator = torch.Generator().manual_seed((10**6 * seed + begin) % 2**63)
        steps, own = sampler(model, encode(model, some), len(some), generator)      # [(B, N)], (B,)
        exact += [is_exact(sample, x) for sample, x in zip(some, model.images(steps[-1]))]
        forwards += own.tolist()
        changes += [(a != b).any(dim=1).sum().item() for a, b in pairwise(steps)]
        drawn.append(steps[-1])
    return {"exact": sum(exact) / len(exact), "forwards": sum(forwards) / len(forwards),
            "steps": 1 + sum(changes) / len(exact), "bits": entropy(torch.cat(drawn))}


def entropy(codes):
    p = codes.flatten().bincount() / codes.numel()
    return -p.xlogy(p).sum().item() / math.log(2)


def order_bits(model, samples, rank):
    """-log2 p of an image, the mean, if its tokens are revealed one by one in the order rank (B, N)."""
    codes = true_codes(samples)                                                     # (B, N)
    cache = encode(model, samples)
    nats = torch.zeros(len(samples))
    for k in range(N):
        log_p = model.log_p(codes.masked_fill(rank >= k, model.mask), cache)        # (B, N, K)
        nats -= (at(log_p, codes) * (rank == k)).sum(dim=1)                         # (B,)
    return nats.mean().item() / math.log(2)


def found(model, samples):
    """A quarter is masked, one other token is another image's. How often is it the least confident?"""
    codes = true_codes(samples)                                                     # (B, N)
    other = codes.roll(1, 0)
    random = torch.rand(codes.shape, generator=torch.Generator().manual_seed(0))
    masked = random.argsort(dim=1).argsort(dim=1) < N // 4                          # (B, N)
    place = (random * (other != codes) * ~masked).argmax(dim=1)                     # (B,)
    shown = torch.where(torch.arange(N) == place[:, None], other, codes).masked_fill(masked, model.mask)
    log_p = model.log_p(shown, encode(model, samples))                              # (B, N, K)
    confidence = at(log_p, shown.masked_fill(masked, 0)).masked_fill(masked, 1)     # (B, N)
    return (confidence.argmin(dim=1) == place).float().mean().item()


def samplers(flags):
    """MaskGIT by confidence and at random, FreeCorrection and PUNT, on the teacher's weights."""
    model = load("teacher", flags)
    sets = {kind: held_out(kind, flags.seed, n) for kind, n in EXAMPLES.items()}
    arms = {f"{order}-{n}": partial(unmask, steps=n, order=order)
            for order in ("confidence", "random") for n in STEPS}
    arms |= {f"{name}-{n}": partial(unmask, steps=n, remask=remask)
             for name, remask in REMASK.items() for n in STEPS[2:]}
    arms |= {f"punt-{eps}": partial(punt, eps=eps) for eps in (0.003, 0.03, 0.3, 3.0)}     # nats
    result = {arm: {kind: score(model, sets[kind], flags.seed, sampler) for kind in sets}
              for arm, sampler in tqdm(arms.items(), f"samplers {flags.seed}")}
    return {**result, "checked": {"found": found(model, sets["captions"])}}


def orders(flags):
    """Bits an image by order, of both models; FreeCorrection on weights that never checked visible tokens."""
    samples = held_out("captions", flags.seed, EXAMPLES["captions"])
    models = {arm: load(arm, flags) for arm in ("one-order", "learned-order")}
    row, column = torch.arange(N) // SIDE, torch.arange(N) % SIDE
    cell = 2 * (row // 2) + column // 2                                # a cell of the toy has four tokens
    corner = 2 * (row % 2) + column % 2
    fixed = {"raster": SIDE * row + column, "by cell": 4 * cell + corner, "by corner": 4 * corner + cell}
    ranks = {name: rank.expand(len(samples), N) for name, rank in fixed.items()}
    for arm, model in models.items():
        ranks[arm] = draw_order(len(samples), model.log_w, torch.Generator().manual_seed(flags.seed))
    result = {}
    for arm, model in models.items():
        bits = {order: order_bits(model, samples, rank) for order, rank in ranks.items()}
        result[arm] = {"bits": {**bits, "own": bits[arm]}, "first": model.log_w.softmax(dim=0).tolist()}
    plain = models["one-order"]
    for n in STEPS[2:]:
        for name, remask in {"confidence": (0, 0, 0), **REMASK}.items():
            sampler = partial(unmask, steps=n, remask=remask)
            result[f"unchecked-{name}-{n}"] = {"captions": score(plain, samples, flags.seed, sampler)}
    return {**result, "unchecked": {"found": found(plain, samples)}}


def undecided(model, samples):
    """Bits of entropy of a token in a student's one step, the mean: what its start has not decided."""
    codes = student_input(len(samples), model.mask, torch.Generator().manual_seed(0))
    log_p = model.log_p(codes, encode(model, samples))                              # (B, N, K)
    return -(log_p.exp() * log_p).sum(dim=2).mean().item() / math.log(2)


def students(flags):
    """The students in one step, and the entropy of the codes of true images."""
    sets = {kind: held_out(kind, flags.seed, n) for kind, n in EXAMPLES.items()}
    models = {arm: load(arm, flags) for arm in ("dimo", "twice-dimo", "naive")}
    result = {arm: {kind: score(model, own, flags.seed, one_step) | {"undecided": undecided(model, own)}
                    for kind, own in sets.items()} for arm, model in models.items()}
    return {**result, "truth": {kind: {"bits": entropy(true_codes(sets[kind]))} for kind in sets}}


# ------------------------------------------------------------------------------------------- commands

def compare(flags):
    """Measure the samplers of the teacher, the orders or the one-step students."""
    for arm, result in PARTS[flags.part](flags).items():
        write_json(Path(flags.out) / arm / str(flags.seed) / "result.json", result)


PARTS = {"samplers": samplers, "orders": orders, "students": students}


def sample(flags):
    """A picture of images as the teacher reveals them: of a caption, or of held-out prompts."""
    model = load("teacher", flags)
    samples = held_out("captions", flags.seed, 3) + held_out("choice", flags.seed, 3)
    samples = 4 * [Sample(flags.prompt, None)] if flags.prompt else samples
    generator = torch.Generator().manual_seed(flags.seed)
    steps, _ = unmask(model, encode(model, samples), len(samples), generator, steps=8)
    rows = []
    for own, *images in zip(samples, *map(model.images, steps)):
        source = (own.images[0], "source", False) if own.images else None
        cells = [(to_array(x), f"step {k}", False) for k, x in enumerate(images[:-1], 1)]
        label = textwrap.fill(own.instruction, 18)
        rows.append([source, *cells, (to_array(images[-1]), label, is_exact(own, images[-1]))])
    sheet(rows, flags.picture, 6, pad=16)
    print(f"wrote {flags.picture}; framed: exact")


def points(runs, name, kind):
    """The arms called NAME or NAME-SETTING, over their seeds -> [(forwards, mean exact, low, high)]"""
    arms = {}
    for run in runs:
        if f"{run['arm']}-".startswith(f"{name}-"):
            arms.setdefault(run["arm"], []).append(run[kind])
    lines = []
    for scores in arms.values():
        mean, half = interval([one["exact"] for one in scores])
        lines.append((interval([one["forwards"] for one in scores])[0], mean, mean - half, mean + half))
    return sorted(lines)


def figures(flags):
    """The figures of related/README.md, from related/results.jsonl."""
    runs = [run for _, run in rows_of("related/results.jsonl")]
    sets = {"captions": "captions", "choice": "add a thing, anywhere", "edits": "edits without a choice"}
    many = dict(confidence="confidence", random="random order", early="FreeCorrection", punt="PUNT")
    one = dict(confidence="teacher, by confidence", dimo="Di[M]O", naive="naive distillation")
    for name, arms in (("samplers", many), ("one_step", one)):
        line_charts([(title, "forwards an image", "exact",
                      {label: points(runs, arm, kind) for arm, label in arms.items()})
                     for kind, title in sets.items()], f"related/{name}.png")
    learned = [run for run in runs if run["arm"] == "learned-order"]
    shares = torch.tensor([run["first"] for run in learned]).view(-1, SIDE, SIDE, 1)
    images = (255 * (N / 2 * shares).clamp(max=1)).byte().expand(-1, -1, -1, 3).numpy()
    sheet([[(image, f"seed {run['seed']}", False) for image, run in zip(images, learned)]],
          "related/orders.png", 40, title="share of orders that begin with a token; gray 1/16, white 2/16")


def main():
    p = parser(__doc__)
    add = p.add_subparsers(required=True)
    add_command(add, train).add_argument("arm", choices=ARMS)
    add_command(add, compare).add_argument("part", choices=PARTS)
    command = add_command(add, sample)
    command.add_argument("--prompt", type=utf8_text, help="a caption; held-out prompts if not given")
    command.add_argument("--picture", default="sample.png")
    for command in add.choices.values():
        command.add_argument("--seed", type=SEED, default=0)
        command.add_argument("--out", default="out/related", help="folder of ARM/SEED")
    add_command(add, figures)
    flags = p.parse_args()
    flags.run(flags)


if __name__ == "__main__":
    run_script(main)
