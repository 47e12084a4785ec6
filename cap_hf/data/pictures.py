"""Pictures as PIL converts them rightly: those of more than 8 bits, which it cuts off at 255, are scaled to 8."""

import io
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets.utils.file_utils import xopen
from PIL import ExifTags, Image, ImageOps
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION

from cap_hf.errors import CAPError

# The largest value of 8 bits, of the 12 bits that many cameras have, of a signed 16-bit number, and of 16 bits.
BYTE, CAMERA, SIGNED, WORD = 0xFF, 0xFFF, 0x7FFF, 0xFFFF
# What a TIFF says where 0 is white.
WHITE_IS_ZERO = 0


def read_picture(value: Mapping[str, Any] | None, white_level: float | None = None) -> Image.Image:
    """Return a picture the right way up, of 8 bits.

    `datasets` decodes images too, and takes away what a TIFF says of its values where it says which way is up.

    Args:
        value: as `datasets` has an image that it has not decoded: its `bytes`, or the `path` where these are None.
        white_level: as of `in_eight_bits`.

    Raises:
        CAPError: there is none, or as of `in_eight_bits`.
        Exception: whatever PIL and the file system raise where it cannot be read.
    """
    content, path = (value or {}).get("bytes"), (value or {}).get("path")
    if content is None and path is None:
        raise CAPError("there is no image")
    source: Any = path if content is None else io.BytesIO(content)
    if content is None and not os.path.exists(str(path)):  # in an archive
        with xopen(str(path), "rb") as file:
            source = io.BytesIO(file.read())
    with Image.open(source) as image:
        # Of several channels PIL reads the upper 8 bits.
        halved = ";16" in str(image.tile) and not image.mode.startswith("I")
        image.load()
        if halved:
            check_colors(image, white_level)
        return ImageOps.exif_transpose(in_eight_bits(image, white_level))


def in_eight_bits(image: Image.Image, white_level: float | None = None) -> Image.Image:
    """Return a picture as PIL converts it rightly: one of more than 8 bits scaled to mode `L`, another as it is.

    White is what the file can hold: 65535 in 16 bits, and in integers of 32 bits too, 32767 in signed 16 bits, 4095 in
    a TIFF of 12 bits, 1.0 in floating-point numbers. Where 16 bits or more hold no value above 4095 they may be those
    of a camera of 12 bits, and the caller has to say what white is. A TIFF whose white is 0 is turned round.

    Args:
        image: any; of several channels PIL itself reads 16 bits as the upper 8 of them.
        white_level: the value of white; None for the largest one of its kind.

    Raises:
        CAPError: what white is cannot be known: values below 0 or above white; or, in 16 bits and more, some above 0
            and none above 4095.
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values, white = np.asarray(image), white_of(image) if white_level is None else white_level
    low, high = values.min().item(), values.max().item()
    if not (low >= 0 and high <= white):  # nor where one is not a number
        raise CAPError(
            f"its values are {low:.9g} to {high:.9g} and white is taken to be {white:g}: pass the value of white with "
            "--white_level, or scale them and save it in 8 bits"
        )
    if white_level is None and white > CAMERA and 0 < high <= CAMERA:
        raise CAPError(
            f"it has more than 8 bits and no value above {high}: pass the value of white with --white_level, {CAMERA} "
            f"for a camera of 12 bits, {white:g} if the picture is dark, {BYTE} if 8 bits were stored in 16"
        )
    scaled = np.rint(values * np.float32(BYTE / white)).astype(np.uint8)
    inverted = getattr(image, "tag_v2", {}).get(PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO
    picture = Image.fromarray(BYTE - scaled if inverted else scaled)
    picture.getexif().update(
        {tag: image.getexif()[tag] for tag in (ExifTags.Base.Orientation,) if tag in image.getexif()}
    )
    return picture


def check_colors(image: Image.Image, white_level: float | None) -> None:
    """Raise a CAPError where white is not what PIL takes it for, or may not be, in 16 bits of several channels.

    Args:
        image: the upper 8 bits of the values.
        white_level: as of `in_eight_bits`.
    """
    colors = [number for number, name in enumerate(image.getbands()) if name != "A"]
    high = np.asarray(image)[..., colors].max()
    if white_level is None and 0 < high <= CAMERA >> 8:
        raise CAPError(
            f"it has colours of 16 bits and no value above {CAMERA}: save it in 8 bits, scaled if a camera of 12 bits "
            f"wrote it; or pass --white_level {WORD} if it is dark"
        )
    if white_level not in (None, WORD):
        raise CAPError(
            f"it has colours of 16 bits, whose white is taken to be {WORD} and not --white_level {white_level:g}: "
            "scale them and save it in 8 bits"
        )


def white_of(image: Image.Image) -> float:
    """Return the value that is white in a picture of more than 8 bits, of mode `I`, `I;16` (any byte order) or `F`."""
    if image.mode == "F":
        return 1.0
    bits = getattr(image, "tag_v2", {}).get(BITSPERSAMPLE, (None,))[0]
    if bits == 12:
        return CAMERA
    # PIL opens 16 bits without a sign as `I;16`, except from PGM, which it scales to them.
    return SIGNED if bits == 16 and image.mode == "I" else WORD
