"""The problems: images with BatchNorm, and an autoencoder without."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lbopt
from experiments.data import grey, splits
from experiments.models import resnet
from experiments.models.autoencoder import Autoencoder


class Task(NamedTuple):
    """A model, its data and its loss.

    Attributes:
        variables: Initial `(params, model_state)` from a key.
        loss_fn: As for `lbopt.training.make_train_step`, on `{"x", "y"}`.
        train: All training examples as one batch.
        error: Error of `(params, model_state)`.
    """

    variables: Callable[[jax.Array], tuple[Any, Any]]
    loss_fn: Callable[..., Any]
    train: dict[str, np.ndarray]
    error: Callable[[Any, Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A task and the budget of a run.

    Attributes:
        name: Its name in files and tables.
        title: Its title in pictures.
        error: Name of the error, with its unit.
        target: The error to be reached.
        batch_sizes: Batch sizes; the largest is half of the training examples.
        examples: Number of training examples.
        epochs: The fixed budget after which errors are compared.
        least_steps: Steps that a run takes, if its budget has fewer, until it reaches
            the target.
        readings: How often the error is read within the budget.
        sharing_norms: Whether a norm layer follows the weights, so that their norm is
            free and may be rescaled.
        task: Opens the data and makes the model.
    """

    name: str
    title: str
    error: str
    target: float
    batch_sizes: tuple[int, ...]
    examples: int
    epochs: int
    least_steps: int
    readings: int
    sharing_norms: bool
    task: Callable[[], Task]

    def steps_in_epochs(self, batch_size: int) -> int:
        """Returns the steps of the fixed budget."""
        return self.epochs * self.examples // batch_size

    def steps(self, batch_size: int) -> int:
        """Returns the steps of a run that does not reach the target sooner."""
        return max(self.least_steps, self.steps_in_epochs(batch_size))

    def period(self, batch_size: int) -> int:
        """Returns the steps from one reading of the error to the next."""
        return max(1, self.steps_in_epochs(batch_size) // self.readings)


# === Images ===========================================================================

IMAGES, TEST_IMAGES, WIDTH = 5120, 1024, 8


def strokes() -> Task:
    """Returns a ResNet-8 of 8 channels with BatchNorm on images of 20 classes.

    The error is read with the running averages of BatchNorm made anew, of as many
    training images as there are for testing, because they lag behind in short runs.
    """
    pixels = functools.partial(_normalised, splits.PREPROCESSING["strokes"])
    train = splits.open_split("strokes/20_small", "train", "data").records
    test = splits.open_split("strokes/20_small", "test", "data").records
    sizes: Any = {train: IMAGES, test: TEST_IMAGES}
    x, test_x = (pixels(records.images[:n]) for records, n in sizes.items())
    y, test_y = (records.labels[:n] for records, n in sizes.items())
    model = resnet.ResNet8(num_classes=20, width=WIDTH, norm_momentum=0.0)

    def variables(key: jax.Array) -> tuple[Any, Any]:
        made = dict(model.init(key, x[:1], train=False))
        return made.pop("params"), made

    def apply(params: Any, model_state: Any, x: Any) -> Any:
        return model.apply(
            {"params": params, **model_state}, x, train=True, mutable=["batch_stats"]
        )

    def loss_fn(params: Any, model_state: Any, batch: Any, rng: Any) -> Any:
        del rng
        logits, model_state = apply(params, model_state, batch["x"])
        logits = lbopt.likelihood(logits, "categorical")
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        return jnp.mean(loss), (model_state, {})

    def error(params: Any, model_state: Any) -> jax.Array:
        _, model_state = apply(params, model_state, x[:TEST_IMAGES])
        logits: Any = model.apply(
            {"params": params, **model_state}, test_x, train=False
        )
        return jnp.mean(jnp.argmax(logits, -1) != test_y, dtype=jnp.float32)

    return Task(variables, loss_fn, {"x": x, "y": y}, error)


def _normalised(kept: splits.Preprocessing, images: np.ndarray) -> np.ndarray:
    mean, std = np.array(kept.mean, np.float32), np.array(kept.std, np.float32)
    return (images.astype(np.float32) / 255 - mean) / std


# === An autoencoder ===================================================================


def digits() -> Task:
    """Returns the autoencoder 64-100-50-25-10-25-50-100-64 of scikit-learn's digits.

    The error is the Bernoulli training loss less the images' own entropy.
    """
    images = grey.digits().train
    model = Autoencoder((100, 50, 25, 10))
    xlogy = jax.scipy.special.xlogy

    def variables(key: jax.Array) -> tuple[Any, Any]:
        return model.init(key, images[:1])["params"], {}

    def loss_fn(params: Any, model_state: Any, batch: Any, rng: Any) -> Any:
        del rng
        outputs: Any = model.apply({"params": params}, batch["x"])
        logits = lbopt.likelihood(outputs, "bernoulli")
        cross_entropy = optax.sigmoid_binary_cross_entropy(logits, batch["x"]).sum(-1)
        return jnp.mean(cross_entropy), (model_state, {})

    def error(params: Any, model_state: Any) -> jax.Array:
        loss, _ = loss_fn(params, model_state, {"x": images}, None)
        entropy = -(xlogy(images, images) + xlogy(1 - images, 1 - images)).sum(-1)
        return loss - jnp.mean(entropy)

    return Task(variables, loss_fn, {"x": images, "y": np.zeros(len(images))}, error)


PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem(
            name="strokes",
            title="ResNet-8 with BatchNorm, strokes",
            error="test error",
            target=0.25,
            batch_sizes=(160, 320, 640, 1280, 2560),
            examples=IMAGES,
            epochs=8,
            least_steps=60,
            readings=16,
            sharing_norms=True,
            task=strokes,
        ),
        Problem(
            name="digits",
            title="autoencoder without norms, digits",
            error="training loss (nats)",
            target=3.0,
            batch_sizes=(50, 100, 200, 375, 750),
            examples=1500,
            epochs=40,
            least_steps=480,
            readings=20,
            sharing_norms=False,
            task=digits,
        ),
    )
}
"""The problems by name."""
