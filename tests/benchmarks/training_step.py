"""A training step of DeiT-S at 0.7, compared with the dense model and with the official code's structure.

The official structure implements the paper's algorithm 1 literally: the attention map is materialized and its class row
averaged over heads, and the dropped tokens are the rest of a full sort. Counts and weights are the same. Images are
bytes, transferred and normalized as in training; the three take turns, and ratios are medians over rounds. On a CPU
times are CPU time of one thread. On a GPU they are wall time, and there is more to tell: images a second, peak memory
(three models with their optimizers among it), and of the time the share in which the CPU waits for a batch, which a GPU
may wait for too, and the share in which it waits for the GPU, which is then busy.

python tests/benchmarks/training_step.py --out docs/results/training_step.json
python tests/benchmarks/training_step.py --device cuda --batch 256 --autocast bf16 --steps 10 --rounds 5 [--compile]
"""

import argparse
import copy
import random
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from common import deit_small, save

from evit_deploy import Preprocess, TokenSpec, reduce_tokens_, token_plan
from evit_deploy.data.training.transfer import Transfer
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
    """A block without reduction, its attention map materialized as the official code does."""
    attn = block.attn
    q, k, v = attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) * attn.scale).softmax(dim=-1)
    x = x + attn.proj((weights @ v).transpose(1, 2).flatten(2))
    return x + block.mlp(block.norm2(x))


class Turn(msgspec.Struct, frozen=True):
    """A few steps of one model.

    Args:
        seconds: A step; CPU time on a CPU.
        for_data: Of the wall time, the share spent waiting for batches.
        for_device: And for the device.
        memory: Peak, in bytes; 0 on a CPU.
    """

    seconds: float
    for_data: float
    for_device: float
    memory: int


def batches(device: torch.device, size: int, images: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Endless: the same bytes, sent anew for every step."""
    transfer = Transfer(device, Preprocess(size=(size, size)))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (images, 3, size, size), dtype=torch.uint8, generator=generator)
    labels = torch.arange(images)
    if transfer.pins:  # as a loader's thread does
        pixels, labels = pixels.pin_memory(), labels.pin_memory()
    while True:
        yield transfer((pixels, labels))


def turn(run: TrainingRun, drawn: Iterator[tuple[torch.Tensor, ...]], steps: int) -> Turn:
    """Trains as ``fit`` does: a result is read when the next step is on its way."""
    on_gpu, sent, waited, sending = run.device.type == "cuda", deque(), 0.0, 0.0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(run.device)
    cpu, started = time.process_time(), time.perf_counter()
    for _ in range(steps):
        begun = time.perf_counter()
        sent.append(run.advance(drawn, 1e-4, moving=False))
        sending, waited = sending + time.perf_counter() - begun, waited + sent[-1].waited
        if len(sent) > 1:
            assert sent.popleft().finite
    assert sent.popleft().finite
    wall = time.perf_counter() - started
    seconds = wall if on_gpu else time.process_time() - cpu
    memory = torch.cuda.max_memory_allocated(run.device) if on_gpu else 0
    return Turn(seconds / steps, waited / wall, 1 - sending / wall, memory)


def models(device: torch.device) -> dict[str, Any]:
    """The three, with the same weights."""
    ours: Any = reduce_tokens_(deit_small(), TokenSpec(keep_rate=0.7))
    official = copy.deepcopy(ours)
    for block in official.blocks:
        block.forward = (official_forward if hasattr(block, "reducer") else dense_forward).__get__(block)
    return {name: model.to(device) for name, model in
            (("dense", deit_small()), ("ours", ours), ("official", official))}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--autocast", choices=("none", "bf16", "fp16"), default="none")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--steps", type=int, default=1, help="of each model in a round")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    compared = models(device)
    drawn = batches(device, 224, options.batch)
    images, _ = next(drawn)
    with torch.inference_mode():
        difference = (compared["ours"](images[:8]) - compared["official"](images[:8])).abs().max().item()
    del images
    section = TrainSection(steps=1, learning_rate=1e-4, batch_size=options.batch, autocast=options.autocast,
                           compile=options.compile)  # fmt: skip
    runs = {name: TrainingRun(model.train(), section) for name, model in compared.items()}
    turns: dict[str, list[Turn]] = {name: [] for name in runs}
    for number in range(options.rounds + 1):
        for name in random.Random(number).sample(list(runs), 3):
            done = turn(runs[name], drawn, options.steps if number else max(3, options.steps))
            if number:  # the first round warms up
                turns[name].append(done)
    figures: dict[str, Any] = {
        "device": str(device), "batch": options.batch, "autocast": options.autocast, "compiled": options.compile,
        "rounds": options.rounds, "steps a round": options.steps, "largest logit difference": difference,
    }  # fmt: skip
    seconds = {name: np.array([one.seconds for one in found]) for name, found in turns.items()}
    for one, other in (("dense", "ours"), ("official", "ours")):
        ratio = seconds[one] / seconds[other]
        figures[f"{one} over {other}"] = [float(np.median(ratio)), *median_interval(ratio)]
    figures["seconds"] = {name: float(np.median(values)) for name, values in seconds.items()}
    figures["images a second"] = {name: options.batch / value for name, value in figures["seconds"].items()}
    for key, title in (("for_data", "waits for data"), ("for_device", "waits for the device")):
        figures[title] = {name: float(np.median([getattr(one, key) for one in found])) for name, found in turns.items()}
    if device.type == "cuda":
        figures["peak memory"] = {name: max(one.memory for one in found) for name, found in turns.items()}
        figures["gpu"] = torch.cuda.get_device_name(device)
    figures["ideal"] = float(token_plan(compared["ours"]).mac_ratio())
    for name in runs:
        memory = f", {figures['peak memory'][name] / 2**30:.1f} GiB" if device.type == "cuda" else ""
        print(
            f"{name:9}{figures['images a second'][name]:10.1f} images/s{memory}, waits for data "
            f"{figures['waits for data'][name]:.1%}, for the device {figures['waits for the device'][name]:.1%}"
        )
    print(figures)
    save(options.out, figures)


if __name__ == "__main__":
    main()
