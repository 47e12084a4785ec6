"""Temporary folders go with their object and at a forced end; no other folder does."""

import errno
import tempfile
from pathlib import Path

import pytest

from cap_hf.distributed.temporary import TemporaryFolder, forget, register, remove_temporary
from cap_hf.errors import CAPError


def test_a_folder_goes_with_its_object(tmp_path):
    folder = TemporaryFolder(tmp_path)
    path = Path(folder.name)
    assert path.parent == tmp_path
    (path / "sums").mkdir()
    folder.cleanup()
    assert not path.exists()
    # Somebody else's by now.
    del folder
    path.mkdir()
    remove_temporary()
    assert path.exists()


def test_only_what_is_registered_is_removed(tmp_path):
    kept, given, folder = tmp_path / "collection", tmp_path / "given", TemporaryFolder(tmp_path)
    for path in (kept, given):
        path.mkdir()
        (path / "state").write_text("sums")
        register(path)
    (Path(folder.name) / "sums").write_text("sums")
    forget(kept)
    remove_temporary()
    assert list(tmp_path.iterdir()) == [kept]
    assert (kept / "state").read_text() == "sums"
    forget(given)
    # What is gone already is no trouble.
    folder.cleanup()


def test_where_none_can_be_made_the_line_says_how_to_have_it_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(CAPError, match=r"file cannot be written \(.*Not a directory.*\): choose another folder"):
        TemporaryFolder(tmp_path / "file")

    def nowhere():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    monkeypatch.setattr(tempfile, "_gettempdir", nowhere)
    with pytest.raises(CAPError, match=r"temporary files cannot be written \(.*/tmp.*\): set TMPDIR to a folder"):
        TemporaryFolder()
