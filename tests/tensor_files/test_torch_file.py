"""Files of torch.save that ask for more than they are: each is refused in words, in memory of the file's own size."""

import io
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from evit_deploy.errors import InputError
from evit_deploy.models.files.safe_weights import read_weights
from evit_deploy.tensor_files.torch_file import open_torch

ONE = torch.zeros(1)
WIDE = torch.arange(12.0).reshape(3, 4)


def saved(folder: Path, tensors: dict[Any, Any], as_zip: bool = True) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({"model": tensors}, folder / "w.pth", _use_new_zipfile_serialization=as_zip)
    return folder / "w.pth"


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_weights(path)
    assert path.name in str(caught.value)
    assert str(caught.value).isprintable()
    return str(caught.value)


ODD = {
    "expanded": (lambda: ONE.expand(100_000, 100_000), "is expanded"),
    "overlapping": (lambda: torch.zeros(5).as_strided((4, 2), (1, 1)), "is expanded"),
    "sparse": (lambda: torch.eye(2).to_sparse(), "is a sparse tensor"),
    "sparse CSR": (lambda: torch.eye(2).to_sparse_csr(), "is a sparse tensor"),
    "quantized": (lambda: torch.quantize_per_tensor(WIDE, 0.1, 0, torch.qint8), "is a quantized tensor"),
    "meta": (lambda: torch.zeros(10**9, device="meta"), r"without values \(meta\)"),
    "complex": (lambda: WIDE.to(torch.complex64), "complex64"),
    "FP8": (lambda: WIDE.to(torch.float8_e4m3fn), "float8_e4m3fn"),
    "negated": (lambda: WIDE.to(torch.complex64).conj().imag, "negates"),
    "uint16": (lambda: WIDE.to(torch.uint16), "uint16"),
}


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", ODD)
def test_tensors_that_are_not_plain_are_refused_by_name(tmp_path, kind, as_zip):
    make, words = ODD[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = saved(tmp_path, {"fine": WIDE, "blocks.0.odd": make()}, as_zip)
    with pytest.raises(InputError, match=words) as caught:
        read_weights(path)
    assert "'blocks.0.odd'" in str(caught.value)


def test_what_lies_beside_the_weights_may_be_odd(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"model": {"a": WIDE}, "momentum": {"a": torch.eye(2).to_sparse()}, "seen": {3, 4}}, path)
    assert torch.equal(read_weights(path).tensors["a"], WIDE)


@pytest.mark.parametrize(
    "key", [3, b"a", ("a", 1), None, "", "a\x1b[31mb", "a\nb", "\ud800", "x" * 600], ids=lambda key: ascii(key)[:12]
)
def test_keys_that_are_no_names(tmp_path, key):
    refusal(saved(tmp_path, {"a": WIDE, key: WIDE}))


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
def test_views_and_ties_are_read(tmp_path, as_zip):
    tensors = {
        "transposed": WIDE.T, "column": WIDE[:, 1], "tied": WIDE, "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
        "channels": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), "flag": torch.tensor([True]),
    }  # fmt: skip
    found = read_weights(saved(tmp_path, tensors, as_zip)).tensors
    assert list(found) == list(tensors)
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


def test_one_tensor_under_thousands_of_names(tmp_path):
    big = torch.zeros(100_000)
    assert "together" in refusal(saved(tmp_path, {f"a{number}": big for number in range(5000)}))


def zipped(folder: Path, pickle: bytes, **parts: bytes) -> Path:
    with zipfile.ZipFile(folder / "w.pth", "w") as archive:
        archive.writestr("a/data.pkl", pickle)
        for name, content in parts.items():
            archive.writestr(f"a/data/{name[1:]}", content)
    return folder / "w.pth"


def tensor(size: bytes, stride: bytes, count: bytes = b"K\x01", offset: bytes = b"K\x00") -> bytes:
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + count + b"tQ"
    made = (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + offset
        + size
        + stride
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )
    return b"\x80\x02}X\x01\x00\x00\x00a" + made + b"s."


LARGE = b"\x8a\x05\x00\x00\x00\x00\x10"  # 2**36


def test_the_crafted_pickle_is_a_good_one(tmp_path):
    path = zipped(tmp_path, tensor(b"K\x01\x85", b"K\x01\x85"), _0=b"\0\0\x80\x3f")
    assert read_weights(path).tensors["a"].tolist() == [1.0]


