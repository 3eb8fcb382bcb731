"""Published data sets -> JSONL files of our own form (common/rows.py), one a split: TO/NAME-SPLIT.jsonl.

    python -m tools.prepare magicbrush MagicBrush data       data/magicbrush-train.jsonl, magicbrush-dev.jsonl
    python -m tools.prepare emu-edit emu_edit_test_set data --split test
    python -m tools.prepare complex-edit Complex-Edit data --complexity 4

NAME          what FROM is                                                 splits                used for
magicbrush    folder dev/ or test/ with edit_turns.json, or Parquet files  train, dev, test      both
ultraedit     Parquet files                                                FreeForm, RegionBase  training
aurora        the repository, with data/PART/train.json and its images     its four parts        training
emu-edit      Parquet files of emu_edit_test_set, or of ..._generations    validation, test      evaluation
complex-edit  Parquet files, or JSON or JSONL with image and edit          test_real, test_syn   evaluation
idea-bench    case folders TASK_NNNN                                       none: TO/NAME.jsonl   evaluation
geneval       the repository, with prompts/evaluation_metadata.jsonl       none                  evaluation

Image files stay where they are and are named by relative paths. Images inside Parquet files (which need the
package pyarrow) and converted masks are written to TO/images unless a file of that size is there. Rows are
counted from 0. Evaluation sets have no target image: "output_image" is null; sample.py --data edits such
rows, training refuses them. Scorers need more keys: id, benchmark (NAME), split, turn, turns, local_caption,
idx, complexity, operations, task_name, uid, tag, edited_image. Where the published scorer of a benchmark
expects a layout of folders, sample.py saves its outputs in it:
    save_as    path of an output below --out, a format string with the fields pauses and seed
    save_also  {path of the same kind: object to write there as a line of JSON}
"""
import io
import json
import os
import re
import shutil
from collections import Counter, namedtuple
from contextlib import ExitStack
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
from PIL import Image
from tqdm import tqdm

from common.cli import parser, run_script
from common.files import (InputError, decode, make_folder, optional, read_bytes, read_json, relative, rows_of,
                          writing)
from common.rows import check_row

FILES = {                                 # where the rows are: of several patterns, the first that matches
    "magicbrush": ["edit_turns.json", "*/edit_turns.json", "**/*.parquet"], "ultraedit": ["**/*.parquet"],
    "aurora": ["data/*/train.json"], "complex-edit": ["**/*.parquet", "*.jsonl", "*.json"],
    "emu-edit": ["**/*.parquet"], "idea-bench": ["*_[0-9][0-9][0-9][0-9]"],
    "geneval": ["prompts/evaluation_metadata.jsonl", "evaluation_metadata.jsonl"]}
COLUMNS = {                               # that Parquet files must have
    "magicbrush": {"img_id", "turn_index", "source_img", "mask_img", "instruction", "target_img"},
    "ultraedit": {"edit_prompt", "source_image", "edited_image"}, "complex-edit": {"image", "edit"},
    "emu-edit": {"instruction", "image", "task", "idx"}}
SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "JPEG2000": "jp2"}            # MPO: a JPEG of several pictures
KUBRIC_TASKS = {"location", "further_location", "closer", "counting", "rotate", "attribute"}
BROKEN = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)    # Pillow, pyarrow
# Where a published row stands: `number` counts in the file `path`, `index` in its split. Its images go to
# `out`/images/`name`-ROLE.png; out is the folder TO.
Place = namedtuple("Place", "out path split number index name")


# ------------------------------------------------------------------------------------------- reading

def read_files(name, source):
    """Yield (path, split or None, published rows) for each file; an unreadable row is an InputError."""
    matches = (sorted(source.glob(pattern)) for pattern in FILES[name])
    paths = next(filter(None, matches), None)
    if not paths:
        found = [path.name for path in sorted(source.glob("*"))]
        raise InputError(f"{source}: this is not {name} as published: expected {' or '.join(FILES[name])}, "
                         f"found {', '.join(found[:8] + ['...'] * (len(found) > 8)) or 'nothing'}")
    for path in paths:
        split = {"magicbrush": path.parent.resolve().name,             # FROM may be "."
                 "aurora": path.parent.name, "complex-edit": path.stem}.get(name)
        if name == "idea-bench":
            rows = [path]                                              # the folder of a case is its row
        elif path.suffix == ".jsonl":
            rows = [row for _, row in rows_of(path)]
        elif path.suffix == ".json":
            rows = read_json(path, list)
        else:
            # train-00000-of-00051-0a1b.parquet, train.parquet or train/0000.parquet
            split = path.parent.name if path.stem.isdigit() else re.sub(r"-\d+-of-\d+.*", "", path.stem)
            rows = read_parquet(path)
            first = list(islice(rows, 1))
            columns = set(first[0]) if first and isinstance(first[0], dict) else COLUMNS[name]
            if missing := COLUMNS[name] - columns:
                raise InputError(f"{path}: this is not {name} as published: it has the columns "
                                 f"{', '.join(sorted(columns))}; missing: {', '.join(sorted(missing))}")
            if name == "emu-edit" and "edited_image" in columns:
                # emu_edit_test_set_generations has the names of its splits swapped
                split = {"validation": "test", "test": "validation"}.get(split, split)
            rows = chain(first, rows)
        yield path, split, rows


