"""Every method on DeiT-S, compared with the dense model and with slices of the same token counts, in CUDA graphs."""

import time
from typing import Any

from torch import Tensor, nn

from evit_deploy import TokenPlan, TokenSpec, reduce_tokens_, token_plan
from evit_deploy.tokens.backbone import copy_sharing_weights

from .inference import DTYPES, SMALL, call, images_for, times_row
from .job import Job
from .variants import kernel_calls, seeded

SPECS = {
    "evit 0.7": TokenSpec(keep_rate=0.7),
    "evit 0.7 squeeze": TokenSpec(keep_rate=0.7, options={"squeeze": True}),
    "evo-vit 0.5": TokenSpec(keep_rate=0.5, method="evo-vit", options={"representative": False}),
    "evo-vit 0.5 representative": TokenSpec(keep_rate=0.5, method="evo-vit", options={"representative": True}),
    "dynamicvit 0.7": TokenSpec(keep_rate=0.7, method="dynamicvit"),
    "tome r13": TokenSpec(method="tome", options={"merge": 13}),
}
TOY_SPECS = SPECS | {"tome r13": TokenSpec(method="tome", options={"merge": 2})}


class SlicedBlock(nn.Module):
    """A block that uses only the first tokens, as many as in a plan, in attention and MLP.

    Args:
        block: A timm block.
        plan: Its row.
    """

    def __init__(self, block: Any, plan: Any) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = block.norm1, block.attn, block.norm2, block.mlp
        self.plan = plan

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, C]`` to ``[B, tokens_out, C]``."""
        x = x[:, : self.plan.tokens_in]
        x = (x + self.attn(self.norm1(x)))[:, : self.plan.tokens_out]
        return x + self.mlp(self.norm2(x))


def sliced(dense: Any, plan: TokenPlan) -> Any:
    """A dense model with the token counts of a plan, without scoring, sorting, merging or restoring."""
    model = copy_sharing_weights(dense)
    model.blocks = nn.Sequential(*(SlicedBlock(b, row) for b, row in zip(model.blocks, plan.blocks, strict=True)))
    return model.eval()


def measure(job: Job) -> None:
    """FP16, the paper's batch and one image; each method in turns with the dense model and its own slices."""
    dense = seeded(SMALL, job.device.name, toy=job.toy).to(DTYPES["fp16"])
    for batch in job.rows.in_time((2,) if job.toy else (128, 1), reserve=3):
        for name, spec in (TOY_SPECS if job.toy else SPECS).items():
            with job.rows.attempt(model=SMALL, dtype="fp16", batch=batch, method=name):
                started, model = time.monotonic(), reduce_tokens_(copy_sharing_weights(dense), spec).eval()
                plan, images = token_plan(model), images_for(dense, batch, DTYPES["fp16"], job.device.name)
                models = {"dense": dense, name: model.half(), f"{name} slice": sliced(dense, plan)}
                runs = {key: job.device.capture([call(made, images)]) for key, made in models.items()}
                row = times_row(job, runs, batch, started)
                row |= {"mac ratio": round(plan.mac_ratio(), 4), "gmacs": round(plan.macs() / 1e9, 4)}
                row["kernel calls"] = kernel_calls(model, images)
                job.rows.add(model=SMALL, dtype="fp16", batch=batch, method=name, **row)
            job.device.release()
