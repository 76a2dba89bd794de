"""Reports as web pages, each a single file that needs no network."""
