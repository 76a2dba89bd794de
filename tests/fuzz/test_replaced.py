"""A bundle that is replaced again and again while others read it: what is accepted is whole, all old or all new."""

import threading
from collections import Counter
from pathlib import Path

import msgspec

from evit_deploy.bundle.bundle import Staging, changed_files, read_bundle, write_manifest
from evit_deploy.bundle.manifest import DENSE, MODEL, Manifest
from evit_deploy.errors import EvitDeployError
from evit_deploy.files import sha256

REPLACEMENTS = 80


def _publish(out: Path, manifest: Manifest, content: str) -> None:
    with Staging(out, force=True) as staging:
        (staging.path / "dense").mkdir()
        for name in (MODEL, DENSE):
            (staging.path / name).write_text(f"{name} {content}" * 1000)
        write_manifest(staging.path, manifest)
        staging.publish(out)


def _look(out: Path) -> str:
    """``old`` or ``new`` if the bundle is accepted, else the class of the error or ``changed``."""
    try:
        found = read_bundle(out)
        if changed_files(found):
            return "changed"
    except EvitDeployError as error:
        return type(error).__name__
    return found.manifest.notes[0]


def test_a_reader_accepts_no_mixture(converted, tmp_path):
    out, hashes = tmp_path / "bundle", {}
    manifests = {}
    for which in ("old", "new"):
        manifests[which] = msgspec.structs.replace(converted.manifest, notes=[which])
        _publish(out, manifests[which], which)
        hashes[which] = {name: sha256(out / name) for name in (MODEL, DENSE)}
    stop, seen, trouble = threading.Event(), Counter[str](), []

    def read() -> None:
        while not stop.is_set():
            try:
                seen[_look(out)] += 1
            except Exception as error:  # for the assertion below; a thread's own would go unseen
                trouble.append(repr(error))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for number in range(REPLACEMENTS):
            _publish(out, manifests[("old", "new")[number % 2]], ("old", "new")[number % 2])
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert trouble == []
    assert set(seen) <= {"old", "new", "changed", "InputError"}
    assert seen["old"]
    assert seen["new"]
    assert _look(out) == "new"
    assert {name: sha256(out / name) for name in (MODEL, DENSE)} == hashes["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]  # no drafts, nothing put aside
