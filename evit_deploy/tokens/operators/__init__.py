"""The operators ``evit::TokenReorg`` and ``evit::TokenMerge``, and the compiled kernel for ``TokenReorg``."""
