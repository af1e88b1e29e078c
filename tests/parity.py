"""How far our networks are from other people's: what the tests and `benchmarks/parity.py` measure.

A `Network` says, as data, which network of another library is which of ours. `build_pair` builds
both with the same random weights, and the functions below it measure a `Pair`. Every difference is
max|ours − theirs| / max|theirs| of one tensor, and the largest is what counts.
"""

import contextlib
import dataclasses
import gc
from unittest import mock

import keras
import numpy as np
import references
import tensorflow as tf
import torch
from torch import nn
from torch.nn import functional

from keras_resnet import weights
from keras_resnet.models import SPECS, build_resnet, count_parameters

# The optimizer reads it as float32, whatever the policy: 0.9 itself would be another number.
MOMENTUM = float(np.float32(0.9))

# What is measured on, (size, batch): every size and every batch; what trains takes more images, so
# that the last stage's BatchNorm has statistics worth the name.
IMAGES = ((64, 3), (97, 1), (224, 1))
GRADIENT_IMAGES = (64, 8)
STATISTICS_IMAGES = (64, 3)
TRAJECTORY_IMAGES = (33, 8)
# Rate, and whether ReLUs are on the same sides, see `Sides`. Rates are what float32 holds exactly.
TRAJECTORIES = {"float32": (2**-10, True), "float64": (2**-8, False)}


@dataclasses.dataclass(frozen=True)
class Network:
    """A network of another library, and what it is among ours.

    Attributes:
        source: A row of `references.SOURCES`.
        name: Its name there.
        spec: A row of `SPECS`.
        variant: A row of `VARIANTS`.
        options: Further arguments of the source's factory.
    """

    source: str
    name: str
    spec: str
    variant: str = "torchvision"
    options: tuple = ()

    def __str__(self):
        changed = "".join(f" {name}" for name, value in self.options if value)
        return f"{self.source} {self.name}{changed}"


PAPER_STRIDE = (("downsample_in_bottleneck", True),)

NETWORKS = (
    *(
        Network("torchvision", name, name)
        for name in (
            *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
            *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
            *("wide_resnet50_2", "wide_resnet101_2"),
        )
    ),
    *(
        Network("timm", name, name)
        for name in (
            *("resnet18", "resnet50", "resnet200"),
            *("resnet18d", "resnet34d", "resnet50d", "resnet101d", "seresnet50"),
        )
    ),
    *(
        Network("timm", f"resnetv2_{depth}", f"resnet{depth}", "v2")
        for depth in ("18", "34", "50", "50d", "101", "152")
    ),
    *(Network("huggingface", name, name) for name in references.CONFIGS),
    *(
        Network("huggingface", name, name, "v1", PAPER_STRIDE)
        for name in ("resnet50", "resnet101", "resnet152")
    ),
    *(
        Network("keras.applications", f"ResNet{depth}{suffix}", f"resnet{depth}", variant)
        for suffix, variant in (("", "keras_v1"), ("V2", "keras_v2"))
        for depth in (50, 101, 152)
    ),
    *(
        Network("paper", name, name.replace("plain", "resnet"), variant)
        for name in references.SOURCES["paper"]
        for variant in ("plain" if "plain" in name else "cifar",)
    ),
)


def random_images(size, count, seed=0):
    """Returns normal images, channels last, in float32: a network that reads float32 loses none."""
    random = np.random.default_rng((seed, size, count))
    return random.normal(size=(count, size, size, 3)).astype("float32")


def random_labels(count, seed=0):
    """Returns labels of ten classes."""
    return np.random.default_rng((seed, count)).integers(0, 10, count)


def learnable_batches(steps, size, count, seed=0):
    """Returns `steps` batches of images and labels: a pattern for each class, and noise."""
    patterns = random_images(size, 10, seed)
    labels = [random_labels(count, (seed, step)) for step in range(steps)]
    noise = [random_images(size, count, (seed, step)) for step in range(steps)]
    return [(patterns[y] + x, y) for x, y in zip(noise, labels, strict=True)]


