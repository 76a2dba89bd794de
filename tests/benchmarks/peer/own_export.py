"""Only our export, without the checks and measurements of `convert`.

python own_export.py CHECKPOINT OUT.onnx [KEEP_RATE]
"""

import sys
from pathlib import Path

from evit_deploy import TokenSpec, build_model, read_checkpoint, reduce_tokens_
from evit_deploy.export.portable import portable

checkpoint, out, *rate = sys.argv[1:]
read = read_checkpoint(checkpoint)
model = build_model(read).eval()
if rate:
    reduce_tokens_(model, TokenSpec(keep_rate=float(rate[0])))
portable(model, name=read.model, preprocess=read.preprocess).save(Path(out))