def read_parquet(path):
    """Yield the rows as dicts, a few at a time: a shard may be larger than memory."""
    ParquetFile = optional("pyarrow.parquet").ParquetFile
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=16):
                yield from batch.to_pylist()
    except BROKEN as error:
        yield InputError(f"the file cannot be read from here on: download it again ({error})")


def need(raw, *keys):
    """The values of `keys` in a published row."""
    if not isinstance(raw, dict):
        wrong = InputError(f"expected an object with {keys[0]!r}, this is {type(raw).__name__}")
        raise raw if isinstance(raw, InputError) else wrong
    for key in keys:
        if raw.get(key) is None:
            there = ", ".join(sorted(raw)) or "none"
            raise InputError(f"the key {key!r} is missing or empty; there are {there}")
    return [raw[key] for key in keys]


def content(value, folder):
    """An image as published, bytes, {"bytes", "path"} or a path in `folder` -> bytes or Path of a file."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if not value or not isinstance(value, (bytes, str)):
        raise InputError(f"expected an image as bytes or a path, this is {value!r:.60}")
    if isinstance(value, str) and not (folder / value).is_file():
        raise InputError(f"{folder / value}: there is no such image")
    return folder / value if isinstance(value, str) else value


def keep(place, role, value, folder):
    """An image as published -> its path relative to TO; bytes are written to TO/images."""
    value = content(value, folder)
    if isinstance(value, Path):
        # folders are resolved because `..` leaves a linked folder by its real parent
        return relative(value.parent.resolve() / value.name, place.out.resolve())
    try:
        with Image.open(io.BytesIO(value)) as image:
            ending = SUFFIXES.get(image.format, image.format.lower())
    except BROKEN as error:
        raise InputError(f"not an image that can be read ({error})") from None
    name = f"images/{place.name}-{role}.{ending}"
    path = place.out / name
    # not `writing`, which would sync millions of images to disk: a torn one has another size
    if not path.is_file() or path.stat().st_size != len(value):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(value)
    return name


def keep_mask(place, value, folder, source):
    """A mask of MagicBrush -> path of a gray PNG as large as `source`, white where the edit is, or None.

    These masks are copies of the photo, some of another size, in which the region to edit is transparent: as
    gray images they would mark the bright parts of the photo. If nothing is transparent, white is the region.
    """
    value = content(value, folder)
    try:
        with Image.open(io.BytesIO(value) if isinstance(value, bytes) else value) as image:
            pixels = np.asarray(image.convert("RGBA"))                                    # (h, w, 4)
        with Image.open(place.out / source) as image:
            size = image.size
    except BROKEN as error:
        raise InputError(f"mask or source image: not an image that can be read ({error})") from None
    clear = pixels[:, :, 3] < 255                                                         # (h, w)
    region = clear if clear.any() else (pixels[:, :, :3] > 250).all(axis=2)               # (h, w)
    if not region.any():
        return None
    png = io.BytesIO()
    Image.fromarray(region.astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST).save(png, "png")
    return keep(place, "mask", png.getvalue(), folder)


def make_row(place, folder, text, sources, target=None, cutout=None, **more):
    """A row of ours from images as published, without keys that are None. cutout: a mask of MagicBrush."""
    sources = [keep(place, "source", image, folder) for image in sources]
    target = None if target is None else keep(place, "target", target, folder)
    if cutout is not None:
        more = {"mask": keep_mask(place, cutout, folder, sources[0]), **more}
    if not isinstance(text, str) or text.strip() in ("", "{}"):        # AURORA has "{}"
        raise InputError(f"expected an instruction, this is {text!r}")
    more = {key: value for key, value in more.items() if value is not None}
    row = {"instruction": text.strip(), "input_images": sources, "output_image": target, **more}
    check_row(row, Path())
    json.dumps(row, allow_nan=False, ensure_ascii=False).encode()      # or the file could not be read again
    return row


def candidate(path):
    """save_as for scorers that are given the folder of one candidate."""
    return "pauses{pauses}_seed{seed}/" + path.replace("{", "{{").replace("}", "}}")


# ------------------------------------------------------------------------------------------- the data sets
# A function for each: a published row and its Place -> our rows, or InputError.

@lru_cache(1)
def captions(folder):
    """MagicBrush's {ID: {file: caption}} of images and of edits, empty if missing, {ID: number of turns}."""
    paths = (folder / "global_descriptions.json", folder / "local_descriptions.json")
    images, edits = (read_json(path) if path.is_file() else {} for path in paths)
    turns = [turn for turn in read_json(folder / "edit_turns.json", list) if isinstance(turn, dict)]
    return images, edits, Counter(str(turn.get("output")).split("-")[0] for turn in turns)


