"""Client side of Triton Inference Server: connection, failures, finding a model, a command-line client."""
