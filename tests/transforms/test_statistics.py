"""Folding statistics into factors, against averages and norms of whole matrices."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lbopt import linalg
from lbopt.collectives import Axis
from lbopt.curvature import factor
from lbopt.transforms.statistics import Running, fold
from tests.devices import AXIS, on_devices, shares
from tests.oracles import quick_jit
from tests.problems import assert_close

# Float32 sums of a few dozen numbers.
ROUNDING = 1e-5


class Case(NamedTuple):
    """A kind of factor: blocks of a matrix, and how they lie packed."""

    kind: factor.Factor
    blocks: tuple[int, ...]  # [copies, blocks, rows]
    pack: Any

    def draw(self, rng):
        """Positive definite blocks, ``[copies, blocks, rows, rows]``."""
        x = rng.normal(size=(*self.blocks, self.blocks[-1]))
        return x @ np.swapaxes(x, -1, -2)


def pack_pairs(x):
    packed = jnp.stack([x[..., 0, 0], x[..., 0, 1], x[..., 1, 1]], -1)
    return packed.reshape(len(x), -1)


CASES = [
    Case(factor.symmetric(4), (3, 1, 4), lambda x: linalg.pack(x[:, 0])),
    Case(factor.symmetric(5), (1, 1, 5), lambda x: linalg.pack(x[:, 0])),
    Case(factor.diagonal((3,)), (1, 3, 1), lambda x: x[..., 0, 0]),
    Case(factor.pairs(3), (2, 3, 2), pack_pairs),
    # Two diagonal blocks of one matrix are rows of their own.
    Case(factor.symmetric(6, 2), (2, 1, 3), lambda x: linalg.pack(x[:, 0])),
]
KINDS = [case.kind for case in CASES]
EVERY = jnp.ones(len(CASES), bool)


def drawn(seed, devices=1):
    """Whole blocks of each statistic on each device, and the same packed."""
    rng = np.random.default_rng(seed)
    whole = [[case.draw(rng) for _ in range(devices)] for case in CASES]
    return whole, packed_of(whole)


def packed_of(whole):
    return [
        jnp.stack([case.pack(jnp.asarray(x, jnp.float32)) for x in each])
        for case, each in zip(CASES, whole, strict=True)
    ]


def made(packed):
    """Statistics as functions that make them."""
    return [lambda x=x: x for x in packed]


def folded(devices, running, packed, due=EVERY, weights=1.0, alpha=None):
    """``fold`` of statistics ``[devices, copies, size]``; whole arrays in and out."""
    weights = jnp.full(len(CASES), weights)
    if devices is None:
        run = quick_jit(
            lambda r, p: fold(KINDS, r, made(p), due, weights, alpha, Axis(None, 1))
        )
        return run(running, [x[0] for x in packed])
    axis = Axis(AXIS, devices)
    split = [
        Running(
            shares(r.factor, devices),
            () if alpha is None else shares(r.before, devices),
            jnp.stack([r.traces] * devices),
        )
        for r in running
    ]
    after, findings = on_devices(
        devices,
        lambda r, p: fold(KINDS, r, made(p), due, weights, alpha, axis),
        split,
        packed,
    )

    def whole(x, size):
        joined = np.moveaxis(np.asarray(x), 0, 1).reshape(x.shape[1], -1)
        assert not joined[:, size:].any()  # the padding stays zero
        return joined[:, :size]

    def same(x):
        x = np.asarray(x)
        assert (x == x[:1]).all()  # on all devices
        return x[0]

    together = [
        Running(
            whole(r.factor, kind.size),
            () if alpha is None else whole(r.before, kind.size),
            same(r.traces),
        )
        for r, kind in zip(after, KINDS, strict=True)
    ]
    return together, jax.tree.map(same, findings)


def start(packed, before=None):
    """What statistics leave behind that were taken whole, traces left at zero."""
    olds = [()] * len(packed) if before is None else [x[0] for x in before]
    return [
        Running(x[0], old, jnp.zeros(len(x[0])))
        for x, old in zip(packed, olds, strict=True)
    ]


everywhere = pytest.mark.parametrize("devices", [None, 4])


@everywhere
@pytest.mark.parametrize("alpha", [None, 0.1])
def test_the_running_average_of_the_devices_mean(devices, alpha):
    old, old_packed = drawn(0)
    new, new_packed = drawn(1, devices or 1)
    expected = [
        o[0] + 0.3 * (np.mean(n, 0) - o[0]) for o, n in zip(old, new, strict=True)
    ]
    running = start(old_packed, None if alpha is None else old_packed)
    after, findings = folded(devices, running, new_packed, weights=0.3, alpha=alpha)
    assert findings.accepted.tolist() == [True] * len(CASES)
    for one, mine, own, packed in zip(
        after, packed_of([[x] for x in expected]), new, old_packed, strict=True
    ):
        assert_close(one.factor, np.asarray(mine[0]), rtol=ROUNDING)
        # Traces started at zero.
        trace = 0.3 * np.trace(np.mean(own, 0), axis1=-2, axis2=-1).sum(-1)
        assert_close(one.traces, trace, rtol=ROUNDING)
        if alpha is not None:  # X₋₂ is now what was X₋₁
            np.testing.assert_array_equal(one.before, packed[0])


@everywhere
@pytest.mark.parametrize("alpha", [None, 0.1])
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_what_is_not_due_or_not_finite_is_left_out(devices, alpha, number):
    due = jnp.asarray([True, False, True, False, True])
    _, old = drawn(0)
    _, new = drawn(1, devices or 1)
    new[2] = new[2].at[-1, 0, -1].set(number)  # due, on the last device alone
    new[3] = new[3] * jnp.nan  # not due
    running = start(old, None if alpha is None else drawn(2)[1])
    after, findings = folded(devices, running, new, due, alpha=alpha)
    assert findings.accepted.tolist() == [True, False, False, False, True]
    for i, (before, one) in enumerate(zip(running, after, strict=True)):
        if i not in (0, 4):
            jax.tree.map(np.testing.assert_array_equal, one, before)
        else:
            mean = np.mean(new[i], 0)
            assert_close(np.asarray(one.factor), mean, rtol=ROUNDING)


def test_nothing_due():
    _, old = drawn(0)
    bad = [x * jnp.nan for x in old]
    after, findings = folded(None, start(old), bad, ~EVERY)
    assert not any(jnp.any(x) for x in findings)
    jax.tree.map(np.testing.assert_array_equal, after, start(old))


def perturbed(whole, seed, size):
    """Each statistic moved by ``size`` times its Frobenius norm, copies together."""
    rng = np.random.default_rng(seed)
    moved = []
    for (x,) in whole:
        e = rng.normal(size=x.shape)
        e = e + np.swapaxes(e, -1, -2)
        moved.append([x + size * np.linalg.norm(x) / np.linalg.norm(e) * e])
    return moved


@everywhere
@pytest.mark.parametrize(
    ("size", "before_size", "alpha", "expected"),
    [
        (0.099, 0.5, 0.1, (True, False)),
        (0.101, 0.5, 0.1, (False, False)),
        (0.5, 0.099, 0.1, (False, True)),
        (0.199, 0.199, 0.2, (True, True)),
        (0.0, 0.0, 0.0, (False, False)),  # the same, but the comparison is strict
    ],
)
def test_similarity_is_of_whole_matrices(devices, size, before_size, alpha, expected):
    last, _ = drawn(0)
    new = perturbed(last, 1, size)
    # ‖X − Y‖ = before_size · ‖Y‖ by choosing Y = X / (1 + before_size).
    before = [[x / (1 + before_size)] for (x,) in new]
    packed = [jnp.repeat(x, devices or 1, 0) for x in packed_of(new)]
    running = start(packed_of(last), packed_of(before))
    _, findings = folded(devices, running, packed, alpha=alpha)
    # All copies of a statistic share one flag.
    assert findings.similar.tolist() == [expected[0]] * len(CASES)
    assert findings.similar_before.tolist() == [expected[1]] * len(CASES)


def test_one_copy_can_make_a_statistic_unlike():
    last, packed = drawn(0)
    new = [[x.copy()] for (x,) in last]
    new[0][0][2] *= 1.5  # the third copy of three
    _, findings = folded(None, start(packed, packed), packed_of(new), alpha=0.1)
    assert findings.similar.shape == (len(CASES),)
    assert findings.similar.tolist() == [False, True, True, True, True]


@everywhere
def test_missing_and_zero_history_is_not_similar(devices):
    _, new = drawn(0)
    zeros = [jnp.zeros_like(x) for x in new]
    packed = [jnp.repeat(x, devices or 1, 0) for x in new]
    for running, last in ((start(zeros, new), False), (start(new, zeros), True)):
        _, findings = folded(devices, running, packed, alpha=0.1)
        assert findings.similar.tolist() == [last] * len(CASES)
        assert findings.similar_before.tolist() == [not last] * len(CASES)
    nothing = [jnp.zeros_like(x) for x in packed]
    _, findings = folded(devices, start(zeros, zeros), nothing, alpha=0.1)
    assert not findings.similar.any()
    assert not findings.similar_before.any()
