"""Hashing files, and writing files atomically."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from evit_deploy.errors import StageError
from evit_deploy.files.drafts import draft


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashes(folder: Path, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Hashes of all files in a folder, by name.

    Args:
        folder: The folder.
        known: Known hashes by name.
    """
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    return {name: (known or {}).get(name) or sha256(folder / name) for name in names}


def write_atomically(path: Path, content: bytes) -> None:
    """Writes one file atomically.

    Raises:
        StageError: The disk is full or failing.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft(path.parent) as making:
            made = making.folder / "content"
            made.write_bytes(content)
            made.chmod(0o644)
            making.publish(made, path, replace=True)
    except OSError as error:
        raise StageError(f"could not be written ({error.strerror or error})", where=path) from error
