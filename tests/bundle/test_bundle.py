"""A bundle appears whole or not at all, replaces nothing but bundles, and its manifest cannot point outside."""

import errno
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from evit_deploy.bundle.bundle import Bundle, Staging, changed_files, check_out, read_bundle, write_manifest
from evit_deploy.bundle.manifest import DENSE, FORMAT, MANIFEST, MODEL
from evit_deploy.errors import InputError, StageError
from evit_deploy.files import sha256, write_atomically
from evit_deploy.files.drafts import PREFIX
from tests.support.models import tree


@pytest.fixture
def bundle(tmp_path, converted: Bundle) -> Bundle:
    shutil.copytree(converted.path, tmp_path / "work" / "bundle")
    return read_bundle(tmp_path / "work" / "bundle")


def rewrite_manifest(bundle: Bundle, **changes: Any) -> None:
    manifest = msgspec.json.decode((bundle.path / MANIFEST).read_bytes())
    (bundle.path / MANIFEST).write_bytes(msgspec.json.encode(manifest | changes))


# Reading.


def test_a_bundle_lists_all_its_files(converted):
    assert converted.manifest.format == FORMAT
    on_disk = {name for name, content in tree(converted.path).items() if content is not None}
    assert on_disk == set(converted.manifest.files) | {MANIFEST}
    for name, digest in converted.manifest.files.items():
        assert sha256(converted.path / name) == digest
    assert read_bundle(converted.path) == converted
    assert changed_files(converted) == []


def test_a_bundle_names_no_folder_of_this_machine(converted, checkpoint_file):
    (parent,) = converted.manifest.parents
    assert parent.source == f"../{checkpoint_file.name}"
    assert parent.sha256 == sha256(checkpoint_file)
    for name, content in tree(converted.path).items():
        assert content is None or str(checkpoint_file.parent).encode() not in content, name
        assert content is None or str(Path.home()).encode() + b"/" not in content, name


def test_a_bundle_says_what_it_is(converted):
    replace, own = msgspec.structs.replace, converted.manifest
    facts = converted.facts()
    assert (facts["method"], facts["precision"]) == ("evit at keep rate 0.6", "fp32")
    assert "labels" not in facts
    assert repr(converted) == f"Bundle({str(converted.path)!r}: vit_tiny_patch16_224, evit at keep rate 0.6, fp32)"
    for names, text in ((["cat", "dog", "fox"], "cat, dog, fox"), (["cat", "dog", "fox", "owl"], "cat, dog, fox, …")):
        wide = replace(
            own, labels=names, preprocess=replace(own.preprocess, size=(64, 96)),
            inputs=(replace(own.inputs[0], shape=(None, 3, 64, 96)),),
            outputs=(replace(own.outputs[0], shape=(None, len(names))), *own.outputs[1:]),
        )  # fmt: skip
        facts = Bundle(converted.path, wide).facts()
        assert (facts["labels"], facts["input"], facts["answer"]) == (
            text,
            "64 × 96 pixels",
            f"logits, {len(names)} numbers",
        )


def test_changed_files(bundle):
    (bundle.path / DENSE).write_bytes(b"other")
    (bundle.path / MODEL).unlink()
    assert sorted(changed_files(bundle)) == [DENSE, MODEL]
    (bundle.path / "more.txt").write_text("not listed, so not ours to judge")
    assert sorted(changed_files(bundle)) == [DENSE, MODEL]


def test_files_that_are_not_there(bundle):
    with pytest.raises(InputError, match=r"no engine\.plan"):
        bundle.file("engine.plan")
    (bundle.path / MODEL).unlink()
    with pytest.raises(InputError, match="listed in the manifest and missing"):
        bundle.file(MODEL)


