"""Devices with given instead of measured times, the planner of a small model for them, and search results."""

import msgspec
import numpy as np

from evit_deploy.profiling.clocks.turns import Times
from evit_deploy.profiling.speedup import row_of
from evit_deploy.registry import METHODS
from evit_deploy.report.report import ProfileRow
from evit_deploy.tokens.backbone import backbone_of
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tuning.answers import Nearness
from evit_deploy.tuning.results.front import TunedRow, Tuning
from evit_deploy.tuning.schedules import Planner, Schedule
from evit_deploy.tuning.staircase import Staircase
from tests.support.models import seeded

WIDE = {"img_size": 224, "embed_dim": 48, "depth": 12, "num_heads": 3, "num_classes": 10}
"""A small model with the depth and token count of DeiT-S."""


def planner(method: str = "evit", model=None, **spec) -> Planner:
    model = model if model is not None else seeded("vit_tiny_patch16_224", **WIDE)
    backbone = backbone_of(model)
    rate = {"keep_rate": 0.7} if METHODS.get(method).takes_keep_rate else {}
    return Planner(TokenSpec(**(rate | {"method": method} | spec)), backbone.shape(model), backbone.method(method))


def device(steps: int = 16, counts: tuple[int, ...] = (197, *range(192, 23, -8))) -> Staircase:
    """A device that computes tokens in tiles of this size, at one second per tile."""
    block = tuple(float(-(-count // steps)) for count in counts)
    return Staircase("onnxruntime", 1, "cpu", counts, block, block, block, outside=2.0, location=0.25)


def like_tokens(schedule) -> Nearness:
    """A model whose answers improve with the number of tokens, and are best if none is dropped before block 4."""
    ends = [*schedule.locations[1:], 12]
    spans = zip(schedule.locations, ends, schedule.counts, strict=True)
    seen = sum((end - begin) * count for begin, end, count in spans) / (197 * 12)
    early = sum(location < 4 for location in schedule.locations)
    return Nearness(round(0.5 + 0.4 * seen - 0.1 * early, 6), 0.0, 0.9, 16)


def row(name, expected, cosine, **more) -> TunedRow:
    tokens = TokenSpec(keep_rate=(0.8, 0.5), locations=(2, 5))
    return TunedRow(name, Schedule((2, 5), (150, 80)), tokens, 3.0, expected, cosine, 0.9, **more)


def measured(name, ms, speedup) -> ProfileRow:
    times = Times("cpu", np.full((20, 1), ms / 1e3))
    known = {"speedup": speedup, "speedup_low": speedup - 0.02, "speedup_high": speedup + 0.02}
    return msgspec.structs.replace(row_of("onnxruntime", name, 1, times, on_gpu=False), **known)


def tuning(name="a <b> & c") -> Tuning:
    dense = TunedRow("dense", Schedule((), ()), TokenSpec(keep_rate=1.0), 4.6, 90.0, 1.0, 1.0)
    final = row(name, 60.0, 0.95, measured=measured(name, 61.0, 1.5), confirmed=Nearness(0.94, 0.01, 0.92, 128))
    front = (row("s1", 70.0, 0.97), row(name, 60.0, 0.95), row("s9", 50.0, 0.9))
    return Tuning(True, "at least 1.5x", "It is met.", name, (dense, final), front, device(), 40, 128)
