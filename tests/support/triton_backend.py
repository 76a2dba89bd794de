"""A Triton backend in Python: ONNX Runtime on the CPU, under any backend name.

The server of ``triton_server.py`` includes only the Python backend. With this file as ``<backend>/model.py`` it serves
models that are configured for ``onnxruntime``, ``tensorrt`` or ``openvino``; the server itself reads and checks the
configuration. Files other than ONNX are replaced by the one in ``SERVED_ONNX``.
"""

import json
import os
import time

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils  # type: ignore[reportMissingImports]  # the server's own


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self.config = json.loads(args["model_config"])
        folder = os.path.join(args["model_repository"], args["model_version"])
        path = os.path.join(folder, self.config.get("default_model_filename") or "model.onnx")
        if not path.endswith(".onnx"):
            path = os.environ["SERVED_ONNX"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.outputs = [output["name"] for output in self.config["output"]]
        # The parameter slow_ms is for tests that need pending requests.
        slow = self.config.get("parameters", {}).get("slow_ms", {}).get("string_value", "0")
        self.delay = float(slow) / 1e3

    def execute(self, requests: list) -> list:
        parts = [pb_utils.get_input_tensor_by_name(request, "input").as_numpy() for request in requests]
        time.sleep(self.delay)
        answers = self.session.run(self.outputs, {"input": np.concatenate(parts)})
        ends = np.cumsum([len(part) for part in parts])[:-1]
        split = [np.split(answer, ends) for answer in answers]
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor(*pair) for pair in zip(self.outputs, row, strict=True)])
            for row in zip(*split, strict=True)
        ]
