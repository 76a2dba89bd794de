"""The portable ONNX file and its derivatives: precisions, variants, OpenVINO files."""
