"""Files that a package copies to the server; they import nothing from here."""
