"""Pictures whose values have more than 8 bits, scaled to 8: PIL cuts them off at 255."""

import logging

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import BITSPERSAMPLE

from cap_hf.data.once import warn_once
from cap_hf.errors import CAPError

logger = logging.getLogger(__name__)

# The largest value of 8 bits, of the 12 bits that many cameras have, of a signed 16-bit number, and of 16 bits.
BYTE, CAMERA, SIGNED, WORD = 0xFF, 0xFFF, 0x7FFF, 0xFFFF


def in_eight_bits(image: Image.Image) -> Image.Image:
    """Return a picture as PIL converts it rightly: one of more than 8 bits scaled to mode `L`, another as it is.

    White is what the file can hold: 65535 in 16 bits, and in integers of 32 bits too, 32767 in signed 16 bits, 4095 in
    a TIFF of 12 bits, 1.0 in floating-point numbers. Many cameras have 12 bits, which are stored in 16 without a word
    of it: such pictures are taken as 16 bits, nearly black, and a warning says so once.

    Args:
        image: any; of several channels PIL itself reads 16 bits as the upper 8 of them.

    Raises:
        CAPError: what white is cannot be known: values below 0, above white, or (in 16 bits and more) none above 255.
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values, white = np.asarray(image), white_of(image)
    low, high = values.min().item(), values.max().item()
    if not (low >= 0 and high <= white):  # nor where one is not a number
        span = f"{low:.9g} to {high:.9g}"
        raise CAPError(f"its values are {span} and white is taken to be {white:g}: scale them, and save it in 8 bits")
    if white > CAMERA and 0 < high <= BYTE:
        raise CAPError(
            f"it has more than 8 bits and no value above {high}: whether white is {BYTE} or {white} cannot be known. "
            "Save it in 8 bits"
        )
    if white > CAMERA and 0 < high <= CAMERA:
        warn_once(
            logger,
            f"Some pictures of 16 bits have no value above {CAMERA}; they are taken as nearly black, since white is "
            f"{WORD}. If they come from a camera of fewer bits, scale them, and save them in 8 bits",
        )
    return Image.fromarray(np.rint(values * np.float32(BYTE / white)).astype(np.uint8))


def white_of(image: Image.Image) -> float:
    """Return the value that is white in a picture of more than 8 bits, of mode `I`, `I;16` (any byte order) or `F`."""
    if image.mode == "F":
        return 1.0
    bits = getattr(image, "tag_v2", {}).get(BITSPERSAMPLE, (None,))[0]
    if bits == 12:
        return CAMERA
    # PIL opens 16 bits without a sign as `I;16`, except from PGM, which it scales to them.
    return SIGNED if bits == 16 and image.mode == "I" else WORD
