"""The export of timm without evit-deploy: torch.onnx.export of the dense model, same opset, dynamic batch.

python timm_export.py CHECKPOINT OUT.onnx
"""

import sys
import warnings

import torch

from evit_deploy import build_model, read_checkpoint

checkpoint, out = sys.argv[1:]
model = build_model(read_checkpoint(checkpoint)).eval()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    program = torch.onnx.export(
        model,
        (torch.zeros(2, 3, 224, 224),),
        dynamo=True,
        opset_version=23,
        input_names=["input"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        verbose=False,
    )
    program.save(out)
