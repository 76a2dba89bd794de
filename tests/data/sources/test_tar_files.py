"""Tar files whose headers say what cannot be, refused before a reader believes them."""

import io
import shutil
import subprocess
import tarfile

import pytest

from evit_deploy.data.sources.tar_files import check_tar
from evit_deploy.errors import InputError


def packed(*members: tuple[str, bytes]) -> bytes:
    """A tar file."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def claiming(size: int, content: bytes = b"x" * 512) -> bytes:
    """A tar file of one member whose header gives another size."""
    info = tarfile.TarInfo("cat/1.png")
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(1024)


@pytest.mark.parametrize("size", [5000, 2**40, 2**62, -512, -1024])
@pytest.mark.parametrize("inside", [False, True])
def test_a_member_lies_in_the_file(size, inside, tmp_path):
    content = claiming(size)
    (tmp_path / "a.tar").write_bytes(packed(("cats.tar", content)) if inside else content)
    with pytest.raises(InputError, match="tar file"):
        check_tar(tmp_path / "a.tar")


def test_a_cut_file_is_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(packed(("cat/1.png", b"x" * 5000))[:4000])
    with pytest.raises(InputError, match=r"a\.tar.*outside the file"):
        check_tar(tmp_path / "a.tar")


def test_tar_files_in_tar_files(tmp_path):
    content = packed(("cat/1.png", b"x" * 600), ("cat/2.png", b""))
    for depth in range(4):
        (tmp_path / "a.tar").write_bytes(content)
        if depth < 3:
            check_tar(tmp_path / "a.tar")
        else:
            with pytest.raises(InputError, match="too deep"):
                check_tar(tmp_path / "a.tar")
        content = packed((f"level{depth}.tar", content))


@pytest.mark.parametrize("size", [2**40, 2**62, -512])
@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_long_names_of_impossible_lengths(kind, size, tmp_path):
    info = tarfile.TarInfo("name")
    info.type, info.size = kind, size
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + packed(("cat/1.png", b"x" * 600)))
    with pytest.raises(InputError, match="tar file"):
        check_tar(tmp_path / "a.tar")


def test_a_sparse_member_is_larger_than_the_file(tmp_path):
    (tmp_path / "sparse").write_bytes(b"")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 20)

    if shutil.which("tar") is None:
        pytest.skip("no tar command")
    subprocess.run(["tar", "--sparse", "-cf", "a.tar", "sparse"], cwd=tmp_path, check=True)
    check_tar(tmp_path / "a.tar")
