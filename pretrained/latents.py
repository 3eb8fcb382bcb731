"""Latents of real images, encoded once, so that training runs no autoencoder.

    python -m pretrained.latents pairs.jsonl --init omnigen:OmniGen-v1
    torchrun --nproc-per-node 4 -m pretrained.latents pairs.jsonl --init omnigen:OmniGen-v1

A cache is a folder with cache.json (which autoencoder, which size) and, for each process that wrote it, a
file of float16 numbers and an index of one JSON line an image. A run that was killed goes on with the same
command.
"""
import hashlib
import math
import os
import random
import re
import zlib
from array import array
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from common.cli import COUNT, NONE_OR_MORE, add_device, parser, run_script
from common.devices import processes
from common.files import (InputError, append, cut_rest, file_checksum, json_lines, make_folder, read_bytes,
                          read_json, relative, whole_lines, write_json)
from common.images import open_image, open_mask
from common.rows import CODE, BadRows, Rows, checksum, good_rows, recall, remember
from data import Sample, blank, shuffled, to_tensor
from pretrained.omnigen import omnigen_folder
from pretrained.vae import load_vae
from pretrained.weights import HINT


def cache_header(vae_folder, size):
    """What a cache says that it is of."""
    path = Path(vae_folder) / "diffusion_pytorch_model.safetensors"
    return {"size": size, "vae": file_checksum(path, f"The autoencoder is needed. {HINT}")}


def bucket(width, height, most):
    """The (width, height) of an image in training: no side above `most`, in steps of 64, so batches fill."""
    factor = min(1, most / max(width, height))
    return tuple(max(64, round(side * factor / 64) * 64) for side in (width, height))


def needed(row, root):
    """The latents a row needs: its references, target, and the source without the masked region.

    -> [(key, image, mask)]; keys name files relative to root, the folder of the JSONL file, so that data and
    cache can move together."""
    names = [*row["input_images"], row["output_image"]]
    latents = [(relative(name, root), name, None) for name in names]
    if row.get("mask") and row["input_images"]:
        source = row["input_images"][0]
        mask = row["mask"]
        key = f"{relative(source, root)} without {relative(mask, root)}"
        latents.append((key, source, mask))
    return latents


def time_of(name):
    """When a file was changed, in ns; -1 if it is not there."""
    try:
        return os.stat(name).st_mtime_ns
    except (OSError, ValueError):
        return -1


def fingerprint(name):
    """A file that a latent comes from -> its time of change in ns, the checksum of its bytes."""
    return [time_of(name), zlib.crc32(read_bytes(name))]


# ------------------------------------------------------------------------------------------- the cache

def check_header(folder, header):
    """Are the latents in `folder` of the autoencoder and the size in `header`? InputError if not."""
    path = Path(folder) / "cache.json"
    found = read_json(path, dict, "python -m pretrained.latents DATA.jsonl --init omnigen:FOLDER makes it")
    if found != header:
        wrong = f"made at size {found.get('size')}, not {header['size']}"
        if found.get("vae") != header["vae"]:
            wrong = "of another autoencoder"
        raise InputError(f"{folder}: these latents are {wrong}. Make new ones in another --out folder.")


# where the numbers of a latent are; an entry of the cache, with the times and checksums of image and mask
NUMBERS = [("file", "u2"), ("shape", "u2"), ("offset", "i8"), ("crc32", "u4")]
ENTRY = np.dtype([("key", "S16"), *NUMBERS, ("version", "i8"), ("times", "i8", 2), ("crcs", "u4", 2)])


