"""Published data sets -> JSONL files of our own form (data.read_rows), one for each split: TO/NAME-SPLIT.jsonl.

    python tools/prepare.py magicbrush MagicBrush data            data/magicbrush-train.jsonl and data/magicbrush-dev.jsonl
    python tools/prepare.py emu-edit emu_edit_test_set data --split test
    python tools/prepare.py complex-edit Complex-Edit data --complexity 4

NAME          what FROM is                                                           splits                  for
magicbrush    folder dev/ or test/ with edit_turns.json, or Parquet files            train, dev, test        training, evaluation
ultraedit     Parquet files                                                          FreeForm, RegionBase    training
aurora        the repository, with data/PART/train.json and its images               its four parts          training
emu-edit      Parquet files of emu_edit_test_set, or of ..._generations              validation, test        evaluation
complex-edit  Parquet files, or JSON or JSONL with image and edit                    test_real, test_syn     evaluation
idea-bench    case folders TASK_NNNN                                                 none: TO/NAME.jsonl     evaluation
geneval       the repository, with prompts/evaluation_metadata.jsonl                 none                    evaluation

Images that are files stay where they are and are named by relative paths; images inside Parquet files and converted masks are
written to TO/images. A second run writes only images that are missing or of another size. Rows are counted from 0. What a scorer
needs stands in further keys: id, benchmark (NAME: sample.py puts outputs where its scorer looks), split, turn, turns,
local_caption, idx, complexity, operations, task_name, uid, tag, geneval.
Evaluation sets have no target image: their rows have "output_image": null. sample.py --data reads these rows, training does not.
Parquet files need the package pyarrow.
"""
import argparse
import io
import json
import os
import re
import sys
from collections import Counter
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import check_row  # noqa: E402
from model import InputError  # noqa: E402

# where the rows are: of several patterns, the first that is found
FILES = {"magicbrush": ["edit_turns.json", "*/edit_turns.json", "**/*.parquet"], "ultraedit": ["**/*.parquet"],
         "aurora": ["data/*/train.json"], "emu-edit": ["**/*.parquet"], "complex-edit": ["**/*.parquet", "*.jsonl", "*.json"],
         "idea-bench": ["*_[0-9][0-9][0-9][0-9]"], "geneval": ["prompts/evaluation_metadata.jsonl", "evaluation_metadata.jsonl"]}
COLUMNS = {"magicbrush": {"img_id", "turn_index", "source_img", "mask_img", "instruction", "target_img"},     # of Parquet files
           "ultraedit": {"edit_prompt", "source_image", "edited_image"}, "complex-edit": {"image", "edit"},
           "emu-edit": {"instruction", "image", "task", "idx"}}
BROKEN = (OSError, SyntaxError, ValueError, EOFError)       # what Pillow and pyarrow raise on broken files

# --------------------------------------------------------------------------------------- reading


