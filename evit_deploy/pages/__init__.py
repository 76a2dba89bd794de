"""Reports as web pages: one file that needs no network."""
