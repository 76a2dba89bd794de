"""Recipe files: names of the recipes that come with the package, and values that are one of some."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from evit_deploy.errors import RecipeError
from evit_deploy.recipe.recipe import is_comparison, is_sweep, load_comparison, load_recipe, load_sweep
from tests.support.paths import RECIPES

DIGITS = RECIPES / "digits.yaml"


@pytest.mark.parametrize(
    "name",
    [
        "paper/deit-small-0.7",
        "recipes/paper/deit-small-0.7",
        "paper/deit-small-0.7.yaml",
        "recipes/paper/deit-small-0.7.yaml",
    ],
)
def test_a_recipe_of_the_paper_is_found_by_its_name_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe(name) == load_recipe(RECIPES / "paper" / "deit-small-0.7.yaml")


@pytest.mark.parametrize(
    ("name", "near"),
    [("paper/deit-small-0.75", "paper/deit-small-0.7"), ("digts", "digits"), ("recipes/finetun", "finetune")],
)
def test_a_recipe_that_is_not_there_has_a_near_name(name, near, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=rf"no such recipe.*Did you mean '{near}'"):
        load_recipe(name)


def test_a_file_of_the_users_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("digits").write_text(DIGITS.read_text().replace("name: digits", "name: mine", 1))
    assert load_recipe("digits").name == "mine"


@pytest.mark.parametrize("value", ["no", "off", "null", "none", "false", "~", ""])
def test_none_may_be_written_as_yaml_has_it(value):
    assert load_recipe(DIGITS, [f"finetune.autocast={value}"]).finetune.autocast == "none"


@pytest.mark.parametrize(
    ("override", "hints"),
    [
        ("finetune.autocast=fp15", ["got 'fp15'", "one of none, bf16, fp16", "Did you mean 'fp16'"]),
        ("finetune.autocast=yes", ["got True", "one of none, bf16, fp16"]),
        ("finetune.model_mode=null", ["finetune.model_mode", "one of train, eval"]),
        ("convert.precision=fp15", ["got 'fp15'", "one of fp32, fp16, bf16, int8, fp8", "Did you mean 'fp16'"]),
        ("data.name=digit", ["got 'digit'", "one of digits, digits-in-the-wild, folder", "Did you mean 'digits'"]),
        ("data.difficulty=3", ["got 3", "one of easy, medium, hard"]),
    ],
)
def test_an_unknown_value_lists_the_choices(override, hints):
    with pytest.raises(RecipeError) as caught:
        load_recipe(DIGITS, [override])
    for hint in hints:
        assert hint in str(caught.value)


def test_a_recipe_is_found_by_name_without_the_checkout(tmp_path):
    code = "from evit_deploy import load_recipe; print(load_recipe('paper/lvvit-small-0.7').name)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "lvvit-small-0.7"


# ---- files that ask for more than they are


def bomb(*, merges: bool) -> str:
    """Thirty lines that are 9^30 values when they are written out."""
    lines = ["a0: &a0 {x: 1}"]
    for i in range(30):
        names = ", ".join([f"*a{i}"] * 9)
        lines.append(f"a{i + 1}: &a{i + 1} " + (f"{{<<: [{names}]}}" if merges else f"[{names}]"))
    return "\n".join(lines)


HOSTILE = {
    "a bomb of aliases": (bomb(merges=False), "aliases written out"),
    "a bomb of merges": (bomb(merges=True), "aliases written out|nested too deeply"),
    "an anchor within itself": ("name: &a [*a]", "nested too deeply"),
    "a mapping within itself": ("name: &a {<<: *a}", "nested too deeply"),
    "lists in lists": ("[" * 200_000, "nested too deeply"),
    "closed lists": ("name: " + "[" * 40 + "]" * 40, "nested too deeply"),
    "mappings in mappings": ("{a: " * 10_000, "nested too deeply"),
    "blocks": ("".join(f"{' ' * i}a:\n" for i in range(300)), "nested too deeply"),
    "20,000 keys": ("".join(f"key{i}: 1\n" for i in range(20_000)), "too many parts"),
    "4,000 keys": ("".join(f"key{i}: 1\n" for i in range(4_000)), "unknown key 'key0'"),
    "a key again after 4,000": (
        "".join(f"key{i}: 1\n" for i in range(4_000)) + "key0: 2\n",
        "'key0' stands here twice",
    ),
    "a megabyte": ("# " + "x" * (1 << 20), "too large .*got 1,048,578 bytes, expected at most 262,144"),
    "a list as a key": ("[a, b]: 1", "a key has to be text"),
    "a mapping as a key": ("{a: 1}: 1", "a key has to be text"),
    "null as a key": ("~: 1", "a key has to be text: put '~' in quotes"),
    "yes as a key": ("yes: 1", "put 'yes' in quotes"),
    "a whole number of 5,000 digits": ("seed: " + "1" * 5_000, "a number of 5,000 digits"),
    "a hexadecimal number without end": ("seed: 0x" + "f" * 100_000, "a number of 100,002 digits"),
    "a sexagesimal number without end": ("seed: 1" + ":59" * 50_000, "a number of 150,001 digits"),
    "more than 64 bits": ("seed: 18446744073709551616", "18446744073709551616 is out of range"),
    "infinity": ("seed: .inf", "number .inf is out of range"),
    "an exponent": ("seed: 1.0e+999", "out of range"),
    "no number": ("seed: !!int cat", "not a number: 'cat'"),
    "an object": ("name: !!python/name:os.system", "not a kind of value"),
    "bytes": ("name: !!binary aGk=", "not a kind of value"),
    "a set": ("name: !!set {a}", "not a kind of value"),
    "a tag": ("name: !mine x", "not a kind of value"),
    "a zero byte": ("name: a\0b", "the character U\\+0000 at 7"),
    "two documents": ("name: a\n---\nname: b", "but found another document"),
    "an alias of nothing": ("name: *a", "undefined alias"),
    "a scanner's error": ("a: b: c", "line 1, column 5: mapping values"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line(tmp_path, case):
    text, reason = HOSTILE[case]
    (tmp_path / "hostile.yaml").write_text(text)
    for read in (load_recipe, load_sweep, load_comparison):
        with pytest.raises(RecipeError, match=reason) as caught:
            read(tmp_path / "hostile.yaml")
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize("case", [case for case in HOSTILE if case not in ("a megabyte", "4,000 keys")])
def test_a_hostile_value_is_refused_alike(case):
    text, _ = HOSTILE[case]
    with pytest.raises(RecipeError) as caught:
        load_recipe(DIGITS, [f"model.args.x={text}" if case == "infinity" else f"model.args={text}"])
    assert "\n" not in str(caught.value)


def test_hostile_files_take_no_memory_and_no_time(tmp_path):
    code = (
        "import resource, sys\n"
        "from evit_deploy.errors import RecipeError\n"
        "from evit_deploy.recipe.recipe import load_recipe\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for path in sys.argv[1:]:\n"
        "    try: load_recipe(path)\n"
        "    except RecipeError: print('refused')\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)\n"
    )
    paths = []
    for number, (text, _) in enumerate(HOSTILE.values()):
        paths.append(tmp_path / f"{number}.yaml")
        paths[-1].write_text(text)
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True, timeout=120)
    *refused, grown = done.stdout.split()
    assert refused == ["refused"] * len(HOSTILE)
    assert int(grown) < 200  # MiB; a bomb took 3,400


def test_a_key_of_many_parts():
    with pytest.raises(RecipeError, match="a key of too many parts"):
        load_recipe(DIGITS, ["tokens.options" + ".a" * 50_000 + "=1"])


def test_overrides_together_have_limits_too():
    with pytest.raises(RecipeError, match="too many parts"):
        load_recipe(DIGITS, [f"model.args.a{i}=[{'1,' * 5_000}]" for i in range(3)])


def test_anchors_merges_and_dates_are_read(tmp_path):
    text = DIGITS.read_text().replace("name: digits\n", "name: 2026-11-27\n", 1)
    start = text.index("dense:\n")
    text = text[:start] + "dense: &run" + text[start + len("dense:") :]
    changed = yaml.safe_load(DIGITS.read_text())["dense"]
    (tmp_path / "own.yaml").write_text(text + "\n")
    recipe = load_recipe(tmp_path / "own.yaml")
    assert recipe.name == "2026-11-27"
    (tmp_path / "merged.yaml").write_text(text.split("finetune:\n")[0] + "finetune:\n  <<: *run\n  steps: 7\n")
    finetune = load_recipe(tmp_path / "merged.yaml").finetune
    assert (finetune.steps, finetune.learning_rate) == (7, float(changed["learning_rate"]))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff\xfen\x00a\x00m\x00e\x00", "not UTF-8 text at byte 0"),
        ("name: a".encode("utf-16-le"), "U.0000"),
        (b"name: \xff", "not UTF-8 text at byte 6"),
        (b"\xed\xb2\x80: 1", "not UTF-8"),
    ],
)
def test_other_encodings_are_refused(tmp_path, content, reason):
    (tmp_path / "own.yaml").write_bytes(content)
    with pytest.raises(RecipeError, match=reason):
        load_recipe(tmp_path / "own.yaml")


def test_a_byte_order_mark_is_no_content(tmp_path):
    (tmp_path / "own.yaml").write_bytes(b"\xef\xbb\xbf" + DIGITS.read_bytes().replace(b"\n", b"\r\n"))
    assert load_recipe(tmp_path / "own.yaml") == load_recipe(DIGITS)


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "a long name", "a zero byte", "a link to nothing"])
def test_what_is_no_file_is_refused(tmp_path, kind):
    path = tmp_path / "own.yaml"
    match kind:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "device":
            path = Path("/dev/zero")
        case "a long name":
            path = Path("x" * 5_000)
        case "a zero byte":
            path = Path("a\0b")
        case _:
            path.symlink_to("absent")
    for read in (load_recipe, load_sweep, load_comparison):
        with pytest.raises(RecipeError):
            read(path)
    assert not is_sweep(path)
    assert not is_comparison(path)


# ---- extends


def test_a_recipe_extends_one_of_the_package_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text("extends: digits\nname: own\n")
    assert load_recipe("own.yaml").data == load_recipe(DIGITS).data
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "below.yaml").write_text("extends: paper/deit-small-0.7\nname: below\n")
    (tmp_path / "first.yaml").write_text("extends: runs/below.yaml\n")
    assert load_recipe("first.yaml").name == "below"


@pytest.mark.parametrize(
    "kind", ["above", "absolute", "a link out", "a folder that is a link", "a pipe", "a folder", "/proc"]
)
def test_what_lies_outside_is_not_extended(tmp_path, kind):
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret.yaml").write_text("name: secret\n")
    name, reason = "base.yaml", "only extend recipes in its folder or in the package"
    match kind:
        case "above":
            name = "../secret.yaml"
        case "absolute":
            name = str(tmp_path / "secret.yaml")
        case "a link out":
            (inside / "base.yaml").symlink_to(tmp_path / "secret.yaml")
        case "a folder that is a link":
            (inside / "link").symlink_to(tmp_path)
            name = "link/secret.yaml"
        case "a pipe":
            os.mkfifo(inside / "base.yaml")
            reason = "a pipe"
        case "a folder":
            (inside / "base.yaml").mkdir()
            reason = "this is a folder"
        case _:
            name = "/proc/self/environ"
    (inside / "own.yaml").write_text(f"extends: {name}\n")
    with pytest.raises(RecipeError, match=reason):
        load_recipe(inside / "own.yaml")


def test_a_folder_reached_by_a_link_is_a_recipes_own(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "base.yaml").write_text(DIGITS.read_text())
    (tmp_path / "real" / "own.yaml").write_text("extends: base.yaml\nname: own\n")
    (tmp_path / "link").symlink_to("real")
    assert load_recipe(tmp_path / "link" / "own.yaml").name == "own"


def test_a_chain_has_an_end(tmp_path):
    (tmp_path / "0.yaml").write_text(DIGITS.read_text())
    for i in range(1, 10):
        (tmp_path / f"{i}.yaml").write_text(f"extends: {i - 1}.yaml\nname: n{i}\n")
    assert load_recipe(tmp_path / "7.yaml").name == "n7"
    with pytest.raises(RecipeError, match="too many recipes extend each other"):
        load_recipe(tmp_path / "9.yaml")
