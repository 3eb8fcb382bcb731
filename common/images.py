"""Pictures in and out: any still image as RGB, and contact sheets."""
import itertools
import warnings

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from common.files import InputError, writing

ANIMATIONS = ("GIF", "PNG", "WEBP", "AVIF", "FLI")    # other formats keep thumbnails, pages or layers
MOST_PIXELS = 2**26                       # 67 megapixels, 8192 x 8192: more is refused before it is decoded


def open_image(path):
    """Any still image that Pillow reads, as an upright RGB Image; alpha goes onto white, 16 bits become 8.

    Of a file with several pictures, such as a phone's JPEG, the first; an animation is refused."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:    # of odd metadata
            if image.width * image.height > MOST_PIXELS:
                raise InputError(f"{path}: {image.width} x {image.height} pixels are too many to decode "
                                 f"safely; at most {MOST_PIXELS}. Scale it down first.")
            if image.format in ANIMATIONS and getattr(image, "n_frames", 1) > 1:
                raise InputError(f"{path}: an animation of {image.n_frames} frames; a still image is needed. "
                                 f"Save one frame of it.")
            return upright_rgb(image)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such image") from None
    except Image.DecompressionBombError:
        raise InputError(f"{path}: too many pixels to decode safely; at most {MOST_PIXELS}. "
                         f"Scale it down first.") from None
    except InputError as error:
        raise InputError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    except Exception as error:            # broken files: Pillow's own types, and whatever its decoders meet
        reason = str(error).split("\n")[0] or type(error).__name__
        raise InputError(f"{path}: not an image that can be read ({reason})") from None


def upright_rgb(image):
    kind = image.format                   # which turning the image upright forgets
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = from_16_bits(image, kind)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def from_16_bits(image, kind):
    """Gray of 16 bits -> 8 bits, which Pillow's own conversion clips. Other ranges are refused: what is white
    in 32 bits or in floats, nobody knows."""
    values = np.asarray(image)
    sixteen = image.mode.startswith("I;16") or kind == "PPM" and image.mode == "I"
    if not sixteen or 0 < values.max() <= 255:
        raise InputError(f"gray of the mode {image.mode} with values from {values.min():g} to "
                         f"{values.max():g}; save it with 8 bits (0 to 255) or 16 (0 to 65535)")
    return Image.fromarray((values / 257).round().astype(np.uint8))


def open_mask(path, image):
    """The mask of an Image -> an Image of its size in mode L: 255 where the mask is white, i.e. where the
    edit is, else 0. A marked pixel keeps its mark whatever the mask's size."""
    mask = open_image(path).convert("L")
    if abs(mask.width * image.height - mask.height * image.width) > max(image.size):   # a pixel for rounding
        raise InputError(f"{path}: a mask of {mask.width} x {mask.height} pixels for an image of "
                         f"{image.width} x {image.height}: it should have the same aspect ratio")
    brightest = mask.getextrema()[1]
    if brightest <= 127:
        raise InputError(f"{path}: a mask that marks nothing: its brightest value is {brightest}, and white "
                         f"(255) marks the edit; leave out the mask of a row without one")
    return shrink_mask(mask.point(lambda value: 255 * (value > 127)), image.size)


def shrink_mask(mask, size):
    """Resize a mask of 0 and 255; a pixel with any mark in it is marked."""
    return mask.resize(size, Image.Resampling.BOX).point(lambda value: 255 * (value > 0))


def save_image(image, path):
    """Write (h, w, 3) uint8, or an Image, as .png or .jpg, by the name of the file."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    with writing(path, "wb") as file:
        image.save(file, "JPEG" if str(path).lower().endswith((".jpg", ".jpeg")) else "PNG", quality=95)


def sheet(rows, path, scale=1, pad=4, title=""):
    """Save a table of images: rows of (image (h, w, 3) uint8, caption, framed), None for an empty place."""
    cells = [cell for row in rows for cell in row if cell]
    height = max(image.shape[0] for image, _, _ in cells) * scale
    width = max(image.shape[1] for image, _, _ in cells) * scale
    text = [14 * (1 + max(cell[1].count("\n") for cell in row if cell)) for row in rows]
    tops = list(itertools.accumulate((height + own + pad for own in text), initial=pad + 18 * bool(title)))
    page = Image.new("RGB", (max(map(len, rows)) * (width + pad) + pad, tops[-1]), "white")
    pen = ImageDraw.Draw(page)
    pen.text((pad, pad), title, fill="black")
    for row, y in zip(rows, tops):
        for column, cell in enumerate(row):
            if cell is None:
                continue
            image, caption, framed = cell
            x = pad + column * (width + pad)
            size = (image.shape[1] * scale, image.shape[0] * scale)
            page.paste(Image.fromarray(image).resize(size, Image.Resampling.NEAREST), (x, y))
            if framed:
                pen.rectangle([x - 2, y - 2, x + width + 1, y + height + 1], outline="red", width=2)
            pen.multiline_text((x, y + height + 1), caption, fill="black", spacing=2)
    save_image(page, path)
