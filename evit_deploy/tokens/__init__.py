"""Token reduction: the plan (counts), the op (tensors), the methods, and the one verb ``reduce_tokens_``."""
