"""What the experiments measure on a toy model, each as one JSON file beside its checkpoint.

    python -m experiments.measure distance --ckpt FILE    pause tokens, and the same distance without any
    python -m experiments.measure pauses --ckpt FILE      counts, other words instead, seeds, Euler steps
    python -m experiments.measure curve --ckpt FILE       checkpoints that were kept on the way; loss by time
    python -m experiments.measure scaling --ckpt FILE     several samples, steps or guidance at equal compute
"""
import itertools
from copy import copy
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import magd
from common.cli import COUNT, add_command, add_device, parser, run_script
from common.devices import processes
from common.files import InputError, write_json
from common.images import sheet
from data import Shapes, make_condition, make_prompt, to_tensor
from metrics import LIMITS, breakdown, evaluate, protocol, toy_model
from sample import select

COUNTS = (0, 4, 8, 16, 32, 48)            # pause tokens
TABLE_3 = (0, 8, 16, 32)                  # the paper's counts, which four candidates have
SEEDS = range(4)                          # of the noise
STEPS = 10                                # Euler steps, where nothing else is said


def some_edits(dataset, n):
    """The indices of the first n samples that are edits, not captions."""
    return list(itertools.islice((k for k in itertools.count() if dataset.sample(k).images), n))


class Toy:
    """A toy model and the held-out edits that it is measured on; `scores` is metrics.evaluate on them."""

    def __init__(self, flags):
        self.device = processes(flags.device)[2]
        self.model, self.tokenizer, trained = toy_model(flags.ckpt, self.device)
        self.dataset = Shapes(flags.data or trained["data"], "iid", trained["seed"])
        self.edits = some_edits(self.dataset, flags.examples)
        self.encode = self.model.encode

    def evaluate(self, steps=STEPS, gap=0, tokenizer=None, indices=None, **options):
        """gap: RoPE positions by which the target stands further off than its prompt puts it."""
        self.model.encode = lambda condition, N: self.encode(replace(condition, gap=gap), N)
        return evaluate(self.model, tokenizer or self.tokenizer, self.dataset, indices or self.edits, steps,
                        device=self.device, progress=False, **options)


# ------------------------------------------------------------------------------------------- pauses

def distance(toy, flags):
    """Exact edits with pause tokens, with the same distance and no token, and with tokens at no distance."""
    plain = means_of(toy.evaluate())
    result = {"0 pauses": plain, "0 positions": plain, "0 pauses in place": plain}
    for count in tqdm((1, 4, 8, 16, 32), "distance"):
        result[f"{count} pauses"] = means_of(toy.evaluate(pauses=count))
        result[f"{count} positions"] = means_of(toy.evaluate(gap=count))
        result[f"{count} pauses in place"] = means_of(toy.evaluate(pauses=count, gap=-count))
    return result


def means_of(rows):
    return breakdown(rows)["all"]


def pauses(toy, flags):
    """Pause tokens and as many words "the", each with four noise seeds; the best of four counts and of four
    seeds (Table 3); other numbers of Euler steps; a picture of candidates."""
    filler = copy(toy.tokenizer)
    filler.pause = "the "
    edits = {}                                             # "8 pauses": [[edit] of each seed]
    for count in tqdm(COUNTS, "pauses"):
        edits[f"{count} pauses"] = [toy.evaluate(pauses=count, seed=seed) for seed in SEEDS]
        if count:
            edits[f"{count} fillers"] = [toy.evaluate(pauses=count, tokenizer=filler)]
    result = {name: breakdown(sum(by_seed, [])) for name, by_seed in edits.items()}
    by_count = [edits[f"{count} pauses"] for count in TABLE_3]
    result["best of 4 counts"] = breakdown(sum(map(best, zip(*by_count)), []))
    for count, by_seed in zip(TABLE_3, by_count):
        result[f"best of 4 seeds, {count} pauses"] = breakdown(best(by_seed))
    result["table 3"] = {"0 pauses": table_3(by_count[0][:1]),
                         "4 counts": table_3([by_seed[0] for by_seed in by_count]),
                         "4 seeds": table_3(by_count[0])}
    for steps, count in itertools.product((1, 4, 20), (0, 8, 32)):
        result[f"{count} pauses, {steps} steps"] = breakdown(toy.evaluate(steps, pauses=count))
    show_candidates(by_count, Path(flags.out).with_suffix(".png"))
    return result


def best(candidates):
    """[[edit] of each candidate] -> [edit]: of each example the one that sample.py chooses (Sec. 6.1)."""
    return [own[select(own, LIMITS["faithfulness"])[0]] for own in zip(*candidates)]


def table_3(candidates):
    """[[edit] of each candidate] -> scores of the paper's Table 3, by rule."""
    scores = [np.array([[edit[key] for edit in own] for own in zip(*candidates)])    # (examples, candidates)
              for key in ("adherence", "faithfulness")]
    return protocol(*scores, LIMITS["faithfulness"], LIMITS["adherence"])


def show_candidates(by_count, path):
    """A picture of the example whose 16 candidates differ most: about half of them are exact."""
    exact = np.array([[[edit["exact"] for edit in edits] for edits in by_seed] for by_seed in by_count])
    shown = abs(8 - exact.sum(axis=(0, 1))).argmin()
    sample = by_count[0][0][shown]["sample"]
    rows = [[(sample.images[0], "source", False), None, None, (sample.target, "target", False)]]
    for count, by_seed in zip(TABLE_3, by_count):
        own = [edits[shown] for edits in by_seed]
        rows.append([(e["output"], f"{count} pauses, seed {k}", e["exact"]) for k, e in enumerate(own)])
    sheet(rows, path, 6, title=f"{sample.instruction}; framed: exact")


