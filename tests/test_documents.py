import os
from typing import Any

import msgspec
import pytest

from evit_deploy.documents import Limits, check_tree, decode_json, read_bytes, read_json
from evit_deploy.errors import CheckpointError, InputError


class Answer(msgspec.Struct):
    number: int
    parts: dict[int, str] = {}


def test_a_document_becomes_its_type(tmp_path):
    path = tmp_path / "answer.json"
    path.write_bytes(b'{"number": 42, "parts": {"7": "x"}, "unknown": [1, {"a": null}]}')

    assert read_json(path, Answer) == Answer(42, {7: "x"})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"number": "42"}', r"number: expected `int`, got `str`"),
        (b'{"parts": {}}', "missing required field `number`"),
        (b'{"number": 1, "parts": {"x": "y"}}', "parts"),
        (b"[1]", "expected `object`, got `array`"),
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"number": NaN}', "not valid JSON"),
        (b'{"\xc3": 1}', "not valid JSON"),
        (b'{"number": ' + b"9" * 5000 + b"}", "answer.json: "),
        (b'{"number": 1e999}', "answer.json: "),
        (b"[" * 100_000, "nested too deeply|not valid JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b"[" * 40 + b"]" * 40, "nested too deeply"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, "nested too deeply"),
    ],
)
def test_what_is_something_else_is_an_error_with_its_place(content, said):
    with pytest.raises(InputError, match=said) as caught:
        decode_json(content, Answer, "answer.json")

    assert str(caught.value).startswith("answer.json: ")
    assert len(str(caught.value)) < 300


def test_limits_are_those_that_were_asked_for(tmp_path):
    path = tmp_path / "answer.json"
    path.write_bytes(b'{"number": 1}')

    read_json(path, Answer, Limits(size=13, depth=1, items=2))
    for limits, said in [
        (Limits(size=12), "too large"),
        (Limits(depth=0), "nested too deeply"),
        (Limits(items=1), "too many parts"),
    ]:
        with pytest.raises(CheckpointError, match=said):
            read_json(path, Answer, limits, CheckpointError)


def test_a_large_file_is_refused_by_its_size(tmp_path):
    path = tmp_path / "answer.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a hole: takes no space, and would take a terabyte of memory

    with pytest.raises(InputError, match=r"1,099,511,627,776 bytes"):
        read_bytes(path)


@pytest.mark.parametrize("kind", ["absent", "folder", "pipe", "device", "endless", "circle", "zero byte", "too long"])
def test_only_regular_files_are_read(kind, tmp_path):
    path = tmp_path / "answer.json"
    match kind:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "endless":
            path.symlink_to("/proc/self/pagemap")  # says it has no bytes, and has very many
        case "circle":
            path.symlink_to(path)
        case "zero byte":
            path = tmp_path / "a\0b"
        case "too long":
            path = tmp_path / ("a" * 300)

    reasons = {"folder": "this is a folder", "pipe": "this is a pipe", "device": "a device", "endless": "too large",
               "zero byte": "not the name of a file", "absent": "no such file"}  # fmt: skip
    with pytest.raises(InputError, match=reasons.get(kind, "cannot be read")):
        read_bytes(path, Limits(size=1 << 16))


def test_a_link_to_a_file_is_read(tmp_path):
    (tmp_path / "there").write_bytes(b"x")
    (tmp_path / "here").symlink_to("there")

    assert read_bytes(tmp_path / "here") == b"x"


def test_parts_that_stand_in_many_places_count_at_each():
    bomb: Any = "x"
    for _ in range(20):
        bomb = [bomb] * 10
    with pytest.raises(InputError, match="too many parts"):
        check_tree(bomb, "recipe.yaml")

    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(InputError, match="nested too deeply"):
        check_tree(circle, "recipe.yaml")
