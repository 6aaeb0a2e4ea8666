"""SP-NGD's running mixup and random erasing of training batches.

Both run inside the training step, on the device.  They are pure functions of a key and
of arrays; a ``VirtualBatch`` passes from one step to the next, so that a checkpoint of
the training state resumes a run bit for bit.

    real batch x_t, t_t  ->  running mixup  ->  virtual batch x̃_t, t̃_t  ->  erasing
                                  ^                     |
                                  +---- next step ------+

The network sees the erased images, the next step the images before erasing.  Zero, with
which images are erased, is the data set's mean colour after normalisation.

Random numbers belong to a place in the array that is passed.  Under ``jit`` that array
is the global batch however it is sharded; inside a ``shard_map`` it is a shard, and the
shard's number has to be folded into the key.

References:
  Osawa et al., `Scalable and Practical Natural Gradient for Large-Scale Deep Learning
    <https://arxiv.org/abs/2002.06015>``_, 2020, §6.1: both.
  Zhang et al., ``mixup <https://arxiv.org/abs/1710.09412>``_, 2017.
  Zhong et al., ``Random Erasing <https://arxiv.org/abs/1708.04896>`_, 2017.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from lbopt import checks

Form = Literal["paper", "code"]
"""Mixing weights of the paper, or of the authors' released code."""

_AREA = 0.02, 0.25  # share of the image's area
_ASPECT = 0.3, 1.0  # ratio of the sides, before they change places


class VirtualBatch(NamedTuple):
    """The virtual batch of a step; the next one is mixed with it.

    As large as a batch of images, on the device and in each checkpoint.

    Attributes:
      images: x̃_t ``[n, height, width, channels]``, not erased.
      labels: t̃_t ``[n, classes]``, soft: not negative, with sum 1.
      count: int32 ``[]``, batches mixed so far; at 0 the other fields hold zeros.
    """

    images: jax.Array
    labels: jax.Array
    count: jax.Array


def empty(image_batch_shape: tuple[int, ...], num_classes: int) -> VirtualBatch:
    """Returns zeros, the virtual batch before the first step.

    Args:
      image_batch_shape: ``(n, height, width, channels)``.
      num_classes: number of classes.
    """
    return VirtualBatch(
        images=jnp.zeros(image_batch_shape, jnp.float32),
        labels=jnp.zeros((image_batch_shape[0], num_classes), jnp.float32),
        count=jnp.zeros([], jnp.int32),
    )


def mixing_weights(
    key: jax.Array, n: int, *, alpha: float, form: Form = "paper"
) -> jax.Array:
    """Draws the shares λ of the real images in a virtual batch.

        paper:  λ ~ Beta(α, α), one for the batch
        code:   λ = max(λ', 1-λ'), λ' ~ Beta(α, α), one per image

    Args:
      key: random key.
      n: images in the batch.
      alpha: α, positive: small values draw λ near 0 or 1, the value 1 uniformly.
      form: see above.

    Returns:
      λ float32, ``[1]`` for the paper's form and ``[n]`` for the code's.

    Raises:
      ValueError: if ``alpha`` is not positive and finite, or ``form`` is unknown.
    """
    checks.positive("alpha", alpha, "for no mixup, train on the real batch")
    checks.one_of("form", form, ("paper", "code"))
    if form == "paper":
        return jax.random.beta(key, alpha, alpha, (1,), jnp.float32)
    weights = jax.random.beta(key, alpha, alpha, (n,), jnp.float32)
    return jnp.maximum(weights, 1 - weights)


def running_mixup(
    key: jax.Array,
    previous: VirtualBatch,
    images: jax.Array,
    labels: jax.Array,
    *,
    alpha: float,
    form: Form = "paper",
) -> VirtualBatch:
    """Mixes a batch, slot by slot, with the previous *virtual* batch.

        x̃_t = λ x_t + (1-λ) x̃_{t-1}
        t̃_t = λ t_t + (1-λ) t̃_{t-1},    x̃_1 = x_1,  t̃_1 = t_1

    A real image therefore stays in later steps with geometrically falling shares;
    ordinary mixup mixes two real images.

    Args:
      key: random key of this step alone.
      previous: x̃_{t-1} and t̃_{t-1}: the last step's result, or ``empty``.
      images: x_t ``[n, height, width, channels]``.
      labels: t_t ``[n, classes]``, one-hot or smoothed.
      alpha: α of the mixing weights' distribution; the paper's runs have 0.4 to 1.
      form: mixing weights, see ``mixing_weights``.

    Returns:
      x̃_t and t̃_t with the shapes and dtypes in ``previous``, for this step and to pass
      to the next.

    Raises:
      ValueError: if shapes differ from those in ``previous``, or as ``mixing_weights``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from experiments.data import virtual_batch
      >>> images, labels = jnp.ones((2, 4, 4, 3)), jnp.eye(2)
      >>> virtual = virtual_batch.empty(images.shape, num_classes=2)
      >>> for step in range(3):
      ...     key = jax.random.fold_in(jax.random.key(0), step)
      ...     batch = (images * step, labels)
      ...     virtual = virtual_batch.running_mixup(key, virtual, *batch, alpha=0.4)
      >>> int(virtual.count), bool(0 < virtual.images.mean() < 2)
      (3, True)

    Source:
      SP-NGD (Osawa et al., 2020) §6.1, Eq. 18-19.

    Open in the paper:
      How many λ a step draws: it writes one, and so do we.  The authors' code draws
      one per image and takes max(λ, 1-λ), so that the real image never has the smaller
      share (``form="code"``).  Which images meet: as in the code, those in the same
      slot.  The first step: as in the code, the unmixed batch.
    """
    shapes = (images.shape, labels.shape)
    expected = (previous.images.shape, previous.labels.shape)
    if shapes != expected:
        raise ValueError(
            f"images and labels have the shapes {shapes}, but must have those in "
            f"previous, {expected}; start batches of another size with empty"
        )
    weights = mixing_weights(key, len(images), alpha=alpha, form=form)
    weights = jnp.where(previous.count == 0, 1, weights)

    def mix(new: jax.Array, old: jax.Array) -> jax.Array:
        share = jnp.reshape(weights, (-1,) + (1,) * (new.ndim - 1))
        return (share * new + (1 - share) * old).astype(old.dtype)

    return VirtualBatch(
        images=mix(images, previous.images),
        labels=mix(labels, previous.labels),
        count=previous.count + 1,
    )


