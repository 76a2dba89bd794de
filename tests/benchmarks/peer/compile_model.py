"""torch.compile of the dense model, and a first call at each measured batch size.

python compile_model.py CHECKPOINT default|frozen
"""

import sys

import torch
import torch._inductor.config

from evit_deploy import build_model, read_checkpoint

BATCHES = (1, 8)


def compiled(checkpoint, *, frozen):
    """The compiled model on one thread, with a program per batch size; ``frozen`` packs weights as constants."""
    torch.set_num_threads(1)
    torch._inductor.config.freezing = frozen
    return torch.compile(build_model(read_checkpoint(checkpoint)).eval(), dynamic=False)


if __name__ == "__main__":
    model = compiled(sys.argv[1], frozen=sys.argv[2] == "frozen")
    with torch.inference_mode():
        for batch in BATCHES:
            model(torch.zeros(batch, 3, 224, 224))
