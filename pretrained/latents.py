"""Latents of real images, encoded once, so that training runs no autoencoder.

    python -m pretrained.latents pairs.jsonl --init omnigen:OmniGen-v1
    torchrun --nproc-per-node 4 -m pretrained.latents pairs.jsonl --init omnigen:OmniGen-v1

A cache is a folder with cache.json (which autoencoder, which size) and, for each process that wrote it, a
file of float16 numbers and an index of one JSON line an image. A run that was killed goes on with the same
command.
"""
import hashlib
import os
import random
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from common.cli import COUNT, NONE_OR_MORE, add_device, parser, run_script
from common.devices import processes
from common.files import (InputError, append, finished, make_folder, read_bytes, read_json, relative,
                          write_json)
from common.images import open_image, open_mask
from common.rows import BadRows, checksum, read_rows
from data import Sample, blank, shuffled, to_tensor
from pretrained.omnigen import omnigen_folder
from pretrained.vae import load_vae
from pretrained.weights import HINT


def cache_header(vae_folder, size):
    path = Path(vae_folder) / "diffusion_pytorch_model.safetensors"
    try:
        with open(path, "rb") as file:
            return {"size": size, "vae": hashlib.file_digest(file, "sha256").hexdigest()}
    except OSError as error:
        raise InputError(f"{path}: the autoencoder cannot be read ({error.strerror}). {HINT}") from None


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


ENTRY = {"key", "file", "offset", "shape", "made_of", "version", "crc32"}      # a line of an index


def read_cache(folder, header):
    """-> {key: line of the index}. Each process has an index; of several lines of a key the newest counts."""
    path = Path(folder) / "cache.json"
    found = read_json(path, dict, "python -m pretrained.latents DATA.jsonl --init omnigen:FOLDER makes it")
    if found != header:
        wrong = f"made at size {found.get('size')}, not {header['size']}"
        if found.get("vae") != header["vae"]:
            wrong = "of another autoencoder"
        raise InputError(f"{folder}: these latents are {wrong}. Make new ones in another --out folder.")
    entries = {}
    for index in Path(folder).glob("*.jsonl"):
        for number, entry in enumerate(finished(index), 1):
            if not ENTRY <= set(entry):
                raise InputError(f"{index}:{number}: not a line of this version of the program; make the "
                                 f"latents anew in another --out folder")
            if entry["version"] >= entries.get(entry["key"], entry)["version"]:
                entries[entry["key"]] = entry
    return entries


def end_of(entry):
    """Byte after the last one of an entry's numbers, which are float16."""
    return entry["offset"] + 2 * int(np.prod(entry["shape"]))


def fingerprint(name):
    """A file that a latent comes from -> its time of change in ns, the checksum of its bytes."""
    time = os.stat(name).st_mtime_ns if os.path.exists(name) else None
    return [time, zlib.crc32(read_bytes(name))]


def stale(entry, image, mask):
    """Has a file changed since the latent was made? It is read only if its time differs; one that is not
    there, because only the latents were copied, cannot have changed."""
    return any(os.path.exists(name) and os.stat(name).st_mtime_ns != time and fingerprint(name)[1] != crc
               for name, (time, crc) in zip((image, mask), entry["made_of"]))


