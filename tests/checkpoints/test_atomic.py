"""A final name never holds half of what is written to it, whoever else writes there and whenever a run is killed."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest

from cap_hf import CAPError
from cap_hf.checkpoints import atomic
from cap_hf.checkpoints.atomic import atomic_directory, atomic_file, write_json


@pytest.fixture(autouse=True)
def any_content(monkeypatch):
    """Which content may be replaced is test_replacing's; here it is what tells who wrote it."""
    monkeypatch.setattr(atomic, "check_replaceable", lambda *_: None)


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def run_and_kill(target, path):
    """Run a function in a process that kills itself in it."""
    process = multiprocessing.get_context("fork").Process(target=target, args=(path,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def kill_while_filling(path):
    with atomic_directory(path) as folder:
        (folder / "half").write_text("x")
        os.kill(os.getpid(), signal.SIGKILL)


def kill_between_the_renames(path):
    real = os.rename

    def rename(source, destination):
        real(source, destination)
        if source == path:
            os.kill(os.getpid(), signal.SIGKILL)

    os.rename = rename
    with atomic_directory(path) as folder:
        (folder / "new").write_text("x")


def test_a_failure_leaves_the_old_folder(tmp_path):
    with atomic_directory(tmp_path / "out") as folder:
        (folder / "old").write_text("1")
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "out") as folder:
        (folder / "new").write_text("2")
        raise RuntimeError
    assert names(tmp_path) == ["out", "out/old"]
    with atomic_directory(tmp_path / "out") as folder:
        (folder / "new").write_text("2")
    assert names(tmp_path) == ["out", "out/new"]


def test_what_a_killed_run_left_is_removed_by_the_next_one(tmp_path):
    run_and_kill(kill_while_filling, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert any(name.endswith("half") for name in names(tmp_path))
    (tmp_path / ".out.mine.partial").mkdir()  # not ours: it holds no lock
    with atomic_directory(tmp_path / "out") as folder:
        assert not list(folder.iterdir())
    assert names(tmp_path) == [".out.mine.partial", "out"]


def test_a_kill_between_the_renames_loses_nothing(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("")
    run_and_kill(kill_between_the_renames, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "out"):
        raise RuntimeError
    assert names(tmp_path) == ["out", "out/old"]


def test_two_runs_with_one_output_dir_each_publish_what_they_wrote(tmp_path):
    """The second begins and ends within the first; both publish whole, the one that ends last stays."""
    with atomic_directory(tmp_path / "out") as first:
        (first / "weights").write_text("first")
        with atomic_directory(tmp_path / "out") as second:
            assert not list(second.iterdir())
            (second / "weights").write_text("second")
        assert (tmp_path / "out" / "weights").read_text() == "second"
        (first / "report").write_text("first")
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == {
        "weights": "first",
        "report": "first",
    }
    assert names(tmp_path) == ["out", "out/report", "out/weights"]


def write_often(path, mark):
    for _ in range(40):
        with atomic_directory(path) as folder:
            for name in ("a", "b"):
                (folder / name).write_text(mark)


def test_processes_that_replace_one_folder_again_and_again(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_often, args=(tmp_path / "out", mark)) for mark in "12"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert (tmp_path / "out" / "a").read_text() == (tmp_path / "out" / "b").read_text()
    assert names(tmp_path) == ["out", "out/a", "out/b"]


def test_threads_write_one_file(tmp_path):
    """Each with a partial file of its own."""
    seen = []

    def write(number):
        with atomic_file(tmp_path / "x.json") as file:
            file.write_text(str(number))
            seen.append(file)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(seen)) == 8
    assert {file.name for file in seen} == {"x.json"}
    assert int((tmp_path / "x.json").read_text()) in range(8)
    assert names(tmp_path) == ["x.json"]


def test_a_file_that_fails_keeps_the_old_one(tmp_path):
    with atomic_file(tmp_path / "deep" / "x") as file:
        file.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "deep" / "x") as file:
        file.write_text("new")
        raise RuntimeError
    assert (tmp_path / "deep" / "x").read_text() == "old"
    with pytest.raises(CAPError, match="cannot write .*x .No such file"), atomic_file(tmp_path / "deep" / "x"):
        pass  # nothing was written
    assert names(tmp_path) == ["deep", "deep/x"]


@pytest.mark.parametrize("rename", [1, 2])
@pytest.mark.parametrize("after", [False, True])
def test_an_interrupt_around_the_renames_leaves_one_whole_folder(tmp_path, monkeypatch, rename, after):
    """Ctrl-C just before or just after either of the two renames that replace a folder."""
    out = tmp_path / "out"
    with atomic_directory(out) as folder:
        (folder / "old").write_text("1")
    calls, real = [], os.rename

    def interrupted(source, destination):
        if out in (source, destination):
            calls.append(source)
        # The first call is an attempt, which a folder that has the name makes fail.
        now = out in (source, destination) and len(calls) == rename + 1
        if now and not after:
            raise KeyboardInterrupt
        real(source, destination)
        if now:
            raise KeyboardInterrupt

    monkeypatch.setattr(atomic.os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_directory(out) as folder:
        (folder / "new").write_text("2")
    assert len(calls) >= rename + 1
    assert names(tmp_path) == ["out", "out/new" if rename == 2 and after else "out/old"]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    with atomic_directory(tmp_path / "out") as folder:
        (folder / "new").write_text("")
    assert (tmp_path / "out").is_symlink()
    assert names(tmp_path) == ["disk", "disk/real", "disk/real/new", "out"]


def test_a_file_system_without_locks_still_writes_and_removes_nothing_of_others(tmp_path, monkeypatch):
    run_and_kill(kill_while_filling, tmp_path / "out")
    left = names(tmp_path)

    def refused(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(atomic.fcntl, "flock", refused)
    with atomic_directory(tmp_path / "out") as folder:
        (folder / "x").write_text("")
    assert names(tmp_path) == [*left, "out", "out/x"]


def fill(path, **files):
    with atomic_directory(path) as folder:
        for name, text in files.items():
            (folder / name).mkdir()
            (folder / name / "file").write_text(text)


@pytest.fixture(params=["busy", "another disk", "mounted", "closed parent", "current folder"])
def fixed(request, tmp_path, monkeypatch):
    """A folder that cannot be renamed or replaced: the system says so, or it can be seen beforehand."""
    folder = tmp_path / "up" / "out"
    folder.mkdir(parents=True)
    rename, mkdtemp = os.rename, atomic.tempfile.mkdtemp
    number = {"busy": errno.EBUSY, "another disk": errno.EXDEV, "mounted": errno.EBUSY}.get(request.param)

    def refused(source, destination):
        inside = [Path(path).is_relative_to(folder) and Path(path) != folder for path in (source, destination)]
        if number is not None and (folder in map(Path, (source, destination)) or inside[0] != inside[1]):
            raise OSError(number, os.strerror(number), source)
        rename(source, destination)

    def closed(prefix, suffix, dir):
        if Path(dir) == folder.parent:
            raise PermissionError(errno.EACCES, "Permission denied", str(dir))
        return mkdtemp(prefix=prefix, suffix=suffix, dir=dir)

    monkeypatch.setattr(atomic.os, "rename", refused)
    if request.param == "mounted":
        monkeypatch.setattr(atomic.os.path, "ismount", lambda path: Path(path) == folder)
    if request.param == "closed parent":
        monkeypatch.setattr(atomic.tempfile, "mkdtemp", closed)
    if request.param == "current folder":
        monkeypatch.chdir(folder)
    return folder


def test_a_folder_that_has_to_stay_is_written_from_within(fixed, tmp_path):
    (fixed / "lost+found").mkdir()
    (tmp_path / "link").symlink_to(fixed)
    inode = fixed.stat().st_ino
    for path, name in ((fixed, "a"), (tmp_path / "link", "b")):
        fill(path, both=name, **{name: name})
        assert names(fixed) == sorted([name, f"{name}/file", "both", "both/file", "lost+found"])
        assert (fixed / "both" / "file").read_text() == name
    with pytest.raises(RuntimeError), atomic_directory(fixed) as folder:
        (folder / "c").write_text("")
        raise RuntimeError
    assert names(tmp_path) == ["link", "up", "up/out", *(f"up/out/{name}" for name in names(fixed))]
    assert "b" in names(fixed)
    assert fixed.stat().st_ino == inode
    assert os.listdir(".")  # the current folder is still one


@pytest.mark.parametrize("moved", range(5))
def test_a_kill_while_content_is_exchanged_leaves_the_old_or_the_new(tmp_path, monkeypatch, moved):
    """The next run puts right what was between, whatever was moved before the kill."""
    out = tmp_path / "out"
    fill(out, a="old", b="old")
    monkeypatch.setattr(atomic.os.path, "ismount", lambda path: Path(path) == out)

    def kill_while_moving(path):
        real, calls = os.rename, []

        def rename(source, destination):
            if "lock" not in str(source):
                calls.append(source)
                if len(calls) > moved:
                    os.kill(os.getpid(), signal.SIGKILL)
            real(source, destination)

        os.rename = rename
        fill(path, a="new", c="new")

    run_and_kill(kill_while_moving, out)
    with pytest.raises(RuntimeError), atomic_directory(out):
        raise RuntimeError
    new = moved >= 3  # two old ones out, then the new ones are ready
    assert names(out) == (["a", "a/file", "c", "c/file"] if new else ["a", "a/file", "b", "b/file"])
    assert (out / "a" / "file").read_text() == ("new" if new else "old")


def exchange_with_a_stop(folder, monkeypatch, at, stop, **files):
    """Write a folder from within, and call a function before one of the renames that exchange what it holds."""
    real, calls = os.rename, []

    def rename(source, destination):
        if threading.current_thread() is threading.main_thread() and "lock" not in str(source):
            calls.append(source)
            if len(calls) == at:
                stop()
        real(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "rename", rename)
        fill(folder, **files)


@pytest.mark.parametrize("at", [2, 4, 5])  # the second old one, the first new one, the second new one
@pytest.mark.parametrize("fails", [False, True])
def test_what_is_exchanged_is_never_of_two_runs(tmp_path, monkeypatch, at, fails):
    """Another run that publishes while one exchanges waits for it, and what it publishes stays."""
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, a="old", b="old")
    other = threading.Thread(target=fill, args=(tmp_path,), kwargs={"a": "other", "d": "other"})
    seen = []

    def stop():
        other.start()
        other.join(0.3)
        seen.append(other.is_alive())
        if fails:
            raise RuntimeError

    with pytest.raises(RuntimeError) if fails else nullcontext():
        exchange_with_a_stop(tmp_path, monkeypatch, at, stop, a="first", b="first", c="first")
    other.join()
    assert seen == [True]
    assert names(tmp_path) == ["a", "a/file", "d", "d/file"]
    assert (tmp_path / "a" / "file").read_text() == (tmp_path / "d" / "file").read_text() == "other"


@pytest.mark.parametrize("at", [2, 4, 5])
def test_what_a_killed_run_has_left_comes_back_before_another_publishes_and_not_after(tmp_path, monkeypatch, at):
    """The other one had begun before the kill: it has not seen what that run was going to leave."""
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, a="old", b="old")

    def kill(path):
        exchange_with_a_stop(path, monkeypatch, at, lambda: os.kill(os.getpid(), 9), a="killed", b="killed", c="killed")

    with atomic_directory(tmp_path) as folder:
        run_and_kill(kill, tmp_path)
        (folder / "d").write_text("other")
    fill("elsewhere", a="")  # and one more run looks around
    with pytest.raises(RuntimeError), atomic_directory(tmp_path):
        raise RuntimeError
    assert names(tmp_path) == ["d", "elsewhere", "elsewhere/a", "elsewhere/a/file"]


def test_a_folder_is_not_taken_away_from_a_run_that_writes_in_it(tmp_path, monkeypatch):
    """As two runs see one folder that is the current folder of the first alone."""
    out = tmp_path / "out"
    fill(out, a="old")
    monkeypatch.chdir(out)
    with atomic_directory(out) as first:
        (first / "a").write_text("first")
        monkeypatch.chdir(tmp_path)
        fill(out, a="second", b="second")
        assert names(first) == ["a"]
        assert (out / "b" / "file").read_text() == "second"
    assert names(tmp_path) == ["out", "out/a"]


def test_a_run_that_does_not_give_the_folder_back_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "LOOKS", 2)
    fill(tmp_path / "out", a="old")
    lock = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(CAPError, match="another run is writing to .*out: wait for it"):
        fill(tmp_path / "out", a="new")
    os.close(lock)
    assert (tmp_path / "out" / "a" / "file").read_text() == "old"


