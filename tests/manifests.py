"""A manifest as an export writes it."""

LATENCY = {"1": {"median": 1.5, "p95": 2.5}, "2": {"median": 1.0, "p95": 2}}


def sample():
    """Returns a valid manifest with one artifact."""
    artifact = {
        "file": "model-float32.tflite",
        "format": "tflite",
        "precision": "float32",
        "batch": None,
        "bytes": 5,
        "sha256": "a" * 64,
        "input": {"name": "image", "shape": [None, 28, 28, 1], "dtype": "uint8"},
        "output": {"name": "probabilities", "shape": [None, 10], "dtype": "float32"},
        "images": 10,
        "max_difference": 1e-6,
        "mean_difference": 1e-7,
        "agreement": 1.0,
        "accuracy": 0.93,
        "accuracy_change": -0.001,
        "tolerance": {"agreement": 1.0},
        "failures": [],
        "published_by_force": False,
        "latency_ms": LATENCY,
        "operators": {"CONV_2D": 20},
    }
    return {
        "manifest_version": 1,
        "created": "2026-11-22T04:30:00+00:00",
        "model": {"name": "resnet18", "parameters": 11_184_780},
        "source": {"path": "runs/demo/model.keras", "sha256": "b" * 64},
        "tool_versions": {"numpy": "2.3.4", "torch": None},
        "machine": {"cores": 2},
        "class_names": ["shirt", "coat"],
        "data": {"dataset": "mine", "split": "test", "images": 10, "fingerprint": "c" * 16},
        "keras": {"accuracy": 0.94, "latency_ms": LATENCY},
        "reference": {"file": "reference.npz", "bytes": 7, "sha256": "d" * 64},
        "artifacts": [artifact],
    }