def test_what_is_no_bundle(tmp_path):
    with pytest.raises(InputError, match="no such bundle"):
        read_bundle(tmp_path / "absent")
    with pytest.raises(InputError, match="not a bundle"):
        read_bundle(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="not a bundle"):
        read_bundle(tmp_path / "file")
    with pytest.raises(InputError, match="no such bundle"):
        read_bundle(tmp_path / ("x" * 300))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b'{"format": 1}', b"\xff\xfe", b"[" * 100000])
def test_a_damaged_manifest(bundle, content):
    (bundle.path / MANIFEST).write_bytes(content)
    with pytest.raises(InputError, match=r"manifest\.json: "):
        read_bundle(bundle.path)


def test_a_manifest_cut_short(bundle):
    content = (bundle.path / MANIFEST).read_bytes()
    for length in range(0, len(content) - 1, max(len(content) // 40, 1)):
        (bundle.path / MANIFEST).write_bytes(content[:length])
        with pytest.raises(InputError, match=r"manifest\.json: not valid JSON"):
            read_bundle(bundle.path)


@pytest.mark.parametrize(
    "changes",
    [
        {"files": ["model.onnx"]},
        {"tokens": {"keep_rate": 7}},
        {"tokens": {"keep_rate": 0.7, "locations": [3, 3]}},
        {"plan": None},
        {"preprocess": {"size": [224]}},
        {"format": "one"},
    ],
)
def test_a_manifest_with_a_wrong_field(bundle, changes):
    rewrite_manifest(bundle, **changes)
    with pytest.raises(InputError, match=r"manifest\.json: "):
        read_bundle(bundle.path)


def test_a_manifest_of_another_version(bundle):
    rewrite_manifest(bundle, format=FORMAT + 1)
    with pytest.raises(InputError, match=rf"another version.*got {FORMAT + 1}, expected {FORMAT}"):
        read_bundle(bundle.path)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "dense/../../x", "..", "link", "folder/x", "circle", "a\0b"])
def test_a_manifest_that_leads_outside(bundle, name):
    (bundle.path.parent / "x").write_text("outside")
    (bundle.path / "link").symlink_to(bundle.path.parent / "x")
    (bundle.path / "folder").symlink_to(bundle.path.parent)
    (bundle.path / "circle").symlink_to("circle")
    rewrite_manifest(bundle, files=bundle.manifest.files | {name: "0" * 64})
    with pytest.raises(InputError, match=r"manifest\.json.*outside"):
        read_bundle(bundle.path)


def test_names_that_lead_inside_by_a_detour_are_refused_too(bundle):
    """They would not once the bundle has moved, or a folder on the way is a link."""
    for name in ("dense/../model.onnx", str(bundle.path / MODEL)):
        rewrite_manifest(bundle, files=bundle.manifest.files | {name: "0" * 64})
        with pytest.raises(InputError, match=r"manifest\.json.*outside"):
            read_bundle(bundle.path)


def test_a_bundle_behind_a_link_is_inside_itself(bundle, tmp_path):
    (tmp_path / "link").symlink_to(bundle.path)
    assert changed_files(read_bundle(tmp_path / "link")) == []


# Writing.


def fill(staging: Staging) -> None:
    (staging.path / "dense").mkdir()
    (staging.path / MODEL).write_bytes(b"model")
    (staging.path / DENSE).write_bytes(b"dense")


def fail(out: Path, error: BaseException, *, force: bool = False) -> None:
    with Staging(out, force=force) as staging:
        fill(staging)
        raise error


def test_a_published_folder_is_whole_and_readable(tmp_path):
    out = tmp_path / "new" / "bundle"
    with Staging(out, force=False) as staging:
        fill(staging)
        assert not out.exists()
        assert staging.path.parent.parent == out.parent
        staging.publish(out)
    assert tree(tmp_path) == {
        "new": None, "new/bundle": None, "new/bundle/dense": None, "new/bundle/dense/model.onnx": b"dense",
        "new/bundle/model.onnx": b"model",
    }  # fmt: skip
    assert stat.S_IMODE(out.stat().st_mode) == 0o755


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), SystemExit(3), MemoryError()])
def test_what_goes_wrong_inside_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)):
        fail(tmp_path / "bundle", error)
    assert tree(tmp_path) == {}


