"""A clock that jumps: no wall clock decides anything, and a file's time only says that it is another one."""

import ast
import os

from PIL import Image

from evit_deploy.data.sources.source import Place
from evit_deploy.data.sources.sources import open_source
from tests.support.paths import ROOT

WALL_CLOCKS = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today", "date.today"}


def wall_clocks(source: str) -> list[str]:
    """Calls that read the time of day."""
    called = [ast.unparse(node.func) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [name for name in called if ".".join(name.split(".")[-2:]) in WALL_CLOCKS]


def test_nothing_reads_the_time_of_day():
    """Waiting, progress and measurements ask monotonic clocks, which no one can set back."""
    assert wall_clocks("import time\nx = time.time()\ny = datetime.datetime.now()") == [
        "time.time",
        "datetime.datetime.now",
    ]
    found = {
        path.relative_to(ROOT).as_posix(): names
        for path in (ROOT / "evit_deploy").rglob("*.py")
        if (names := wall_clocks(path.read_text(encoding="utf-8")))
    }
    assert found == {}


def test_an_image_from_the_past_or_the_future_is_another_image(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "1.png")
    file = tmp_path / "a" / "1.png"
    stamps = []
    for seconds in (0, 10**9, 4 * 10**9):
        os.utime(file, (seconds, seconds))
        stamps.append(open_source(Place(str(tmp_path))).stamp())
    assert stamps[0] != stamps[1] != stamps[2] != stamps[0]
