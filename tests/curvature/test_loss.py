"""A user's loss, and the batch among its arguments."""

import functools

import jax
import jax.numpy as jnp
import pytest

from lbopt.curvature import loss
from tests.problems import BATCH, CLASSES, inputs, labels

# ------------------------------------------------------------------------ the batch


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ((inputs(), labels()), BATCH),
        (({"image": inputs(), "label": labels()},), BATCH),
        (({"norm": {"mean": jnp.ones(5)}}, inputs()), BATCH),  # batch_stats
        (({"mean": jnp.ones(5), "scale": jnp.ones((3, 2))}, inputs()), BATCH),
        ((inputs(), jax.random.key(0)), BATCH),
        ((inputs(), jnp.zeros(2, jnp.uint32)), BATCH),  # a raw key
        ((inputs(), 0.1, None, jnp.ones([])), BATCH),
        ((jax.ShapeDtypeStruct((7, 2), jnp.float32),), 7),
        ((), None),
        ((jnp.ones([]),), None),
    ],
)
def test_batch_size_is_the_shared_leading_size(args, expected):
    assert loss.infer_batch_size(args) == expected


def test_an_ambiguous_batch_is_refused():
    message = r"argument 1: 8, argument 2: 3\); pass batch_size="
    with pytest.raises(ValueError, match=message):
        loss.infer_batch_size((inputs(), jnp.ones(CLASSES)))


@pytest.mark.parametrize(
    ("args", "empty"),
    [
        ((jnp.ones((0, 3)), jnp.ones(0)), True),
        (({"x": jnp.ones((0, 3))}, 0.1), True),
        ((jax.ShapeDtypeStruct((0, 3), jnp.float32),), True),
        ((jnp.ones((2, 0)),), False),  # two examples without features
        ((inputs(), jnp.ones([]), None, "name"), False),
        ((), False),
    ],
)
def test_a_batch_is_empty_if_an_array_has_no_rows(args, empty):
    assert loss.is_empty(args) is empty


# ------------------------------------------------------------------- the function


def scaled(params, x, scale=1.0, *, shift):
    return params * jnp.sum(x) * scale + shift


def test_keywords_become_the_last_argument():
    x, keywords = jnp.arange(3.0), {"scale": 2.0, "shift": 5.0}
    positional, args = loss.with_keywords(scaled, (x,), keywords)
    assert len(args) == 2
    assert args[1] == keywords
    assert positional(7.0, *args) == 7 * 3 * 2 + 5
    # The keywords are an argument like others, and may be replaced.
    assert positional(7.0, x, {"shift": 0.0}) == 7 * 3
    unchanged, args = loss.with_keywords(scaled, (x, 2.0), {})
    assert unchanged is scaled
    assert len(args) == 2


def test_jit_is_taken_off_and_other_decorators_stay():
    def doubled(function):
        @functools.wraps(function)
        def wrapper(params):
            return 2 * function(params)

        return wrapper

    def plain(params):
        return params

    assert loss.unjitted(plain) is plain
    assert loss.unjitted(jax.jit(jax.jit(plain))) is plain
    decorated = doubled(jax.jit(plain))
    assert loss.unjitted(jax.jit(decorated)) is decorated
    assert loss.unjitted(jax.jit(decorated))(3.0) == 6


def test_a_result_is_split_into_loss_and_aux():
    value, aux = loss.split_aux((2.0, {"accuracy": 1}), True, scaled)
    assert isinstance(value, jax.Array)
    assert value == 2
    assert aux == {"accuracy": 1}
    assert loss.split_aux(jnp.float32(2), False, scaled) == (2, None)
    without = loss.without_aux(jax.jit(lambda p: (3 * p, "aux")), True)
    assert without(2.0) == 6


