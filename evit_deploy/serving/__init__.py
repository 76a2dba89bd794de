"""Packages of a bundle for Triton Inference Server and for C++."""
