"""What is installed, whether it loads, and what mends it."""
