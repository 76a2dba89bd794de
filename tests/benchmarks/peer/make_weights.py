"""The model that all peers convert: DeiT-S as a folder of transformers, with seeded weights. Optimum's environment.

python make_weights.py FOLDER
"""

import sys

import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

torch.manual_seed(0)
labels = {index: f"class {index}" for index in range(1000)}
config = ViTConfig(
    hidden_size=384,
    num_attention_heads=6,
    intermediate_size=1536,
    layer_norm_eps=1e-6,
    id2label=labels,
    label2id={name: index for index, name in labels.items()},
)
model = ViTForImageClassification(config).eval()
# As general as trained weights: initial biases are 0 and norms 1, which exporters fold away, and queries and keys are
# so small that all scores are nearly equal.
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter += 0.1 * torch.randn_like(parameter)
        if name.endswith(("query.weight", "key.weight")):
            parameter *= 4
model.save_pretrained(sys.argv[1])
ViTImageProcessor(size={"height": 224, "width": 224}).save_pretrained(sys.argv[1])
