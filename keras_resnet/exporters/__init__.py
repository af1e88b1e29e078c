"""Files that leave, each with the proof that it is still the same network.

`formats` is the table of what can be written and of the gates it must pass; `graph` is the one
function that every format holds; `saved_model`, `tflite` and `onnx` write it; `proof` asks the real
runtimes; `exporter` puts a folder together, and `verifier` checks one again, anywhere.
"""
