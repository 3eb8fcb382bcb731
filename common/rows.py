"""A JSONL file of image pairs: what a row holds, and what is wrong with one. README, "Your own images"."""
import hashlib
import json
import os
import re
import secrets
import zlib
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.files import InputError, file_checksum, json_lines, parse_line, read_lines, reading, writing

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


def good_rows(path, targets=True, bad=None):
    """A JSONL file of image pairs, a row at a time: yield (place, row), image paths joined to its folder; a
    place, for Rows, is (line number, offset and size in bytes, crc32). A bad row raises InputError with its
    line number, unless `bad` (BadRows) takes it.

    A row has instruction, input_images (a list; null or none: no images) and output_image (null if there is
    none: such a row can be edited, but not trained on); optionally mask, plan (list of steps),
    source_caption, target_caption and task. Paths are relative to the file. OmniGen's own rows have this
    form. A benchmark's row may also have id, save_as and save_also, for its scorer (tools/prepare.py)."""
    bad = bad or BadRows()
    folder = Path(path).parent
    lines = read_lines(path, "a JSONL file of image pairs is needed")
    good = False
    for number, row, offset, line in json_lines(lines):
        try:
            if isinstance(row, InputError):
                raise row
            row = check_row(row, folder)
            if targets and row["output_image"] is None:
                raise InputError("output_image is null: this row can be edited, not trained on")
        except InputError as error:
            bad.skip(InputError(f"{path}:{number}: {error}"))
            continue
        good = True
        yield (number, offset, len(line), zlib.crc32(line)), row
    if not good:
        raise InputError(f"{path}: no rows")


class Rows(Sequence):
    """The rows of a JSONL file: rows[k] -> (line number, row), read when it is asked for. A line that is no
    longer what it was when it was checked raises InputError.

    In memory are only the places of the rows, so that a file of a million of them is small, and the workers
    of a loader copy nothing. places: those of good_rows, if the file has been gone through already."""

    def __init__(self, path, targets=True, bad=None, places=None):
        self.path = path
        if places is None:
            places = array("q")
            for place, _ in good_rows(path, targets, bad):
                places.extend(place)
        self.places = np.asarray(places).reshape(-1, 4)

    def __len__(self):
        return len(self.places)

    def __getitem__(self, k):
        number, offset, size, crc32 = self.places[k].tolist()
        with reading(self.path) as file:
            file.seek(offset)
            line = file.read(size)
        if zlib.crc32(line) != crc32:
            raise InputError(f"{self.path}:{number}: this line has changed since the program was started; "
                             f"start it again")
        return number, check_row(parse_line(line, number), Path(self.path).parent)


# ------------------------------------------------------------------------- what a check of a large file found

CODE = "".join(file_checksum(Path(__file__).with_name(name)) for name in ("files.py", "rows.py"))


def recall(path, key):
    """What `remember` wrote -> {name: array}; None if it is not there, not whole, or of another key."""
    try:
        with np.load(path) as file:
            found = dict(file)
        return found if found.pop("key") == key else None
    except Exception:           # numpy and zipfile have a dozen types for a file that is damaged
        return None


def remember(path, key, found, say=tqdm.write):
    """Write {name: array}, made from what has the checksum `key`, for the next start. Several processes may
    do so at once."""
    own = Path(f"{path}.{secrets.token_hex(4)}")
    try:
        with writing(own, "wb") as file:
            np.savez(file, key=key, **found)
        os.replace(own, path)
    except (InputError, OSError) as error:
        own.unlink(missing_ok=True)
        say(f"the rows will be checked again at the next start: {error}")


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
    """sha256 of arrays and values that JSON can hold: does a resumed run have the data of its beginning?"""
    text = json.dumps(parts, default=lambda part: hashlib.sha256(part).hexdigest())
    return hashlib.sha256(text.encode()).hexdigest()
