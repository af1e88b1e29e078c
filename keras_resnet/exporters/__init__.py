"""Export to SavedModel, TFLite and ONNX, with verification.

- `formats`: the table of formats and precisions, with the tolerance of each.
- `source`, `float32`, `graph`: the exported model, as one TensorFlow function.
- `calibration`: training images for int8.
- `saved_model`, `tflite`, `onnx`: one module writes each format.
- `reference`: the predictions of the Keras model for the test images.
- `verify_artifact`: an artifact, run by its real runtime, compared with that reference.
- `exporter`: `keras-resnet export`; `folder`, `earlier`: the folder that it writes or adds to.
- `verify_folder`: `keras-resnet verify`, the same checks for an export folder anywhere.
- `web`, `web_runtime`, `web_html`: the page that runs the network in a browser; its scripts and its
  style are in `page/`.
- `summary`: results as tables of text.
"""
