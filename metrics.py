"""How good is an edit? Scores by the toy world's oracle, by CLIP and DINO for photographs, and Table 3.

    python metrics.py toy --ckpt out/toy/last.pt             exact, adherence, faithfulness by task
    python metrics.py score DIR --clip FOLDER --dino FOLDER  CLIP-I, DINO, CLIP-T, CLIP-Dir, L1, L2 of edits
    python metrics.py select DIR                             selection among candidates (Sec. 6.1, Table 3)

DIR is made by sample.py --data. adherence: was the instruction carried out? faithfulness: is everything else
as it was? exact: both, in full. On the toy the oracle (toy/oracle.py) reads them from source, instruction and
output alone; it never looks at the target. For photographs CLIP-Dir stands for adherence and DINO for
faithfulness.
"""
import math
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.charts import line_charts, markdown, mean_or_none
from common.cli import (COUNT, FINITE, GUIDANCE, NONE_OR_MORE, add_command, add_device, parser, run_script,
                        two_times)
from common.devices import processes
from common.files import InputError, make_folder, write_json, write_jsonl, write_text
from common.images import open_image
from common.results import read_results
from data import Shapes, make_prompt, to_array, to_tensor
from pretrained.encoders import direction
from pretrained.judges import cosine, load_judges
from sample import best, generate, load_checkpoint, noise
from toy.oracle import judge
from toy.world import CAPTIONS, EDITS, WORLDS

SCORES = ("exact", "adherence", "faithfulness")
EDIT_METRICS = ("clip_i", "dino", "clip_t", "clip_dir", "l1", "l2", "copied")

# ------------------------------------------------------------------------------------------- a toy model


def evaluate(model, tokenizer, dataset, indices, steps=20, text_scale=1.0, image_scale=1.0,
             interval=(0.0, 1.0), pauses=0, plans=False, seed=0, batch=128, device="cpu", bf16=True,
             progress=True):
    """Edit the samples of these indices, judged by the oracle -> for each a dict of task, complexity, scores,
    sample and output.

    Noise depends on the index and `seed` alone, so models, pause counts and guidance are compared on equal
    noise. plans: append each sample's plan to its prompt (Eq. 7); the paper's editor is never given one."""
    size = dataset.world.size
    rows = []
    for start in tqdm(range(0, len(indices), batch), desc=dataset.split, disable=not progress, leave=False):
        some = indices[start:start + batch]
        samples = [dataset.sample(index) for index in some]
        prompts = [make_prompt(tokenizer, s.instruction, len(s.images), s.plan if plans else (), pauses)
                   for s in samples]
        images = [[to_tensor(image) for image in s.images] for s in samples]
        seeds = [index + 10**6 * seed for index in some]     # those of two seeds do not overlap
        x0 = noise((3, size, size), seeds, device)
        x = generate(model, tokenizer, prompts, images, x0, steps, text_scale, image_scale,
                     interval=interval, bf16=bf16)
        for sample, output in zip(samples, map(to_array, x)):
            source = sample.images[0] if sample.images else None
            scores = judge(dataset.world, source, sample.instruction, output)
            rows.append({"task": sample.task, "complexity": sample.complexity, **scores,
                         "sample": sample, "output": output})
    return rows


def means(rows):
    return {key: sum(row[key] for row in rows) / len(rows) for key in SCORES}


def breakdown(rows):
    """Rows of scores -> {group: number and means}: all; where both are there, edits and captions; each task;
    each complexity."""
    captions = [row for row in rows if row["task"] in CAPTIONS]
    edits = [row for row in rows if row["task"] not in CAPTIONS]
    groups = {"all": rows}
    if edits and captions:
        groups.update(edits=edits, captions=captions)
    for task in [*EDITS, "several", *CAPTIONS]:
        groups[task] = [row for row in rows if row["task"] == task]
    if len({row["complexity"] for row in rows}) > 1:
        for k in range(1, 5):
            groups[f"complexity {k}"] = [row for row in edits if row["complexity"] == k]
    return {name: {"number": len(group), **means(group)} for name, group in groups.items() if group}


