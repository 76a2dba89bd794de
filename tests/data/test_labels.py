"""Files of class names."""

import json
import os
from pathlib import Path

import pytest
from timm.data import ImageNetInfo

from evit_deploy.data.labels import read_labels, same_classes
from evit_deploy.errors import InputError


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("labels.txt", "tench, Tinca tinca\ngoldfish\n"),
        ("labels.txt", "\ufefftench, Tinca tinca\r\ngoldfish"),
        ("labels.json", json.dumps(["tench, Tinca tinca", "goldfish"])),
        ("labels.json", json.dumps({"1": "goldfish", "0": "tench, Tinca tinca"})),
        ("config.json", json.dumps({"id2label": {"0": "tench, Tinca tinca", "1": "goldfish"}, "hidden_size": 3})),
    ],
)
def test_every_form_gives_the_names_in_order(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_labels(tmp_path / name) == ["tench, Tinca tinca", "goldfish"]


def test_only_line_ends_part_names(tmp_path):
    strange = "a\x0bb\u0085c\u2028d\x0ce\x1cf\x1dg\x1eh\u2029i"
    (tmp_path / "labels.txt").write_text(f"{strange}\nj\n", encoding="utf-8")
    assert read_labels(tmp_path / "labels.txt") == [strange, "j"]


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("labels.txt", b"\xff\xfe\xff", "cannot be read"),
        ("labels.txt", b"a\n\nb\n", "without a name .*for class 1"),
        ("labels.json", b"{", "not valid JSON"),
        ("labels.json", b"[" * 100_000, "nested too deeply"),
        ("labels.json", b"[" * 100 + b"]" * 100, "nested too deeply"),
        ("labels.json", b'["' + b"x" * 2_000 + b'"]', "too long .*got 2,000 letters for class 0"),
        ("labels.json", b'["a\\u0000b"]', "one line"),
        ("labels.json", b'["\\ud800"]', "JSON"),
        ("labels.json", b"\xff\xfe[\0", "not UTF-8"),
        ("labels.txt", b"a\0b\n", "one line"),
        ("labels.txt", b"a\rb\n", "one line"),
        ("labels.txt", b"", "no labels"),
        ("labels.txt", b"\xef\xbb\xbf", "no labels"),
        ("labels.txt", "a\nb\n".encode("utf-16"), "not UTF-8"),
        ("labels.txt", "caf\u00e9\n".encode("latin-1"), "not UTF-8"),
        ("labels.txt", b"x" * 5_000, "too long .*got 5,000 letters for class 0"),
        ("labels.txt", b"x\n" * (9 << 20), "too large"),
        ("labels.json", b"{}", "no labels"),
        ("labels.json", b'"cat"', "no labels"),
        ("labels.json", b'{"0": "cat", "2": "dog"}', "without a name .*for class 1"),
        ("labels.json", b'["cat", 3]', "without a name .*3 for class 1"),
        ("labels.json", b'["cat\\ndog"]', "one line"),
    ],
)
def test_what_holds_no_names_is_refused(tmp_path, name, content, what):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=what):
        read_labels(tmp_path / name)


@pytest.mark.parametrize(("kind", "reason"), [("folder", "a folder"), ("pipe", "a pipe"), ("device", "a device")])
def test_only_files_are_read(tmp_path, kind, reason):
    path = Path("/dev/zero") if kind == "device" else tmp_path / "labels.txt"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(InputError, match=f"the labels cannot be read: .*{reason}"):
        read_labels(path)


def test_two_classes_may_have_one_name(tmp_path):
    (tmp_path / "labels.txt").write_text("crane\ncrane\n")
    assert read_labels(tmp_path / "labels.txt") == ["crane", "crane"]


def test_no_file(tmp_path):
    with pytest.raises(InputError, match=r"--labels .*absent\.txt: the labels cannot be read"):
        read_labels(tmp_path / "absent.txt")


def test_imagenets_folders_are_its_words():
    info = ImageNetInfo("imagenet-1k")
    folders, words = info.label_names(), info.label_descriptions(detailed=False)
    assert same_classes(folders, folders)
    assert same_classes(words, folders)
    assert not same_classes(words[::-1], folders)
    assert not same_classes(words[:-1], folders)
    assert not same_classes([f"class {i}" for i in range(1000)], folders)
    assert not same_classes(["cat", "dog"], ["dog", "cat"])
