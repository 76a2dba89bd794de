"""Talking to a Triton server: connection, failures, finding a model, a client."""
