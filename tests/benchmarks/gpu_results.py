"""Writes the results of gpu_suite.py to the last section of docs/results-gpu.md, and the raw JSON to docs/results/.

python tests/benchmarks/gpu_results.py DIR [DIR...]
mdformat docs/results-gpu.md

With several runs, given in chronological order, rows of later runs replace the same rows of earlier ones; other rows
are kept, and the text states the run of each table. A killed run is read from its rows.jsonl, which contains every
measured row.
"""

import argparse
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu.parts import PARTS
from gpu.rows import read
from gpu.tables import LOST, as_markdown, goal_table, identity, states, tables_of

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- gpu_results.py: begin -->", "<!-- gpu_results.py: end -->"


def document_of(folder: Path) -> dict[str, Any]:
    """A run, possibly incomplete."""
    rows, whole = read(folder / "rows.jsonl"), folder / "gpu_suite.json"
    if whole.is_file():
        document = json.loads(whole.read_text(encoding="utf-8"))
    else:
        first = next((row for row in rows if row["part"] == "probe"), {})
        begun = first.get("begun", f"an unknown time, in {folder.name}")
        document = {
            "command": "", "begun": begun, "seconds": 0.0, "budget": 0.0, "refused": {}, "libraries": {},
            "dry run": first.get("gpu") is None,
            "parts": [{"number": part.number, "name": part.name, "settles": part.settles, "state": "interrupted"}
                      for part in PARTS if not part.hidden],
        }  # fmt: skip
    for part in document["parts"]:
        part["rows"] = [{k: v for k, v in row.items() if k != "part"} for row in rows if row["part"] == part["name"]]
        part["begun"] = document["begun"]
        for row in part["rows"]:
            row["run"] = document["begun"]
    return document


WHOLE = ("tests",)
"""Parts that a later run replaces completely: tests that it does not list as failed have passed."""


def merged(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """The last run, completed with parts and rows of earlier ones."""
    parts: dict[str, dict[str, Any]] = {}
    for document in documents:
        for part in document["parts"]:
            if part["rows"]:
                earlier = parts.get(part["name"], {"rows": []})["rows"]
                parts[part["name"]] = part | {"rows": part["rows"] + _only_in(earlier, part)}
    order = [part.name for part in PARTS]
    return documents[-1] | {
        "runs": [
            {"begun": document["begun"], "command": document["command"], "seconds": document["seconds"]}
            for document in documents
        ],
        "seconds": sum(document["seconds"] for document in documents),
        "parts": sorted(parts.values(), key=lambda part: order.index(part["name"])),
    }


def _only_in(earlier: list[dict[str, Any]], part: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of earlier runs that were not measured again."""
    if part["name"] in WHOLE:
        return []
    measured = [row for row in part["rows"] if not LOST & set(row)]
    again = {identity(row) for row in measured}
    left = []
    for row in earlier:
        if LOST & set(row):
            continue
        if identity(row) not in again:
            left.append(row)
        elif part["name"] == "training":  # rows cover several models, which a later run may have split
            now = {name for other in measured if other.get("how") == row.get("how") for name in other.get("ms", {})}
            if names := set(row.get("ms", {})) - now:
                left.append({key: _of(names, value) for key, value in row.items()})
    return left


def _of(names: set[str], value: Any) -> Any:
    return {name: each for name, each in value.items() if name in names} if isinstance(value, dict) else value


def _time(begun: str) -> str:
    """A run's time as shown on the page: ``2026-11-26 15:45 UTC``."""
    return begun[:16].replace("T", " ") + " UTC" if begun[:1].isdigit() else begun


def _runs(part: dict[str, Any]) -> list[str]:
    """Start times of the runs that a part's rows are from, latest first."""
    return list(dict.fromkeys(row["run"] for row in part["rows"]))


def section(document: dict[str, Any]) -> str:
    """The section's text."""
    ceilings = next((part["rows"] for part in document["parts"] if part["name"] == "ceilings"), [])
    machine = next((row for row in ceilings if row.get("what") == "machine" and "versions" in row), {})
    about = f"{machine.get('gpu', 'a CPU')}, driver {machine.get('driver')}, CUDA {machine.get('cuda')}, PyTorch "
    about += f"{machine.get('versions', {}).get('torch')}. Data: [gpu_suite.json](results/gpu_suite.json)."
    lines = [about, ""]
    for run in document["runs"]:
        names = ", ".join(part["name"] for part in document["parts"] if run["begun"] in _runs(part))
        lines.append(f"- Run of {_time(run['begun'])}, {run['seconds']:.0f} s: {names}. `{run['command']}`")
    found = states(document)
    found = replace(found, title=f"{found.title.partition(';')[0]}; each of the latest run that has it")
    lines += ["", *as_markdown(goal_table(document)), *as_markdown(found)]
    for part in document["parts"]:
        runs = _runs(part)
        for begun in runs:
            rows = [row for row in part["rows"] if row["run"] == begun]
            for table in tables_of(part | {"rows": rows}):
                if not table.lines and not table.notes:
                    continue
                lost = "" if begun == runs[0] else ": rows that the later run does not have"
                lines += as_markdown(table, f"Run of {_time(begun)}{lost}.")
    return "\n".join(lines).rstrip() + "\n"


def placeless(value: Any) -> Any:
    """Removes local folders from a command: ``--out DIR``, ``.`` for scratch folders, and bare file names."""
    if isinstance(value, dict):
        return {key: placeless(item) for key, item in value.items()}
    if isinstance(value, list):
        return [placeless(item) for item in value]
    if not isinstance(value, str):
        return value
    value = re.sub(r"/\S*/gpu-suite-\w+", ".", re.sub(r"--out /\S+", "--out DIR", value))
    return re.sub(r"(?<![\w.])/(?:[^\s/'\"]+/)+", "", value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="what gpu_suite.py wrote")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder with results-gpu.md")
    parser.add_argument("--dry-run", action="store_true", help="take dry runs, whose figures mean nothing")
    options = parser.parse_args()
    documents = [document_of(folder) for folder in options.folders]
    for folder, document in zip(options.folders, documents, strict=True):
        if not any(part["rows"] for part in document["parts"]):
            parser.error(f"{folder}: nothing was measured there (no rows in rows.jsonl)")
        if document["dry run"] and not options.dry_run:
            parser.error(f"{folder}: a dry run, whose figures mean nothing")
    page = options.docs / "results-gpu.md"
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        parser.error(f"{page}: the section's place is not marked: {BEGIN} ... {END}")
    whole = placeless(merged(documents))
    raw = options.docs / "results" / "gpu_suite.json"
    raw.parent.mkdir(parents=True, exist_ok=True)
    raw.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    page.write_text(f"{before}{BEGIN}\n{section(whole)}{END}{after}", encoding="utf-8")
    print(f"{page} and {raw} are written")


if __name__ == "__main__":
    sys.exit(main())