def toy_model(path, device="cpu"):
    """A checkpoint of a toy world -> model, tokenizer, the flags it was trained with."""
    editor, trained = load_checkpoint(path, device)
    if editor.world is None:
        raise InputError(f"{path} was trained on {trained['data']}; the oracle knows {', '.join(WORLDS)}")
    return editor.model, editor.tokenizer, trained


def toy(flags):
    """Scores of a toy model by task on both held-out sets, then those of the source and the target."""
    device = processes(flags.device)[2]
    model, tokenizer, trained = toy_model(flags.ckpt, device)
    world = flags.data or trained["data"]
    if WORLDS[world].size != trained["size"]:
        raise InputError(f"--data {world}: its images have {WORLDS[world].size} pixels a side, those of "
                         f"{flags.ckpt} {trained['size']}")
    out = Path(flags.out or Path(flags.ckpt).with_name("toy.json"))
    make_folder(out.parent)
    result = {}
    seconds = 0.0
    for split in ("iid", "novel"):
        dataset = Shapes(world, split, trained["seed"])
        start = time.perf_counter()
        rows = evaluate(model, tokenizer, dataset, range(flags.examples), flags.steps, flags.text_scale,
                        flags.image_scale, flags.guidance_interval, flags.pauses, flags.plans, device=device)
        seconds += time.perf_counter() - start
        result[split] = breakdown(rows)
        print(f"\n{split}: {flags.examples} examples of {world}, {flags.steps} Euler steps, "
              f"{flags.pauses} pause tokens" + ", plans given" * flags.plans)
        print(f"{'':16}{'number':>8}" + "".join(f"{score:>14}" for score in SCORES))
        for name, values in [*result[split].items(), *reference_scores(dataset.world, rows)]:
            print(f"{name:16}{values['number']:8}" + "".join(f"{values[score]:14.3f}" for score in SCORES))
    settings = {key: getattr(flags, key) for key in ("steps", "pauses", "plans", "text_scale", "image_scale",
                                                     "guidance_interval")}
    write_json(out, {**result, "data": world, **settings, "seconds": seconds})
    print(f"\nsampled and judged in {seconds:.1f} s; wrote {out}")


def reference_scores(world, rows):
    """Reference points: scores of the unchanged source and of the true target, as if they were the output."""
    samples = [row["sample"] for row in rows if row["sample"].images]
    if not samples:
        return []
    unchanged = [judge(world, s.images[0], s.instruction, s.images[0]) for s in samples]
    perfect = [judge(world, s.images[0], s.instruction, s.target) for s in samples]
    return [("output = source", {"number": len(samples), **means(unchanged)}),
            ("output = target", {"number": len(samples), **means(perfect)})]


# ------------------------------------------------------------------------------------------- real edits

def distance(image, reference):
    """L1 and L2 of two Images in [0, 1]; the first is resized to the second."""
    a = np.asarray(image.resize(reference.size), np.float64) / 255
    b = np.asarray(reference, np.float64) / 255
    return float(np.abs(a - b).mean()), float(np.square(a - b).mean())


def edit_metrics(row, folder, judges, against):
    """Metrics of a row of results; those of the source in the place of the output; number of captions cut.

    against: what CLIP-I, DINO, L1 and L2 compare the output with, "target" (MagicBrush) or "source"
    (Emu-Edit). A metric that is not defined for a row is None: without a reference, a source or a caption,
    or where the two captions are alike."""
    images = {key: open_image(folder / row[key]) for key in {"source", "output", against} if row.get(key)}
    seen = {key: judges.see(image) for key, image in images.items()}
    texts = {}
    cut = 0
    for key in ("source_caption", "target_caption"):
        if row.get(key):
            texts[key], too_long = judges.read(row[key])
            cut += too_long
    captions_differ = len(texts) == 2 and row["source_caption"] != row["target_caption"]

    def scores(key):
        found = dict.fromkeys(EDIT_METRICS)
        if key not in seen:
            return found
        if against in seen:
            found["clip_i"] = cosine(seen[key]["clip"], seen[against]["clip"])
            found["dino"] = cosine(seen[key]["dino"], seen[against]["dino"])
            found["l1"], found["l2"] = distance(images[key], images[against])
        if "target_caption" in texts:
            found["clip_t"] = cosine(seen[key]["clip"], texts["target_caption"])
        if "source" in seen:
            found["copied"] = float(distance(images[key], images["source"])[0] < 0.01)
            if captions_differ:
                value = direction(seen["source"]["direct"], seen[key]["direct"], texts["source_caption"],
                                  texts["target_caption"])
                found["clip_dir"] = None if value.isnan() else value.item()
        return found
    return scores("output"), scores("source"), cut


