"""Reports of checks and measurements, their statistics and tables."""
