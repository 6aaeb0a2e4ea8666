"""The training problems that the benchmarks time.

Each has a Flax model and synthetic data, with one fixed batch of them.  Nothing is
downloaded, since a step takes the same time whatever the pictures show; but the data
can be learned, so that the losses fall and a broken optimizer is noticed.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import lbopt
from experiments.models import resnet

Register = Callable[[jax.Array, jax.Array], Any]
"""Declares the loss to a curvature library: ``(outputs, targets) -> anything``."""


class Workload(NamedTuple):
    """A model, its variables, and batches of ``inputs`` and ``targets``.

    Outputs are the logits of a softmax (``"categorical"``, with classes as targets) or
    of independent sigmoids (``"bernoulli"``).
    """

    name: str
    description: str
    params: Any
    model_state: Any
    batch: dict[str, jax.Array]
    sample: Callable[[jax.Array], dict[str, jax.Array]]
    predict: Callable[[Any, Any, jax.Array], tuple[jax.Array, Any]]
    distribution: Literal["categorical", "bernoulli"]

    def loss(
        self, params: Any, model_state: Any, batch: Any, register: Register
    ) -> tuple[jax.Array, Any]:
        """Returns the mean loss over the batch, and the new model state."""
        outputs, model_state = self.predict(params, model_state, batch["inputs"])
        targets = batch["targets"]
        register(outputs, targets)
        if self.distribution == "categorical":
            losses = optax.softmax_cross_entropy_with_integer_labels(outputs, targets)
        else:
            losses = optax.sigmoid_binary_cross_entropy(outputs, targets).sum(-1)
        return jnp.mean(losses), model_state

    def train_loss(
        self, params: Any, model_state: Any, batch: Any, rng: jax.Array
    ) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]:
        """Returns the loss in the form that ``lbopt.training`` takes."""
        del rng
        loss, model_state = self.loss(params, model_state, batch, self._likelihood)
        return loss, (model_state, {})

    def _likelihood(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        del targets
        return lbopt.likelihood(outputs, self.distribution)


def image_classifier(
    name: str, model: resnet.ResNet, image_size: int, batch_size: int
) -> Workload:
    """Returns a residual network on noisy copies of one picture for each class."""
    class_rng, batch_rng, init_rng = jax.random.split(jax.random.key(0), 3)
    shape = (image_size, image_size, 3)
    prototypes = jax.random.normal(class_rng, (model.num_classes, *shape))

    @jax.jit
    def sample(rng: jax.Array) -> dict[str, jax.Array]:
        label_rng, noise_rng = jax.random.split(rng)
        labels = jax.random.randint(label_rng, (batch_size,), 0, model.num_classes)
        noise = jax.random.normal(noise_rng, (batch_size, *shape))
        return {"inputs": prototypes[labels] + 0.5 * noise, "targets": labels}

    return _classifier(name, model, sample(batch_rng), sample, init_rng)


def random_images(
    name: str, model: resnet.ResNet, image_size: int, batch_size: int
) -> Workload:
    """Returns a residual network on noise and random classes, in the model's dtype.

    For large images and many classes, whose pictures would fill the device's memory.
    The loss of one batch falls all the same.
    """
    batch_rng, init_rng = jax.random.split(jax.random.key(0))
    shape = (batch_size, image_size, image_size, 3)

    @jax.jit
    def sample(rng: jax.Array) -> dict[str, jax.Array]:
        label_rng, noise_rng = jax.random.split(rng)
        labels = jax.random.randint(label_rng, (batch_size,), 0, model.num_classes)
        return {
            "inputs": jax.random.normal(noise_rng, shape, model.dtype),
            "targets": labels,
        }

    return _classifier(name, model, sample(batch_rng), sample, init_rng)


def _classifier(
    name: str,
    model: resnet.ResNet,
    batch: dict[str, jax.Array],
    sample: Callable[[jax.Array], dict[str, jax.Array]],
    rng: jax.Array,
) -> Workload:
    """Returns a residual network on given batches."""
    batch_size, image_size = batch["inputs"].shape[:2]
    init = jax.jit(functools.partial(model.init, train=True))
    variables = dict(init(rng, batch["inputs"]))
    params = variables.pop("params")

    def predict(params, model_state, inputs):
        return model.apply(
            {"params": params, **model_state},
            inputs,
            train=True,
            mutable=list(model_state),
        )

    return Workload(
        name=name,
        description=(
            f"ResNet + BatchNorm, {image_size}×{image_size}×3, "
            f"{model.num_classes} classes, batch {batch_size}"
        ),
        params=params,
        model_state=variables,
        batch=batch,
        sample=sample,
        predict=predict,
        distribution="categorical",
    )


class ImageShapes(NamedTuple):
    """A classifier of images as shapes, without an array.

    Attributes:
      loss_fn: the loss in the form that ``lbopt.training`` takes.
      params: the parameters.
      model_state: the model's other collections.
      batch: returns a batch of so many examples.
      rng: a key.
    """

    loss_fn: Callable[..., Any]
    params: Any
    model_state: Any
    batch: Callable[[int], dict[str, Any]]
    rng: Any


def image_shapes(model: resnet.ResNet, image_size: int, dtype: Any) -> ImageShapes:
    """Returns a classifier of square images as shapes, for compiling alone."""

    def batch(examples: int) -> dict[str, Any]:
        shape = (examples, image_size, image_size, 3)
        return {
            "x": jax.ShapeDtypeStruct(shape, dtype),
            "y": jax.ShapeDtypeStruct((examples,), jnp.int32),
        }

    def loss_fn(params: Any, model_state: Any, batch: Any, rng: Any) -> Any:
        del rng
        variables = {"params": params, **model_state}
        logits, model_state = model.apply(
            variables, batch["x"], train=True, mutable=list(model_state)
        )
        lbopt.likelihood(logits, "categorical")
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        return jnp.mean(losses), (model_state, {})

    rng = jax.eval_shape(lambda: jax.random.key(0))
    init = jax.eval_shape(lambda r, x: model.init(r, x, train=True), rng, batch(2)["x"])
    model_state = dict(init)
    params = model_state.pop("params")
    return ImageShapes(loss_fn, params, model_state, batch, rng)


class Autoencoder(nn.Module):
    """Dense layers of ``sizes`` units from input to code and back, with tanh."""

    sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits of the reconstruction of ``x [n, sizes[0]]``."""
        code = len(self.sizes) - 2
        for i, size in enumerate((*self.sizes[1:], *self.sizes[-2::-1])):
            if i not in (0, code + 1):  # the input and the code are linear
                x = jnp.tanh(x)
            x = nn.Dense(size)(x)
        return x


