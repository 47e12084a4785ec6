"""The cache of compiled kernels: nothing is loaded that another user could have written, and nothing half written."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from support.libraries import make_library

from cap_hf.kernels import build, cache

ROOT = Path(__file__).parents[2]
ANOTHER_USER = 12345


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The cache's folder, empty; where it is looked for, and a fresh loader."""
    path = tmp_path / "cache"
    monkeypatch.setenv("CAP_HF_CACHE", str(path))
    monkeypatch.delenv("CAP_HF_DISABLE_EXTENSIONS", raising=False)
    build.load_extension.cache_clear()
    cache.warn_once.cache_clear()
    yield path
    build.load_extension.cache_clear()


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """The mark of what the compiler makes; compiling takes no time."""

    def compile_extension(name, folder):
        library = make_library(folder, tmp_path / "own")
        build.torch.ops.load_library(library)
        return library

    monkeypatch.setattr(build, "compile_extension", compile_extension)
    return tmp_path / "own"


@pytest.fixture
def planted(tmp_path, folder):
    """A library with the name that is looked for, put there by this user, and its mark."""
    folder.mkdir(mode=0o700)
    library = folder / f"marking-{build.fingerprint()}.so"
    library.write_bytes(make_library(tmp_path, tmp_path / "planted").read_bytes())
    library.chmod(0o600)
    return library, tmp_path / "planted"


def give_away(path, monkeypatch):
    """Make a file or folder another user's; root hands it over, anybody else takes another number."""
    if os.geteuid() == 0:
        os.chown(path, ANOTHER_USER, -1)
    else:
        monkeypatch.setattr(cache.os, "geteuid", lambda: ANOTHER_USER)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_a_kept_library_is_loaded_and_nothing_is_said(planted, compiled, caplog):
    _, mark = planted
    assert build.load_extension("marking")
    assert mark.exists()
    assert not compiled.exists()
    assert caplog.messages == []


def test_what_is_compiled_is_kept_for_this_user_alone(folder, compiled):
    assert build.load_extension("marking")
    (library,) = folder.iterdir()
    assert mode(folder) == 0o700
    assert mode(library) == 0o600
    compiled.unlink()
    build.load_extension.cache_clear()
    assert build.load_extension("marking")
    assert compiled.exists()  # the kept copy was loaded: it leaves the same mark


@pytest.mark.parametrize("fault", ["foreign", "writable by the group", "writable by all"])
def test_a_file_that_others_could_have_written_is_not_loaded(planted, compiled, fault, monkeypatch, caplog):
    library, mark = planted
    if fault == "foreign":
        if os.geteuid() != 0:
            pytest.skip("only root can give a file away and keep its folder")
        give_away(library, monkeypatch)
    else:
        library.chmod(0o620 if "group" in fault else 0o602)
    assert build.load_extension("marking")
    assert not mark.exists()
    assert compiled.exists()
    (message,) = caplog.messages
    assert library.name in message
    assert ("another user" if fault == "foreign" else "others may write") in message
    # The folder is private, so that a good library takes the bad one's place.
    assert library.stat().st_uid == os.geteuid()
    assert mode(library) == 0o600


@pytest.mark.parametrize("fault", ["foreign", "writable by the group", "writable by all"])
def test_a_folder_that_others_could_have_written_to_is_left_alone(planted, compiled, fault, monkeypatch, caplog):
    library, mark = planted
    before = library.read_bytes()
    if fault == "foreign":
        give_away(library.parent, monkeypatch)
    else:
        library.parent.chmod(0o770 if "group" in fault else 0o707)
    assert build.load_extension("marking")
    assert not mark.exists()
    assert compiled.exists()
    build.load_extension.cache_clear()
    assert build.load_extension("marking")
    (message,) = caplog.messages
    assert "cannot be kept" in message
    assert "chmod 700" in message
    assert library.read_bytes() == before
    assert len(list(library.parent.iterdir())) == 1