# ------------------------------------------------------------------------------------------- curves

def curve(toy, flags):
    """Scores of the checkpoints step_NUMBER.pt beside the last one, and its loss on edits by time."""
    files = sorted(Path(flags.ckpt).parent.glob("step_*.pt"))
    if not files:
        raise InputError(f"{flags.ckpt}: no step_NUMBER.pt beside it; train.py --keep-every N keeps them")
    result = {}
    for file in tqdm(files, "curve"):
        toy.model.load_state_dict(toy_model(file, toy.device)[0].state_dict())
        rows = toy.evaluate(indices=range(flags.examples))
        result[str(int(file.stem.removeprefix("step_")))] = breakdown(rows)
    return {"steps": result, "loss": loss_by_time(toy)}


@torch.no_grad()
def loss_by_time(toy):
    """Plain loss (Eq. 3) of the edits at ten times, the same noise at each -> {time: mean}."""
    samples = [toy.dataset.sample(k) for k in toy.edits]
    prompts = [make_prompt(toy.tokenizer, s.instruction, 1) for s in samples]
    images = [[to_tensor(s.images[0]).to(toy.device)] for s in samples]
    condition = make_condition(toy.tokenizer, prompts, images, toy.model.cfg.patch).to(toy.device)
    x1 = torch.stack([to_tensor(s.target) for s in samples]).to(toy.device)         # (n, 3, h, w)
    N = x1.shape[2] * x1.shape[3] // toy.model.cfg.patch**2
    draws = magd.draw(x1.shape[1:], N, toy.edits)
    draws = magd.Draws(*(drawn.to(toy.device) for drawn in draws))
    losses = {}
    for k in range(10):
        t = torch.full_like(draws.t, k / 10 + 0.05)
        own, _ = magd.magd_loss(toy.model, x1, condition, draws._replace(t=t))
        losses[f"{k / 10 + 0.05:.2f}"] = own.mean().item()
    return losses


# ------------------------------------------------------------------------------------------- scaling

def scaling(toy, flags):
    """40 Euler steps at most: fewer samples of more steps, or guidance, which costs three; each choice of one
    of the samples, from the oracle to chance."""
    result = {}
    for samples, steps in tqdm(((1, 40), (2, 20), (4, 10), (8, 5)), "scaling"):
        candidates = [toy.evaluate(steps, seed=seed) for seed in range(samples)]
        chosen = {"oracle": best(candidates), "chance": candidates[0],
                  "faithfulness": [max(own, key=itemgetter("faithfulness")) for own in zip(*candidates)],
                  **by_own_loss(toy, candidates)}
        result[f"{samples} of {steps} steps"] = {rule: means_of(rows) for rule, rows in chosen.items()}
    guided = dict(text_scale=2.5, image_scale=1.5)
    result["guidance, 13 steps"] = {"chance": means_of(toy.evaluate(13, **guided))}
    three = [toy.evaluate(13, seed=seed) for seed in range(3)]
    result["3 of 13 steps"] = {"oracle": means_of(best(three))}
    return result


@torch.no_grad()
def by_own_loss(toy, candidates, noises=2):
    """What a user without an oracle has: the model's own loss of each output, and how much the prompt lowers
    it -> {rule: [edit]}. Three times and two noises, the same for all candidates of an edit."""
    samples = [edit["sample"] for edit in candidates[0]]
    images = [[to_tensor(s.images[0]).to(toy.device)] for s in samples]
    N = toy.dataset.world.size**2 // toy.model.cfg.patch**2
    losses = {}
    for name in ("with", "without"):
        prompts = [make_prompt(toy.tokenizer, s.instruction if name == "with" else "", 1) for s in samples]
        condition = make_condition(toy.tokenizer, prompts, images, toy.model.cfg.patch).to(toy.device)
        losses[name] = np.zeros((len(samples), len(candidates)))
        for (k, edits), t, noise in itertools.product(enumerate(candidates), (0.3, 0.5, 0.7), range(noises)):
            x1 = torch.stack([to_tensor(edit["output"]) for edit in edits]).to(toy.device)
            draws = magd.draw(x1.shape[1:], N, [10**8 + noises * index + noise for index in toy.edits])
            draws = magd.Draws(*(drawn.to(toy.device) for drawn in draws))
            own, _ = magd.magd_loss(toy.model, x1, condition, draws._replace(t=torch.full_like(draws.t, t)))
            losses[name][:, k] += own.cpu().numpy()
    scores = {"own loss": losses["with"], "own loss, with less without": losses["with"] - losses["without"]}
    return {rule: [candidates[k][n] for n, k in enumerate(score.argmin(axis=1))]
            for rule, score in scores.items()}


# ------------------------------------------------------------------------------------------- the commands

def main():
    p = parser(__doc__)
    commands = p.add_subparsers(required=True)
    for measure in (distance, pauses, curve, scaling):
        command = add_command(commands, measure)
        command.add_argument("--ckpt", required=True, help="checkpoint of train.py")
        command.add_argument("--data", help="the world; that of the training if not given")
        command.add_argument("--examples", type=COUNT, default=256, help="held out")
        add_device(command)
        command.add_argument("--out", help=f"{measure.__name__}.json beside the checkpoint if not given")
    flags = p.parse_args()
    flags.out = flags.out or Path(flags.ckpt).with_name(f"{flags.run.__name__}.json")
    toy = Toy(flags)
    write_json(flags.out, {**flags.run(toy, flags), "ckpt": str(flags.ckpt), "examples": flags.examples})
    print(f"wrote {flags.out}")


if __name__ == "__main__":
    run_script(main)
