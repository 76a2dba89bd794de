"""The environment: packages, extras, GPU and driver, and the targets available with them."""
