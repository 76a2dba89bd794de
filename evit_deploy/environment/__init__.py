"""What this machine has: packages, extras, GPU and driver, and the targets that makes usable."""