def autoencoder(
    sizes: tuple[int, ...] = (784, 1000, 500, 250, 30),
    batch_size: int = 512,
) -> Workload:
    """Returns the deep autoencoder of Hinton & Salakhutdinov 2006 on grey pictures."""
    code_rng, map_rng, init_rng = jax.random.split(jax.random.key(0), 3)
    mixing = jax.random.normal(map_rng, (sizes[-1], sizes[0]))

    @jax.jit
    def sample(rng: jax.Array) -> dict[str, jax.Array]:
        codes = jax.random.normal(rng, (batch_size, sizes[-1]))
        inputs = jax.nn.sigmoid(codes @ mixing)
        return {"inputs": inputs, "targets": inputs}

    batch = sample(code_rng)
    model = Autoencoder(sizes)
    params = jax.jit(model.init)(init_rng, batch["inputs"])["params"]

    def predict(params, model_state, inputs):
        outputs: Any = model.apply({"params": params}, inputs)
        return outputs, model_state

    return Workload(
        name="autoencoder",
        description=f"MLP {'-'.join(map(str, sizes))} mirrored, batch {batch_size}",
        params=params,
        model_state={},
        batch=batch,
        sample=sample,
        predict=predict,
        distribution="bernoulli",
    )


TINY = resnet.ResNet(
    num_classes=3, stage_sizes=(1,), block=resnet.BasicBlock, width=4, stem_reduction=1
)
"""A network of one block."""


def tiny(batch_size: int = 8) -> Workload:
    """Returns ``TINY`` on 8×8 pictures, to try a benchmark out."""
    return image_classifier("tiny", TINY, 8, batch_size)


def resnet20(batch_size: int = 128) -> Workload:
    """Returns the CIFAR network."""
    model = resnet.ResNet20(num_classes=10)
    return image_classifier("resnet20", model, 32, batch_size)


def resnet50(batch_size: int = 32) -> Workload:
    """Returns the ImageNet network, on pictures small enough for a CPU."""
    model = resnet.ResNet50(num_classes=100)
    return image_classifier("resnet50", model, 64, batch_size)


WORKLOADS: dict[str, Callable[..., Workload]] = {
    "resnet20": resnet20,
    "autoencoder": autoencoder,
    "resnet50": resnet50,
    "tiny": tiny,
}
"""Functions that make the workloads, by name; each takes ``batch_size=``."""
