"""Checks of files from elsewhere, made before a library parses them.

`common` has the rules for every file; `zip_files`, `hdf5_files`, `keras_files` and `torch_files`
those of one format each; `checksums` and `manifest` those of the files of an export.

| file | callers of its checks |
| --- | --- |
| `.keras` | `archive.load_model`, `archive.load_weights`, `weights.applications` |
| `torch.save`, safetensors | `weights.checkpoint.read_checkpoint` |
| `.tflite`, `.onnx` | `runtimes.open_runtime`, which then tries the file in another process |
| JSON of a published repository | `weights.configuration`, with the types of `schema` |
| manifest | `manifest.read_manifest`, with the types of `schema` |
"""
