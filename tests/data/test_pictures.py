"""A picture is as bright in 8 bits as it was in 16, in 32 or in floating-point numbers, or an error says why not."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from cap_hf.data.pictures import in_eight_bits, read_picture
from cap_hf.errors import CAPError

# All 256 greys; 257 * 255 is 65535, so each has an exact value of 16 bits.
RAMP = np.arange(256, dtype=np.uint16).reshape(16, 16)


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(io.BytesIO(file.getvalue()))


def tiff(values, bits, sample_format, more=None):
    """A little-endian TIFF of one row of packed samples, which PIL reads and does not write."""
    packed = values.tobytes()
    if bits == 12:
        pairs = values.reshape(-1, 2).astype(int)
        packed = b"".join(bytes((a >> 4, (a & 15) << 4 | b >> 8, b & 255)) for a, b in pairs)
    tags = {256: values.size, 257: 1, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: len(packed)}
    tags |= {339: sample_format} | (more or {})
    tags = dict(sorted(tags.items()))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    place = 8 + len(packed)
    file = b"II*\0" + struct.pack("<I", place) + packed + struct.pack("<H", len(tags)) + entries + bytes(4)
    return Image.open(io.BytesIO(file))


def png(values, color):
    """A PNG of 16 bits and several channels, which PIL reads and does not write."""
    height, width = values.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(rows), b"IEND": b""}
    file = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items()
    )
    return Image.open(io.BytesIO(file))


DEEP = {
    "PNG of 16 bits": lambda: saved(Image.fromarray(RAMP * 257), "PNG"),
    "TIFF of 16 bits": lambda: saved(Image.fromarray(RAMP * 257), "TIFF"),
    "big-endian TIFF": lambda: saved(Image.frombytes("I;16B", (16, 16), (RAMP * 257).astype(">u2").tobytes()), "TIFF"),
    "PGM of 16 bits": lambda: saved(Image.fromarray(RAMP * 257), "PPM"),
    "TIFF of 32 bits": lambda: saved(Image.fromarray((RAMP * 257).astype(np.int32)), "TIFF"),
    "TIFF of 12 bits": lambda: tiff(np.rint(RAMP * (4095 / 255)).astype("<u2"), 12, 1),
    "TIFF of signed 16 bits": lambda: tiff(np.rint(RAMP * (32767 / 255)).astype("<i2"), 16, 2),
    "floating-point TIFF": lambda: saved(Image.fromarray((RAMP / 255).astype(np.float32)), "TIFF"),
}


@pytest.mark.parametrize("name", DEEP)
def test_every_grey_is_kept(name):
    image = DEEP[name]()
    for mode in ("L", "RGB"):
        greys = np.asarray(in_eight_bits(image).convert(mode)).reshape(256, -1)
        np.testing.assert_array_equal(greys, np.arange(256)[:, None].repeat(greys.shape[1], 1))


@pytest.mark.parametrize(("color", "channels"), [(2, 3), (6, 4)])
def test_pillow_itself_scales_colours_of_16_bits(color, channels):
    image = in_eight_bits(png(np.stack([RAMP * 257] * channels, axis=-1), color))
    np.testing.assert_array_equal(np.asarray(image.convert("RGB"))[..., 0], RAMP)


@pytest.mark.parametrize(("color", "channels"), [(2, 3), (6, 4), (4, 2)])
def test_colours_of_12_bits_in_16(color, channels):
    """PIL reads their upper 8 bits: they came out nearly black."""
    values = np.stack([RAMP * 16] * channels, axis=-1)
    values[..., -1] = 4095 if color == 2 else 65535  # opaque
    value = {"bytes": png(values, color).fp.getvalue(), "path": None}
    with pytest.raises(CAPError, match="colours of 16 bits and no value above 4095: .* or pass --white_level 65535 if"):
        read_picture(value)
    with pytest.raises(CAPError, match="white is taken to be 65535 and not --white_level 4095: scale"):
        read_picture(value, 4095)
    assert np.asarray(read_picture(value, 65535))[..., 0].max() == 15


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_pictures_of_8_bits_are_left_alone(mode):
    image = Image.new(mode, (4, 4))
    assert in_eight_bits(image) is image


def test_what_lies_between_is_rounded():
    values = np.array([[0, 128, 129, 385, 386, 65535]], np.uint16)
    assert np.asarray(in_eight_bits(Image.fromarray(values))).tolist() == [[0, 0, 1, 1, 2, 255]]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.array([[0, 70000]], np.int32), "its values are 0 to 70000 and white is taken to be 65535: pass"),
        (np.array([[-5, 700]], np.int32), "its values are -5 to 700 and"),
        (np.array([[0, 255]], np.float32), "its values are 0 to 255 and white is taken to be 1: pass"),
        (np.array([[-0.5, 1]], np.float32), "its values are -0.5 to 1 and"),
        (np.array([[np.nan, 1]], np.float32), "its values are nan to nan and"),
        (np.array([[0, 255]], np.uint16), "no value above 255: pass the value of white with --white_level, 4095 for a"),
        (
            np.array([[0, 4095]], np.uint16),
            "no value above 4095: .* camera of 12 bits, 65535 if the picture is dark, 255",
        ),
        (np.array([[0, 17]], np.int32), "no value above 17: pass"),
    ],
)
def test_white_that_cannot_be_known_is_an_error(values, said):
    with pytest.raises(CAPError, match=said):
        in_eight_bits(Image.fromarray(values))


@pytest.mark.parametrize(
    ("values", "white", "expected"),
    [
        (np.array([[0, 4095, 1024]], np.uint16), 4095, [0, 255, 64]),
        (np.array([[0, 4095, 257]], np.uint16), 65535, [0, 16, 1]),
        (np.array([[0, 255, 7]], np.int32), 255, [0, 255, 7]),
        (np.array([[0, 300, 150]], np.float32), 300, [0, 255, 128]),
        # What is black is black whatever white is; and there is none to be said of 8 bits.
        (np.array([[0, 0]], np.uint16), None, [0, 0]),
        (np.array([[0, 255]], np.uint8), 4095, [0, 255]),
    ],
)
def test_white_as_the_user_says_it(values, white, expected):
    assert np.asarray(in_eight_bits(Image.fromarray(values), white)).tolist() == [expected]


def test_values_beyond_the_white_that_was_said():
    with pytest.raises(
        CAPError, match="values are 0 to 4096 and white is taken to be 4095: pass .* with --white_level"
    ):
        in_eight_bits(Image.fromarray(np.array([[0, 4096]], np.uint16)), 4095)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("orientation", [None, 1, 2])
def test_a_tiff_whose_white_is_0(bits, orientation, tmp_path):
    """PIL turns the values of 8 bits round, and not those of 16; `datasets` loses what says so."""
    values = np.array([0, 32768, 65535], "<u2") if bits == 16 else np.array([0, 128, 255], np.uint8)
    image = tiff(values, bits, 1, {262: 0} | ({} if orientation is None else {274: orientation}))
    expected = [[0, 127, 255]] if orientation == 2 else [[255, 127, 0]]
    content = image.fp.getvalue()
    (tmp_path / "1.tiff").write_bytes(content)
    for value in ({"bytes": content, "path": None}, {"bytes": None, "path": str(tmp_path / "1.tiff")}):
        assert np.asarray(read_picture(value)).tolist() == expected


def test_what_is_no_picture():
    for value in (None, {"bytes": None, "path": None}):
        with pytest.raises(CAPError, match="there is no image"):
            read_picture(value)
    with pytest.raises(OSError, match="cannot identify"):
        read_picture({"bytes": b"x", "path": None})
