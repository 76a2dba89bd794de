"""Labeled images in tar files, and in WebDataset shards."""

import functools
import tarfile
from pathlib import Path

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from evit_deploy.data.sources.source import Place
from evit_deploy.data.sources.sources import open_source
from tests.fuzz.formats.images import written
from tests.fuzz.harness import Format
from tests.fuzz.mutations import NUMBERS, TEXTS, as_json, damaged, either, nested

_KINDS = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE,
          tarfile.GNUTYPE_SPARSE, tarfile.CONTTYPE, b"Z")  # fmt: skip


def tar(members: list[tuple[tarfile.TarInfo, bytes]], form: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar file whose headers say what they are given, also where that is wrong."""
    content = b""
    for member, data in members:
        content += member.tobuf(form, errors="surrogateescape") + data + bytes(-len(data) % 512)
    return content + bytes(1024)


def member(name: str, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
    """An ordinary file."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info, data


@functools.cache
def images() -> tuple[bytes, bytes]:
    """Two small files."""
    return written("PNG"), written("JPEG")


def class_folders() -> list[tuple[tarfile.TarInfo, bytes]]:
    """What timm takes for two classes."""
    png, jpeg = images()
    return [member("a/1.png", png), member("a/2.jpg", jpeg), member("b/3.png", png)]


def samples() -> list[tuple[tarfile.TarInfo, bytes]]:
    """What WebDataset takes for two images."""
    png, jpeg = images()
    texts = {
        "1.png": png,
        "1.cls": b"0",
        "1.json": b'{"label": 0}',
        "2.jpg": jpeg,
        "2.cls": b"1",
        "2.json": b'{"label": 1}',
    }
    return [member(name, data) for name, data in texts.items()]


@st.composite
def tars(draw: DrawFn, shards: bool) -> bytes:
    """Members that are links, devices or sparse; absolute names, names with ``..``, sizes that are not theirs."""
    members = samples() if shards else class_folders()
    for _ in range(draw(st.integers(1, 3))):
        number = draw(st.integers(0, len(members) - 1))
        info, data = members[number]
        kind = draw(st.sampled_from(("type", "name", "size", "drop", "double", "text", "cut")))
        if kind == "type":
            info.type = draw(st.sampled_from(_KINDS))
            info.linkname = draw(st.sampled_from(("/etc/passwd", "../../x", "1.png", "a/1.png", info.name, "")))
        elif kind == "name":
            info.name = draw(
                st.sampled_from(
                    ("/etc/x.png", "../x.png", "a/../../x.png", "a/.png", ".png", "a//b.png", "c/" * 60 + "x.png")
                )
            )
        elif kind == "size":
            info.size = draw(st.sampled_from([n for n in NUMBERS if 0 <= n < 2**63]))
        elif kind == "drop":
            del members[number]
        elif kind == "double":
            members.insert(number, (info, data))
        elif kind == "text":
            text = draw(st.one_of(st.sampled_from(TEXTS).map(str.encode), st.sampled_from(_LABELS)))
            members[number] = member(info.name, text)
        else:
            members[number] = (info, data[: len(data) // 2])
        if not members:
            break
    return tar(members)


_LABELS = (
    b"-1", b"9" * 5000, b"1_0", b" 1 ", b"1.5", "١".encode(), b"NaN", b"1e400", b"[" * 100_000, b'{"label": "1"}',
    as_json({"label": 2.7}), as_json({"label": float("inf")}), as_json({"label": nested(500)}), as_json({"label": [1]}),
)  # fmt: skip


def read_tar(path: Path) -> None:
    """Opens it, and reads every image."""
    source = open_source(Place(str(path)))
    for index in range(len(source)):
        source.name(index)
        source.load(index)


def read_shard(path: Path) -> None:
    """The same of a folder of shards, with labels as text and in JSON."""
    for key in (None, "label"):
        source = open_source(Place(f"wds/{path.parent}", split="0000.tar", num_classes=2, target_key=key))
        for index in range(len(source)):
            source.load(index)


def _tars(shards: bool) -> SearchStrategy[bytes]:
    whole = [tar(samples() if shards else class_folders())]
    return either(tars(shards), damaged(whole, (b"ustar\x00", b"\x80" + bytes(11), b"77777777777\0")))


FORMATS = (
    Format("tar", "images.tar", lambda: _tars(shards=False), read_tar),
    Format("shards", "0000.tar", lambda: _tars(shards=True), read_shard),
)