def test_a_link_is_not_followed(planted, compiled, tmp_path, caplog):
    library, mark = planted
    elsewhere = tmp_path / "elsewhere.so"
    library.rename(elsewhere)
    library.symlink_to(elsewhere)
    content = elsewhere.read_bytes()
    assert build.load_extension("marking")
    assert not mark.exists()
    assert compiled.exists()
    assert "it is a link" in caplog.text
    assert not library.is_symlink()
    assert elsewhere.read_bytes() == content


def test_a_link_in_the_place_of_the_partial_file_is_not_written_through(folder, compiled, tmp_path):
    folder.mkdir()
    victim = tmp_path / "victim"
    victim.write_text("precious")
    library = folder / f"marking-{build.fingerprint()}.so"
    (folder / f"{library.name}.{os.getpid()}").symlink_to(victim)
    assert build.load_extension("marking")
    assert victim.read_text() == "precious"
    assert library.is_file()
    assert not library.is_symlink()


def test_a_pipe_does_not_hold_the_process(folder, compiled, caplog):
    folder.mkdir(mode=0o700)
    library = folder / f"marking-{build.fingerprint()}.so"
    os.mkfifo(library, 0o600)
    assert build.load_extension("marking")
    assert "not a regular file" in caplog.text
    assert library.is_file()


def test_a_folder_that_leads_elsewhere_is_judged_by_where_it_leads(planted, compiled, tmp_path, caplog):
    library, mark = planted
    real = tmp_path / "real"
    library.parent.rename(real)
    library.parent.symlink_to(real)
    assert build.load_extension("marking")
    assert mark.exists()
    mark.unlink()
    real.chmod(0o777)
    build.load_extension.cache_clear()
    assert build.load_extension("marking")
    assert not mark.exists()
    assert "cannot be kept" in caplog.text


def test_a_folder_that_cannot_be_made_is_one_warning(folder, compiled, monkeypatch, caplog):
    folder.write_text("in the way")
    monkeypatch.setenv("CAP_HF_CACHE", str(folder / "cache"))
    assert build.load_extension("marking")
    assert compiled.exists()
    (message,) = caplog.messages
    assert "cannot be kept" in message


def test_a_disk_that_is_full_leaves_nothing_behind(folder, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "replace", full)
    cache.keep(folder / "some.so", b"content")
    assert list(folder.iterdir()) == []
    assert "No space left on device" in caplog.text


RACING = """
import sys
from pathlib import Path
from cap_hf.kernels import build
from support.libraries import make_library

def compile_extension(name, folder):
    print("compiling", flush=True)
    sys.stdin.readline()
    library = make_library(folder, sys.argv[1])
    build.torch.ops.load_library(library)
    return library

build.compile_extension = compile_extension
assert build.load_extension("marking")
"""


def test_two_processes_that_compile_at_once_do_not_meet(folder, tmp_path, caplog):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-c", RACING]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    marks = [tmp_path / "first", tmp_path / "second"]
    racers = [
        subprocess.Popen([*command, str(mark)], env=environment, text=True, cwd=ROOT, **streams) for mark in marks
    ]
    # Neither goes on before both have found nothing in the cache.
    assert [racer.stdout.readline() for racer in racers] == ["compiling\n"] * 2
    for racer in racers:
        racer.stdin.write("\n")
        racer.stdin.flush()
    for racer in racers:
        _, errors = racer.communicate(timeout=120)
        assert racer.returncode == 0, errors
        assert "kernel" not in errors
    (library,) = folder.iterdir()
    assert mode(library) == 0o600
    for mark in marks:
        mark.unlink()
    assert build.load_extension("marking")
    assert caplog.messages == []
    assert sum(mark.exists() for mark in marks) == 1


def test_the_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("CAP_HF_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / "cap_hf"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_folder() == Path.home() / ".cache" / "cap_hf"
    assert cache.CACHE_VARIABLE == "CAP_HF_CACHE"
    monkeypatch.setenv("CAP_HF_CACHE", str(tmp_path / "own"))
    assert cache.cache_folder() == tmp_path / "own"
