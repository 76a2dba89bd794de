"""Results of a search: rows, Pareto front, the chosen schedule, and output files."""
