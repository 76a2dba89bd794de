"""What was checked and measured: the report, its statistics and its tables."""
