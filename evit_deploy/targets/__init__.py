"""What a reduced model can be made into, one target a file, behind one contract."""