def score(flags):
    """CLIP-I, DINO, CLIP-T, CLIP-Dir, L1, L2 and share of copies by task, beside the source's own."""
    device = processes(flags.device)[2]
    folder = Path(flags.folder)
    judges = load_judges(flags.clip, flags.dino, device)
    rows = read_results(folder, scored=False)
    against = flags.against or ("target" if all(row.get("target") for row in rows) else "source")
    done = []
    cut = 0
    for row in tqdm(rows, desc="scores"):
        scores, identity, too_long = edit_metrics(row, folder, judges, against)
        done.append({**row, **scores, "identity": identity})
        cut += too_long

    tasks = sorted({row["task"] for row in done if row.get("task")})
    groups = {"all": done, **{task: [row for row in done if row.get("task") == task] for task in tasks}}
    lines = []
    for name, group in groups.items():
        identity = [row["identity"] for row in group]
        for label, scores in ((name, group), (f"{name}, output = source", identity)):
            row_means = [mean_or_none([row[metric] for row in scores]) for metric in EDIT_METRICS]
            lines.append([label, len(group), *row_means])
    undefined = sum(row["clip_dir"] is None for row in done)
    encoder = f"CLIP {Path(flags.clip).name}"
    text = markdown(["group", "number", *EDIT_METRICS], lines) + f"""

- clip_i: cosine of image features, {encoder}, shorter side 224 bicubic, centre crop; output against {against}
- dino: cosine of CLS features, {Path(flags.dino).name}, shorter side 256 bicubic, centre crop 224;
  output against {against}
- clip_t: cosine of output and target_caption, {encoder}, shorter side 224 bicubic, centre crop
- clip_dir: cosine of the change of image and captions, {encoder}, bicubic straight to a square; undefined for
  {undefined} of {len(done)} (no or equal captions, no source)
- l1, l2: output resized to the {against}, in [0, 1]
- copied: share of outputs with L1 < 0.01 to the source
- captions: source_caption and target_caption of the data file; {cut} were longer than 77 tokens and cut
"""
    write_jsonl(folder / "scores.jsonl", done)
    write_text(folder / "scores.md", text)
    print(text + f"\nwrote {folder / 'scores.md'}, scores.jsonl")


# ------------------------------------------------------------------------------------------- Table 3

LIMITS = {"dino": 0.91, "clip_dir": 0.09,                   # thresholds of Table 3
          "faithfulness": 0.9, "adherence": 1.0}            # of the toy's oracle


def pick(A, Fa, first, least=-math.inf):
    """sample.best for each item: A and Fa (items, candidates) are adherence and faithfulness -> index
    (items,), -1 where no candidate passes."""
    items = [[{"adherence": a, "faithfulness": f} for a, f in zip(*own)] for own in zip(A, Fa)]
    chosen = [best(candidates, first, least) for candidates in items]
    return np.array([-1 if index is None else index for index in chosen])


def protocol(A, Fa, min_faithfulness, min_adherence, resamples=1000):
    """Table 3. A, Fa (items, candidates) -> {rule: recall, adherence, faithfulness}. Recall is the share of
    items with a passing candidate; the two scores have a mean and a 95% interval."""
    passing = pick(A, Fa, "adherence", min_faithfulness)
    most_faithful = pick(A, Fa, "faithfulness")
    rules = {"best adherence": pick(A, Fa, "adherence"),
             "best faithfulness": most_faithful,
             f"best adherence, faithfulness >= {min_faithfulness:g}": passing,
             f"best faithfulness, adherence >= {min_adherence:g}": pick(A, Fa, "faithfulness", min_adherence),
             "threshold, else the most faithful": np.where(passing >= 0, passing, most_faithful)}
    n = len(A)
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), resamples)  # bootstrap over items
    counts = counts.astype(np.float32)                                              # (resamples, items)
    return {rule: {"recall": float((index >= 0).mean()),
                   "adherence": mean_and_interval(A, index, counts),
                   "faithfulness": mean_and_interval(Fa, index, counts)} for rule, index in rules.items()}