# Two libraries' networks with one set of questions. Images and activations are channels last,
# whatever the library; `stages` are the numbers, from 1, of each stage and its last block.


class KerasNetwork:
    """A Keras model, ours or keras.applications'.

    Attributes:
        model: The model.
        layout: The row of `weights.LAYOUTS` that its names are of; None for our own.
    """

    def __init__(self, model, stages, layout=None):
        self.model = model
        self.layout = layout
        outputs = [model.get_layer(self._block(*last)).output for last in stages]
        self.walk = keras.Function(model.input, [*outputs, *model.outputs])
        for layer in model.layers:
            # keras.applications leaves it at 0.99; no output depends on it.
            if layout and isinstance(layer, keras.layers.BatchNormalization):
                layer.momentum = 0.9

    def _block(self, stage, block):
        own = f"stage{stage}_block{block}"
        return _block_prefix(self.layout, stage, block) + "out" if self.layout else own

    @property
    def num_parameters(self):
        """The number of trainable parameters."""
        return count_parameters(self.model)

    def activations(self, images):
        """Returns what every stage gives in inference, and last the logits."""
        return [np.asarray(output) for output in self.walk(tf.constant(images))]

    def gradients(self, images, labels, sides=None):
        """Returns the loss, each weight's gradient by name, and the `Sides`, all in training.

        Args:
            images: Images.
            labels: Their labels.
            sides: The `Sides` that the ReLUs are to be on, of another network.
        """
        variables = self.model.trainable_variables
        with keras_relus(sides) as sides, tf.GradientTape() as tape:
            logits = self.model(images, training=True)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
            loss = tf.reduce_mean(losses)
        gradients = tape.gradient(loss, [variable.value for variable in variables])
        named = {v.path: g.numpy() for v, g in zip(variables, gradients, strict=True)}
        return float(loss), named, sides

    def statistics(self, images):
        """Returns each BatchNorm's statistics by name after one more batch."""
        self.model(images, training=True)
        return {v.path: np.array(v) for v in self.model.non_trainable_variables}

    def sgd(self, learning_rate, compiled=False):
        """Returns a function like `gradients` that then makes a step of SGD with momentum.

        Args:
            learning_rate: The rate.
            compiled: Whether the step runs as one graph: in a fifth of the time, without `Sides`.
        """
        optimizer = keras.optimizers.SGD(learning_rate, momentum=MOMENTUM)
        variables = self.model.trainable_variables
        optimizer.build(variables)

        @tf.function
        def compiled_step(images, labels):
            with tf.GradientTape() as tape:
                logits = self.model(images, training=True)
                losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
                loss = tf.reduce_mean(losses)
            optimizer.apply(tape.gradient(loss, [v.value for v in variables]), variables)
            return loss

        if compiled:
            return lambda images, labels: (float(compiled_step(images, labels)), Sides())

        def step(images, labels, sides=None):
            loss, gradients, sides = self.gradients(images, labels, sides)
            optimizer.apply([tf.constant(gradients[v.path]) for v in variables], variables)
            return loss, sides

        return step

    def state(self):
        """Returns a copy of all that training changes."""
        return self.model.get_weights()

    def restore(self, state):
        """Takes back what `state` returned."""
        self.model.set_weights(state)


