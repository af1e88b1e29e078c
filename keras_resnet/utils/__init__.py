"""Files, tables of text, errors and progress: helpers for all other packages."""
