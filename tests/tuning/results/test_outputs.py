"""The folder of a search: what may be gone on with, and what is written for others to read."""

import shlex

import msgspec
import pytest

from evit_deploy.cli.convert import command as convert
from evit_deploy.errors import InputError
from evit_deploy.recipe.options import ConvertOptions
from evit_deploy.recipe.recipe import load_comparison
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tuning.results.front import TunedRow, Tuning
from evit_deploy.tuning.results.outputs import ABOUT, FINDINGS, RESULTS, begin, check_place, command, recipe, write
from evit_deploy.tuning.schedules import Schedule
from tests.support.command_line import context_of
from tests.support.tuning import device

SPECS = [
    TokenSpec(keep_rate=(0.8, 0.5), locations=(2, 5)),
    TokenSpec(keep_rate=(0.75,), locations=(4,), fuse=False),
    TokenSpec(keep_rate=(0.8, 0.5), locations=(2, 5), options={"squeeze": True}),
]
ABOUT_IT = {"checkpoint": "abc", "min_speedup": 1.5, "threads": None}


def found(spec: TokenSpec) -> Tuning:
    default = TokenSpec(keep_rate=0.7, options=spec.options)
    rows = (
        TunedRow("dense", Schedule((), ()), TokenSpec(keep_rate=1.0), 4.6, 90.0, 1.0),
        TunedRow("default-0.7", Schedule((3, 6, 9), (140, 100, 72)), default, 3.0, 65.0, 0.9),
        TunedRow("s4", Schedule(spec.locations, (150, 80)[: len(spec.locations)]), spec, 3.0, 60.0, 0.95),
    )
    return Tuning(True, "b", "It is: met #1.", "s4", rows, rows[2:], device(), 9, 64)


@pytest.mark.parametrize("spec", SPECS)
def test_the_recipe_is_one_that_run_takes(tmp_path, spec):
    text = recipe(found(spec), ("a b.pth", None), ConvertOptions(targets=("onnx",), precision="fp32"))
    (tmp_path / "recipe.yaml").write_text(text)
    loaded = load_comparison(tmp_path / "recipe.yaml")
    assert loaded.checkpoint == "a b.pth"
    assert [entry.name for entry in loaded.compare] == ["tuned", "default-0.7"]
    assert loaded.compare[0].tokens == spec
    assert (loaded.convert.targets, loaded.convert.precision) == (("onnx",), "fp32")


@pytest.mark.parametrize("spec", SPECS)
def test_the_line_that_converts_is_one_that_convert_takes(spec):
    row = found(spec).finalists[-1]
    line = command(row, ("a b.pth", "vit_tiny_patch16_224"), ConvertOptions(targets=("onnx",), precision="fp16"))
    program, name, *arguments = shlex.split(line)
    assert (program, name) == ("evit-deploy", convert.name)
    with context_of(arguments) as context:
        asked = context.params
    assert (asked["checkpoint"], asked["model"], asked["keep_rate"]) == ("a b.pth", "vit_tiny_patch16_224", spec.rates)
    assert (asked["locations"], asked["fuse"]) == (spec.locations, None if spec.fuse else False)
    assert dict(asked["method_options"]) == spec.options


def test_a_winner_that_is_the_default_schedule_stands_beside_another(tmp_path):
    own = msgspec.structs.replace(found(SPECS[0]), winner="default-0.7")
    (tmp_path / "recipe.yaml").write_text(recipe(own, ("a.pth", None), ConvertOptions(targets=("onnx",))))
    names = [entry.name for entry in load_comparison(tmp_path / "recipe.yaml").compare]
    assert names == ["tuned", "s4"]


def test_everything_is_written_and_the_json_is_what_was_found(tmp_path):
    write(found(SPECS[0]), tmp_path, ("a.pth", None), ConvertOptions(targets=("onnx",)))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(RESULTS)
    assert msgspec.json.decode((tmp_path / "tune.json").read_bytes(), type=Tuning) == found(SPECS[0])


def begun(place, about, *, force, resume):
    check_place(place, about, force=force, resume=resume)
    begin(place, about, force=force)


def test_a_search_is_not_overwritten_and_goes_on_only_with_its_own(tmp_path):
    begun(tmp_path / "new", ABOUT_IT, force=False, resume=False)
    with pytest.raises(InputError, match=r"there is a search already \(search.json\).*--resume"):
        begun(tmp_path / "new", ABOUT_IT, force=False, resume=False)
    begun(tmp_path / "new", ABOUT_IT, force=False, resume=True)
    with pytest.raises(InputError, match=r"different settings.*min_speedup 2"):
        begun(tmp_path / "new", ABOUT_IT | {"min_speedup": 2.0}, force=False, resume=True)
    (tmp_path / "new" / FINDINGS).write_bytes(b"old")
    (tmp_path / "new" / "mine.txt").write_bytes(b"mine")
    begun(tmp_path / "new", ABOUT_IT | {"min_speedup": 2.0}, force=True, resume=False)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["mine.txt", ABOUT]


def test_resuming_where_nothing_is_begins(tmp_path):
    begun(tmp_path / "new", ABOUT_IT, force=False, resume=True)
    assert (tmp_path / "new" / ABOUT).exists()


def test_places_that_cannot_be_are_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / ABOUT).write_bytes(b"{")
    for place, hint in (("file", "this is a file"), ("x" * 300, "cannot write there"), ("broken", "cannot be read")):
        with pytest.raises(InputError, match=hint):
            check_place(tmp_path / place, ABOUT_IT, force=False, resume=True)


def test_looking_at_a_place_writes_nothing_and_removes_nothing(tmp_path):
    check_place(tmp_path / "new", ABOUT_IT, force=True, resume=False)
    assert not (tmp_path / "new").exists()
    (tmp_path / FINDINGS).write_bytes(b"old")
    check_place(tmp_path, ABOUT_IT, force=True, resume=False)
    assert [path.name for path in tmp_path.iterdir()] == [FINDINGS]