def test_nothing_is_left_of_folders_made_on_the_way(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(KeyboardInterrupt):
        fail(tmp_path / "there" / "a" / "b" / "bundle", KeyboardInterrupt())
    assert tree(tmp_path) == {"there": None}


def test_leaving_without_publishing_leaves_nothing(tmp_path):
    with Staging(tmp_path / "bundle", force=False) as staging:
        fill(staging)
    assert tree(tmp_path) == {}


def test_a_disk_that_fails_is_a_failed_stage(tmp_path):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(StageError, match="No space left") as caught:
        fail(tmp_path / "bundle", full)
    assert caught.value.exit_code == 4
    assert caught.value.__cause__ is full
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_an_older_bundle_outlives_a_failure(bundle, error):
    before = tree(bundle.path.parent)
    with pytest.raises((StageError, KeyboardInterrupt)):
        fail(bundle.path, error, force=True)
    assert tree(bundle.path.parent) == before


def test_force_replaces_a_bundle(bundle):
    with pytest.raises(InputError, match=r"exists already.*--force"):
        check_out(bundle.path, force=False)
    with Staging(bundle.path, force=True) as staging:
        fill(staging)
        staging.publish(bundle.path)
    assert sorted(tree(bundle.path)) == ["dense", DENSE, MODEL]
    assert [path.name for path in bundle.path.parent.iterdir()] == [bundle.path.name]


def test_force_replaces_an_empty_folder(tmp_path):
    (tmp_path / "bundle").mkdir()
    with Staging(tmp_path / "bundle", force=True) as staging:
        fill(staging)
        staging.publish(tmp_path / "bundle")
    assert (tmp_path / "bundle" / MODEL).read_bytes() == b"model"


def test_what_appears_meanwhile_stays(tmp_path):
    out = tmp_path / "bundle"
    with Staging(out, force=False) as staging:
        fill(staging)
        out.mkdir()
        (out / "mine").write_text("mine")
        with pytest.raises(InputError, match="exists already"):
            staging.publish(out)
    assert tree(tmp_path) == {"bundle": None, "bundle/mine": b"mine"}


def test_what_was_rejected_before_is_replaced_without_force(bundle):
    out, rejected = bundle.path.parent / "new", bundle.path
    with Staging(out, force=False) as staging:
        fill(staging)
        staging.publish(rejected)
    assert sorted(tree(rejected)) == ["dense", DENSE, MODEL]
    assert not out.exists()


def test_a_bundle_that_was_moved_aside_by_a_process_that_died_is_found(bundle):
    aside = bundle.path.parent / f"{PREFIX}dead" / "old" / bundle.path.name
    aside.parent.mkdir(parents=True)
    (aside.parent.parent / "lock").touch()
    bundle.path.rename(aside)
    assert read_bundle(bundle.path) == bundle
    assert [path.name for path in bundle.path.parent.iterdir()] == [bundle.path.name]


def test_an_error_without_a_number_is_told_too(tmp_path):
    with pytest.raises(StageError, match=r"could not be written \(cannot seek\)"):
        fail(tmp_path / "bundle", OSError("cannot seek"))


def test_force_replaces_a_package(tmp_path):
    out = tmp_path / "package"
    (out / "model" / "1").mkdir(parents=True)
    (out / "model" / "1" / "model.onnx").write_bytes(b"model")
    (out / "package.json").write_text('{"files": {"model/1/model.onnx": "0"}}')
    check_out(out, force=True)
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"got thesis\.txt\)"):
        check_out(out, force=True)


