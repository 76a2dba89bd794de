"""EViT: "Not All Patches are What You Need" (ICLR 2022, arXiv 2202.07800), algorithm 1."""

from evit_deploy.tokens.reduce import TokenReducer


class EViT(TokenReducer):
    """Keeps the tokens that the class token attends to most and fuses the rest by the same attention."""
