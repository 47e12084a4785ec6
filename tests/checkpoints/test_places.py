"""The place that was full or closed is named, also where it is not the one that was written to."""

import errno
from collections import namedtuple
from pathlib import Path

import pytest
from safetensors import SafetensorError

from cap_hf import CAPError
from cap_hf.checkpoints import loading, places
from cap_hf.checkpoints.atomic import atomic_directory
from cap_hf.checkpoints.loading import local_folder
from cap_hf.checkpoints.places import write_error, writing

FULL = "No space left on device"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, FULL), "the disk of OUT is full: free some space, or choose another folder"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "OUT/x"), "the disk of OUT is full"),
        (SafetensorError(f"I/O error: {FULL} (os error 28)"), "the disk of OUT is full"),
        (SafetensorError("I/O error: File too large"), "cannot write OUT (I/O error: File too large): choose another"),
        (OSError(errno.EROFS, "Read-only file system", "UP"), "cannot write OUT (Read-only file system): choose"),
        (OSError(errno.EACCES, "Denied", "UP/.out.abc.partial"), "cannot write OUT (Denied): choose another folder"),
        # Somebody else's.
        (OSError(errno.EACCES, "Denied", "UP/model/x"), "UP/model/x cannot be read or written (Denied): choose"),
        (OSError(errno.ENOSPC, FULL, "TEMP/tmpab12_xyz/x"), "the disk of TEMP/tmpab12_xyz/x is full: free some space,"),
        (OSError(errno.ENOSPC, FULL, "TEMP/cap_hf-1/x"), "or set TMPDIR to a folder on another disk"),
        (
            OSError(errno.ENOSPC, FULL, "CACHE/hub/x"),
            "the disk of CACHE/hub/x is full: free some space, or set HF_HOME",
        ),
        # A copy: the first file is read.
        (
            OSError(errno.ENOSPC, FULL, "UP/model/x", None, "OUT/x"),
            "the disk of OUT is full: free some space, or choose",
        ),
        (OSError("no such model"), "no such model"),
    ],
)
def test_the_line_names_the_place(tmp_path, monkeypatch, error, line):
    for name in ("up", "temp", "cache"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(places.tempfile, "gettempdir", lambda: str(tmp_path / "temp"))
    monkeypatch.setattr(places, "cache_places", lambda: (str(tmp_path / "cache"), str(tmp_path / "cache" / "hub")))
    words = {"OUT": "up/out", "UP": "up", "TEMP": "temp", "CACHE": "cache"}

    def put(text):
        for word, path in words.items():
            text = text.replace(word, str(tmp_path / path))
        return text

    if getattr(error, "filename", None):
        second = error.filename2 and put(error.filename2)
        error = OSError(error.errno, error.strerror, put(error.filename), None, second)
    said = str(write_error(tmp_path / "up" / "out", error))
    assert put(line) in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.EROFS, "Read-only file system", "CACHE/hub/models--a--b"), "CACHE/hub/models--a--b, cannot be"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "CACHE"), "Not a directory): name another with HF_HOME"),
        (OSError(errno.ENOSPC, FULL), f"CACHE/hub, cannot be written ({FULL}): name another with HF_HOME"),
        (PermissionError(errno.EACCES, "Denied", "OTHER/x"), None),
        (ConnectionError("no network"), None),
    ],
)
def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch, error, line):
    monkeypatch.setattr(places, "cache_places", lambda: (str(tmp_path / "cache"), str(tmp_path / "cache" / "hub")))

    def put(text):
        return text.replace("CACHE", str(tmp_path / "cache")).replace("OTHER", str(tmp_path / "other"))

    if getattr(error, "filename", None):
        error = type(error)(error.errno, error.strerror, put(error.filename))
    try:
        # As transformers does, which then says something of its own.
        raise OSError("Check cache directory permissions") from error
    except OSError as raised:
        found = places.closed_cache(raised)
    assert (found is None) == (line is None)
    assert line is None or put(line) in str(found)


def test_a_download_into_a_cache_that_cannot_be_made_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(loading, "snapshot_download", lambda name, cache_dir, **_: Path(cache_dir).mkdir())
    with pytest.raises(CAPError, match=r"the cache of downloads, .*file.*, cannot be written .*: name .* --cache_dir"):
        local_folder("someone/model", cache_dir=str(tmp_path / "file" / "cache"))


def test_a_full_disk_that_nobody_names_is_looked_for(tmp_path, monkeypatch):
    usage, temporary, free = namedtuple("usage", "free"), tmp_path / "temp", {}
    temporary.mkdir()
    monkeypatch.setattr(places.tempfile, "gettempdir", lambda: str(temporary))
    monkeypatch.setattr(places.shutil, "disk_usage", lambda path: usage(free.get(path, 10**9)))
    for left, full in ((0, temporary), (10**9, tmp_path / "out")):
        free[temporary] = left
        with pytest.raises(CAPError, match=f"the disk of {full} is full"), atomic_directory(tmp_path / "out"):
            raise OSError(errno.ENOSPC, FULL)


def test_without_a_folder_for_temporary_files_the_output_is_named(tmp_path, monkeypatch):
    def nowhere():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(places.tempfile, "gettempdir", nowhere)
    with pytest.raises(CAPError, match="the disk of .*out is full.*choose another"), writing(tmp_path / "out"):
        raise OSError(errno.ENOSPC, FULL)


def test_what_torch_save_says_of_a_full_disk(tmp_path):
    with pytest.raises(CAPError, match="cannot write .*out"), writing(tmp_path / "out"):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file")
    with pytest.raises(RuntimeError, match="shapes"), writing(tmp_path / "out"):
        raise RuntimeError("shapes")
