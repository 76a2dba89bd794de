"""Tar files: checks their headers before a reader uses them.

Readers seek by the sizes that headers give. Python's ``tarfile`` as a stream seeks past the end block by block, so that
a header of 8 exabytes keeps it busy for ever, and a negative size leads it back to the same header (CVE-2025-8194).
"""

import tarfile
from pathlib import Path
from typing import IO

from evit_deploy.errors import InputError

DEEPEST = 2
"""Tar files inside tar files: a data set of one tar that holds a tar a class is one deep."""


def check_tar(path: Path) -> None:
    """Checks that every member of a tar file lies in the file, those of tar files inside it too.

    Args:
        path: The file.

    Raises:
        InputError: It is not a tar file, or a header is impossible.
    """
    try:
        with path.open("rb") as file:
            _check(file, path.stat().st_size, str(path), 0)
    except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError) as error:
        # Long names are read in one piece, whatever size their header gives: hence the last three.
        raise InputError(f"the tar file cannot be read: {error or type(error).__name__}", where=path) from None


def _check(file: IO[bytes], size: int, where: str, depth: int) -> None:
    with tarfile.open(fileobj=file, mode="r:") as tar:
        end = 0
        for member in tar:
            stored = 0 if member.sparse else member.size  # of a sparse file it is the size after unpacking
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
