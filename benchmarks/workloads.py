"""The training problems that the benchmarks time.

Each is a source of made-up data, one fixed batch of it and a Flax model.  Nothing is
downloaded: a step takes the same time whatever the pictures show.  The data have a
structure, so that the losses fall and a broken optimizer is noticed.
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
"""Tells a library about the loss: ``(outputs, targets) -> anything``."""


class Workload(NamedTuple):
    """A model, its variables, and batches.

    Attributes:
      name: its name on the command line.
      description: model, size of the inputs, batch size.
      params: the parameters.
      model_state: the other collections; ``{}`` if there are none.
      batch: ``{"inputs": ..., "targets": ...}``, one batch.
      sample: ``key -> batch``, others like it.
      predict: ``(params, model_state, inputs) -> (outputs, model_state)``.
      distribution: ``categorical``, logits of a softmax with classes as targets, or
        ``bernoulli``, logits of independent sigmoids.
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
        """The mean loss over the batch, and the new model state."""
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
        """The loss as ``lbopt.training`` takes it."""
        del rng
        loss, model_state = self.loss(params, model_state, batch, self._likelihood)
        return loss, (model_state, {})

    def _likelihood(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        del targets
        return lbopt.likelihood(outputs, self.distribution)


def image_classifier(
    name: str, model: resnet.ResNet, image_size: int, batch_size: int
) -> Workload:
    """A residual network with BatchNorm on noisy pictures of its classes.

    Args:
      name: the workload's name.
      model: the network.
      image_size: height and width; the pictures have three channels.
      batch_size: pictures in the batch.

    Returns:
      The workload.
    """
    class_rng, batch_rng, init_rng = jax.random.split(jax.random.key(0), 3)
    shape = (image_size, image_size, 3)
    prototypes = jax.random.normal(class_rng, (model.num_classes, *shape))

    @jax.jit
    def sample(rng: jax.Array) -> dict[str, jax.Array]:
        label_rng, noise_rng = jax.random.split(rng)
        labels = jax.random.randint(label_rng, (batch_size,), 0, model.num_classes)
        noise = jax.random.normal(noise_rng, (batch_size, *shape))
        return {"inputs": prototypes[labels] + 0.5 * noise, "targets": labels}

    batch = sample(batch_rng)
    init = jax.jit(functools.partial(model.init, train=True))
    variables = dict(init(init_rng, batch["inputs"]))
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


class Autoencoder(nn.Module):
    """A chain of dense layers to the last of ``sizes`` and back, tanh between.

    Attributes:
      sizes: units of the layers from the input to the code.
    """

    sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of the reconstruction of ``x [n, sizes[0]]``."""
        code = len(self.sizes) - 2
        for i, size in enumerate((*self.sizes[1:], *self.sizes[-2::-1])):
            if i not in (0, code + 1):  # neither on the input nor on the code
                x = jnp.tanh(x)
            x = nn.Dense(size)(x)
        return x


def autoencoder(
    name: str = "autoencoder",
    sizes: tuple[int, ...] = (784, 1000, 500, 250, 30),
    batch_size: int = 512,
) -> Workload:
    """The deep autoencoder of Hinton & Salakhutdinov 2006 on grey pictures.

    Args:
      name: the workload's name.
      sizes: units of the layers from the input to the code.
      batch_size: examples in the batch.

    Returns:
      The workload.
    """
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
        name=name,
        description=f"MLP {'-'.join(map(str, sizes))} mirrored, batch {batch_size}",
        params=params,
        model_state={},
        batch=batch,
        sample=sample,
        predict=predict,
        distribution="bernoulli",
    )


def tiny(batch_size: int = 8) -> Workload:
    """A one-block network on 8×8 pictures, for trying a benchmark out."""
    model = resnet.ResNet(
        num_classes=3,
        stage_sizes=(1,),
        block=resnet.BasicBlock,
        width=4,
        stem_reduction=1,
    )
    return image_classifier("tiny", model, 8, batch_size)


def resnet20(batch_size: int = 128) -> Workload:
    """The CIFAR network."""
    model = resnet.ResNet20(num_classes=10)
    return image_classifier("resnet20", model, 32, batch_size)


def resnet50(batch_size: int = 32) -> Workload:
    """The ImageNet network on pictures that a processor without accelerator bears."""
    model = resnet.ResNet50(num_classes=100)
    return image_classifier("resnet50", model, 64, batch_size)


WORKLOADS: dict[str, Callable[..., Workload]] = {
    "resnet20": resnet20,
    "autoencoder": autoencoder,
    "resnet50": resnet50,
    "tiny": tiny,
}
"""Makers of the workloads by name; each takes ``batch_size=``."""
