"""The edits of a JSONL file: where each output goes, what is done already, a line of results for each."""
import itertools
import json
import os
import zlib
from pathlib import Path

from tqdm import tqdm

from common.files import (InputError, append, cut_rest, finished, make_folder, read_bytes, relative,
                          write_jsonl)
from common.images import save_image
from common.rows import BadRows, Rows, below, checksum, output_path


def inputs_of(row):
    """A checksum of what a result depends on: the row's instruction and its images."""
    return checksum(row["instruction"], [zlib.crc32(read_bytes(name)) for name in row["input_images"]])


def make_record(out, number, row, pauses, seed, path, scores):
    """The line of a result: the row's own keys, paths relative to `out`, scores."""
    paths = {"source": row["input_images"][0] if row["input_images"] else None, "target": row["output_image"],
             "output": path}
    dropped = ("input_images", "output_image", "mask", "id", "save_as", "save_also")
    return {**{key: value for key, value in row.items() if key not in dropped},
            "id": number, "item": row.get("id"), "inputs": inputs_of(row), "pauses": pauses, "seed": seed,
            **scores, **{key: value and relative(value, out) for key, value in paths.items()}}


SETTINGS = ("ckpt", "init", "lora", "clip", "dino", "steps", "text_scale", "image_scale",
            "guidance_interval", "negative_prompt", "pause_token", "size")


def edit_file(flags, weights, edit_row, choose, rank, world):
    """Edit every row of a JSONL file, one candidate for each number of pauses and each seed; a line of
    results.RANK.jsonl each. Continues where a killed run stopped. Under torchrun the processes share the
    rows.

    edit_row(row, pauses, seed) -> output (h, w, 3) uint8, {score: number}. weights: files that are written
    whenever the weights are. choose(records, threshold) -> which candidate of a row is best, and whether it
    reaches the threshold, or None; they go to chosen.RANK.jsonl."""
    out = make_folder(flags.out)
    bad = BadRows(flags.skip_bad)
    rows = dict(Rows(flags.data, targets=False, bad=bad))         # {line: row}
    taken = {}
    paths = {}                            # where each output goes, known before the first edit
    for number, row in rows.items():
        for pauses, seed in itertools.product(flags.pauses, flags.seeds):
            try:
                paths[number, pauses, seed] = output_path(out, number, row, pauses, seed, taken)
            except InputError as error:
                raise InputError(f"{flags.data}:{number}: {error}") from None

    settings = {key: getattr(flags, key) for key in SETTINGS}
    settings = json.loads(json.dumps({**settings, "data": str(Path(flags.data).resolve()),
                                      "weights_written": max(map(os.path.getmtime, weights))}))
    results = out / f"results.{rank}.jsonl"
    cut_rest(results)
    old = [record for file in sorted(out.glob("results.*.jsonl")) for record in finished(file)]
    for record in old:
        if record.get("settings") != settings:
            raise InputError(f"--out {out}: it holds results of {record.get('settings')}, not of {settings}")
    for number, inputs in {record["id"]: record.get("inputs") for record in old}.items():
        if number not in rows or inputs != inputs_of(rows[number]):
            raise InputError(f"{flags.data}:{number}: --out {out} holds a result of this line for another "
                             f"instruction or other images; take another --out")
    done = {(record["id"], record["pauses"], record["seed"]) for record in old}
    todo = [key for key in paths if key[0] % world == rank and key not in done]
    new = 0
    broken = set()                        # lines
    for number, pauses, seed in tqdm(todo, desc="edits", disable=rank > 0):
        if number in broken:
            continue
        try:
            output, scores = edit_row(rows[number], pauses, seed)
        except InputError as error:
            bad.skip(InputError(f"{flags.data}:{number}: {error}"))
            broken.add(number)
            continue
        row = rows[number]
        path = paths[number, pauses, seed]
        save_image(output, path)
        for name, record in (row.get("save_also") or {}).items():
            write_jsonl(below(out, name, pauses, seed), [record])
        record = make_record(out, number, row, pauses, seed, path, scores)
        append(results, {**record, "settings": settings})
        new += 1
    for file in out.glob("chosen.*.jsonl"):                # of an earlier run with more processes
        if int(file.suffixes[0][1:]) >= world:
            file.unlink(missing_ok=True)
    candidates = {}                       # {line: records}
    for file in sorted(out.glob("results.*.jsonl")):
        for record in finished(file):
            if record["id"] % world == rank:
                candidates.setdefault(record["id"], []).append(record)
    chosen = []
    for records in candidates.values():
        if best := choose(records, flags.threshold):
            chosen.append({**records[best[0]], "passed": best[1]})
    write_jsonl(out / f"chosen.{rank}.jsonl", chosen)
    skipped = f"; {bad.skipped} bad rows skipped" if bad.skipped else ""
    print(f"{out}: {new} new edits, {len(paths)} in all{skipped}" + f" (process {rank})" * (world > 1))


def read_results(folder, scored=True):
    """The lines that sample.py --data wrote (scored: that `score` wrote, if it ran), in a fixed order."""
    def read(file):
        for number, row in enumerate(finished(file), 1):
            if not {"id", "pauses", "seed"} <= set(row):
                raise InputError(f"{file}:{number}: no id, pauses and seed: not a line of sample.py --data")
            yield row
    rows = [row for file in sorted(Path(folder).glob("results*.jsonl")) for row in read(file)]
    scores = Path(folder) / "scores.jsonl"
    if scored and scores.exists():
        edits = len(rows)
        rows = list(read(scores))
        if edits not in (0, len(rows)):
            raise InputError(f"{scores}: scores of {len(rows)} edits, but there are {edits}; run "
                             f"`metrics.py score {folder}` again")
    if not rows:
        raise InputError(f"{folder}: no results there; sample.py --data FILE.jsonl --out {folder} makes them")
    return sorted(rows, key=lambda row: (str(row["id"]), row["pauses"], row["seed"]))