def read_parquet(path):
    """Yield the rows as dicts, a few at a time: a shard may be larger than memory."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError(f"{path}: reading Parquet files needs the package pyarrow: pip install pyarrow") from None
    with ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=16):
            yield from batch.to_pylist()


def read_json(path, kind=list):
    """A JSON file that holds a `kind`; of a .jsonl file, the list of its lines."""
    try:
        text = path.read_text(encoding="utf-8")
        value = [json.loads(line) for line in text.split("\n") if line.strip()] if path.suffix == ".jsonl" else json.loads(text)
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, kind):
        raise InputError(f"{path}: expected a JSON {kind.__name__}, this is a {type(value).__name__}")
    return value


def published(name, source):
    """Yield (path, split, [(number, row or InputError), ...]) for each file of the data set."""
    paths = next((found for pattern in FILES[name] if (found := sorted(source.glob(pattern)))), None)
    if not paths:
        found = sorted(path.name for path in source.iterdir())
        raise InputError(f"{source}: this is not {name} as published: expected {' or '.join(FILES[name])}, found "
                         f"{', '.join(found[:8]) + ', ...' * (len(found) > 8) or 'nothing'}")
    for path in paths:
        if path.suffix != ".parquet":                       # of geneval and IDEA-Bench, where a case folder is a row, no split
            split = {"magicbrush": path.parent.resolve().name, "aurora": path.parent.name, "complex-edit": path.stem}.get(name)
            yield path, split, enumerate([path] if name == "idea-bench" else read_json(path))
            continue
        # train-00000-of-00051-0a1b.parquet, train.parquet or train/0000.parquet
        split = path.parent.name if path.stem.isdigit() else re.sub(r"-\d+-of-\d+.*", "", path.stem)
        columns = set()
        rows = shard(path, name, columns)
        first = next(rows, None)
        if name == "emu-edit" and "edited_image" in columns:           # emu_edit_test_set_generations: its split names are swapped
            split = {"validation": "test", "test": "validation"}.get(split, split)
        yield path, split, ((number, row) for part in ([first] if first else [], rows) for number, row in part)


def shard(path, name, columns):
    """Yield (number, row) of a Parquet file and fill `columns`; a file that breaks off ends with an InputError for a row."""
    number = -1
    try:
        for number, row in enumerate(read_parquet(path)):
            columns.update(row)
            if missing := COLUMNS[name] - columns:
                raise InputError(f"{path}: this is not {name} as published: it has the columns {', '.join(sorted(columns))}; "
                                 f"missing: {', '.join(sorted(missing))}")
            yield number, row
    except InputError:
        raise
    except BROKEN as error:
        yield number + 1, InputError(f"the file cannot be read from here on: download it again ({error})")


def need(raw, *keys):
    """The values of `keys` in a published row."""
    if not isinstance(raw, dict):
        wrong = InputError(f"expected an object with {keys[0]!r}, this is {type(raw).__name__}")
        raise raw if isinstance(raw, InputError) else wrong
    for key in keys:
        if raw.get(key) is None:
            raise InputError(f"the key {key!r} is missing or empty; there are {', '.join(sorted(raw)) or 'none'}")
    return [raw[key] for key in keys]


# --------------------------------------------------------------------------------------- images and rows

def content(value, folder):
    """An image as published, i.e. bytes, {"bytes", "path"}, or a path in `folder` -> bytes, or the Path of a file."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if not value or not isinstance(value, (bytes, str)):
        raise InputError(f"expected an image as bytes or a path, this is {value!r:.60}")
    if isinstance(value, str) and not (folder / value).is_file():
        raise InputError(f"{folder / value}: there is no such image")
    return folder / value if isinstance(value, str) else value


def keep(out, value, folder, name=""):
    """An image as published -> its path relative to `out`. Bytes are written to `out`/images/`name`.png, or .jpg, ..."""
    value = content(value, folder)
    if isinstance(value, Path):          # folders are resolved because `..` leaves a linked folder by its real parent
        return os.path.relpath(value.parent.resolve() / value.name, out.resolve())
    try:
        with Image.open(io.BytesIO(value)) as image:
            path = f"images/{name}.{image.format.lower().replace('jpeg', 'jpg')}"
    except BROKEN as error:
        raise InputError(f"not an image that can be read ({error})") from None
    if not (out / path).is_file() or (out / path).stat().st_size != len(value):
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_bytes(value)
    return path


def keep_mask(out, value, folder, name, source):
    """A mask of MagicBrush -> path of a gray PNG, white where the edit is, of the size of `source`; None if it marks nothing.

    These masks are copies of the photo in which the region to edit is transparent: read as gray images, they would mark the bright
    parts of the photo. Their size may differ from the photo's. One without transparency is painted: white is the region.
    """
    value = content(value, folder)
    try:
        with Image.open(io.BytesIO(value) if isinstance(value, bytes) else value) as image:
            pixels = np.asarray(image.convert("RGBA"))
        with Image.open(out / source) as image:
            size = image.size
    except BROKEN as error:
        raise InputError(f"mask or source image: not an image that can be read ({error})") from None
    region = pixels[:, :, 3] < 255
    if not region.any():
        region = (pixels[:, :, :3] > 250).all(axis=2)
    if not region.any():
        return None
    png = io.BytesIO()
    Image.fromarray(region.astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST).save(png, "png")
    return keep(out, png.getvalue(), folder, name)


def make_row(instruction, input_images, output_image, **more):
    if not isinstance(instruction, str) or instruction.strip() in ("", "{}"):                # AURORA has "{}"
        raise InputError(f"expected an instruction, this is {instruction!r}")
    row = {"instruction": instruction.strip(), "input_images": input_images, "output_image": output_image,
           **{key: value for key, value in more.items() if value is not None}}
    check_row(row, Path())
    return row


# --------------------------------------------------------------------------------------- the data sets
# A function for each: a published row -> our rows, or InputError. path: the file it is in; name: a unique one for its images;
# number: its place in the file; place: its place in the split.

