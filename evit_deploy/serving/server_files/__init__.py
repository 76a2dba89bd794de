"""Files that a package copies to the server; they do not import evit_deploy."""
