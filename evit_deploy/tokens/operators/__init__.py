"""The operators ``evit::TokenReorg`` and ``evit::TokenMerge``, and the compiled kernel of the first."""
