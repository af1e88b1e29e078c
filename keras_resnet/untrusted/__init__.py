"""Checks of files from elsewhere, made before a library parses them.

`common` has the rules for every file; `zip_files`, `hdf5_files`, `keras_files` and `torch_files`
those of one format each; `checksums` and `manifest` those of the files of an export.
"""
