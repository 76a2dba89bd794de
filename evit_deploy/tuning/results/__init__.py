"""What came of a search: its rows and front, the one that was chosen, and the files that say so."""