class Index:
    """What a cache holds, from the indices of all processes; of several lines of a key the newest counts.

    entries: an array of ENTRY, sorted by key. For a key stands its checksum, of 128 bits: that two of a
    million keys have the same one has a chance of 1e-27. files, shapes: {name or shape: its number in the
    entries}. ends: {file: its bytes in use}."""

    def __init__(self, folder):
        self.files = {}
        self.shapes = {}
        self.ends = {}
        entries = np.fromiter(self.read(folder), ENTRY)
        order = np.lexsort((entries["version"], entries["key"]))
        keys = entries["key"][order]
        newest = np.append(keys[1:] != keys[:-1], len(keys) > 0)[:len(keys)]
        self.keys = keys[newest]
        self.entries = entries[order[newest]]

    def read(self, folder):
        """Yield each line as an ENTRY."""
        for path in index_files(folder):
            for number, line, *_ in json_lines(whole_lines(path)):
                if isinstance(line, InputError):
                    raise InputError(f"{path}:{number}: {line}")
                try:
                    times, crcs = zip(*[*line["made_of"], (-1, 0)][:2])            # of image and mask
                    C, h, w = line["shape"]
                    file = line["file"]
                    end = line["offset"] + 2 * C * h * w                           # float16
                    self.ends[file] = max(end, self.ends.get(file, 0))
                    yield np.array((digest(line["key"]), self.files.setdefault(file, len(self.files)),
                                    self.shapes.setdefault((C, h, w), len(self.shapes)), line["offset"],
                                    line["crc32"], line["version"], times, crcs), ENTRY)
                except (AttributeError, LookupError, OverflowError, TypeError, ValueError):
                    raise InputError(f"{path}:{number}: not a line of this version of the program; make the "
                                     f"latents anew in another --out folder") from None

    def find(self, key):
        """-> the place of a key in `entries`, or None."""
        key = digest(key)
        k = int(self.keys.searchsorted(key))
        return k if k < len(self.keys) and self.keys[k] == key else None

    def stale(self, k, files):
        """Has the image or the mask changed since latent k was made? A file is read only if its time
        differs; one that is not there, because only the latents were copied, cannot have changed."""
        entry = self.entries[k]
        return any(time_of(name) not in (-1, time) and fingerprint(name)[1] != crc
                   for name, time, crc in zip(files, entry["times"].tolist(), entry["crcs"].tolist()))


def index_files(folder):
    return sorted(Path(folder).glob("*.jsonl"))


def digest(key):
    """128 bits that stand for a key; zeros at the end go, as numpy leaves them out too."""
    return hashlib.blake2b(key.encode(), digest_size=16).digest().rstrip(b"\0")


