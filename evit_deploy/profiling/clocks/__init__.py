"""Clocks: interleaved timing on CPUs and GPUs, a GPU's clock rates, and summaries of latencies."""