def mean_and_interval(values, index, counts):
    """values (items, candidates), the chosen candidate of each item or -1 -> mean, bootstrap interval."""
    passed = index >= 0                                                             # (items,)
    if not passed.any():
        return {"mean": None, "interval": [None, None]}
    chosen = np.take_along_axis(values, index.clip(0)[:, None], 1)[:, 0]            # (items,)
    chosen = np.where(passed, chosen, 0)
    weight = counts @ passed.astype(np.float32)                                     # (resamples,)
    total = counts @ chosen.astype(np.float32)
    resampled = total[weight > 0] / weight[weight > 0]
    interval = np.percentile(resampled, [2.5, 97.5]).tolist()
    return {"mean": float(chosen.sum() / passed.sum()), "interval": interval}


def candidate_sets(rows, adherence, faithfulness):
    """Rows of results -> {name: (A, Fa)}: pause counts at one seed; as many seeds at one count (the
    control); each count alone; the items used; number of items left out, where a score is undefined."""
    items = {}
    for row in rows:
        items.setdefault(str(row["id"]), {})[row["pauses"], row["seed"]] = row
    pauses = sorted({row["pauses"] for row in rows})
    seeds = sorted({row["seed"] for row in rows})
    sets = {"pause counts " + ", ".join(map(str, pauses)): [(p, seeds[0]) for p in pauses]}
    if len(seeds) >= len(pauses) > 1:
        control = seeds[:len(pauses)]
        sets["seeds " + ", ".join(map(str, control)) + " (control)"] = [(pauses[0], s) for s in control]
    for p in pauses:
        sets[f"{p} pauses alone"] = [(p, seeds[0])]

    kept = []
    for name in sorted(items):
        if all(row.get(key) is not None for row in items[name].values() for key in (adherence, faithfulness)):
            kept.append(items[name])
    if not kept:
        raise InputError(f"no item has {adherence} and {faithfulness} for all candidates; run score first")
    wanted = {candidate for candidates in sets.values() for candidate in candidates}
    for item in kept:
        for p, s in sorted(wanted - set(item)):
            name = next(iter(item.values()))["id"]
            raise InputError(f"item {name} has no candidate of {p} pauses, seed {s}; let sample.py finish")

    def scores(candidates, key):
        return np.array([[item[candidate][key] for candidate in candidates] for item in kept], float)
    tables = {title: (scores(candidates, adherence), scores(candidates, faithfulness))
              for title, candidates in sets.items()}
    return tables, kept, len(items) - len(kept)


def select(flags):
    """Table 3 of a folder: the pause counts, as many seeds (the control), and each count alone."""
    folder = Path(flags.folder)
    rows = read_results(folder)
    on_toy = "adherence" in rows[0]
    adherence = flags.adherence or ("adherence" if on_toy else "clip_dir")
    faithfulness = flags.faithfulness or ("faithfulness" if on_toy else "dino")
    limits = [LIMITS.get(faithfulness, 0.0) if flags.min_faithfulness is None else flags.min_faithfulness,
              LIMITS.get(adherence, 0.0) if flags.min_adherence is None else flags.min_adherence]
    sets, kept, undefined = candidate_sets(rows, adherence, faithfulness)
    tables = {name: protocol(A, Fa, *limits) for name, (A, Fa) in sets.items()}

    def shown(mean, interval):
        return "-" if mean is None else f"{mean:.4f} [{interval[0]:.4f}, {interval[1]:.4f}]"
    lines = []
    for name, table in tables.items():
        rules = list(table.items())
        if name.endswith("alone"):                         # one candidate: every rule takes it
            rules = [("as it is", table["best adherence"])]
        for rule, row in rules:
            scores = [shown(**row[key]) for key in ("adherence", "faithfulness")]
            lines.append([name, rule, *scores, f"{row['recall']:.3f}"])
    identity = [next(iter(item.values())).get("identity") or {} for item in kept]
    same = [mean_or_none([own.get(key) for own in identity]) for key in (adherence, faithfulness)]
    lines.append(["output = source", "as it is", *same, "1.000"])
    header = ["candidates", "rule", f"adherence ({adherence})", f"faithfulness ({faithfulness})", "recall"]
    text = markdown(header, lines)
    text += f"\n\n{len(kept)} items; {undefined} more where a score is undefined are left out. "
    text += "Intervals: 95%, bootstrap over items."
    write_json(folder / "selection.json", {"adherence": adherence, "faithfulness": faithfulness,
                                           "items": len(kept), "undefined": undefined, "identity": same,
                                           "tables": tables})
    write_text(folder / "selection.md", text + "\n")
    print(text + f"\n\nwrote {folder / 'selection.md'}, selection.json")
    pauses = sorted({row["pauses"] for row in rows})
    trade_off = {name: frontier(A, Fa) for name, (A, Fa) in sets.items()}
    line_charts([("each pause count alone", "pause tokens", "mean, 95% interval", alone(tables, pauses)),
                 ("threshold, then best adherence", "faithfulness", "adherence", trade_off)],
                folder / "selection.png")


