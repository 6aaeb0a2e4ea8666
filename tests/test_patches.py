"""Patches and their moments against loops over every index."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lbopt import patches
from tests import oracles
from tests.oracles import quick_jit

# Sums of at most a few thousand products of unit numbers in float64.
EXACT = 1e-12


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def window(size, strides=1, padding=(0, 0), input_dilation=1, kernel_dilation=1):
    def each(value):
        return (value,) * len(size) if isinstance(value, int) else value

    if isinstance(padding[0], int):
        padding = (padding,) * len(size)
    dilations = each(input_dilation), each(kernel_dilation)
    return patches.Window(size, each(strides), padding, *dilations)


PLANE = (7, 6)
PLANE_OPTIONS = itertools.product(
    [(3, 3), (1, 1), (2, 4)],
    [1, (2, 3)],
    [(0, 0), (1, 1), ((2, 0), (0, 3)), ((-1, 2), (1, -1))],
    [1, (1, 2)],
    [1, (2, 1)],
)
# Every third of the cross product: sizes coprime to 3 mix all pairs of options.
PLANE_WINDOWS = [window(*options) for options in [*PLANE_OPTIONS][::3]]
LINE = [
    window((k,), stride, padding, 1, dilation)
    for k, stride, padding, dilation in [
        (3, 1, (1, 1), 1),
        (4, 1, (0, 5), 2),
        (2, 3, (1, 0), 1),
        (5, 1, (4, 0), 1),
        (3, 1, (7, 7), 3),  # locations that touch nothing but padding
        (9, 1, (4, 4), 1),  # a kernel longer than the input
    ]
]
SOLID = [
    window((2, 3, 2), 1, (1, 1)),
    window((2, 2, 2), 1, ((0, 1), (1, 0), (2, 0)), 1, (1, 2, 1)),
    window((1, 3, 2), (2, 1, 1), (0, 0), (1, 2, 1), 1),
]
CASES = [
    *(((3, *PLANE, 2), w) for w in PLANE_WINDOWS),
    *(((3, 8, 2), w) for w in LINE),
    *(((2, 4, 3, 5, 2), w) for w in SOLID),
]


def error(actual, expected):
    assert actual.shape == expected.shape
    return np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30)


@pytest.mark.parametrize(("shape", "w"), CASES)
def test_patches_moments_and_sums_are_those_of_the_loops(shape, w):
    x = np.random.default_rng(0).normal(size=shape)
    rows = oracles.conv_patches(x, *w)
    unit = all(s == 1 for s in (*w.strides, *w.input_dilation))
    # The displacement form needs inputs away from all edges.
    unit &= all(first < stop for first, stop in patches._cores(w, shape[1:-1]))

    @quick_jit
    def run(x):
        return (
            patches.extract_patches(x, w),
            patches.patch_sum(x, w),
            patches.patch_moment(x, w, jnp.float64),
            patches._moment_by_displacement(x, w, jnp.float64) if unit else None,
        )

    extracted, total, moment, by_displacement = run(x)
    assert extracted.shape[1:-1] == patches.output_size(w, shape[1:-1])
    np.testing.assert_array_equal(extracted.reshape(rows.shape), rows)
    assert error(total, rows.sum(1)) < EXACT
    expected = np.einsum("nti,ntj->ij", rows, rows)
    assert error(moment, expected) < EXACT
    if unit:
        assert error(by_displacement, expected) < EXACT


@pytest.mark.parametrize(
    ("w", "batch", "map_size", "cheaper"),
    [
        (window((3, 3), 1, (1, 1)), 64, 32, True),
        (window((3, 3), 1, (1, 1)), 1, 2, False),  # a tiny map
        (window((3, 3), 2, (1, 1)), 64, 32, False),
        (window((1, 1)), 64, 32, False),
    ],
)
def test_the_cheaper_form_is_chosen(w, batch, map_size, cheaper):
    x = jnp.zeros((batch, map_size, map_size, 2))
    program = str(jax.make_jaxpr(lambda x: patches.patch_moment(x, w, x.dtype))(x))
    assert ("conv_general_dilated" in program) == cheaper


def brightest(where):
    """Maps of which one part is a million times brighter than the rest."""
    x = np.random.default_rng(0).normal(size=(16, 12, 12, 3)) + 1.0
    x[:, *where] *= 1e6
    return x


MAPS = {
    "plain": brightest(()) / 1e6,
    "top": brightest([0]),
    "bottom": brightest([-1]),
    "left": brightest([slice(None), 0]),
    "right": brightest([slice(None), -1]),
    "corner": brightest([slice(10, None), slice(2)]),
    "inside": brightest([5, 5]),
    "smooth": brightest(()).cumsum(1).cumsum(2),
}


@pytest.mark.parametrize("padding", [(1, 1), (0, 0), ((2, 0), (0, 3))])
def test_float32_displacements_lose_no_more_than_patches_do(padding):
    w = window((3, 3), 1, padding)
    run = quick_jit(lambda x: patches._moment_by_displacement(x, w, x.dtype))
    for name, x in MAPS.items():
        single = jnp.asarray(x, jnp.float32)
        rows = oracles.conv_patches(np.asarray(single, np.float64), *w)
        expected = np.einsum("nti,ntj->ij", rows, rows)
        # Each entry by its own size, so that a bright part hides no error elsewhere.
        sizes = np.sqrt(np.diag(expected))
        relative = (run(single) - expected) / np.outer(sizes, sizes)
        assert np.abs(relative).max() < 1e-6, name


@pytest.mark.parametrize("spatial", [(2, 5), (5, 2), (1, 1)])
def test_a_kernel_larger_than_the_map_has_no_patches(spatial):
    w = window((3, 3))
    with pytest.raises(ValueError, match=r"kernel of size \[3, 3\] .* no output locat"):
        patches.patch_moment(jnp.zeros((2, *spatial, 2)), w, jnp.float64)


def test_outer_sums_keep_the_stack_and_accumulate_in_their_type():
    rows = np.random.default_rng(0).normal(size=(2, 3, 4, 5))
    total = patches.outer_sum(jnp.asarray(rows), jnp.float64, stack=1)
    assert error(total, np.einsum("sabi,sabj->sij", rows, rows)) < EXACT
    # 4,096 ones: a bfloat16 accumulator would stop at 256.
    ones = jnp.ones((4096, 2), jnp.bfloat16)
    total = patches.outer_sum(ones, jnp.float32)
    assert total.dtype == jnp.float32
    np.testing.assert_array_equal(total, np.full((2, 2), 4096.0))