@lru_cache(1)
def captions(folder):
    """The two caption files of a MagicBrush folder, {ID: {file: caption}}, empty if missing, and {ID: number of turns}."""
    both, local = (read_json(path, dict) if path.is_file() else {}
                   for path in (folder / "global_descriptions.json", folder / "local_descriptions.json"))
    turns = read_json(folder / "edit_turns.json")
    return both, local, Counter(str(turn.get("output")).split("-")[0] for turn in turns if isinstance(turn, dict))


def magicbrush(raw, out, path, split, name, number, place):
    if path.suffix == ".parquet":
        text, before, after, mask = need(raw, "instruction", "source_img", "target_img", "mask_img")
        (img, turn), folder, more = need(raw, "img_id", "turn_index"), path.parent, {}
    else:
        text, before, after, mask = need(raw, "instruction", "input", "output", "mask")
        if not (match := re.fullmatch(r"([^/]+)-output(\d+)\.\w+", str(after))):
            raise InputError(f"expected an output named ID-outputK.png, this is {after!r}")
        img, turn = match[1], int(match[2])
        folder, (both, local, turns) = path.parent / "images" / img, captions(path.parent)
        both, local = both.get(img, {}), local.get(img, {})
        more = dict(source_caption=both.get(str(before)), target_caption=both.get(after), local_caption=local.get(after),
                    turns=turns[img])
    source, target = keep(out, before, folder, f"{name}-source"), keep(out, after, folder, f"{name}-target")
    return [make_row(text, [source], target, mask=keep_mask(out, mask, folder, f"{name}-mask", source), id=f"{img}-{turn}",
                     turn=turn, **more)]


def ultraedit(raw, out, path, split, name, number, place):
    text, before, after = need(raw, "edit_prompt", "source_image", "edited_image")
    source, target = keep(out, before, path.parent, f"{name}-source"), keep(out, after, path.parent, f"{name}-target")
    mask = keep(out, raw["mask_image"], path.parent, f"{name}-mask") if raw.get("mask_image") else None   # white where the edit is
    return [make_row(text, [source], target, mask=mask, source_caption=raw.get("source_caption"),
                     target_caption=raw.get("target_caption"), id=f"{path.stem}-{number:06d}", idx=raw.get("idx"))]


def aurora(raw, out, path, split, name, number, place):
    root, (text, before, after) = path.parent.parent.parent, need(raw, "instruction", "input", "output")
    text = text[0] if isinstance(text, list) and text else text
    source, target = keep(out, before, root), keep(out, after, root)
    # only MagicBrush's rows have a mask, named without its folder, and not every copy of the data has the file
    folder, mask = (root / before).parent, raw.get("mask")
    mask = keep_mask(out, mask, folder, f"{name}-mask", source) if mask and (folder / mask).is_file() else None
    tasks = {"location", "further_location", "closer", "counting", "rotate", "attribute"} & set(Path(before).parts)     # Kubric
    return [make_row(text, [source], target, mask=mask, task=min(tasks, default=split), id=f"{number:06d}")]


def emu_edit(raw, out, path, split, name, number, place):
    text, task, idx, image = need(raw, "instruction", "task", "idx", "image")
    made = keep(out, raw["edited_image"], path.parent, f"{name}-emu") if raw.get("edited_image") else None
    # edited_image is what Emu Edit itself made of it, not a target. idx is unique only together with task and split.
    return [make_row(text, [keep(out, image, path.parent, f"{name}-source")], None, source_caption=raw.get("input_caption"),
                     target_caption=raw.get("output_caption"), task=task, id=f"{task}-{idx}", idx=idx, edited_image=made)]


def complex_edit(raw, out, path, split, name, number, place, complexity=8):
    def items(steps, key):               # a list of objects, or as some Parquet files hold it, an object of lists
        return need(steps, key)[0] if isinstance(steps, dict) else [need(step, key)[0] for step in steps]
    image, edit = need(raw, "image", "edit")
    texts, operations = items(need(edit, "compound")[0], "compound_instruction"), items(edit.get("sequence") or [], "name")
    if len(texts) < complexity:
        raise InputError(f"edit.compound has {len(texts)} instructions, {complexity} are needed: see --complexity")
    image = keep(out, image, path.parent, f"{name}-source")
    # sorted by id, results are in the order of the data set, as its evaluator expects
    return [make_row(texts[c - 1], [image], None, complexity=c, operations=operations[:c] or None, id=f"{place:05d}-{c}")
            for c in range(1, complexity + 1)]


