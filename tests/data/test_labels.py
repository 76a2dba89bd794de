"""Files of class names."""

import json

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
    (tmp_path / "labels.txt").write_text("a\x0bb\u0085c\u2028d\ne\n", encoding="utf-8")
    assert read_labels(tmp_path / "labels.txt") == ["a\x0bb\u0085c\u2028d", "e"]


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("labels.txt", b"\xff\xfe\xff", "cannot be read"),
        ("labels.txt", b"a\n\nb\n", "without a name .*for class 1"),
        ("labels.json", b"{", "not JSON"),
        ("labels.json", b"[" * 100_000, "not JSON"),
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
