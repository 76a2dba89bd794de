"""Outputs of the official code of other methods for random weights: ``tests/support/golden/official``."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.support.method_oracles import synthetic

FOLDER = Path(__file__).parent / "golden" / "official"


class Official(NamedTuple):
    """One golden file with its inputs.

    Attributes:
        recipe: The JSON file: source, commit, model, seeds, shapes.
        weights: The checkpoint's tensors under their released names.
        images: float32 ``[2, 3, 224, 224]``.
        arrays: Outputs of the official code in float64; the README describes them.
    """

    recipe: dict[str, Any]
    weights: dict[str, np.ndarray]
    images: np.ndarray
    arrays: dict[str, np.ndarray]

    def teacher(self) -> dict[str, np.ndarray]:
        """The dense teacher's weights (DynamicViT)."""
        about = self.recipe["teacher"]
        shapes = {name: shape for name, shape in self.recipe["shapes"].items() if not name.startswith(about["without"])}
        return synthetic.draw(shapes, about["seed"])

    def decisions(self) -> np.ndarray:
        """Choices drawn in training, 1 for kept, ``[3, 2, 196]`` (DynamicViT)."""
        return np.unpackbits(self.arrays["train:decisions"]).reshape(3, 2, 196).astype(np.float64)

    def noise(self) -> np.ndarray:
        """Gumbel noise of these draws, ``[3, 2, 196, 2]``."""
        return np.random.default_rng(self.recipe["noise"]["seed"]).gumbel(size=(3, 2, 196, 2))


def read_official(name: str) -> Official:
    """``evo_deit_tiny``, ``evo_levit_128s``, ``levit_128s``, ``dynamicvit_deit_tiny`` or ``dynamicvit_lvvit_s``."""
    recipe = json.loads((FOLDER / f"{name}.json").read_text())
    weights = synthetic.draw(recipe["shapes"], recipe["seed"])
    weights |= {second: weights[first] for second, first in recipe.get("same", {}).items()}
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = dict(file)
    return Official(recipe, weights, synthetic.images(**recipe["images"]), arrays)
