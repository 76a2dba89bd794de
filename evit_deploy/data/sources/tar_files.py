"""Checks the headers of tar files before a reader uses them.

Readers seek by the sizes in the headers. In stream mode, Python's ``tarfile`` seeks past the end block by block, so
that a header with a size of 8 exabytes keeps it busy forever, and a negative size makes it read the same header again
(CVE-2025-8194).
"""

import tarfile
from pathlib import Path
from typing import IO

from evit_deploy.errors import InputError

DEEPEST = 2
"""Maximum nesting of tar files; a data set of one tar file with a tar file per class has depth 1."""


def check_tar(path: Path) -> None:
    """Checks that every member of a tar file and of nested tar files lies within the file.

    Args:
        path: The file.

    Raises:
        InputError: It is not a tar file, or a header is invalid.
    """
    try:
        with path.open("rb") as file:
            _check(file, path.stat().st_size, str(path), 0)
    except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError) as error:
        # The last three occur because long names are read at once, with whatever size the header has.
        raise InputError(f"the tar file cannot be read: {error or type(error).__name__}", where=path) from None


def _check(file: IO[bytes], size: int, where: str, depth: int) -> None:
    with tarfile.open(fileobj=file, mode="r:") as tar:
        end = 0
        for member in tar:
            stored = 0 if member.sparse else member.size  # for a sparse file, size is the unpacked size
            if member.size < 0 or member.offset < end or member.offset_data + stored > size:
                raise InputError(
                    "a member of the tar file lies outside the file",
                    where=f"{where}: {member.name}",
                    seen=f"{member.size} bytes at {member.offset_data}",
                    wanted=f"the file has {size} bytes",
                    fix="Copy the file again, or make it again.",
                )
            end = member.offset_data
            inner = tar.extractfile(member) if member.isreg() and member.name.lower().endswith(".tar") else None
            if inner is None:
                continue
            if depth == DEEPEST:
                raise InputError("tar files are nested too deeply", where=f"{where}: {member.name}",
                                 wanted=f"at most {DEEPEST} deep")  # fmt: skip
            _check(inner, member.size, f"{where}: {member.name}", depth + 1)