@pytest.mark.parametrize(
    ("result", "has_aux", "message"),
    [
        ((1.0, {}), False, "returns a pair, but has_aux=False"),
        ([1.0, {}], False, "returns a pair, but has_aux=False"),
        (1.0, True, "returns a float, but has_aux=True"),
        ((1.0, {}, {}), True, "returns a tuple, but has_aux=True"),
        (jnp.ones(3), False, r"returns float32\[3\]; the loss is one real number"),
        ((jnp.ones((1, 1)), {}), True, r"returns float32\[1, 1\]"),
        (jnp.ones([], jnp.int32), False, r"returns int32\[\]"),
        (jnp.ones([], complex), False, r"returns complex64\[\]"),
    ],
)
def test_results_that_are_no_loss(result, has_aux, message):
    with pytest.raises(ValueError, match=f"loss_fn=scaled {message}"):
        loss.split_aux(result, has_aux, scaled)


class Model:
    """Losses that are no plain functions."""

    def of_batch(self, params):
        """A loss whose repr holds the model."""

    def __call__(self, params):
        """Another."""


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (scaled, "scaled"),
        (functools.partial(functools.partial(scaled, 1.0), 2.0), "scaled"),
        (jax.jit(functools.partial(scaled, 1.0)), "scaled"),
        (Model().of_batch, "of_batch"),
        (functools.partial(Model().of_batch), "of_batch"),
        (Model(), "Model"),
    ],
)
def test_the_name_of_a_function(function, name):
    assert loss.name_of(function) == name


# --------------------------------------------------------------------- its keywords


def optional(params, x, rng=None):
    """Samples if it is given a key."""


def required(params, x, rng):
    """Always samples."""


def by_keyword(params, x, *, rng=None):
    """Cannot be given its key by position."""


def any_keyword(params, *args, **kwargs):
    """A wrapper."""


def named_like_others(rng, *due, batch_size=2, strict=False, **loss_scale):
    """No keyword, or the same value as lbopt's."""


BY_POSITION = "pass it as one of the loss's positional arguments, or write a loss that"


@pytest.mark.parametrize(
    ("function", "args", "kept", "message"),
    [
        (
            optional,
            "x",
            {"rng": "key"},
            f"rng='key' .* loss_fn=optional; {BY_POSITION}",
        ),
        (required, "x", {"rng": "key"}, "would not reach that of loss_fn=required"),
        (by_keyword, "x", {"rng": "key"}, "; write a loss that calls by_keyword with"),
        (jax.jit(optional), "x", {"rng": "key"}, "loss_fn=optional"),
        (functools.partial(optional, x=0), "", {"rng": "key"}, "loss_fn=optional"),
        (functools.partial(optional, rng="a"), "x", {"rng": "b"}, "with rng="),
        (named_like_others, "x", {"batch_size": 6}, "batch_size=6 is an argument of"),
        (named_like_others, "x", {"batch_size": 2.0}, "batch_size=2.0"),
        (named_like_others, "x", {"strict": True}, "strict=True"),
        (any_keyword, "x", {"rng": {}}, "rng=dict is .* loss_fn=any_keyword; write"),
    ],
)
def test_keywords_that_would_not_reach_the_loss_are_refused(
    function, args, kept, message
):
    with pytest.raises(ValueError, match=message):
        loss.refuse_shared_keywords(function, args, kept, idle=["rng"])


@pytest.mark.parametrize(
    ("function", "args", "kept"),
    [
        (optional, ("x", "key"), {"rng": "label key"}),  # by position
        (required, ("x", "key"), {"rng": "label key"}),
        (functools.partial(required, "params", "x"), (), {"rng": "label key"}),
        (optional, "x", {"rng": None, "due": {}, "loss_scale": 2.0}),
        (by_keyword, "x", {"rng": None, "strict": True}),
        (any_keyword, "x", {"due": {}, "loss_scale": 2.0}),
        (named_like_others, "x", {"strict": False, "batch_size": None}),
        (named_like_others, "x", {"rng": 1, "due": 2, "loss_scale": 3}),
    ],
)
def test_harmless_keywords_pass(function, args, kept):
    loss.refuse_shared_keywords(function, args, kept, idle=["rng"])