@pytest.mark.parametrize(
    ("pickle", "words"),
    [
        (tensor(LARGE + b"\x85", b"K\x01\x85"), "asks for more than the file holds"),
        (tensor(LARGE + b"\x85", b"K\x01\x85", LARGE), "bytes for 'a'"),
        (tensor(b"K\x01\x85", b"K\x01\x85", offset=b"J\xff\xff\xff\xff"), "a shape that no tensor has"),
        (tensor(b"K\x01\x85", b"K\x01\x85", offset=LARGE), "asks for more"),
        (tensor(b"K\x02\x85", b"J\xff\xff\xff\xff\x85"), "a shape that no tensor has"),
        (tensor(b"K\x01\x85", b")"), "a shape that no tensor has"),
        (tensor(b"(" + b"K\x01" * 60 + b"t", b"(" + b"K\x01" * 60 + b"t"), "60 axes"),
        (tensor(b"N", b"N"), "damaged"),
        (b"\x80\x02c__builtin__\nbytearray\n" + LARGE + b"\x85R.", "not a dictionary"),
        (b"\x80\x02ctorch.storage\nUntypedStorage\n" + LARGE + b"\x85R.", "damaged"),
        (b"\x80\x02ctorch\nTensor\n" + LARGE + b"\x85R.", "damaged"),
        (b"\x80\x02Kr\xff\xff\xff\x7f.", "damaged"),  # a memo index of 2**31
        (b"\x80\x02NK\x05r\xff\xff\xff\x7f.", "not a dictionary"),
        (b"\x80\x02" + b"\x8f" * 10_000 + b".", "damaged"),
        (b"\x80\x02N" + b"\x85" * 100_000 + b".", "not a dictionary"),
        (b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".", "not a dictionary"),
        (b"\x80\x02}K\x01\x85Ns.", "neither text nor a number"),
        (b"\x80\x02}\x8a\x10" + b"\x7f" * 16 + b"Ns.", "neither text nor a number"),
        (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R.", "damaged"),
        (b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.", "it was not run"),
        (b"\x80\x02cm\x1b[31m\nn\x1b]0;t\n.", "it was not run"),
        (b"\x80\x02" + b"N" * (2 << 20) + b".", "too much besides tensors"),
        (b"", "damaged"),
        (b".", "damaged"),
        (b"0", "damaged"),
    ],
)
def test_pickles_that_ask_for_more(tmp_path, pickle, words):
    assert words in refusal(zipped(tmp_path, pickle, _0=b"\0\0\x80\x3f"))


def test_the_same_in_the_older_format(tmp_path):
    path = saved(tmp_path, {"a": WIDE}, as_zip=False)
    content = path.read_bytes()
    path.write_bytes(content[:-56] + (2**60).to_bytes(8, "little") + content[-48:])
    assert "damaged" in refusal(path)
    path.write_bytes(content.replace(b"FloatStorage", b"LongStorage\n"))
    refusal(path)


def test_bytes_in_the_other_order(tmp_path):
    path = zipped(tmp_path, tensor(b"K\x01\x85", b"K\x01\x85"), _0=b"\x3f\x80\0\0")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a/byteorder", b"big")
    assert read_weights(path).tensors["a"].tolist() == [1.0]


def test_archives_that_are_not_pytorch_s(tmp_path):
    path = tmp_path / "w.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\0" * (64 << 20))
    assert "compressed" in refusal(path)
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")
        for _ in range(2):
            archive.writestr("a/data.pkl", b"\x80\x02}.")
    assert "two parts have one name" in refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"\x80\x02}.")
    assert "no archive of PyTorch" in refusal(path)
    path = zipped(tmp_path, b"\x80\x02}.")
    content = path.read_bytes()
    start = content.rindex(b"PK\x01\x02")
    lied = content[:start] + content[start : start + 20] + (2**31).to_bytes(4, "little") * 2 + content[start + 28 :]
    path.write_bytes(lied)
    assert "cut off" in refusal(path)
    path.write_bytes(content[:start] + content[start : start + 42] + b"\x05\0\0\0" + content[start + 46 :])
    assert "leads elsewhere" in refusal(path)


def test_a_pipe_and_a_device_are_not_waited_for(tmp_path):
    import os

    os.mkfifo(tmp_path / "w.pth")
    assert "a pipe" in refusal(tmp_path / "w.pth")
    with pytest.raises(InputError, match="a pipe"):
        open_torch(tmp_path / "w.pth")
    with pytest.raises(InputError, match="a device"):
        read_weights(Path("/dev/zero"))


def test_a_part_within_dictionaries_that_share_others(tmp_path):
    inside: dict[str, Any] = {"w": WIDE}
    for _ in range(4):
        inside = {f"k{number}": inside for number in range(2000)}
    torch.save(inside | {"model": {"a": WIDE}}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="dictionaries are nested too deeply"):
        read_weights(tmp_path / "w.pth", "k1")


_LIMITED = """
import resource, sys
from pathlib import Path
from evit_deploy.errors import InputError
from evit_deploy.models.files.safe_weights import read_weights
held = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (held + (600 << 20),) * 2)
try:
    read_weights(Path(sys.argv[1]))
except InputError as error:
    print("refused", error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "pickle", [b"]" * (1 << 20), b"}NNs" * (1 << 18), b"\x8f" * (1 << 20)], ids=["lists", "dicts", "sets"]
)
def test_the_worst_pickles_keep_within_memory(tmp_path, pickle):
    path = zipped(tmp_path, b"\x80\x02" + pickle[:-8] + b".")
    done = subprocess.run([sys.executable, "-c", _LIMITED, str(path)], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("refused"), done.stderr


def test_reading_costs_nothing_for_what_is_left(tmp_path):
    content = io.BytesIO()
    torch.save({"a": WIDE}, content)
    (tmp_path / "w.pth").write_bytes(content.getvalue())
    described = open_torch(tmp_path / "w.pth").content["a"]
    assert (described.shape, described.stride, described.size) == ((3, 4), (4, 1), 48)
