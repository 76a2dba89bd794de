"""The output folder of a search: the files written to it, and the check whether a search may continue in it."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import yaml

from evit_deploy.errors import InputError
from evit_deploy.files import write_atomically
from evit_deploy.recipe.options import ConvertOptions
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tuning.results.choice import DENSE
from evit_deploy.tuning.results.front import TunedRow, Tuning, as_svg
from evit_deploy.tuning.results.page import as_page
from evit_deploy.tuning.results.tables import as_csv, as_markdown

ABOUT, STAIRCASE, FINDINGS = "search.json", "staircase.json", "findings.jsonl"
"""Files that a search continues from: its settings, the staircase of the device, and the findings."""
RESULTS = ("tune.json", "tune.csv", "tune.md", "tune.svg", "recipe.yaml", "tune.html")
BUNDLE = "bundle"


def check_place(place: Path, about: dict[str, Any], *, force: bool, resume: bool) -> None:
    """Checks, before any work, that a search may start or continue in a folder.

    Args:
        place: The folder.
        about: Settings of the search, JSON-compatible.
        force: Whether existing files may be replaced.
        resume: Whether to continue an existing search.

    Raises:
        InputError: The folder contains a search and neither ``force`` nor ``resume`` is set, or a search with other
            settings, or the path is a file.
    """
    with _writing(place):
        if place.exists() and not place.is_dir():
            raise InputError("this is a file", where=place, wanted="a folder", fix="Give another --out.")
        known = _known(place)
        if known and not force and not resume:
            fix = "Give --resume to go on with it, --force to begin anew, or another --out."
            raise InputError(f"there is a search already ({', '.join(known)})", where=place, fix=fix)
        if resume and not force and (place / ABOUT).exists():
            _check_same(place / ABOUT, about)


def begin(place: Path, about: dict[str, Any], *, force: bool) -> None:
    """Creates the folder checked by :func:`check_place`, and writes the settings of the search to it.

    Args:
        place: The folder.
        about: Settings of the search, JSON-compatible.
        force: Whether to delete the files of an existing search.

    Raises:
        InputError: The folder is not writable.
    """
    with _writing(place):
        for name in _known(place) if force else ():
            (place / name).unlink()
        place.mkdir(parents=True, exist_ok=True)
        if not (place / ABOUT).exists():
            write_atomically(place / ABOUT, msgspec.json.format(msgspec.json.encode(about), indent=2))


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    """Converts an ``OSError`` to an ``InputError`` that names the folder of the search."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write there ({error.strerror})", where=place, fix="Give another --out.") from None


def _known(place: Path) -> list[str]:
    """Names of the files of a search that exist in a folder."""
    return [name for name in (ABOUT, STAIRCASE, FINDINGS, *RESULTS) if (place / name).exists()]


def _check_same(path: Path, about: dict[str, Any]) -> None:
    try:
        known = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise InputError(
            f"the settings of the search cannot be read: {error}", where=path, fix="Give --force."
        ) from None
    now = msgspec.json.decode(msgspec.json.encode(about))
    other = [name for name in now if known.get(name) != now[name]]
    if other:
        raise InputError(
            "this search has different settings", where=path, seen="; ".join(f"{name} {now[name]}" for name in other),
            wanted="; ".join(f"{name} {known.get(name)}" for name in other),
            fix="Use the same settings, give --force to start again, or another --out.",
        )  # fmt: skip


def write(found: Tuning, place: Path, source: tuple[str, str | None], options: ConvertOptions) -> None:
    """Writes the results of a search: JSON, CSV, Markdown, SVG, an HTML page, and the winner as a recipe.

    Args:
        found: The results.
        place: The folder.
        source: The checkpoint as given, and the timm name of its architecture, if given.
        options: Conversion options for the winner.

    Raises:
        StageError: A file could not be written.
    """
    texts = (
        msgspec.json.format(msgspec.json.encode(found), indent=2).decode(), as_csv(found), as_markdown(found),
        as_svg(found), recipe(found, source, options), as_page(found),
    )  # fmt: skip
    for name, text in zip(RESULTS, texts, strict=True):
        write_atomically(place / name, text.encode())


def command(row: TunedRow, source: tuple[str, str | None], options: ConvertOptions) -> str:
    """Command line that converts a model with the schedule of a row."""
    spec = row.tokens
    parts = ["evit-deploy", "convert", source[0], *(["--model", source[1]] if source[1] else [])]
    parts += ["--method", spec.method] if spec.method != "evit" else []
    for name, value in spec.options.items():
        parts += ["--method-option", f"{name}={msgspec.json.encode(value).decode()}"]
    parts += ["--keep-rate", ",".join(f"{rate:g}" for rate in spec.rates)]
    parts += ["--locations", ",".join(map(str, row.schedule.locations))] if row.schedule.locations else []
    parts += [] if spec.fuse else ["--no-fuse"]
    for target in options.targets:
        parts += ["--target", target]
    parts += ["--precision", options.precision] if options.precision else []
    parts += ["--calibration", options.calibration] if options.calibration else []
    return shlex.join(parts)


def recipe(found: Tuning, source: tuple[str, str | None], options: ConvertOptions) -> str:
    """Recipe for ``evit-deploy run`` that converts the winner and compares it with another finalist."""
    rows = {row.name: row for row in found.finalists if row.name != DENSE}
    winner = rows.pop(found.winner)
    rival = next((row for row in rows.values() if row.name.startswith("default")), next(iter(rows.values()), None))
    entries = [
        {"name": name, "tokens": _tokens(row.tokens)}
        for name, row in (("tuned", winner), (rival.name if rival else "", rival))
        if row is not None
    ]
    document: dict[str, Any] = {"name": "tuned", "checkpoint": source[0]}
    document |= {"model": source[1]} if source[1] else {}
    convert = {"targets": list(options.targets)}
    convert |= {"precision": options.precision} if options.precision else {}
    convert |= {"calibration": options.calibration} if options.calibration else {}
    document |= {"convert": convert, "compare": entries}
    head = [
        f"# {found.verdict}",
        "#",
        "# The tokens of the first entry are also what `evit-deploy train` takes as `tokens`. To convert it alone:",
        f"#   {command(winner, source, options)}",
    ]
    return "\n".join(head) + "\n" + yaml.safe_dump(document, sort_keys=False, allow_unicode=True)


def _tokens(spec: TokenSpec) -> dict[str, Any]:
    """The ``tokens`` section of a recipe, without default values."""
    plain = msgspec.to_builtins(spec)
    default = msgspec.to_builtins(TokenSpec())
    kept = {name: value for name, value in plain.items() if name == "method" or value != default[name]}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}
