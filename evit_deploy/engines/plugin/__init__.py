"""The TensorRT plugin: the library, its build, and its kernel for PyTorch."""
