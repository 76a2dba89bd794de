"""Files that a forge and its readers look for: in the form that they have to have, and saying what is so."""

import importlib.util
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

import evit_deploy
from tests.support.paths import ROOT

LINKS = ("link_open", "image")
KEPT = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
FORMS = [path for path in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")) if path.name != "config.yml"]


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("vendor.github-workflows", sorted((ROOT / ".github" / "workflows").glob("*.yml"))),
        ("vendor.github-issue-forms", FORMS),
        ("vendor.github-issue-config", [ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml"]),
        ("vendor.citation-file-format", [ROOT / "CITATION.cff"]),
    ],
)
def test_files_have_the_form_that_their_readers_want(schema: str, files: list[Path]):
    assert files
    line = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *map(str, files)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == evit_deploy.__version__
    assert citation["license"] == "Apache-2.0"


def test_the_plugin_is_of_this_version():
    project = re.search(r"^project\(\w+ VERSION (\S+)", (ROOT / "plugins" / "CMakeLists.txt").read_text(), re.MULTILINE)
    assert project is not None
    assert project[1] == evit_deploy.__version__


def test_the_changelog_has_its_form_and_this_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    first, *released = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert first == "Unreleased"
    versions = [heading.split(" - ")[0] for heading in released]
    assert versions[0] == evit_deploy.__version__
    days = [date.fromisoformat(heading.split(" - ")[1]) for heading in released]
    assert days == sorted(days, reverse=True)
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= set(KEPT)


def test_every_supported_version_of_python_is_tested():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))
    tests = workflow["jobs"]["tests"]
    assert tests["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13", "3.14"]
    assert ".ci/run" in [step.get("run") for step in tests["steps"]]


def test_a_commit_is_held_to_what_ci_runs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    commands = [hook["entry"].split(" --")[0] for hook in hooks]
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert len(commands) == 7
    assert [command for command in commands if not re.search(rf"\b{re.escape(command)}\b", ci)] == []


def links(text: str) -> list[str]:
    """Targets of all links and pictures of a Markdown text, as a Markdown parser finds them."""
    inline = [child for token in MarkdownIt().parse(text) for child in token.children or ()]
    return [str(child.attrs.get("href") or child.attrs.get("src")) for child in inline if child.type in LINKS]


def test_the_index_shows_a_readme_whose_links_work():
    spec = importlib.util.spec_from_file_location("release_readme", ROOT / "docs" / "release_readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before, after = links((ROOT / "README.md").read_text(encoding="utf-8")), links(module.readme("me/mine", "v9"))
    assert len(before) == len(after) > 50
    for old, new in zip(before, after, strict=True):
        if "://" in old:
            assert new == old
            continue
        kind, path = re.fullmatch(r"https://github\.com/me/mine/(raw|tree|blob)/v9/(.+)", new).groups()
        assert path == (f"README.md{old}" if old.startswith("#") else old)
        place = ROOT / path.partition("#")[0]
        assert place.is_dir() if kind == "tree" else place.is_file()
        assert (kind == "raw") == (place.suffix == ".png")
