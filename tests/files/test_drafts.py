"""Drafts: killed at every system call, owned by the living and the dead, and moved in one step."""

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from evit_deploy.bundle.bundle import Staging, check_out, read_bundle
from evit_deploy.bundle.manifest import MANIFEST
from evit_deploy.errors import InputError
from evit_deploy.files import drafts, write_atomically
from evit_deploy.files.drafts import PREFIX, draft, sweep
from tests.support.kill_points import cannot
from tests.support.paths import ROOT


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.fixture(params=["exchange", "aside"])
def how(request, monkeypatch) -> str:
    """With a kernel and file system that exchange folders, and with one that cannot."""
    if request.param == "aside":
        monkeypatch.setattr(drafts, "_system_call", lambda: cannot)
    return request.param


# ---- killed


@pytest.mark.parametrize("way", ["exchange", "aside"])
@pytest.mark.parametrize("what", ["fresh", "forced", "file"])
def test_killed_at_every_system_call(what, way, converted, tmp_path):
    command = [sys.executable, "-m", "tests.support.kill_points", tmp_path / "user", converted.path / MANIFEST]
    done = subprocess.run([*command, what, way], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["wrong"] == []
    before = "nothing" if what == "fresh" else "old"
    assert len(report["found"]) > (50 if what == "file" else 200)  # points it was killed at
    turn = report["found"].index("new")
    assert report["found"] == [before] * turn + ["new"] * (len(report["found"]) - turn)
    assert 5 < turn < len(report["found"]) - 5
    if (what, way) == ("forced", "aside"):  # for a moment there is none; whoever looks next puts it back
        assert 0 < report["in_view"].count("nothing") < 20
    else:
        assert report["in_view"] == report["found"]


@contextmanager
def other_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has a draft open, and says so."""
    code = """
import sys, time
from pathlib import Path
from evit_deploy.files.drafts import draft
with draft(Path(sys.argv[1])) as made:
    (made.folder / "half").write_text("half")
    print(made.folder, flush=True)
    time.sleep(600)
"""
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith(str(folder))
            yield process
        finally:
            process.kill()


def test_what_the_dead_left_is_removed_and_what_the_living_have_stays(tmp_path):
    with other_process(tmp_path) as process:
        before = names(tmp_path)
        assert len(before) == 4
        write_atomically(tmp_path / "file", b"one")
        sweep(tmp_path)
        assert names(tmp_path) == [*before, "file"]
        process.send_signal(signal.SIGSTOP)  # alive, if asleep
        sweep(tmp_path)
        assert names(tmp_path) == [*before, "file"]
        process.kill()
        process.wait()
        assert names(tmp_path) == [*before, "file"]
        write_atomically(tmp_path / "file", b"two")
    assert names(tmp_path) == ["file"]


def test_clocks_and_process_numbers_do_not_matter(tmp_path):
    with other_process(tmp_path) as process:
        (room,) = tmp_path.glob(f"{PREFIX}*")
        for path in (room, room / "lock", room / "new"):
            os.utime(path, (0, 0))  # from 1970
        sweep(tmp_path)
        assert room.exists()
        process.kill()
        process.wait()
        for path in (room, room / "lock", room / "new"):
            os.utime(path, (2**33, 2**33))  # from the year 2242
        sweep(tmp_path)
    assert names(tmp_path) == []


def test_a_draft_of_this_process_stays_while_another_is_opened_beside_it(tmp_path):
    with draft(tmp_path) as one:
        with draft(tmp_path) as two:
            assert one.folder != two.folder
            assert one.folder.is_dir()
        assert one.folder.is_dir()
        assert not two.folder.exists()
    assert names(tmp_path) == []


def test_without_locks_everything_stays(tmp_path, monkeypatch):
    def no_locks(room: Path) -> int:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    (tmp_path / f"{PREFIX}someone").mkdir()
    monkeypatch.setattr(drafts, "_lock", no_locks)
    with draft(tmp_path) as made:
        (made.folder / "file").write_text("one")
        assert made.folder.parent.name.startswith(".not-owned-")
        sweep(tmp_path)
        monkeypatch.undo()  # a machine on which they work looks in
        sweep(tmp_path)
        assert names(tmp_path) == [made.folder.parent.name, f"{made.folder.parent.name}/new",
                                   f"{made.folder.parent.name}/new/file"]  # fmt: skip
        made.publish(made.folder / "file", tmp_path / "file", replace=True)
    assert names(tmp_path) == ["file"]


def test_what_only_looks_like_a_draft_stays(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("mine")
    (tmp_path / f"{PREFIX}link").symlink_to(tmp_path / "mine")
    (tmp_path / f"{PREFIX}file").write_text("mine")
    before = names(tmp_path)
    sweep(tmp_path)
    sweep(tmp_path / "absent")
    assert names(tmp_path) == before


def test_what_cannot_go_back_is_not_removed(tmp_path, monkeypatch):
    def refused(folder: Path, place: Path) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    old = tmp_path / f"{PREFIX}dead" / "old" / "bundle"
    old.mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(drafts, "_move", refused)
        sweep(tmp_path)
    assert old.is_dir()
    sweep(tmp_path)
    assert names(tmp_path) == ["bundle"]


def test_a_reader_finds_what_was_moved_aside(converted, tmp_path):
    aside = tmp_path / f"{PREFIX}dead" / "old" / "bundle"
    shutil.copytree(converted.path, aside)
    assert read_bundle(tmp_path / "bundle").manifest == converted.manifest
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


# ---- one of two


def stage(out: Path, content: str, *, force: bool) -> Staging:
    staging = Staging(out, force=force).__enter__()
    (staging.path / "model.onnx").write_text(content)
    return staging


def test_of_two_at_once_one_wins(tmp_path, how):
    out = tmp_path / "bundle"
    one, two = stage(out, "one", force=False), stage(out, "two", force=False)
    two.publish(out)
    with pytest.raises(InputError, match=r"bundle: it (appeared|exists).*--force") as caught:
        one.publish(out)
    one.__exit__(InputError, caught.value, None)
    two.__exit__(None, None, None)
    assert names(tmp_path) == ["bundle", "bundle/model.onnx"]
    assert (out / "model.onnx").read_text() == "two"


def test_of_many_processes_at_once_one_wins(tmp_path, how):
    """They all look, find nothing, and move at one moment."""
    children = []
    ready, go = os.pipe(), os.pipe()
    for number in range(8):
        child = os.fork()
        if child == 0:
            code = 9
            try:
                with draft(tmp_path) as made:
                    (made.folder / "model").write_text(str(number))
                    os.write(ready[1], b".")
                    os.read(go[0], 1)
                    try:
                        made.publish(made.folder, tmp_path / "bundle", replace=False)
                        code = 0
                    except FileExistsError:
                        code = 2
            finally:
                os._exit(code)
        children.append(child)
    for _ in children:
        os.read(ready[0], 1)
    os.write(go[1], b"." * len(children))
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    for handle in (*ready, *go):
        os.close(handle)
    assert sorted(codes) == [0] + [2] * 7
    assert (tmp_path / "bundle" / "model").read_text() == str(codes.index(0))
    assert names(tmp_path) == ["bundle", "bundle/model"]


@pytest.mark.parametrize("there", ["folder", "full", "file", "link"])
def test_what_appears_meanwhile_stays(there, tmp_path, how):
    place = tmp_path / "bundle"
    with draft(tmp_path) as made:
        (made.folder / "model").write_text("made")
        if there == "file":
            place.write_text("mine")
        elif there == "link":
            place.symlink_to("absent")
        else:
            place.mkdir()
        if there == "full":
            (place / "mine").write_text("mine")
        before = place.lstat().st_ino
        with pytest.raises(FileExistsError):
            made.publish(made.folder, place, replace=False)
        assert (made.folder / "model").read_text() == "made"
    assert place.lstat().st_ino == before
    assert names(tmp_path) == ["bundle"] + ["bundle/mine"] * (there == "full")


def test_files_that_came_to_the_old_bundle_meanwhile_are_not_removed(tmp_path):
    out = tmp_path / "bundle"
    out.mkdir()
    with Staging(out, force=True) as staging:
        (out / "thesis").write_text("mine")
        with pytest.raises(InputError, match=r"do not belong to a bundle.*thesis"):
            staging.publish(out)
    assert names(tmp_path) == ["bundle", "bundle/thesis"]


# ---- replaced while others read


def test_there_is_a_bundle_at_every_moment_while_it_is_replaced(tmp_path):
    """Where the file system exchanges: a reader opens files by their paths, and always finds one."""
    out = tmp_path / "bundle"
    with draft(tmp_path) as made:
        (made.folder / "model").write_text("0" * 100)
        made.publish(made.folder, out, replace=False)
        if not drafts._renameat2(out, out, drafts._EXCHANGE):
            pytest.skip("this file system cannot exchange two folders")
    stop = os.pipe()
    child = os.fork()
    if child == 0:
        code, seen = 0, set()
        try:
            os.set_blocking(stop[0], False)
            while True:
                text = (out / "model").read_text()
                if len(text) != 100 or len(set(text)) != 1:
                    code = 3
                seen.add(text)
                try:
                    if os.read(stop[0], 1):
                        break
                except BlockingIOError:
                    pass
        except OSError:
            code = 4  # it was not there
        finally:
            os._exit(code or (0 if len(seen) > 1 else 5))
    for number in range(1, 201):
        with draft(tmp_path) as made:
            (made.folder / "model").write_text(str(number % 10) * 100)
            made.publish(made.folder, out, replace=True)
    os.write(stop[1], b".")
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for handle in stop:
        os.close(handle)
    assert code == 0
    assert names(tmp_path) == ["bundle", "bundle/model"]


# ---- on the disk


def test_everything_is_on_the_disk_before_it_moves_and_the_move_before_it_returns(tmp_path, monkeypatch, how):
    events: list[str] = []
    fsync, rename, renameat2 = os.fsync, os.rename, drafts._renameat2

    def synced(handle: int) -> None:
        fsync(handle)
        path = os.readlink(f"/proc/self/fd/{handle}")
        events.append(os.path.relpath(path, tmp_path).replace(room, "ROOM"))

    def renamed(one: Path, other: Path) -> None:
        rename(one, other)
        events.append("move")

    def exchanged(one: Path, other: Path, flags: int) -> bool:
        done = renameat2(one, other, flags)
        events.extend(["move"] * done)
        return done

    out = tmp_path / "a" / "bundle"
    with Staging(out, force=False) as staging:
        room = staging.path.parent.name
        (staging.path / "dense").mkdir()
        (staging.path / "dense" / "model.onnx").write_text("dense")
        (staging.path / "model.onnx").write_text("model")
        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(os, "rename", renamed)
        monkeypatch.setattr(drafts, "_renameat2", exchanged)
        staging.publish(out)
        monkeypatch.undo()
    inside = ["a/ROOM/new", "a/ROOM/new/dense", "a/ROOM/new/dense/model.onnx", "a/ROOM/new/model.onnx"]
    assert sorted(events[:4]) == inside
    assert events[4:] == ["move", "a/ROOM", "a", "."]


def test_a_draft_is_private_and_what_is_published_is_not(tmp_path):
    before = os.umask(0o077)
    try:
        with Staging(tmp_path / "bundle", force=False) as staging:
            assert stat.S_IMODE(staging.path.parent.stat().st_mode) == 0o700
            staging.publish(tmp_path / "bundle")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "bundle").stat().st_mode) == 0o755


def test_looking_whether_one_may_write_puts_back_what_was_moved_aside(tmp_path):
    (tmp_path / f"{PREFIX}dead" / "old" / "bundle").mkdir(parents=True)
    with pytest.raises(InputError, match="exists already"):
        check_out(tmp_path / "bundle", force=False)
    assert names(tmp_path) == ["bundle"]
