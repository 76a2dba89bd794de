"""Every reader on hostile inputs: a few new ones, the same on every machine, and all that ever were trouble.

``EVIT_FUZZ_INPUTS=20000 pytest tests/fuzz`` tries more; ``python -m tests.fuzz`` collects instead of stopping.
"""

import os
import tempfile
from pathlib import Path

import hypothesis
import pytest

from tests.fuzz import harness
from tests.fuzz.formats import FORMATS
from tests.fuzz.harness import Format, Violation, attempt, corpus, watch

INPUTS = int(os.environ.get("EVIT_FUZZ_INPUTS", "40"))
TROUBLE = [(form, path) for form in FORMATS.values() for path in corpus(form)]


@pytest.fixture(scope="module", autouse=True)
def watched() -> None:
    watch()


@pytest.mark.parametrize("name", FORMATS)
def test_hostile_inputs_are_read_or_refused_in_words(name, tmp_path, monkeypatch):
    form = FORMATS[name]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    @hypothesis.settings(
        max_examples=max(10, round(INPUTS * form.share)), suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )  # fmt: skip
    @hypothesis.given(form.inputs())
    def one(content: bytes) -> None:
        attempt(form, content, tmp_path)

    one()


@pytest.mark.parametrize(("form", "path"), TROUBLE, ids=[f"{form.name}/{path.name}" for form, path in TROUBLE])
def test_what_was_trouble_is_none_now(form, path, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    attempt(form, path.read_bytes(), tmp_path)


# ---- the harness itself


def _allocate(path: Path) -> None:
    bytearray(3 << 30)


def _write_outside(path: Path) -> None:
    path.parent.with_name("outside").write_text("x")


def _never_end(path: Path) -> None:
    while True:
        pass


def _reach_out(path: Path) -> None:
    os.system("true")


@pytest.mark.parametrize(
    ("reader", "hint"),
    [(lambda path: {}["x"], "KeyError"), (_allocate, "MemoryError"), (_write_outside, "outside the folder"),
     (_reach_out, "os.system"), (_never_end, "still not done")],
)  # fmt: skip
def test_what_a_reader_may_not_do_is_seen(reader, hint, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "LONGEST", 1)
    folder = tmp_path / "inside"
    folder.mkdir()
    with pytest.raises(Violation, match=hint):
        attempt(Format("example", "file", dict, reader), b"x", folder)  # type: ignore[arg-type]
