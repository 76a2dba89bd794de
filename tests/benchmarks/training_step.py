"""A training step of DeiT-S at 0.7 against the dense one and against the official code's structure, one thread.

The official structure is what the paper's algorithm 1 suggests when written down directly: the attention map is
materialised and its class row averaged over heads, and the dropped tokens are the rest of a full sort. Same counts,
same weights. Times are CPU time of the one thread, the three take turns, ratios are medians over rounds.

python tests/benchmarks/training_step.py --out docs/results/training_step.json
"""

import argparse
import copy
import random
import time
from pathlib import Path

import numpy as np
import torch
from common import deit_small, save

from evit_deploy import TokenSpec, reduce_tokens_, token_plan
from evit_deploy.recipe.sections import TrainSection
from evit_deploy.report.statistics import median_interval
from evit_deploy.training.step import TrainingRun


def official_reorganize(x: torch.Tensor, scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Gathers kept and dropped tokens by the two halves of one sort."""
    order = scores.argsort(dim=1, descending=True)
    patches = x[:, 1:]

    def rows(index: torch.Tensor) -> torch.Tensor:
        return patches.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))

    kept, rest = order[:, :keep], order[:, keep:]
    fused = (rows(rest) * scores.gather(1, rest).unsqueeze(-1)).sum(1, keepdim=True)
    return torch.cat([x[:, :1], rows(kept), fused], dim=1)


def official_forward(block, x: torch.Tensor) -> torch.Tensor:
    """A reduced block in the official structure."""
    attn = block.attn
    q, k, v = attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) * attn.scale).softmax(dim=-1)
    x = x + attn.proj((weights @ v).transpose(1, 2).flatten(2))
    x = official_reorganize(x, weights[:, :, 0, 1:].mean(1), block.reducer.plan.keep)
    return x + block.mlp(block.norm2(x))


def dense_forward(block, x: torch.Tensor) -> torch.Tensor:
    """A block without reduction, its attention map materialised as the official code does."""
    attn = block.attn
    q, k, v = attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) * attn.scale).softmax(dim=-1)
    x = x + attn.proj((weights @ v).transpose(1, 2).flatten(2))
    return x + block.mlp(block.norm2(x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dense = deit_small()
    ours = reduce_tokens_(deit_small(), TokenSpec(keep_rate=0.7))
    official = copy.deepcopy(ours)
    for block in official.blocks:
        block.forward = (official_forward if hasattr(block, "reducer") else dense_forward).__get__(block)
    images = torch.randn(options.batch, 3, 224, 224)
    labels = torch.arange(options.batch)
    with torch.inference_mode():
        difference = (ours(images) - official(images)).abs().max().item()
    section = TrainSection(steps=1, learning_rate=1e-4, batch_size=options.batch)
    runs = {name: TrainingRun(model.train(), section) for name, model in
            (("dense", dense), ("ours", ours), ("official", official))}  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(options.rounds + 1):
        for name in random.Random(turn).sample(list(runs), 3):
            start = time.process_time()
            runs[name].advance(iter([(images, labels)]), 1e-4, moving=True)
            if turn:  # the first round warms up
                times[name].append(time.process_time() - start)
    figures = {"batch": options.batch, "rounds": options.rounds, "largest logit difference": difference}
    seconds = {name: np.array(values) for name, values in times.items()}
    for one, other in (("dense", "ours"), ("official", "ours")):
        ratio = seconds[one] / seconds[other]
        figures[f"{one} over {other}"] = [float(np.median(ratio)), *median_interval(ratio)]
    figures["seconds"] = {name: float(np.median(values)) for name, values in seconds.items()}
    figures["ideal"] = float(token_plan(ours).mac_ratio())
    print(figures)
    save(options.out, figures)


if __name__ == "__main__":
    main()