def magicbrush(raw, place):
    folder = place.path.parent
    more = {}
    if place.path.suffix == ".parquet":
        text, before, after, mask = need(raw, "instruction", "source_img", "target_img", "mask_img")
        session, turn = need(raw, "img_id", "turn_index")
    else:
        text, before, after, mask = need(raw, "instruction", "input", "output", "mask")
        if not (match := re.fullmatch(r"([^/]+)-output(\d+)\.\w+", str(after))):
            raise InputError(f"expected an output named ID-outputK.png, this is {after!r}")
        session = match[1]
        turn = int(match[2])
        images, edits, turns = captions(folder)
        images = images.get(session, {})
        more = {"source_caption": images.get(str(before)), "target_caption": images.get(after),
                "local_caption": edits.get(session, {}).get(after), "turns": turns[session]}
        folder = folder / "images" / session
    # inde, independent: each turn starts from the true image of the turn before
    file = f"{session}_{turn}.png" if str(turn) == "1" else f"{session}_inde_{turn}.png"
    return [make_row(place, folder, text, [before], after, mask, id=f"{session}-{turn}", turn=turn, **more,
                     save_as=candidate(f"{session}/{file}"))]


def ultraedit(raw, place):
    text, before, after = need(raw, "edit_prompt", "source_image", "edited_image")
    folder = place.path.parent
    # white where the edit is, as it should be
    mask = keep(place, "mask", raw["mask_image"], folder) if raw.get("mask_image") else None
    return [make_row(place, folder, text, [before], after, mask=mask,
                     source_caption=raw.get("source_caption"), target_caption=raw.get("target_caption"),
                     id=f"{place.path.stem}-{place.number:06d}", idx=raw.get("idx"))]


def aurora(raw, place):
    text, before, after = need(raw, "instruction", "input", "output")
    text = text[0] if isinstance(text, list) and text else text
    root = place.path.parents[2]
    # only MagicBrush's rows name a mask, without its folder, and not every copy of the data has the file
    mask = Path(str(before)).parent / (raw.get("mask") or "")
    cutout = str(mask) if (root / mask).is_file() else None
    task = min(KUBRIC_TASKS & set(mask.parts), default=place.split)
    return [make_row(place, root, text, [before], after, cutout, task=task, id=f"{place.number:06d}")]


def emu_edit(raw, place):
    text, task, idx, image = need(raw, "instruction", "task", "idx", "image")
    folder = place.path.parent
    # edited_image was made by Emu Edit: it is no target. idx is unique only together with task and split.
    made = keep(place, "emu", raw["edited_image"], folder) if raw.get("edited_image") else None
    return [make_row(place, folder, text, [image], source_caption=raw.get("input_caption"),
                     target_caption=raw.get("output_caption"), task=task, id=f"{task}-{idx}", idx=idx,
                     edited_image=made)]


def complex_edit(raw, place, complexity=8):
    def items(steps, key):                # a list of objects, or in some Parquet files an object of lists
        return need(steps, key)[0] if isinstance(steps, dict) else [need(step, key)[0] for step in steps]
    image, edit = need(raw, "image", "edit")
    texts = items(need(edit, "compound")[0], "compound_instruction")
    operations = items(edit.get("sequence") or [], "name")
    if len(texts) < complexity:
        raise InputError(f"edit.compound has {len(texts)} instructions, {complexity} are needed: "
                         f"see --complexity")
    # the evaluator goes by the order of the data set, so ids and outputs sort like it
    return [make_row(place, place.path.parent, text, [image], complexity=c, operations=operations[:c] or None,
                     id=f"{place.index:05d}-{c}", save_as=candidate(f"complexity_{c}/{place.index:05d}.png"))
            for c, text in enumerate(texts[:complexity], 1)]


