"""`tune` as a user runs it: what is refused before any work, and how options are read."""

import shutil

import click
import pytest

from evit_deploy.cli import cli as group
from evit_deploy.cli.options import struct_of
from evit_deploy.cli.tune import command as tune
from evit_deploy.errors import InputError
from evit_deploy.recipe.options import TuneOptions, seconds_in

BUDGET = ["--min-speedup", "1.5"]
VALUES = {
    "calibration": ("images", "images"), "data": ("labeled", "labeled"), "sample": ("32", 32), "trials": ("12", 12),
    "seed": ("3", 3), "target": ("openvino", "openvino"), "precision": ("fp16", "fp16"), "runtime": ("eager", "eager"),
    "batch": ("8", 8), "threads": ("2", 2), "duration": ("7", 7.0),
}  # fmt: skip


@pytest.mark.parametrize(
    ("budget", "wanted"), [(BUDGET, 1.5), (["--max-latency", "2ms"], "2ms"), (["--max-drop", "0.5"], 0.5)]
)
def test_every_field_of_its_options_is_a_flag(budget, wanted):
    field = budget[0][2:].replace("-", "_")
    arguments = ["model.pth", *budget]
    for name, (text, _) in VALUES.items():
        arguments += [f"--{name}", text]
    with tune.make_context("tune", arguments, parent=click.Context(group, **group.context_settings)) as context:
        asked = struct_of("TuneOptions", dict(context.params))
    assert asked == TuneOptions(**{name: value for name, (_, value) in VALUES.items()}, **{field: wanted})
    assert set(TuneOptions.__struct_fields__) == {*VALUES, "min_speedup", "max_latency", "max_drop"}


@pytest.mark.parametrize(
    ("arguments", "code", "hints"),
    [
        ([], 2, ["a search needs exactly one budget", "got none"]),
        ([*BUDGET, "--max-drop", "1", "--data", "x"], 2, ["one budget", "min_speedup and max_drop"]),
        (["--max-drop", "1"], 2, ["needs labeled images"]),
        (["--max-latency", "2"], 2, ["not a time", "2ms"]),
        (["--max-latency", "0ms"], 2, ["not a time"]),
        (["--min-speedup", "1"], 2, ["min_speedup", "got 1"]),
        (BUDGET, 2, ["--calibration", "no images to rank schedules by", "they need no labels"]),
        ([*BUDGET, "--calibration", "absent"], 2, ["absent", "no such folder"]),
        ([*BUDGET, "--calibration", "{empty}"], 2, ["no images here"]),
        ([*BUDGET, "--calibration", "{few}"], 2, ["too few images to rank schedules by", "got 15", "16 or more"]),
        ([*BUDGET, "--calibration", "{many}", "--method", "random"], 2, ["random", "only for comparison"]),
        ([*BUDGET, "--calibration", "{many}", "--method", "tome"], 2, ["tome", "no keep rate for each location"]),
        ([*BUDGET, "--calibration", "{many}", "--method", "evo-vit"], 2, ["evo-vit", "no keep rate for each location"]),
        ([*BUDGET, "--calibration", "{many}", "--runtime", "triton"], 2, ["--runtime", "not on a server"]),
        ([*BUDGET, "--calibration", "{many}", "--precision", "int9"], 2, ["--precision", "int8"]),
        ([*BUDGET, "--calibration", "{many}", "--data", "{few}"], 2, ["these images have no labels"]),
        ([*BUDGET, "--calibration", "{many}", "--force", "--resume"], 2, ["give one of them"]),
    ],
)
def test_what_cannot_be_searched_is_refused_and_nothing_is_left(cli, checkpoint, tmp_path, arguments, code, hints):
    from PIL import Image

    for name, count in {"empty": 0, "few": 15, "many": 16}.items():
        (tmp_path / name).mkdir()
        for number in range(count):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / name / f"{number}.png")
    places = {name: str(tmp_path / name) for name in ("empty", "few", "many")}
    out = tmp_path / "out"
    result = cli("tune", checkpoint, "--out", out, *(argument.format(**places) for argument in arguments))
    result.refused(code, *hints)
    assert not (out / "findings.jsonl").exists()


@pytest.mark.parametrize(("text", "seconds"), [("2ms", 0.002), ("0.5s", 0.5), ("800us", 8e-4), ("3 µs", 3e-6)])
def test_times_have_units(text, seconds):
    assert seconds_in(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "2", "ms", "-2ms", "2 min", "nanms", "1e400s", "0s", "9999999s"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(InputError, match="not a time"):
        seconds_in(text)


def test_a_folder_of_another_search_is_not_written_into(cli, checkpoint, pictures, tmp_path):
    shutil.copy(checkpoint, tmp_path / "tune.csv")
    result = cli("tune", checkpoint, *BUDGET, "--calibration", pictures, "--out", tmp_path)
    result.refused(2, "there is a search already (tune.csv)", "--resume", "--force")
