"""NNCF's INT8 quantization of an ONNX file, as documented for transformers. NNCF's environment.

python nncf_int8.py IN.onnx CALIBRATION.npy OUT.onnx
"""

import sys

import nncf
import numpy as np
import onnx

source, calibration, out = sys.argv[1:]
model = onnx.load(source)
name = model.graph.input[0].name
images = [{name: image[None]} for image in np.load(calibration)]
made = nncf.quantize(model, nncf.Dataset(images), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(images))
onnx.save(made, out)