class Latents:
    """The rows of a JSONL file as an endless stream of latents: a share p_edit of edits, the rest
    text-to-image.

    Text-to-image rows are those without input images; if there are none, the target captions of the edits
    serve. bad: rows that it may leave out (--skip-bad)."""

    def __init__(self, path, folder, header, seed=0, p_edit=0.5, bad=None):
        self.path = path
        self.folder = Path(folder)
        self.seed = seed
        self.p_edit = p_edit
        self.root = Path(path).parent
        bad = bad or BadRows()
        self.entries = read_cache(folder, header)
        again = f"run `python -m pretrained.latents {path}` again"
        rows = []
        made_of = []
        for number, row in tqdm(read_rows(path, bad=bad), "rows", leave=False):
            latents = needed(row, self.root)
            missing = [key for key, _, _ in latents if key not in self.entries]
            if missing:
                bad.skip(InputError(f"{path}:{number}: {missing[0]} is not in {folder}; {again}"))
                continue
            for key, image, mask in latents:
                if stale(self.entries[key], image, mask):
                    raise InputError(f"{path}:{number}: {key} has changed since its latent was made; {again}")
                made_of.append([crc for _, crc in self.entries[key]["made_of"]])
            rows.append((number, row))
        if not rows:
            raise InputError(f"{path}: every row is bad")
        self.checksum = checksum(rows, made_of)
        self.edits = [(number, row) for number, row in rows if row["input_images"]]
        self.texts = [(number, row) for number, row in rows if not row["input_images"]]
        if not self.texts:
            self.texts = [(number, {**row, "instruction": row["target_caption"], "input_images": [],
                                    "plan": []}) for number, row in rows if row.get("target_caption")]
        if p_edit > 0 and not self.edits:
            raise InputError(f"{path}: no row has input_images, so there is nothing to edit; "
                             f"--p-edit 0 trains text-to-image only")
        if p_edit < 1 and not self.texts:
            raise InputError(f"{path}: every row is an edit without target_caption, so there is nothing for "
                             f"text-to-image, {1 - p_edit:.0%} of the training; add rows, or take --p-edit 1")

    def row(self, index):
        before = int(index * self.p_edit)                  # edits among the samples 0 ... index - 1
        if int((index + 1) * self.p_edit) > before:
            return shuffled(self.edits, f"{self.seed}/edit", before)
        return shuffled(self.texts, f"{self.seed}/text", index - before)

    def bucket(self, index):
        _, row = self.row(index)
        return self.entries[relative(row["output_image"], self.root)]["shape"]

    def latent(self, key, generator):
        """One draw of the autoencoder's posterior, (C, h, w) float32."""
        entry = self.entries[key]
        path = self.folder / entry["file"]
        try:
            data = np.fromfile(path, np.float16, int(np.prod(entry["shape"])), offset=entry["offset"])
        except OSError as error:
            raise InputError(f"{path}: latents that cannot be read ({error.strerror or error})") from None
        if zlib.crc32(data.tobytes()) != entry["crc32"] or not np.isfinite(data).all():
            raise InputError(f"{path}: the latent of {key} is damaged; delete {self.folder} and make it anew")
        mean, std = torch.from_numpy(data.astype(np.float32)).view(entry["shape"]).chunk(2)
        return mean + std * torch.randn(mean.shape, generator=generator)

    def sample(self, index):
        _, row = self.row(index)
        seed = random.Random(f"latents/{self.seed}/{index}").getrandbits(62)
        generator = torch.Generator().manual_seed(seed)
        latents = [self.latent(key, generator) for key, _, _ in needed(row, self.root)]
        n = len(row["input_images"])
        blanked = latents[n + 1] if len(latents) > n + 1 else None
        return Sample(row["instruction"], latents[n], latents[:n], None, blanked, row.get("plan") or [])


# ------------------------------------------------------------------------------------------- the command

def load_picture(flags, item):
    """What a worker does: one image -> key, fingerprint, tensor; or key, None and what is wrong with it."""
    number, key, image, mask = item
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
        return key, None, f"{flags.data}:{number}: {error}"
    return key, made_of, to_tensor(pixels)


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
    done = read_cache(folder, header)
    numbers = folder / f"{rank}.f16"
    index = folder / f"{rank}.jsonl"

    bad = BadRows(flags.skip_bad)
    todo = {}                             # shared out: a key belongs to one process by its checksum
    for number, row in tqdm(read_rows(flags.data, bad=bad), "rows", disable=rank > 0, leave=False):
        for key, image, mask in needed(row, Path(flags.data).parent):
            own = zlib.crc32(key.encode()) % world == rank
            if own and key not in todo and (key not in done or stale(done[key], image, mask)):
                todo[key] = (number, key, image, mask)

    work = torch.utils.data.DataLoader(list(todo.values()), batch_size=None, num_workers=flags.workers,
                                       collate_fn=partial(load_picture, flags))
    with open(numbers, "ab") as file:
        # numbers of a killed run that have no line in the index go
        file.truncate(max(map(end_of, finished(index, cut=True)), default=0))
        file.seek(0, os.SEEK_END)
        for key, made_of, picture in tqdm(work, desc="latents", unit="image", disable=rank > 0):
            if made_of is None:
                bad.skip(InputError(picture))
                continue
            latent = torch.cat(vae.encode(picture[None].to(device)), dim=1)[0].half().cpu().numpy()
            if not np.isfinite(latent).all():
                raise InputError(f"{flags.data}:{todo[key][0]}: the latent of {key} is not finite: the "
                                 f"autoencoder {source} is broken, or not that of SDXL; get it again")
            version = done.get(key, {}).get("version", 0) + 1
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
    print(f"{folder}: {len(todo)} new latents, {len(done)} were there" + f"; {bad.skipped} bad rows skipped" *
          (bad.skipped > 0) + f" (process {rank})" * (world > 1))


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