class TorchNetwork:
    """A PyTorch network; see `KerasNetwork`, whose questions it answers."""

    def __init__(self, net, stages, layout):
        self.net = net.eval()
        self.layout = layout
        names = [_block_prefix(layout, *last).rstrip(".") for last in stages]
        self.stages = [net.get_submodule(name) for name in names]
        for module in net.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False  # or a hook finds its input overwritten
        self.dtype = next(net.parameters()).dtype

    @property
    def num_parameters(self):
        return sum(parameter.numel() for parameter in self.net.parameters())

    def _logits(self, images):
        outputs = self.net(torch.from_numpy(_channels_first(images)).to(self.dtype))
        return getattr(outputs, "logits", outputs)

    def activations(self, images):
        seen = []

        def keep(module, args, output):
            seen.append(output.numpy().transpose(0, 2, 3, 1))

        with _hooks(self.stages, keep), torch.no_grad():
            logits = self._logits(images).numpy()
        return [*seen, logits]

    def gradients(self, images, labels, sides=None):
        sides = Sides(sides)

        def take(module, args, output):
            side = sides.side(args[0].detach().numpy(), _channels_first)
            if sides.imposed is not None:
                output = args[0] * torch.from_numpy(side).to(self.dtype)
            return output

        self.net.train().zero_grad()
        with _hooks([m for m in self.net.modules() if isinstance(m, nn.ReLU)], take):
            loss = functional.cross_entropy(self._logits(images), torch.from_numpy(labels))
        loss.backward()
        gradients = {name: p.grad.numpy() for name, p in self.net.named_parameters()}
        return loss.item(), gradients, sides

    def statistics(self, images):
        norms = {n: m for n, m in self.net.named_modules() if isinstance(m, nn.BatchNorm2d)}
        before = {name: module.running_var.numpy().copy() for name, module in norms.items()}
        counts = []

        def count(module, args, output):
            counts.append((module, args[0].numel() // args[0].shape[1]))

        with _hooks(norms.values(), count), torch.no_grad():
            self.net.train()(torch.from_numpy(_channels_first(images)).to(self.dtype))
        counts = dict(counts)
        found = {}
        for name, module in norms.items():
            found[f"{name}.running_mean"] = module.running_mean.numpy().copy()
            # PyTorch keeps the unbiased variance of a batch of n numbers, Keras the biased one:
            # (n - 1) / n of what the batch has added.
            old = before[name] * (1 - module.momentum)
            n = counts[module]
            found[f"{name}.running_var"] = old + (module.running_var.numpy() - old) * (n - 1) / n
        return found

    def sgd(self, learning_rate):
        optimizer = torch.optim.SGD(self.net.parameters(), learning_rate, momentum=MOMENTUM)

        def step(images, labels, sides=None):
            loss, _, sides = self.gradients(images, labels, sides)
            optimizer.step()
            return loss, sides

        return step

    def state(self):
        return {name: tensor.clone() for name, tensor in self.net.state_dict().items()}

    def restore(self, state):
        self.net.load_state_dict(state)
        self.net.eval().zero_grad()


def _block_prefix(layout, stage, block):
    """Returns what the names within a block begin with in `layout`."""
    indices = {"stage0": stage - 1, "stage2": stage + 1, "block0": block - 1}
    return layout.block.format(stage=stage, block=block, **indices)


def _channels_first(array):
    if array.ndim == 2:  # a Dense layer's, which is a 1×1 convolution there
        return array[:, :, None, None]
    return np.ascontiguousarray(array.transpose(0, 3, 1, 2))


@contextlib.contextmanager
def _hooks(modules, function):
    handles = [module.register_forward_hook(function) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Sides:
    """On which side of its kink every ReLU of a network is, in the order in which they run.

    An input within rounding of 0 can be active in one library and not in the other. The derivative
    jumps there, so that the gradients differ by some percent and neither is wrong. That happens in
    every deep network: it has millions of inputs. So the second network takes the sides of the
    first, and what would have differed is measured by itself.

    Attributes:
        active: Where each ReLU was active.
        imposed: Where each is to be active; None leaves it to the input.
        kink: The largest |input|, relative to its tensor's largest, whose own side was another.
        changed: The number of such inputs.
    """

    def __init__(self, imposed=None):
        self.active = []
        self.imposed = None if imposed is None else imposed.active
        self.kink = 0.0
        self.changed = 0

    def side(self, inputs, convert=lambda array: array):
        """Returns where the next ReLU is active, of the imposed ones by `convert`."""
        own = inputs > 0
        self.active.append(own)
        if self.imposed is None:
            return own
        side = convert(self.imposed[len(self.active) - 1])
        if (other := side != own).any():
            sizes = np.abs(inputs)
            self.kink = max(self.kink, float(sizes[other].max() / sizes.max()))
            self.changed += int(other.sum())
        return side


@contextlib.contextmanager
def keras_relus(imposed=None):
    """Lets every ReLU that runs report its side, or take that of `imposed`; yields the `Sides`."""
    sides = Sides(imposed)
    own_relu = tf.nn.relu  # what all of Keras's ways to a ReLU end in, on TensorFlow

    def relu(x):
        side = sides.side(x.numpy())
        return own_relu(x) if sides.imposed is None else x * tf.cast(side, x.dtype)

    with mock.patch.object(tf.nn, "relu", relu):
        yield sides


# Pairs


@dataclasses.dataclass
class Pair:
    """A network of another library, and ours with its weights.

    Attributes:
        network: The row they were built from.
        dtype: "float32" or "float64".
        ours: Our network.
        theirs: The other one.
    """

    network: Network
    dtype: str
    ours: KerasNetwork
    theirs: KerasNetwork | TorchNetwork

    @property
    def stages(self):
        """The names of what `activations` return."""
        return [*(f"stage{n}" for n, _ in enumerate(SPECS[self.network.spec].blocks, 1)), "logits"]


def build_pair(network, dtype="float32", seed=0, variant=None):
    """Builds a `Pair` with random weights and random BatchNorm statistics.

    Args:
        network: A `Network`.
        dtype: "float32" or "float64", of both.
        seed: What the weights depend on.
        variant: Another variant for ours than the network's.
    """
    gc.collect()  # of pairs that are in use no more; a model refers to itself
    keras.backend.clear_session()
    keras.config.set_dtype_policy(dtype)
    try:
        reference = _build_reference(network, dtype, seed)
        variant = variant or network.variant
        model = build_resnet(SPECS[network.spec], (None, None, 3), 1000, variant=variant)
    finally:
        keras.config.set_dtype_policy("float32")
    of_keras = isinstance(reference, keras.Model)
    source = reference if of_keras else reference.state_dict()
    tensors = weights.read_tensors(source)
    loaded = weights.load_tensors(model, tensors)
    layout = weights.LAYOUTS[loaded.layout]
    stages = list(enumerate(SPECS[network.spec].blocks, start=1))
    wrap = KerasNetwork if of_keras else TorchNetwork
    theirs = wrap(reference, stages, layout)
    return Pair(network, dtype, KerasNetwork(model, stages), theirs)


def _build_reference(network, dtype, seed):
    keras.utils.set_random_seed(seed)
    torch.manual_seed(seed)
    reference = references.FACTORIES[network.source](network.name, **dict(network.options))
    if isinstance(reference, keras.Model):
        return references.randomize_keras(reference, seed)
    return references.randomize(reference, seed).to(getattr(torch, dtype))


@contextlib.contextmanager
def restored(pair):
    """Undoes what is done within to the pair's weights and statistics."""
    states = [(network, network.state()) for network in (pair.ours, pair.theirs)]
    try:
        yield
    finally:
        for network, state in states:
            network.restore(state)


# Measurements


def relative_difference(ours, theirs, scale=None):
    """Returns max|ours − theirs| / max|theirs|, or / `scale`; infinity where only theirs is 0."""
    if np.shape(ours) != np.shape(theirs):
        raise ValueError(f"shapes {np.shape(ours)} and {np.shape(theirs)}")
    difference = np.abs(np.subtract(ours, theirs, dtype="float64")).max()
    scale = np.abs(theirs).max() if scale is None else scale
    if scale == 0:
        return 0.0 if difference == 0 else np.inf
    return float(difference / scale)


def activation_differences(pair, images):
    """Returns the relative difference of each stage's output, and of the logits, by name."""
    both = zip(pair.ours.activations(images), pair.theirs.activations(images), strict=True)
    differences = [relative_difference(ours, theirs) for ours, theirs in both]
    return dict(zip(pair.stages, differences, strict=True))


@dataclasses.dataclass(frozen=True)
class GradientDifference:
    """What `gradient_difference` has measured.

    Attributes:
        value: The largest relative difference.
        path: The weight that has it.
        kink: See `Sides`.
        changed: See `Sides`.
    """

    value: float
    path: str
    kink: float
    changed: int


def gradient_difference(pair):
    """Returns how far the gradients of all weights are apart in training, ReLUs on the same sides.

    The loss is the mean cross-entropy, and BatchNorm takes the batch's statistics.
    """
    size, count = GRADIENT_IMAGES
    images, labels = random_images(size, count), random_labels(count)
    with restored(pair):
        _, ours, sides = pair.ours.gradients(images, labels)
        _, theirs, own_sides = pair.theirs.gradients(images, labels, sides)
    if len(own_sides.active) != len(sides.active) or len(ours) != len(theirs):
        raise ValueError("not the same number of ReLUs, or of weights")
    layout = pair.theirs.layout
    theirs = {path: layout.to_ours(path, theirs.pop(layout.name(path))) for path in ours}
    differences = {
        path: relative_difference(gradient, theirs[path], _gradient_scale(theirs, path))
        for path, gradient in ours.items()
    }
    worst = max(differences, key=differences.get)
    return GradientDifference(differences[worst], worst, own_sides.kink, own_sides.changed)


def _gradient_scale(gradients, path):
    """Returns what a difference from the gradient of the weight `path` is relative to.

    Where BatchNorm takes off what a convolution's bias adds, the bias has gradient zero, and both
    libraries' numbers are rounding alone. The kernel's is summed from the same numbers.
    """
    layer, _, variable = path.rpartition("/")
    names = ("kernel", "bias") if "conv" in layer and variable == "bias" else (variable,)
    return max(np.abs(gradients[f"{layer}/{name}"]).max() for name in names)


def batch_norm_difference(pair):
    """Returns the relative difference of all BatchNorm statistics after one batch."""
    images = random_images(*STATISTICS_IMAGES)
    with restored(pair):
        ours, theirs = pair.ours.statistics(images), pair.theirs.statistics(images)
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} statistics beside {len(theirs)}")
    name = pair.theirs.layout.name
    return max(relative_difference(ours[path], theirs[name(path)]) for path in ours)


@dataclasses.dataclass(frozen=True)
class TrajectoryDifference:
    """What `trajectory_difference` has measured.

    Attributes:
        value: The largest relative difference of a loss.
        losses: The other network's.
        kink: The largest of `Sides`.
    """

    value: float
    losses: list
    kink: float


def trajectory_difference(pair, steps=20):
    """Returns how far the losses of SGD with momentum 0.9 are apart, each of another batch.

    Rate and sides are those of `TRAJECTORIES`. In float64 each library is left alone. In float32
    the ReLUs are on the same sides: one input in a million that is active in one library only is
    the start of two trainings that part. PyTorch's own part as well: where the stem's weights of
    two of its runs differ in the last bit, losses of a ResNet-50 come to differ by 5e-3 and of a
    ResNet-101 by 2e-2, at this very rate and on these images.
    """
    learning_rate, share_sides = TRAJECTORIES[pair.dtype]
    rows = []
    with restored(pair):
        ours = pair.ours.sgd(learning_rate, compiled=not share_sides)
        theirs = pair.theirs.sgd(learning_rate)
        for images, labels in learnable_batches(steps, *TRAJECTORY_IMAGES):
            our_loss, sides = ours(images, labels)
            their_loss, own_sides = theirs(images, labels, sides if share_sides else None)
            rows.append((abs(our_loss / their_loss - 1), their_loss, own_sides.kink))
    differences, losses, kinks = zip(*rows, strict=True)
    return TrajectoryDifference(max(differences), list(losses), max(kinks))
