"""Which files the site has: the pages of ``docs/`` and whatever they link to, each where it lies in the repository.

A hook of MkDocs (``mkdocs.yml``). MkDocs sees one folder, and our pages link to recipes, sources and read-me files
beside it. Keeping the repository's paths makes every relative link right on the site as it is on the forge.
"""

import json
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)")
WITHOUT_LINKS = ("docs/results/*.json", "docs/site/*.css", "docs/site/*.js", "docs/site/*.svg")
FIGURES = "docs/figures.md"


def linked(page: str) -> set[str]:
    """The files of the repository that a page links to, as paths from its root."""
    found = set()
    for target in LINK.findall((ROOT / page).read_text(encoding="utf-8")):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
        if ":" not in target and not path.startswith("..") and (ROOT / path).is_file():
            found.add(path)
    return found


def sources() -> set[str]:
    """Every file of the site, as paths from the repository's root: its pages, and what they lead to."""
    todo = [path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))]
    found = {path.relative_to(ROOT).as_posix() for pattern in WITHOUT_LINKS for path in ROOT.glob(pattern)}
    while todo:
        page = todo.pop()
        if page not in found:
            found.add(page)
            todo += sorted(linked(page)) if page.endswith(".md") else []
    return found


def figures() -> str:
    """The page that lists the files of measurements with the command that made each."""
    lines = [
        "# Figures as files",
        "",
        "What [the results](results.md) quote, whole, with the command where the file has it.",
        "",
    ]
    lines += ["| file | command |", "|---|---|"]
    for path in sorted((ROOT / "docs" / "results").glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        command = content.get("command") if isinstance(content, dict) else None
        shown = f"`{command}`".replace("|", "\\|") if command else ""
        lines.append(f"| [{path.name}](results/{path.name}) | {shown} |")
    return "\n".join(lines) + "\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Puts the repository's paths in the place of those that MkDocs found in ``docs/``; the theme's files stay."""
    theme = [file for file in files if file.src_dir != config.docs_dir]
    ours = [File.generated(config, path, abs_src_path=str(ROOT / path)) for path in sorted(sources())]
    return Files([*theme, *ours, File.generated(config, FIGURES, content=figures())])