def test_force_never_removes_a_users_files(bundle, tmp_path):
    (bundle.path / "dense" / "thesis.txt").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(InputError, match=r"do not belong to a bundle.*dense/thesis\.txt"):
        Staging(bundle.path, force=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(bundle.path)
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    for name in ("photos", "file", "link", "dangling"):
        with pytest.raises(InputError, match=name):
            Staging(tmp_path / name, force=True)
        with pytest.raises(InputError, match="exists already"):
            Staging(tmp_path / name, force=False)
    after = tree(tmp_path)
    assert after.items() >= before.items()
    assert after["photos/a.jpg"] == after["file"] == b"mine"


def test_a_users_file_under_a_listed_name_in_a_damaged_bundle_stays(bundle):
    (bundle.path / MANIFEST).write_bytes(b"{")
    before = tree(bundle.path)
    with pytest.raises(InputError, match="do not belong to a bundle"):
        Staging(bundle.path, force=True)
    assert tree(bundle.path) == before


def test_places_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="parent is not a folder"):
        check_out(tmp_path / "file" / "bundle", force=False)
    with pytest.raises(InputError, match="parent is not a folder"):
        check_out(tmp_path / "file" / "a" / "bundle", force=True)
    with pytest.raises(InputError, match="cannot write there"):
        check_out(Path("/proc/bundle"), force=False)
    with pytest.raises(InputError, match="cannot write there"):
        check_out(tmp_path / ("x" * 300), force=False)
    assert tree(tmp_path) == {"file": b"mine"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write everywhere")
def test_a_folder_without_write_permission(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(InputError, match="cannot write there"):
        check_out(tmp_path / "locked" / "bundle", force=False)


def test_a_name_as_long_as_a_file_system_takes(tmp_path):
    out = tmp_path / ("x" * 255)
    with Staging(out, force=False) as staging:
        fill(staging)
        staging.publish(out)
    assert (out / MODEL).is_file()


def test_checking_leaves_nothing(tmp_path):
    check_out(tmp_path / "a" / "b", force=False)
    assert tree(tmp_path) == {}


def test_the_manifest_lists_what_is_there(tmp_path, converted):
    with Staging(tmp_path / "bundle", force=False) as staging:
        fill(staging)
        write_manifest(staging.path, converted.manifest)
        staging.publish(tmp_path / "bundle")
    files = {name: sha256(tmp_path / "bundle" / name) for name in (DENSE, MODEL)}
    assert read_bundle(tmp_path / "bundle").manifest == msgspec.structs.replace(converted.manifest, files=files)


def test_one_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a" / "file.bin"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert tree(tmp_path) == {"a": None, "a/file.bin": b"two"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    (tmp_path / "a" / "folder").mkdir()
    with pytest.raises(StageError, match="could not be written"):
        write_atomically(tmp_path / "a" / "folder", b"three")
    assert tree(tmp_path) == {"a": None, "a/file.bin": b"two", "a/folder": None}


# A disk that is really full.

_WRITE = """
import sys, resource
from pathlib import Path
from evit_deploy.bundle.bundle import Staging
from evit_deploy.files import write_atomically
from evit_deploy.errors import StageError
folder = Path(sys.argv[1])
if sys.argv[2:]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
for write in range(2):
    try:
        if write:
            write_atomically(folder / "file", bytes(2_000_000))
        else:
            with Staging(folder / "bundle", force=False) as staging:
                (staging.path / "model.onnx").write_bytes(bytes(2_000_000))
                staging.publish(folder / "bundle")
    except StageError as error:
        print(error)
"""


def written(*arguments: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", _WRITE, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_a_file_size_limit(tmp_path):
    (tmp_path / "mine").write_text("mine")
    lines = written(str(tmp_path), "1000000")
    assert len(lines) == 2
    assert all("File too large" in line for line in lines)
    assert tree(tmp_path) == {"mine": b"mine"}


def test_a_full_disk(small_disk):
    lines = written(str(small_disk))
    assert len(lines) == 2
    assert all("No space left" in line for line in lines)
    assert tree(small_disk) == {}
