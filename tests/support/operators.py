"""Inputs and models for the operators over the compiled kernels."""

import numpy as np
import timm
import torch

from evit_deploy.tokens.operators.kernel import TokenReorgKernel
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import reduce_tokens_
from tests.support.cases import DTYPES
from tests.support.op_checks import to_torch

SHAPES = [  # batch, tokens, heads, width, prefix, spread of q and k
    (2, 197, 6, 64, 1, 1.0),
    (1, 198, 3, 64, 2, 1.0),
    (1, 581, 6, 64, 5, 1.0),
    (3, 5, 1, 8, 1, 1.0),
    (2, 50, 3, 32, 1, 6.0),
    (1, 12, 2, 80, 0, 1.0),
    (1, 4096, 1, 16, 8, 1.0),
]


def queries_and_keys(batch, tokens, heads, width, spread, dtype):
    """As in the output of one projection: next to the values."""
    random = np.random.default_rng(tokens)
    qkv = (spread * random.standard_normal((batch, tokens, 3, heads, width))).astype(np.float32)
    return to_torch(qkv.astype(DTYPES[dtype])).unbind(2)[:2]


class CountedKernel(TokenReorgKernel):
    """Counts its calls."""

    count = 0

    def __call__(self, *arguments, **named):
        self.count += 1
        return super().__call__(*arguments, **named)


def reduced(**options):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4, num_classes=5)
    return reduce_tokens_(model.eval(), TokenSpec(keep_rate=0.5, **options))