def idea_bench(case, place):
    for file in ("instruction.txt", "meta.json"):
        if not (case / file).is_file():
            raise InputError(f"{file} is missing")
    task, uid = need(read_json(case / "meta.json"), "task_name", "uid")
    files = sorted(path.name for path in case.iterdir())
    images = [file for file in files if re.fullmatch(r"\d{4}\.(jpe?g|png|webp)", file.lower())]
    if not images:
        raise InputError("no input image 0001.jpg: a text-to-image case; only cases with input images become "
                         "rows")
    try:
        text = decode(read_bytes(case / "instruction.txt"))
    except InputError as error:
        raise InputError(f"instruction.txt: {error}") from None
    return [make_row(place, case, text, images, task=task, task_name=task, uid=uid, id=case.name,
                     save_as=candidate(f"{case.name}/0001.jpg"))]


def geneval(raw, place):
    text, tag = need(raw, "prompt", "tag")
    number = f"{place.number:05d}"
    folder = "pauses{pauses}/" + number                                # the scorer's samples are our seeds
    return [make_row(place, None, text, [], task=tag, tag=tag, id=number,
                     save_as=folder + "/samples/{seed:04d}.png", save_also={folder + "/metadata.jsonl": raw})]


SETS = {"magicbrush": magicbrush, "ultraedit": ultraedit, "aurora": aurora, "emu-edit": emu_edit,
        "complex-edit": complex_edit, "idea-bench": idea_bench, "geneval": geneval}


def converted(name, source, out, split, convert, skipped):
    """Yield (JSONL file, our rows) for each published row; `skipped` gets where and why one is left out."""
    ids = set()
    sizes = {}                                                         # of the splits, skipped rows included
    for path, own, rows in read_files(name, source):
        sizes.setdefault(own, 0)
        if split not in (None, own):
            continue
        make_folder(out)
        target = out / (f"{name}-{own}.jsonl" if own else f"{name}.jsonl")
        more = {"benchmark": name, "split": own} if own else {"benchmark": name}
        for number, raw in enumerate(rows):
            place = Place(out, path, own, number, sizes[own], f"{name}/{own}/{path.stem}-{number:06d}")
            sizes[own] += 1
            try:
                made = convert(raw, place)
                if (own, made[0]["id"]) in ids:
                    raise InputError(f"its id {made[0]['id']} was there before")
            except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
                reason = error if isinstance(error, InputError) else f"not a row as published ({error})"
                skipped.append(f"{path} row {number}: {reason}" if path.is_file() else f"{path}: {reason}")
                continue
            ids.add((own, made[0]["id"]))
            yield target, [{**row, **more} for row in made]
    if split and split not in sizes:
        found = ", ".join(sorted(filter(None, sizes))) or "no splits"
        raise InputError(f"--split {split}: {source} has {found}")


def prepare(name, source, out, split=None, complexity=None):
    """Write the JSONL files -> {path: (rows, rows with a mask)}, [where and why a row was skipped]."""
    if not os.path.isdir(source):
        raise InputError(f"{source}: there is no such folder")
    convert = partial(complex_edit, complexity=complexity) if complexity else SETS[name]
    files = {}
    counts = {}
    skipped = []
    try:
        with ExitStack() as stack:
            rows = converted(name, source, out, split, convert, skipped)
            for target, made in tqdm(rows, desc=name, unit=" rows"):
                if target not in files:                                # copied to its place when it is whole
                    files[target] = stack.enter_context(TemporaryFile(dir=out))
                files[target].write("".join(json.dumps(row) + "\n" for row in made).encode())
                done, masks = counts.get(target, (0, 0))
                counts[target] = (done + len(made), masks + sum("mask" in row for row in made))
            for target, file in files.items():
                file.seek(0)
                with writing(target, "wb") as whole:
                    shutil.copyfileobj(file, whole)
    except OSError as error:                                           # such as a full disk
        reason = f"cannot be read or written ({error.strerror or error})"
        raise InputError(f"{error.filename or out}: {reason}") from None
    return counts, skipped


def main():
    p = parser(__doc__)
    p.add_argument("name", choices=SETS, metavar="NAME", help=", ".join(SETS))
    p.add_argument("source", type=Path, metavar="FROM", help="folder of the data set as published")
    p.add_argument("out", type=Path, metavar="TO", help="folder to write to")
    p.add_argument("--split", help="only this split; all if not given")
    p.add_argument("--complexity", type=int, choices=range(1, 9), metavar="N",
                   help="complex-edit: instructions 1 to N of 8")
    flags = p.parse_args()
    if flags.complexity and flags.name != "complex-edit":
        p.error(f"--complexity is for complex-edit, not for {flags.name}")
    counts, skipped = prepare(flags.name, flags.source, flags.out, flags.split, flags.complexity)
    for path, (rows, masks) in counts.items():
        print(f"{path}: {rows} rows, {masks} with a mask")
    print(f"{len(skipped)} rows skipped", *skipped, sep="\n")
    if not counts:
        raise InputError(f"{flags.source}: no row could be read")


if __name__ == "__main__":
    run_script(main)
