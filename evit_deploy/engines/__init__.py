"""TensorRT engines: options, build, plan files, and audit."""
