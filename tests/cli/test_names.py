"""Names that others chose: quoted in suggested commands, shown and not obeyed on a terminal, exact in JSON."""

import json
import os
import shlex
import shutil
import subprocess

import pytest
from PIL import Image

from tests.support.command_line import QUICK, command

ESCAPES = "\x1b[2J\x1b]0;title\x07"
NAMES = {
    f"{ESCAPES}a": r"\x1b[2J\x1b]0;title\x07a",
    "a\nevit-deploy: verified": r"a\nevit-deploy: verified",
    "\u202egpj.a": r"\u202egpj.a",
    "[red]:bug:[link=x]a": "[red]:bug:[link=x]a",
    "$(touch x) 'a' \"b\"": "$(touch x) 'a' \"b\"",
}


def plain(*texts: str) -> None:
    """Whether nothing in these texts moves the cursor, hides or turns what stands there."""
    for text in texts:
        assert not set(text) & {"\x1b", "\x07", "\r", "\u202e", "\x9b"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["{}", "{}.safetensors", "{}.pth", "{}.onnx"])
def test_a_refusal_shows_a_name_on_its_line(cli, tmp_path, monkeypatch, name, form):
    monkeypatch.chdir(tmp_path)
    file = form.format(name)
    (tmp_path / file).write_bytes(b"no model")
    for arguments in (
        ("convert", "--keep-rate", "0.5", "--"),
        ("verify", "--"),
        ("profile", "--"),
        ("run",),
        ("train",),
    ):
        result = cli(*arguments, f"./{file}")
        result.refused(2, NAMES[name])
        plain(result.err)
        result = cli(arguments[0], "--json", *arguments[1:], f"./{file}")
        plain(result.err, result.out)
        assert file in result.document["error"]["message"]


@pytest.mark.parametrize("option", ["--kep-rate", "--precision", "--batch", "--method"])
def test_what_is_typed_wrong_is_shown_and_not_obeyed(cli, option):
    result = cli("convert", "absent.pth", option, f"a{ESCAPES}\nb")
    assert result.code == 2
    plain(result.err)
    result = cli("convert", "absent.pth", f"{option}{ESCAPES}")
    assert result.code == 2
    plain(result.err)


def test_a_traceback_that_is_asked_for_is_plain_too(cli, tmp_path):
    (tmp_path / f"{ESCAPES}.yaml").write_text("name: [")
    result = cli("run", "--debug", tmp_path / f"{ESCAPES}.yaml")
    assert result.code == 2
    assert "Traceback" in result.err
    plain(result.err)


@pytest.mark.parametrize("name", ["$(touch x) 'a'.safetensors", f"{ESCAPES}\n[red].safetensors", "-k 3.safetensors"])
def test_a_suggested_command_is_quoted_and_a_bundle_of_any_name_works(cli, checkpoint, monkeypatch, name):
    monkeypatch.chdir(checkpoint.parent)
    checkpoint.rename(checkpoint.with_name(name))
    result = cli("convert", "--keep-rate", "0.6", *QUICK, "--", name)
    assert result.code == 0, result.err
    plain(result.out, result.err)
    line = result.err.partition("To fine-tune: ")[2].splitlines()[0]
    shown = name.replace("\x1b", r"\x1b").replace("\x07", r"\x07").replace("\n", r"\n")
    assert f"model.checkpoint={shown}" in shlex.split(line)
    script = f"evit-deploy() {{ printf '%s\\n' \"$@\"; }}; {line}"
    said = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    assert f"model.checkpoint={shown}" in said.splitlines()
    assert not (checkpoint.parent / "x").exists()
    made = f"./{name.removesuffix('.safetensors')}-evit-k0.6"
    result = cli("verify", made, "--json", "--runtime", "onnxruntime")
    assert result.code == 0, result.err
    plain(result.out, result.err)
    assert result.document["passed"]


def test_images_and_labels_of_any_name(cli, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a long path leaves a table no room
    labels = [f"\x1b[2J{number}\u2028\u202e[red]" for number in range(10)]
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    bundle = tmp_path / "bundle"
    options = ("--keep-rate", "0.6", "--labels", tmp_path / "labels.json", "--out", bundle, *QUICK)
    result = cli("convert", checkpoint, *options)
    assert result.code == 0, result.err
    plain(result.out, result.err)
    folder = tmp_path / "images"
    folder.mkdir()
    names = [*(f"{name.replace('/', '')}.png" for name in NAMES), os.fsdecode(b"caf\xe9.png")]
    for name in names:
        Image.new("RGB", (64, 64)).save(folder / name)
    result = cli("predict", bundle, folder.name)
    assert result.code == 0, result.err
    plain(result.out, result.err)
    for name in NAMES.values():
        assert f"{name}.png" in result.out
    assert r"caf\xe9.png" in result.out
    assert r"\u2028\u202e[red]" in result.out
    result = cli("predict", bundle, folder, "--json")
    assert result.code == 0, result.err
    said = {os.path.basename(one["image"]): one for one in result.document["predictions"]}
    assert set(said) == set(names)
    assert set(said[names[0]]["labels"]) <= set(labels)


def test_what_libraries_cannot_open_is_refused_by_name(cli, bundle, tmp_path):
    strange = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(bundle, strange)
    for arguments in (("verify",), ("profile",), ("predict", "--top", "1"), ("convert", "--keep-rate", "0.5")):
        result = cli(*arguments, strange, *(["image.png"] if arguments[0] == "predict" else []))
        result.refused(2, r"caf\xe9", "not UTF-8")
    assert command("convert", "absent.pth", "--out", strange).code == 2
