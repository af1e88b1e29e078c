"""Checks of files from elsewhere, made before a library parses them."""
