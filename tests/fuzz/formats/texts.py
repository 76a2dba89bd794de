"""Text that people write or pass on: recipes and class names."""

import functools
from pathlib import Path

import yaml
from hypothesis.strategies import SearchStrategy

from evit_deploy.data.labels import read_labels
from evit_deploy.recipe.recipe import is_comparison, is_sweep, load_comparison, load_recipe, load_sweep
from tests.fuzz.harness import Format
from tests.fuzz.mutations import LARGEST, NUMBERS, TEXTS, damaged, documents, either, json_files
from tests.support.paths import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
_WORDS = (
    b"&a [*a, *a]", b"&a ", b"*a", b"<<: *a", b"!!python/object/apply:os.system ['x']", b"!!binary ", b"? [x]\n: y\n",
    b"---\n", b"%YAML 9.9\n", b"\t", b"- " * 2000, b"[" * 2000, b"{a: " * 2000, b"extends: ../../x\n", b"1e999", b"0o9",
    b"extends: /dev/zero\n", b"1:2:3:4", b".nan", b"2001-99-99", b"\xef\xbb\xbf", "\x85".encode(), b"'", b'"\\x',
    b"|9\n", b"a: " * 300,
)  # fmt: skip


@functools.cache
def recipes() -> tuple[bytes, ...]:
    """The shipped ones."""
    return tuple(path.read_bytes() for path in RECIPES)


def read_recipe(path: Path) -> None:
    """What ``run`` does first."""
    if is_comparison(path):
        load_comparison(path)
    elif is_sweep(path):
        load_sweep(path)
    else:
        load_recipe(path)


def _recipes() -> SearchStrategy[bytes]:
    written = [yaml.safe_load(content) for content in recipes()]
    values = (*TEXTS, *NUMBERS, "timm", "/etc", "digits.yaml", "a100.yaml", "evit", "tome", "int8", [1, 2], {"a": 1})
    dumped = documents(written, values).map(lambda document: _dumped(document)[:LARGEST])
    return either(dumped, damaged(recipes(), _WORDS))


def _dumped(document: object) -> bytes:
    # YAML's own writer is slow; in its flow style JSON is YAML, but for numbers that are none there.
    return yaml.dump(document, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper)).encode("utf-8", "surrogatepass")


_NAMES = [b"tench\ngoldfish\nshark\n", "naïve\r\nτ\r\n".encode(), b"\xef\xbb\xbfone\ntwo"]
_NAME_WORDS = (
    b"\0",
    b"\x85",
    "\x85".encode(),
    b"\x0b",
    b"\x0c",
    b"\r",
    b"\n\n",
    b"\x1b[2J",
    b"\xff",
    b" ",
    b"\xed\xa0\x80",
)
_AS_JSON = [["tench", "goldfish"], {"0": "tench", "1": "goldfish"}, {"id2label": {"0": "tench", "1": "shark"}}]

FORMATS = (
    Format("recipe", "recipe.yaml", _recipes, read_recipe),
    Format("labels", "labels.txt", lambda: damaged(_NAMES, _NAME_WORDS), read_labels),
    Format("labels-json", "labels.json", lambda: json_files(_AS_JSON, TEXTS), read_labels),
)
