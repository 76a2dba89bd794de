"""One portable ONNX file, and what is made of it: precisions, variants, OpenVINO files."""