def random_erasing(
    key: jax.Array, images: jax.Array, *, probability: float = 0.5
) -> jax.Array:
    """Sets a random rectangle of some of the images to zero.

    For each image by itself, with the given probability:

        S ~ HW · U(0.02, 0.25),  r ~ U(0.3, 1),
        h = ⌊√(S r) + ½⌋,  w = ⌊√(S / r) + ½⌋,

    h and w change places with probability ½, each is cut to the image's side, and the
    rectangle lies anywhere within the image with equal probability.

    Args:
      key: random key of this step alone.
      images: ``[n, H, W, channels]``.
      probability: probability that an image is erased.

    Returns:
      The images, of the same shape.

    Raises:
      ValueError: if ``images`` has another rank, or ``probability`` is not in [0, 1].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from experiments.data import virtual_batch
      >>> images = jnp.ones((100, 8, 8, 3))
      >>> erased = virtual_batch.random_erasing(jax.random.key(0), images)
      >>> touched = (erased == 0).any(axis=(1, 2, 3))
      >>> 30 < int(touched.sum()) < 70, set(erased.ravel().tolist())
      (True, {0.0, 1.0})

    Source:
      SP-NGD (Osawa et al., 2020) §6.1; rounding and cutting as in the authors' code.

    Open in the paper:
      Whether erasures return in the next step's mixup.  The code erases in place the
      array that it keeps as x̃_t, so there they do; we take that for an accident.
      Carrying ``virtual._replace(images=erased)`` does the same.  Where the rectangle
      lies: the code's never touches the last row and column unless it fills them; ours
      may.
    """
    if images.ndim != 4:
        raise ValueError(
            f"images.shape={images.shape} must be [n, height, width, channels]; give a "
            "single image a first axis"
        )
    if not 0 <= probability <= 1:
        raise ValueError(
            f"probability={probability} must lie in [0, 1]; 0 erases nothing"
        )
    n, height, width, _ = images.shape
    chosen_key, box_key = jax.random.split(key)
    chosen = jax.random.bernoulli(chosen_key, probability, (n,))
    top, left, h, w = _rectangles(box_key, n, height, width)
    rows = _between(top, h, height) & chosen[:, None]
    columns = _between(left, w, width)
    erased = rows[:, :, None] & columns[:, None, :]  # [n, H, W]
    return jnp.where(erased[..., None], jnp.zeros([], images.dtype), images)


def _rectangles(
    key: jax.Array, n: int, height: int, width: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Draws top, left, height and width, int32 ``[n]``, of rectangles in an image."""
    area_key, aspect_key, swap_key, top_key, left_key = jax.random.split(key, 5)
    shares = jax.random.uniform(area_key, (n,), jnp.float32, *_AREA)
    S = height * width * shares
    r = jax.random.uniform(aspect_key, (n,), jnp.float32, *_ASPECT)
    h = (jnp.sqrt(S * r) + 0.5).astype(jnp.int32)  # conversion truncates
    w = (jnp.sqrt(S / r) + 0.5).astype(jnp.int32)
    swapped = jax.random.bernoulli(swap_key, 0.5, (n,))
    h, w = jnp.where(swapped, w, h), jnp.where(swapped, h, w)
    h, w = jnp.minimum(h, height), jnp.minimum(w, width)
    top = jax.random.randint(top_key, (n,), 0, height - h + 1)
    left = jax.random.randint(left_key, (n,), 0, width - w + 1)
    return top, left, h, w


def _between(start: jax.Array, length: jax.Array, size: int) -> jax.Array:
    """Marks the places within ``[start, start + length)``, bool ``[n, size]``."""
    places = jnp.arange(size)[None, :]
    start, length = start[:, None], length[:, None]
    return (start <= places) & (places < start + length)
