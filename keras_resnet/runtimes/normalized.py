"""A model of normalised floats, together with the normalisation: a model of raw images."""

import numpy as np

from keras_resnet.preprocessing import NORMALIZATIONS, find_normalization, with_normalization
from keras_resnet.runtimes.base import Runtime, Tensor
from keras_resnet.runtimes.keras_file import KerasRuntime
from keras_resnet.utils.errors import InputError

# How far the range of a quantized input, which comes from calibration images, may differ from that
# of a normalisation, as a share of its width.
_RANGE_TOLERANCE = 0.02


def normalized(runtime, normalize=None):
    """Returns a runtime of raw images for one that takes floats.

    Args:
        runtime: A `Runtime`.
        normalize: A row of `NORMALIZATIONS`. None leaves the model unchanged; for a quantized
            input it selects the row whose numbers have the range of that input.

    Raises:
        InputError: If the model takes raw images already, or no row has the range of its
            quantized input.
    """
    if normalize is None and runtime.input_range is None:
        return runtime
    if normalize == "0-255" and runtime.takes_images:
        return runtime  # whole numbers in 0 … 255 are images
    shape = runtime.input.shape
    if len(shape) != 4 or shape[-1] not in (1, 3):
        return runtime  # `Predictor` refuses it: it takes no images
    normalize = normalize or _find_by_range(runtime)
    if isinstance(runtime, KerasRuntime):
        model = with_normalization(runtime.model, normalize)
        return KerasRuntime(model, runtime.metadata, runtime.path, runtime.threads)
    return NormalizedRuntime(runtime, normalize)


def _find_by_range(runtime):
    for name, row in NORMALIZATIONS.items():
        if all(isinstance(value, float) for value in row.values()):
            low, high = ((end - row["mean"]) / row["std"] for end in (0, 1))
            differences = np.abs(np.subtract(runtime.input_range, (low, high)))
            if (differences <= _RANGE_TOLERANCE * (high - low)).all():
                return name
    low, high = runtime.input_range
    raise InputError(
        f"{runtime.name}: its quantized input represents numbers from {low:.4g} to {high:.4g}, as "
        f"no normalisation does: name one with --normalize, of {', '.join(NORMALIZATIONS)}"
    )


class NormalizedRuntime(Runtime):
    """A model of normalised floats that gets raw images; see `Runtime`.

    Args:
        runtime: The `Runtime` of the model.
        normalize: A row of `NORMALIZATIONS`.
    """

    def __init__(self, runtime, normalize):
        metadata = {**runtime.metadata, "takes_raw_images": True}
        super().__init__(runtime.path, metadata, runtime.threads)
        if "float" not in runtime.input.dtype:
            raise InputError(
                f"{self.name}: --normalize needs a model that takes floats, this one takes "
                f"{runtime.input.dtype}: leave --normalize {normalize} out"
            )
        self._runtime = runtime
        self.format, self.operators = runtime.format, runtime.operators
        self.input = Tensor(runtime.input.name, runtime.input.shape, "uint8")
        self.output = runtime.output
        self.graph_kind = runtime.graph_kind
        channels = runtime.input.shape[-1]
        row = {"reverse_channels": False, **find_normalization(normalize, channels)}
        self._mean, self._std = (np.asarray(row[name], "float32") for name in ("mean", "std"))
        self._step = -1 if row["reverse_channels"] else 1

    def call(self, images):
        """Returns the output for one batch of raw images."""
        floats = (images.astype("float32") / 255 - self._mean) / self._std
        return self._runtime.call(floats[..., :: self._step].astype(self._runtime.input.dtype))

    def close(self):
        """Closes the runtime of the model."""
        self._runtime.close()