def idea_bench(raw, out, path, split, name, number, place):
    for file in ("instruction.txt", "meta.json"):
        if not (path / file).is_file():
            raise InputError(f"{file} is missing")
    task, uid = need(read_json(path / "meta.json", dict), "task_name", "uid")
    images = sorted(file.name for file in path.iterdir() if re.fullmatch(r"\d{4}\.(jpe?g|png|webp)", file.name.lower()))
    if not images:
        raise InputError("no input image 0001.jpg: a text-to-image case; only cases with input images become rows")
    text = (path / "instruction.txt").read_text(encoding="utf-8", errors="replace")
    return [make_row(text, [keep(out, image, path) for image in images], None, task=task, task_name=task, uid=uid, id=path.name)]


def geneval(raw, out, path, split, name, number, place):
    text, tag = need(raw, "prompt", "tag")                  # the id is the name of the folder that the evaluator looks for
    return [make_row(text, [], None, task=tag, tag=tag, geneval=raw, id=f"{number:05d}")]


SETS = {"magicbrush": magicbrush, "ultraedit": ultraedit, "aurora": aurora, "emu-edit": emu_edit, "complex-edit": complex_edit,
        "idea-bench": idea_bench, "geneval": geneval}

# --------------------------------------------------------------------------------------- the command


def prepare(name, source, out, split=None, complexity=None):
    """Write the JSONL files -> ({path: (rows, rows with a mask)}, [where and why a row was skipped])."""
    if not source.is_dir():
        raise InputError(f"{source}: there is no such folder")
    convert = partial(complex_edit, complexity=complexity) if complexity else SETS[name]
    files, counts, splits, ids, places, skipped = {}, {}, set(), set(), Counter(), []
    with tqdm(desc=name, unit=" rows") as bar:
        for path, own, rows in published(name, source):
            splits.add(own)
            if split not in (None, own):
                continue
            out.mkdir(parents=True, exist_ok=True)
            target = out / f"{name}-{own}.jsonl" if own else out / f"{name}.jsonl"
            for number, raw in rows:
                bar.update()
                try:
                    made = convert(raw, out, path, own, f"{name}/{own}/{path.stem}-{number:06d}", number, places[own])
                    if (own, made[0]["id"]) in ids:
                        raise InputError(f"its id {made[0]['id']} was there before")
                    ids.add((own, made[0]["id"]))
                    if target not in files:
                        files[target] = open(f"{target}.part", "w")
                    more = {"benchmark": name, "split": own} if own else {"benchmark": name}
                    files[target].writelines(json.dumps({**row, **more}) + "\n" for row in made)
                    done, masks = counts.get(target, (0, 0))
                    counts[target] = done + len(made), masks + sum("mask" in row for row in made)
                except InputError as error:
                    skipped.append(f"{path} row {number}: {error}" if path.is_file() else f"{path}: {error}")
                places[own] += 1
    if split and split not in splits:
        raise InputError(f"--split {split}: {source} has {', '.join(sorted(filter(None, splits))) or 'no splits'}")
    for target, file in files.items():   # only now, so that a JSONL file is always whole
        file.close()
        os.replace(file.name, target)
    return counts, skipped


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: sys.exit(f"prepare.py: {message}")
    p.add_argument("name", choices=SETS, metavar="NAME", help=", ".join(SETS))
    p.add_argument("source", type=Path, metavar="FROM", help="folder of the data set as published")
    p.add_argument("out", type=Path, metavar="TO", help="folder to write to")
    p.add_argument("--split", help="only this split; all if not given")
    p.add_argument("--complexity", type=int, choices=range(1, 9), metavar="N", help="complex-edit: instructions 1 to N of 8")
    flags = p.parse_args()
    if flags.complexity and flags.name != "complex-edit":
        p.error(f"--complexity is for complex-edit, not for {flags.name}")
    try:
        counts, skipped = prepare(flags.name, flags.source, flags.out, flags.split, flags.complexity)
    except OSError as error:
        raise InputError(f"{error.filename or flags.out}: cannot be read or written ({error.strerror or error})") from None
    print(*(f"{path}: {rows} rows, {masks} with a mask" for path, (rows, masks) in counts.items()),
          f"{len(skipped)} rows skipped", *skipped, sep="\n")
    if not counts:
        raise InputError(f"{flags.source}: no row could be read")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"prepare.py: {error}")
