"""Paths in the checkout."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
PLUGINS = ROOT / "plugins"
DATA = Path(__file__).parent / "data"
GOLDEN = Path(__file__).parent / "golden"
