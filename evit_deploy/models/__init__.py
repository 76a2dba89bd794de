"""Which model a file is: safe reading, identification, weights and model families."""