class Latents:
    """The rows of a JSONL file as an endless stream of latents: a share p_edit of edits, the rest
    text-to-image.

    Text-to-image rows are those without input images; if there are none, the target captions of the edits
    serve. bad: rows that it may leave out (--skip-bad).

    The start checks all rows, and that no image has changed since its latent was made. What it found is kept
    beside the latents: the next start on the same data looks at the images' times only."""

    def __init__(self, path, folder, header, seed=0, p_edit=0.5, bad=None):
        self.path = path
        self.folder = Path(folder)
        self.seed = seed
        self.p_edit = p_edit
        self.root = Path(path).parent
        bad = bad or BadRows()
        check_header(folder, header)
        kept = self.folder / f"{Path(path).name}.npz"
        key = checksum(CODE, file_checksum(__file__), os.path.abspath(self.root),
                       file_checksum(path, "a JSONL file of image pairs is needed"),
                       [file_checksum(index) for index in index_files(folder)])
        found = recall(kept, key)
        if found is None or not np.array_equal(found["times"], self.times(found["files"])):
            found = self.check(bad)
            if not bad.skipped:           # else the next start has to name them again
                remember(kept, key, found, bad.say)
        self.rows = Rows(path, places=found["places"])
        self.latents = found["latents"]                    # of all rows, one row after the other
        self.first = found["first"]                        # where those of a row begin
        self.references = found["references"]              # how many images a row has
        self.names = found["names"].tolist()
        self.shapes = [tuple(shape) for shape in found["shapes"].tolist()]
        self.target_shape = self.latents["shape"][self.first[:-1] + self.references]
        self.checksum = checksum(found["places"], found["made_of"])
        self.edits = np.flatnonzero(self.references)
        self.texts = np.flatnonzero(self.references == 0)
        if not len(self.texts):
            self.texts = np.flatnonzero(found["captioned"])
        if p_edit > 0 and not len(self.edits):
            raise InputError(f"{path}: no row has input_images, so there is nothing to edit; "
                             f"--p-edit 0 trains text-to-image only")
        if p_edit < 1 and not len(self.texts):
            raise InputError(f"{path}: every row is an edit without target_caption, so there is nothing for "
                             f"text-to-image, {1 - p_edit:.0%} of the training; add rows, or take --p-edit 1")

    def check(self, bad):
        """Go through all rows -> what __init__ needs to know of them, as {name: array}."""
        index = Index(self.folder)
        again = f"run `python -m pretrained.latents {self.path}` again"
        places, latents, counts, references, captioned = (array("q") for _ in range(5))
        seen = np.zeros(len(index.entries), bool)
        times = array("q")
        files = bytearray()               # names, each with a zero behind it
        for place, row in tqdm(good_rows(self.path, bad=bad), "rows", leave=False):
            parts = needed(row, self.root)
            own = [index.find(key) for key, _, _ in parts]
            if None in own:
                bad.skip(InputError(f"{self.path}:{place[0]}: {parts[own.index(None)][0]} is not in "
                                    f"{self.folder}; {again}"))
                continue
            for k, (key, image, mask) in zip(own, parts):
                if not seen[k]:
                    seen[k] = True
                    names = [image, mask] if mask else [image]
                    times.extend(map(time_of, names))      # before they are read
                    below = [relative(name, self.root) for name in names] if mask else [key]
                    files += "".join(f"{name}\0" for name in below).encode()
                    if index.stale(k, names):
                        raise InputError(f"{self.path}:{place[0]}: {key} has changed since its latent was "
                                         f"made; {again}")
            places.extend(place)
            latents.extend(own)
            counts.append(len(own))
            references.append(len(row["input_images"]))
            captioned.append(bool(row.get("target_caption")))
        if not places:
            raise InputError(f"{self.path}: every row is bad")
        entries = index.entries[latents]
        return {"places": np.array(places), "first": np.cumsum([0, *counts], dtype=np.int32),
                "references": np.array(references, np.int32), "captioned": np.array(captioned, bool),
                "latents": entries[[name for name, _ in NUMBERS]].astype(NUMBERS),
                "made_of": entries["crcs"].copy(), "names": np.array(list(index.files)),
                "shapes": np.array(list(index.shapes)), "files": np.frombuffer(files, np.uint8),
                "times": np.array(times)}

    def times(self, files):
        """files: names, each with a zero behind it, as uint8 -> when each was changed, in ns."""
        names = re.finditer(rb"[^\0]+", files.tobytes())
        return np.fromiter((time_of(os.path.join(self.root, name[0].decode())) for name in names), np.int64)

    def place(self, index):
        """Sample `index` -> its row's place in the file, and is it text-to-image?"""
        before = int(index * self.p_edit)                  # edits among the samples 0 ... index - 1
        if int((index + 1) * self.p_edit) > before:
            return shuffled(self.edits, f"{self.seed}/edit", before), False
        return shuffled(self.texts, f"{self.seed}/text", index - before), True

    def row(self, index):
        k, text = self.place(index)
        number, row = self.rows[k]
        if text and row["input_images"]:
            row = {**row, "instruction": row["target_caption"], "input_images": [], "plan": []}
        return number, row

    def bucket(self, index):
        return self.shapes[self.target_shape[self.place(index)[0]]]

    def latent(self, key, entry, generator):
        """One draw of the autoencoder's posterior, (C, h, w) float32. entry: where its NUMBERS are."""
        path = self.folder / self.names[entry["file"]]
        shape = self.shapes[entry["shape"]]
        try:
            data = np.fromfile(path, np.float16, math.prod(shape), offset=int(entry["offset"]))
        except OSError as error:
            raise InputError(f"{path}: latents that cannot be read ({error.strerror or error})") from None
        if zlib.crc32(data.tobytes()) != entry["crc32"] or not np.isfinite(data).all():
            raise InputError(f"{path}: the latent of {key} is damaged; delete {self.folder} and make it anew")
        mean, std = torch.from_numpy(data.astype(np.float32)).view(shape).chunk(2)
        return mean + std * torch.randn(mean.shape, generator=generator)

    def sample(self, index):
        k, text = self.place(index)
        _, row = self.row(index)
        entries = self.latents[self.first[k]:self.first[k + 1]]
        if text:                          # of an edit, perhaps: the target alone
            entries = entries[self.references[k]:]
        seed = random.Random(f"latents/{self.seed}/{index}").getrandbits(62)
        generator = torch.Generator().manual_seed(seed)
        latents = [self.latent(key, entry, generator)
                   for (key, _, _), entry in zip(needed(row, self.root), entries)]
        n = len(row["input_images"])
        blanked = latents[n + 1] if len(latents) > n + 1 else None
        return Sample(row["instruction"], latents[n], latents[:n], None, blanked, row.get("plan") or [])


# ------------------------------------------------------------------------------------------- the command

