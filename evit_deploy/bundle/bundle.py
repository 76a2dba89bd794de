"""A bundle: a folder with the model, its dense twin, golden answers and a manifest that describes them.

A bundle is published atomically: it is written to a draft next to its destination and moved there in one step;
:mod:`evit_deploy.files.drafts` explains the guarantees.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Self

import msgspec

from evit_deploy.bundle.manifest import FORMAT, MANIFEST, PACKAGE, SIGNATURE, Manifest
from evit_deploy.documents import converted, read_json
from evit_deploy.errors import InputError, StageError, first_few
from evit_deploy.files import hashes, sha256
from evit_deploy.files.drafts import draft, sweep, sync


class Bundle(msgspec.Struct, frozen=True):
    """A bundle on disk.

    Args:
        path: Its folder.
        manifest: Description of its content.
    """

    path: Path
    manifest: Manifest

    def facts(self) -> dict[str, str]:
        """A summary as names and values."""
        manifest = self.manifest
        rates = ", ".join(f"{rate:g}" for rate in manifest.tokens.rates)
        facts = {
            "model": manifest.model,
            "method": manifest.kind + (f" at keep rate {rates}" if rates else ""),
            "multiply-adds": manifest.plan.total,
            "precision": manifest.precision,
            "input": f"{manifest.preprocess.size[0]} × {manifest.preprocess.size[1]} pixels",
            "answer": f"{manifest.answer}, {manifest.answer_size} numbers",
            "labels": ", ".join(manifest.labels[:3]) + ", …" * (len(manifest.labels) > 3) if manifest.labels else "",
            "files": ", ".join(manifest.files),
            "folder": str(self.path),
        }
        return {name: text for name, text in facts.items() if text}

    def __repr__(self) -> str:
        manifest, facts = self.manifest, self.facts()
        return f"Bundle({facts['folder']!r}: {manifest.model}, {facts['method']}, {manifest.precision})"

    def _repr_html_(self) -> str:
        from evit_deploy.report.html import html_table

        manifest = self.manifest
        return html_table((), list(self.facts().items())) + manifest.plan._repr_html_()

    def file(self, name: str) -> Path:
        """Path of a file listed in the manifest.

        Raises:
            InputError: The manifest does not list it, or it is missing.
        """
        if name not in self.manifest.files:
            raise InputError(f"this bundle has no {name}", where=self.path)
        path = self.path / name
        if not os.path.isfile(path):
            raise InputError(f"{name} is listed in the manifest and missing", where=self.path, fix="Convert again.")
        return path


def read_bundle(path: str | Path) -> Bundle:
    """Reads a bundle's manifest and checks that every listed file is inside the folder.

    Raises:
        InputError: Not a bundle, a damaged manifest, a manifest of another version, or a file name that points outside.
    """
    path = Path(path)
    manifest_path = path / MANIFEST
    try:
        if not path.exists():
            sweep(path.parent)  # a process may have died while replacing the bundle
        if not path.exists():
            raise InputError("no such bundle", where=path, fix="Check the path, or make the bundle with convert.")
        if not manifest_path.is_file():
            raise InputError(f"not a bundle (no {MANIFEST} in it)", where=path, fix="Give a folder that convert wrote.")
    except OSError as error:  # a name that is too long, or a folder without access
        raise InputError(f"no such bundle ({error.strerror})", where=path) from None
    document = read_json(manifest_path, dict[str, Any])
    if document.get("format", FORMAT) != FORMAT:
        raise InputError("a bundle of another version", where=manifest_path, seen=document["format"], wanted=FORMAT)
    manifest = converted(document, Manifest, manifest_path)
    root = path.resolve()
    for name in manifest.files:
        if not _is_inside(root, name):
            raise InputError("the manifest lists a file outside the bundle", where=manifest_path, seen=repr(name))
    return Bundle(path, manifest)


def _is_inside(root: Path, name: str) -> bool:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts:
        return False
    try:
        found = (root / name).resolve()
        return found.is_relative_to(root) and not found.is_symlink()  # a loop of links, which Python 3.13 resolves
    except (OSError, RuntimeError, ValueError):  # too long, a loop of links, or a null character
        return False


def changed_files(bundle: Bundle) -> list[str]:
    """Names of listed files that are missing or have another hash."""
    changed = []
    for name, digest in bundle.manifest.files.items():
        path = bundle.path / name
        if not os.path.isfile(path) or sha256(path) != digest:  # Path.is_file raises for names that are too long
            changed.append(name)
    return changed


def check_out(out: Path, *, force: bool) -> None:
    """Checks, before any work, that a bundle may be written to ``out``.

    Raises:
        InputError: It exists and ``force`` is false, it contains files that belong to no bundle or package, or its
            parent is not writable.
    """
    try:
        sweep(out.parent)  # restores what a process that died had moved aside
        exists = out.exists() or out.is_symlink()
    except OSError as error:  # a name that is too long, or a folder without access
        raise InputError(f"cannot write there ({error.strerror})", where=out, fix="Give another --out.") from None
    if exists:
        if not force:
            raise InputError("it exists already", where=out, fix="Give --force to replace it, or another --out.")
        strangers = _strangers(out)
        if strangers:
            raise InputError(
                "it contains files that do not belong to a bundle, and --force only replaces bundles and packages",
                where=out,
                seen=first_few(strangers),
                fix="Move them away, or give another --out.",
            )
    folder = out.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise InputError("its parent is not a folder", where=out, seen=folder)
    try:  # os.access is not enough: read-only file systems, quotas, root
        with draft(folder):
            pass
    except OSError as error:
        raise InputError(f"cannot write there ({error.strerror})", where=folder, fix="Give another --out.") from None


def _strangers(out: Path) -> list[str]:
    if not out.is_dir() or out.is_symlink():
        return [out.name]
    known = _listed(out)
    return sorted(
        str(path.relative_to(out))
        for path in out.rglob("*")
        if not path.is_dir() and path.relative_to(out).as_posix() not in known
    )


def _listed(out: Path) -> set[str]:
    """Names of the files listed by a bundle's manifest or a package's list."""
    try:
        known = set(read_bundle(out).manifest.files) | {MANIFEST, SIGNATURE}
    except InputError:
        known = set()
    try:
        listed = read_json(out / PACKAGE, _Listed)
    except InputError:
        return known
    return known | set(listed.files) | {PACKAGE}


class _Listed(msgspec.Struct):
    """The part of ``package.json`` needed here; the complete structure is
    :class:`evit_deploy.serving.package.Package`."""

    files: dict[str, str]


class Staging:
    """A temporary folder next to ``out`` for a new bundle; deleted unless it is published.

    Args:
        out: Destination of the bundle.
        force: Whether to replace an existing bundle.

    Raises:
        InputError: See :func:`check_out`.
    """

    def __init__(self, out: Path, *, force: bool) -> None:
        check_out(out, force=force)
        self.out, self.force = out, force

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._made = stack.enter_context(_folders_for(self.out))
            self._draft = stack.enter_context(draft(self.out.parent))
            self.path = self._draft.folder
            self.path.chmod(0o755)  # a bundle may be served by another user, so the umask does not apply
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._stack.close()
        if isinstance(error, OSError):
            what = f"the files could not be written ({error.strerror or error})"
            raise StageError(what, where=self.out, fix="Nothing was left behind.") from error

    def publish(self, out: Path) -> None:
        """Moves the folder to its destination in one step; an existing bundle is replaced or stays unchanged.

        Args:
            out: ``self.out``, or another path next to it, whose content is replaced.

        Raises:
            InputError: ``self.out`` was created in the meantime and may not be replaced.
        """
        replace = self.force or out != self.out
        try:
            check_out(out, force=replace)  # it may have changed since the first check
            self._draft.publish(self.path, out, replace=replace)
        except FileExistsError:
            what = "it appeared while this one was made, and stays"
            raise InputError(what, where=out, fix="Give --force to replace it, or another --out.") from None
        for folder in self._made:  # new folders are durable once their parents are synced
            sync(folder.parent)


@contextlib.contextmanager
def _folders_for(out: Path) -> Iterator[list[Path]]:
    """Creates the parent folders of ``out``, and removes those that are still empty at the end."""
    made = [folder for folder in out.parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield made
    finally:
        with contextlib.suppress(OSError):  # not empty: something was published
            for folder in made:
                folder.rmdir()


def write_manifest(staging: Path, manifest: Manifest, unchanged: Mapping[str, str] | None = None) -> Manifest:
    """Hashes all files in a staging folder, and writes a manifest that lists them.

    Args:
        staging: The folder.
        manifest: The manifest; its ``files`` are replaced.
        unchanged: Known hashes by file name.

    Returns:
        The manifest as written.
    """
    files = hashes(staging, unchanged)
    for name in (MANIFEST, SIGNATURE):  # from an earlier call, with fewer files
        files.pop(name, None)
    manifest = msgspec.structs.replace(manifest, files=files)
    (staging / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2))
    return manifest
