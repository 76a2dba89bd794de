"""Packaging of bundles for Triton Inference Server and C++ programs."""