def load_picture(flags, rows, item):
    """What a worker does. item: a row's place, which of its latents -> line number, key, fingerprint, tensor;
    or None and what is wrong, for the last two."""
    number, row = rows[item[0]]
    key, image, mask = needed(row, Path(flags.data).parent)[item[1]]
    try:
        made_of = [fingerprint(name) for name in (image, mask) if name]
        picture = open_image(image)
        size = bucket(*picture.size, flags.size)
        pixels = np.asarray(ImageOps.fit(picture, size, Image.Resampling.BICUBIC))
        if mask:
            region = np.asarray(ImageOps.fit(open_mask(mask, picture), size, Image.Resampling.BOX)) > 0
            if not region.any():
                raise InputError(f"{mask}: what it marks lies in the margin that is cut off at size {size}")
            pixels = blank(pixels, region)
    except InputError as error:
        return number, key, None, f"{flags.data}:{number}: {error}"
    return number, key, made_of, to_tensor(pixels)


def encode(flags):
    """Encode the images of a JSONL file that the cache does not hold yet."""
    rank, world, device = processes(flags.device)
    if flags.size % 64:
        raise InputError(f"--size {flags.size}: a multiple of 64 is needed")
    source = omnigen_folder(flags.init) / "vae"
    vae = load_vae(source, device)
    header = cache_header(source, flags.size)
    folder = make_folder(flags.out or Path(flags.data).with_suffix(".latents"))
    if not (folder / "cache.json").exists():
        write_json(folder / f"cache.{rank}.json", header)           # processes may come here at once
        os.replace(folder / f"cache.{rank}.json", folder / "cache.json")
    check_header(folder, header)
    done = Index(folder)
    numbers = folder / f"{rank}.f16"
    index = folder / f"{rank}.jsonl"

    bad = BadRows(flags.skip_bad)
    rows = Rows(flags.data, bad=bad)
    todo = {}                             # shared out: a key belongs to one process by its checksum
    for k, (_, row) in enumerate(tqdm(rows, "rows", disable=rank > 0, leave=False)):
        for part, (key, image, mask) in enumerate(needed(row, Path(flags.data).parent)):
            if zlib.crc32(key.encode()) % world == rank and key not in todo:
                there = done.find(key)
                if there is None or done.stale(there, [image, mask] if mask else [image]):
                    todo[key] = k, part

    todo = np.array(list(todo.values()), int)              # which row, which of its latents
    work = torch.utils.data.DataLoader(todo, batch_size=None, num_workers=flags.workers,
                                       collate_fn=partial(load_picture, flags, rows))
    cut_rest(index)
    with open(numbers, "ab") as file:
        # numbers of a killed run that have no line in the index go
        file.truncate(done.ends.get(numbers.name, 0))
        file.seek(0, os.SEEK_END)
        for number, key, made_of, picture in tqdm(work, desc="latents", unit="image", disable=rank > 0):
            if made_of is None:
                bad.skip(InputError(picture))
                continue
            latent = torch.cat(vae.encode(picture[None].to(device)), dim=1)[0].half().cpu().numpy()
            if not np.isfinite(latent).all():
                raise InputError(f"{flags.data}:{number}: the latent of {key} is not finite: the "
                                 f"autoencoder {source} is broken, or not that of SDXL; get it again")
            there = done.find(key)
            version = 1 if there is None else int(done.entries["version"][there]) + 1
            entry = {"key": key, "file": numbers.name, "offset": file.tell(), "shape": latent.shape,
                     "made_of": made_of, "version": version, "crc32": zlib.crc32(latent.tobytes())}
            try:
                file.write(latent.tobytes())
                file.flush()
                os.fsync(file.fileno())
            except OSError as error:
                raise InputError(f"{numbers}: cannot be written ({error.strerror}); the same command goes on "
                                 f"once there is space") from None
            append(index, entry)                                       # only now is it there
    print(f"{folder}: {len(todo)} new latents, {len(done.keys)} were there" +
          f"; {bad.skipped} bad rows skipped" * (bad.skipped > 0) + f" (process {rank})" * (world > 1))


def main():
    p = parser(__doc__)
    p.add_argument("data", help="a JSONL file")
    p.add_argument("--init", required=True, help="omnigen:FOLDER, for the autoencoder in FOLDER/vae")
    p.add_argument("--size", type=COUNT, default=1024, help="longest side in pixels (1024)")
    p.add_argument("--out", help="folder of the cache; DATA.latents if not given")
    p.add_argument("--skip-bad", type=NONE_OR_MORE, default=0, help="bad rows to leave out (0)")
    p.add_argument("--workers", type=NONE_OR_MORE, default=2, help="processes that read images (2)")
    add_device(p)
    encode(p.parse_args())


if __name__ == "__main__":
    run_script(main)
