"""Writes ``golden/evo_levit.npz``: outputs of the official code in float64, for seeded weights.

Run by hand, never by a test: ``python -m tests.support.levit_golden EVO_VIT LEVIT``. The arguments are working copies
of https://github.com/YifanXu74/Evo-ViT (MIT) and https://github.com/facebookresearch/LeViT (Apache-2.0); only the
logits are kept. Weights and images are those of ``levit_oracle``.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.support.levit_oracle import TINY_ARGS, pictures, weights

GOLDEN = Path(__file__).parent / "golden" / "evo_levit.npz"
CLASSES_KEPT = 100
TINY_SEED = 5  # for images on which sorting in every block and once per stage choose differently
SIZES = ("128S", "128", "192", "256", "384")


def answer(model: Any, size: int, count: int, seed: int = 1) -> np.ndarray:
    shapes = {
        name: value.shape
        for name, value in model.state_dict().items()
        if not name.startswith("stage_blocks") and "idxs" not in name
    }
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights(shapes).items()}, strict=False)
    model.double().train().eval()  # the official LeViT looks up its attention biases when it enters evaluation mode
    with torch.inference_mode():
        return model(torch.from_numpy(pictures(count, size, seed)).double()).numpy()[:, :CLASSES_KEPT]


def tiny(module: Any) -> Any:
    widths, heads, key_dim, depth = (TINY_ARGS[name] for name in ("embed_dim", "num_heads", "key_dim", "depth"))
    return module.LeViT(
        img_size=TINY_ARGS["img_size"], num_classes=TINY_ARGS["num_classes"], embed_dim=list(widths),
        num_heads=list(heads), key_dim=[key_dim] * 3, depth=list(depth), attn_ratio=[2] * 3, mlp_ratio=[2] * 3,
        down_ops=[["Subsample", key_dim, width // key_dim, 4, 2, 2] for width in widths[:2]],
        hybrid_backbone=module.b16(widths[0], activation=torch.nn.Hardswish),
        prune_ratio=[[1, 1] + [0.5] * (sum(depth) - 2), [0.5] * 3],
    )  # fmt: skip


def main(evo_vit: str, levit: str) -> None:
    sys.path.insert(0, evo_vit)
    from levit import evo_levit  # type: ignore[import-not-found]

    made = {}
    for learned, name in ((True, "tiny"), (False, "tiny, alpha fixed")):
        evo_levit.learn_tradeoff_mode = learned
        made[name] = answer(tiny(evo_levit), 112, 3, TINY_SEED)
    evo_levit.learn_tradeoff_mode = True
    layer_wise = tiny(evo_levit)
    layer_wise.stage_wise_prune = False
    made["tiny, sorted in every block"] = answer(layer_wise, 112, 3, TINY_SEED)
    for size in SIZES:
        made[f"evo_levit_{size.lower()}"] = answer(getattr(evo_levit, f"EvoLeViT_{size}")(), 224, 1)
    for name in [name for name in sys.modules if name == "utils" or name.startswith("levit")]:
        del sys.modules[name]
    sys.path[0] = levit
    import levit as plain  # type: ignore[import-not-found]

    for size in SIZES:
        made[f"levit_{size.lower()}"] = answer(getattr(plain, f"LeViT_{size}")(), 224, 1)
    np.savez_compressed(GOLDEN, **made)


if __name__ == "__main__":
    main(*sys.argv[1:])
