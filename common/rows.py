"""A JSONL file of image pairs: what a row holds, and what is wrong with one. README, "Your own images"."""
import hashlib
import json
import os
import re
from pathlib import Path

from tqdm import tqdm

from common.files import InputError, json_lines, read_bytes

TAG = r"<\|image_([0-9]{1,6})\|>"
LIKE_A_TAG = r"<(\|\s*|/)?(image|img)|<\s*(image|img)[\s_-]*\d|(image|img)[\s_-]*\d*\s*\|>"
ROW_TYPES = {"instruction": str, "input_images": list, "output_image": str, "mask": str, "plan": list,
             "source_caption": str, "target_caption": str, "task": str, "save_as": str, "save_also": dict}


class BadRows:
    """--skip-bad: up to `most` bad rows are left out, each is named; the next one stops the run."""

    def __init__(self, most=0, say=tqdm.write):
        self.most = most
        self.say = say
        self.skipped = 0

    def skip(self, error):
        if self.skipped == self.most:
            raise InputError(f"{error}; {self.most} bad rows were skipped before" if self.most else error)
        self.skipped += 1
        self.say(f"skipped: {error}")


def read_rows(path, targets=True, bad=None):
    """A JSONL file of image pairs -> [(line number, row)], image paths joined to its folder. A bad row raises
    InputError with its line number, unless `bad` (BadRows) takes it.

    A row has instruction, input_images (a list; null or none: no images) and output_image (null if there is
    none: such a row can be edited, but not trained on); optionally mask, plan (list of steps),
    source_caption, target_caption and task. Paths are relative to the file. OmniGen's own rows have this
    form. A benchmark's row may also have id, save_as and save_also, for its scorer (tools/prepare.py)."""
    bad = bad or BadRows()
    rows = []
    for number, row in json_lines(read_bytes(path, "a JSONL file of image pairs is needed")):
        try:
            if isinstance(row, InputError):
                raise row
            row = check_row(row, Path(path).parent)
            if targets and row["output_image"] is None:
                raise InputError("output_image is null: this row can be edited, not trained on")
            rows.append((number, row))
        except InputError as error:
            bad.skip(InputError(f"{path}:{number}: {error}"))
    if not rows:
        raise InputError(f"{path}: no rows")
    return rows


def check_row(row, folder):
    """-> the row with its paths below `folder`, or InputError."""
    row = {**row, "input_images": [] if row.get("input_images") is None else row["input_images"]}
    for key in ("instruction", "output_image"):
        if key not in row:
            raise InputError(f"the key {key!r} is missing; there are {sorted(row)}")
    for key, expected in ROW_TYPES.items():
        value = row.get(key)
        may_be_null = key != "instruction"
        if not isinstance(value, expected) and not (may_be_null and value is None):
            raise InputError(f"{key} should be a {expected.__name__}, not {type(value).__name__}")
    for key in ("input_images", "plan"):
        if not all(isinstance(item, str) for item in row.get(key) or []):
            raise InputError(f"{key} should be a list of strings")
    if "" in (*row["input_images"], row["output_image"], row.get("mask")):
        raise InputError("the path of an image is empty; where there is no image, null is expected")
    if not row["input_images"] and not row["instruction"].strip():
        raise InputError("there is neither an instruction nor an image")
    check_tags(row["instruction"], len(row["input_images"]))
    for text in (row.get("target_caption") or "", *(row.get("plan") or [])):
        if re.search(TAG, text):
            raise InputError(f"an image tag outside the instruction, in {text[:60]!r}")
        check_tags(text, 0)
    checked = {**row, "input_images": [str(folder / name) for name in row["input_images"]]}
    for key in ("output_image", "mask"):
        if row.get(key):
            checked[key] = str(folder / row[key])
    return checked


def check_tags(instruction, n):
    """-> the numbers of the image tags <|image_1|> ... <|image_n|> of an instruction; there may be none."""
    tags = {int(k) for k in re.findall(TAG, instruction)}
    if tags and tags != set(range(1, n + 1)):
        raise InputError(f"the instruction names images {sorted(tags)}, but {n} {'is' if n == 1 else 'are'} "
                         f"given; tags run from <|image_1|> to <|image_n|> without a gap")
    rest = re.sub(rf"<img>\s*{TAG}\s*</img>|{TAG}", " ", instruction)
    if wrong := re.search(LIKE_A_TAG, rest, re.IGNORECASE):
        raise InputError(f"{rest[wrong.start():][:40]!r} looks like an image tag, but a tag is written "
                         f"<img><|image_1|></img>")
    return tags


# ------------------------------------------------------------------------------------------- outputs of a row

def below(out, name, pauses, seed):
    """A path that a row gives, with the fields {pauses} and {seed}, below the folder `out`."""
    try:
        path = Path(out) / name.format(pauses=pauses, seed=seed)
        inside = path.resolve().is_relative_to(Path(out).resolve())
    except (AttributeError, LookupError, MemoryError, OSError, OverflowError, TypeError, ValueError):
        raise InputError(f"{name!r:.80} is not a path with the fields pauses and seed") from None
    if not inside:
        raise InputError(f"{name!r} leads out of the folder {out}")
    return path


def output_path(out, number, row, pauses, seed, taken):
    """Where the output of line `number` goes. taken: {path: whose it is}, of all lines so far; one path for
    two outputs, or for an output and an image of the data, is an error."""
    path = below(out, row.get("save_as") or "pauses{pauses}_seed{seed}/" + f"{number:05d}.png", pauses, seed)
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise InputError(f"save_as {row['save_as']!r} is not the path of a .png or .jpg file")
    own = f"the output of line {number}, {pauses} pauses, seed {seed}"
    images = filter(None, [*row["input_images"], row["output_image"], row.get("mask")])
    claims = [*((name, "an image of the data") for name in images), (path, own)]
    for name, record in (row.get("save_also") or {}).items():
        claims.append((below(out, name, pauses, seed), json.dumps(record)))
    for name, claim in claims:
        key = os.path.realpath(name).casefold()            # some file systems know no capitals
        if taken.setdefault(key, claim) != claim:
            raise InputError(f"{name} would be {claim:.99} and {taken[key]:.99}; each needs its own path")
    return path


def checksum(*parts):
    """sha256 of values that JSON can hold: are the data of a resumed run those of its beginning?"""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
