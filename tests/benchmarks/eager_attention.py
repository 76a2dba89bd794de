"""The reduced PyTorch model against one that materializes the attention map, DeiT-S at keep rate 0.7, one thread.

The other model implements the paper's algorithm literally: softmax(QKᵀ) as a tensor, its class row averaged over heads,
then A·V. Everything else is the same code.

python tests/benchmarks/eager_attention.py --out docs/results/eager_attention.json
"""

import argparse
import copy
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from common import deit_small, save

from evit_deploy import TokenSpec, reduce_tokens_
from evit_deploy.profiling.timing import measure
from evit_deploy.report.statistics import median_interval
from evit_deploy.runtimes.select import opened
from evit_deploy.tokens.operators.token_reorg import token_reorg


def attention_map_forward(block, x):
    """A reduced block that takes the scores from the attention map."""
    attn = block.attn
    q, k, v = attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
    weights = (q * attn.scale @ k.transpose(-2, -1)).softmax(dim=-1)
    x = x + attn.proj((weights @ v).transpose(1, 2).flatten(2))
    scores = weights[:, :, 0, 1:].mean(1)
    x, _ = token_reorg(x, scores, block.reducer.plan.keep, block.reducer.plan.fused, 1)
    return x + block.mlp(block.norm2(x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-sizes", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    ours = reduce_tokens_(deit_small(), TokenSpec(keep_rate=0.7))
    other = copy.deepcopy(ours)
    for block in other.blocks:
        if hasattr(block, "reducer"):
            block.forward = attention_map_forward.__get__(block)
    figures = []
    with ExitStack() as stack:
        runners = [stack.enter_context(opened("eager", model, threads=1)) for model in (ours, other)]
        images = torch.randn(2, 3, 224, 224)
        with torch.inference_mode():
            difference = (ours(images) - other(images)).abs().max().item()
        for batch in map(int, options.batch_sizes.split(",")):
            _, cpu = measure(runners, batch, duration=0.0, minimum_rounds=options.rounds)
            ratio = cpu[:, 1] / cpu[:, 0]
            row = [float(np.median(ratio)), *median_interval(ratio)]
            figures.append({"batch": batch, "rounds": len(cpu), "attention map over ours": row})
            print(f"batch {batch}: attention map / ours = {row[0]:.4f} [{row[1]:.4f}, {row[2]:.4f}]")
    print(f"largest logit difference {difference:.1e}")
    save(options.out, {"largest logit difference": difference, "batches": figures})


if __name__ == "__main__":
    main()
