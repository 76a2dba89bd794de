"""Model outputs on images, and how much token reduction and rounding change them."""