def alone(tables, pauses):
    """Figures 6 to 8: the scores of each pause count alone, as the series of a chart."""
    series = {"adherence": [], "faithfulness": []}
    for key, points in series.items():
        for p in pauses:
            score = tables[f"{p} pauses alone"]["best adherence"][key]
            points.append((p, score["mean"], *score["interval"]))
    return series


def frontier(A, Fa):
    """Mean faithfulness and adherence of "threshold, else the most faithful" for 21 thresholds: the
    trade-off curve."""
    most_faithful = pick(A, Fa, "faithfulness")
    points = []
    for threshold in np.quantile(Fa, np.linspace(0, 1, 21)):
        index = pick(A, Fa, "adherence", threshold)
        index = np.where(index >= 0, index, most_faithful)[:, None]
        point = [float(np.take_along_axis(values, index, 1).mean()) for values in (Fa, A)]
        points.append((*point, None, None))
    return points


# ------------------------------------------------------------------------------------------- the commands

def main():
    p = parser(__doc__)
    commands = p.add_subparsers(required=True)
    command = add_command(commands, toy)
    command.add_argument("--ckpt", required=True, help="checkpoint of train.py")
    command.add_argument("--steps", type=COUNT, default=20, help="Euler steps")
    command.add_argument("--examples", type=COUNT, default=512, help="of each held-out set")
    command.add_argument("--data", choices=WORLDS, help="the world; that of the training if not given")
    command.add_argument("--pauses", type=NONE_OR_MORE, default=0, help="pause tokens after each prompt")
    command.add_argument("--plans", action="store_true", help="give each instruction its plan")
    command.add_argument("--text-scale", type=GUIDANCE, default=1.0, help="guidance by the prompt; 1 = none")
    command.add_argument("--image-scale", type=GUIDANCE, default=1.0, help="guidance by the image; 1 = none")
    command.add_argument("--guidance-interval", type=two_times, default=(0.0, 1.0))
    add_device(command)
    command.add_argument("--out", help="the scores as JSON; toy.json beside the checkpoint if not given")
    command = add_command(commands, score)
    command.add_argument("folder", help="made by sample.py --data")
    command.add_argument("--clip", required=True, help="folder of a CLIP of OpenAI: clip-vit-base-patch32")
    command.add_argument("--dino", required=True, help="folder dino-vits16, or dino_deitsmall16_pretrain.pth")
    add_device(command)
    command.add_argument("--against", choices=("source", "target"), help="target if every row has one")
    command = add_command(commands, select)
    command.add_argument("folder", help="made by sample.py --data --pauses ... --seeds ..., then scored")
    for key in ("adherence", "faithfulness"):
        command.add_argument(f"--{key}", help="the score to use; the oracle's, or CLIP-Dir and DINO")
        command.add_argument(f"--min-{key}", type=FINITE, help="threshold; if not given 0.91 for DINO and "
                             "0.09 for CLIP-Dir (Table 3); the oracle's: 0.9 (faithfulness), 1 (adherence)")
    flags = p.parse_args()
    flags.run(flags)


if __name__ == "__main__":
    run_script(main)