def test_what_a_run_keeps_in_an_output_stays_there(tmp_path):
    fill(tmp_path / "out", training="mine", collection="mine", a="old")
    fill(tmp_path / "out", a="new")
    assert (tmp_path / "out" / "a" / "file").read_text() == "new"
    for name in ("training", "collection"):
        assert (tmp_path / "out" / name / "file").read_text() == "mine"


def test_links_are_followed_or_named(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk/not-yet")
    fill(tmp_path / "out", a="")
    write_json(tmp_path / "out" / "x.json", {})
    assert names(tmp_path) == ["disk", "disk/not-yet", *(f"disk/not-yet/{n}" for n in ("a", "a/file", "x.json")), "out"]
    (tmp_path / "round").symlink_to("round")
    for path in (tmp_path / "round", tmp_path / "round" / "below"):
        with pytest.raises(CAPError, match="round is a link that leads back to itself: remove it"):
            fill(path)
    with pytest.raises(CAPError, match="round is a link that leads back to itself: remove it"):
        write_json(tmp_path / "round" / "x.json", {})
    monkeypatch.chdir(tmp_path / "disk")
    fill("below", a="")
    assert names(tmp_path / "disk" / "below") == ["a", "a/file"]


def test_what_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CAPError, match="file is a file"), atomic_directory(tmp_path / "file"):
        pass
    with pytest.raises(CAPError, match="cannot write .*file/out"), atomic_directory(tmp_path / "file" / "out"):
        pass
    with pytest.raises(CAPError, match="cannot write .*file/report.json"):
        write_json(tmp_path / "file" / "report.json", {})
    with pytest.raises(CAPError, match="disk of .*out is full"), atomic_directory(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == ["file"]


def test_write_json_replaces(tmp_path):
    write_json(tmp_path / "a" / "x.json", {"a": 1})
    write_json(tmp_path / "a" / "x.json", {"a": 2})
    assert json.loads((tmp_path / "a" / "x.json").read_text()) == {"a": 2}
    assert names(tmp_path) == ["a", "a/x.json"]
