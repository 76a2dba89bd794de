"""Everything that can run a model, one runtime a file, behind one contract."""
