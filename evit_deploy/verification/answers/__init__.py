"""Answers to images: what a runtime gives for them, and what fewer tokens and rounding cost them."""
