"""The flags of train.py; which presets there are, train.py says itself."""
import argparse

import magd
from common.cli import (COUNT, FINITE, GUIDANCE, NONE_OR_MORE, POSITIVE, SEED, SHARE, ZERO_OR_MORE, Parser,
                        add_device)
from toy.world import WORLDS


def flag_parser(presets):
    p = Parser(description="Train a MADI editor.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = p.add_argument
    switch = argparse.BooleanOptionalAction
    flag("--preset", choices=presets, default="toy", help="starting values; any flag overrides them")
    flag("--data", help=f"{', '.join(WORLDS)}, or a JSONL file of image pairs")
    flag("--init", help="weights to start from: a checkpoint of this script, or omnigen:FOLDER, OmniGen-v1")
    flag("--latents", help="folder of `python -m pretrained.latents`; DATA.latents if not given")
    flag("--skip-bad", type=NONE_OR_MORE, default=0, help="bad rows of a JSONL file to leave out")
    flag("--out", help="folder of the run; out/PRESET if not given")
    flag("--resume", action="store_true", help="continue from last.pt in --out; --steps may grow")
    flag("--seed", type=SEED, default=0)
    # model
    flag("--size", type=COUNT, help="pixels of a side, OmniGen: the longer one; a toy world has its own")
    flag("--patch", type=COUNT)
    flag("--width", type=COUNT)
    flag("--layers", type=COUNT)
    flag("--heads", type=COUNT)
    flag("--mlp", type=COUNT, help="hidden width of the feed-forward")
    flag("--checkpointing", type=NONE_OR_MORE, default=0, help="blocks the backward recomputes: less "
         "memory, up to a third more work; OmniGen: as few as the GPU's memory needs, if not given")
    flag("--prediction", choices=magd.PREDICTIONS, default="velocity", help="what the network's output means")
    # the paper
    flag("--p-magd", type=SHARE, default=0.5, help="chance that a noisy sample is masked; 0 = no masking")
    flag("--tau", type=SHARE, default=0.7, help="least noise level 1 - t of a masked sample")
    flag("--r-mask", type=SHARE, default=0.25, help="share of tokens masked in a masked sample")
    flag("--corruption", choices=magd.CORRUPTIONS, default="noise-mask", help="the paper's is noise-mask")
    flag("--mask-token", choices=("learned", "zero"), default="learned")
    flag("--t-mean", type=FINITE, default=0.0, help="mean of the logit of t; below 0: more noise")
    flag("--edit-weight", action=switch, default=False, help="OmniGen's weight on an edit's changed region")
    flag("--p-drop", type=SHARE, default=0.1, help="chance that a prompt is emptied")
    flag("--p-plan", type=SHARE, default=0.0, help="chance that a prompt carries its expressive plan")
    flag("--p-masked-source", type=SHARE, default=0.0, help="chance of the masked source as one more image")
    flag("--max-gap", type=NONE_OR_MORE, default=0, help="most positions a target is moved by, at random")
    flag("--max-pauses", type=NONE_OR_MORE, default=0, help="most pause tokens after a prompt, at random")
    flag("--p-edit", type=SHARE, default=0.5, help="OmniGen: share of edits; the rest is text-to-image")
    flag("--pause-token", default="<|placeholder1|>", help="OmniGen: a word of its tokenizer.json")
    # optimisation
    flag("--steps", type=COUNT)
    flag("--batch", type=COUNT, help="samples a step, over all processes")
    flag("--micro-batch", type=COUNT, help="samples a process runs at once; all its share if not given")
    flag("--lr", type=POSITIVE, help="of AdamW")
    flag("--muon-lr", type=ZERO_OR_MORE, help="of Muon on the matrices of the blocks; 0 = AdamW for all")
    flag("--weight-decay", type=ZERO_OR_MORE, default=0.0)
    flag("--warmup", type=NONE_OR_MORE, default=50, help="steps")
    flag("--clip", type=POSITIVE, default=1.0, help="largest norm of the gradient")
    flag("--ema", type=SHARE, default=0.99, help="decay of the moving average of the weights; 0 = none")
    # evaluation
    flag("--eval-examples", type=NONE_OR_MORE, default=512, help="of each held-out set, at the end")
    flag("--eval-steps", type=COUNT, default=20, help="Euler steps")
    flag("--jump", type=SHARE, default=1.0, help="time of the last sampling step; 1: equal steps")
    flag("--text-scale", type=GUIDANCE, default=1.0)
    flag("--image-scale", type=GUIDANCE, default=1.0)
    # system
    add_device(p)
    flag("--bf16", action=switch, default=True, help="bf16 matrix products where the device is fast at them")
    flag("--compile", action=switch, default=False, help="torch.compile the blocks: minutes at the start")
    flag("--workers", type=NONE_OR_MORE, help="processes that make batches; if not given, 0 on a CPU, "
         "with a GPU its share of the cores, at most 16")
    flag("--log-every", type=COUNT, default=20)
    flag("--save-every", type=COUNT, default=200)
    flag("--keep-every", type=NONE_OR_MORE, default=0, help="also a checkpoint that stays, step_000400.pt")
    flag("--sample-every", type=COUNT, default=400)
    return p


def parse_flags(presets):
    """The flags of the command line; presets: {name: {flag: value}}, what a preset sets."""
    p = flag_parser(presets)
    preset = argparse.ArgumentParser(add_help=False)       # looked at first: --help shows its values
    preset.add_argument("--preset", default="toy")
    p.set_defaults(**presets.get(preset.parse_known_args()[0].preset, {}))
    flags = p.parse_args()
    flags.out = flags.out or f"out/{flags.preset}"
    if flags.corruption == "mask-noise" and flags.mask_token != "zero":
        p.error("--corruption mask-noise blanks patches, which needs --mask-token zero")
    if flags.corruption == "mask" and flags.prediction != "velocity":
        p.error("--corruption mask needs --prediction velocity")
    if flags.preset == "omnigen" or (flags.init or "").startswith("omnigen:"):
        check_omnigen_flags(p, flags)
        return flags
    if flags.data in WORLDS:
        flags.size = WORLDS[flags.data].size
    if flags.size % flags.patch:
        p.error(f"--size {flags.size} is not a multiple of --patch {flags.patch}")
    if flags.width % (2 * flags.heads) or flags.width % 4:
        p.error(f"--width {flags.width} is not a multiple of 4 and of twice --heads {flags.heads}")
    return flags


def check_omnigen_flags(p, flags):
    named = flags.preset == "omnigen" and (flags.init or "").startswith("omnigen:")
    if not named or not flags.data or flags.data in WORLDS:
        p.error("to fine-tune OmniGen-v1: --preset omnigen --init omnigen:FOLDER --data FILE.jsonl")
    for name in ("patch", "width", "layers", "heads", "mlp", "muon_lr"):
        if getattr(flags, name):
            p.error(f"--{name.replace('_', '-')} is for models trained from scratch, not for OmniGen-v1")
    if flags.device == "mps":
        p.error("--device mps is for models trained from scratch; OmniGen-v1 trains on cuda, or on the cpu")
    if flags.prediction != "velocity" or flags.jump < 1:
        p.error("--prediction and --jump are for models trained from scratch, not for OmniGen-v1")
