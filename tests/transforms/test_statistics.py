"""Folding statistics into factors, against averages and norms of whole matrices."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lbopt
from lbopt import Periods, linalg
from lbopt.collectives import Axis
from lbopt.curvature import factor
from lbopt.transforms.statistics import Running, fold, weight
from tests.devices import AXIS, on_devices, shares
from tests.oracles import quick_jit
from tests.problems import (
    BATCH,
    CLASSES,
    assert_close,
    cross_entropy,
    inputs,
    labels,
)

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


@everywhere
def test_a_weight_of_one_replaces_whatever_was_there(devices):
    _, new = drawn(1, devices or 1)
    huge = [x.at[:].set(1e30) for x in drawn(0)[1]]
    running = [r._replace(traces=r.traces + 1e30) for r in start(huge)]
    after, _ = folded(devices, running, new)
    for one, mine, kind in zip(after, new, KINDS, strict=True):
        mean = np.mean(mine, 0)
        assert_close(np.asarray(one.factor), mean, rtol=ROUNDING)
        on_diagonal = np.asarray(kind.multiplicity()) == 1
        assert_close(one.traces, mean[:, on_diagonal].sum(-1), rtol=ROUNDING)


@everywhere
@pytest.mark.parametrize("alpha", [None, 0.1])
def test_a_statistic_of_no_row_is_none(devices, alpha):
    _, old = drawn(0)
    _, new = drawn(1, devices or 1)
    new[0] = jnp.zeros_like(new[0])  # on all devices, in all copies
    new[1] = new[1].at[0].set(0)  # on one device of several, or the only copy
    new[4] = new[4].at[:, 0].set(0)  # in one copy of two
    empty = [True, devices is None, False, False, False]
    running = start(old, None if alpha is None else drawn(2)[1])
    after, findings = folded(devices, running, new, alpha=alpha)
    assert findings.empty.tolist() == empty
    assert findings.accepted.tolist() == [not one for one in empty]
    for before, one, left_out in zip(running, after, empty, strict=True):
        if left_out:
            jax.tree.map(np.testing.assert_array_equal, one, before)
        else:
            assert (one.factor != before.factor).any()


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95])
def test_weights_are_those_of_a_debiased_average(decay):
    found = np.asarray(weight(decay, jnp.arange(4)))
    assert found[0] == 1
    sums = [sum(decay**j for j in range(k)) for k in range(1, 5)]
    np.testing.assert_allclose(found, 1 / np.asarray(sums), rtol=ROUNDING)


@pytest.mark.parametrize("decay", [1.0, 1.5, -0.1, np.nan])
def test_a_decay_out_of_range_has_no_weight(decay):
    seen = jnp.arange(3)
    weights = jax.jit(weight)(decay, seen)
    assert weights.tolist() == [0, 0, 0]
    _, old = drawn(0)
    after, findings = folded(None, start(old), drawn(1)[1], weights=weights[0])
    assert not findings.accepted.any()
    jax.tree.map(np.testing.assert_array_equal, after, start(old))


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
        assert not findings.empty.any()
        assert findings.similar.tolist() == [last] * len(CASES)
        assert findings.similar_before.tolist() == [not last] * len(CASES)
    nothing = [jnp.zeros_like(x) for x in packed]
    _, findings = folded(devices, start(zeros, zeros), nothing, alpha=0.1)
    assert not findings.similar.any()
    assert not findings.similar_before.any()


# ------------------------------------------------------- a layer that does not run


class Heads(nn.Module):
    """Three heads, of which one runs in a step."""

    def setup(self):
        self.heads = [nn.Dense(CLASSES) for _ in range(3)]

    def __call__(self, x, number):
        if self.is_initializing():
            return [head(x) for head in self.heads]
        run = [lambda mdl, x, i=i: mdl.heads[i](x) for i in range(3)]
        return nn.switch(number, run, self, x)


@functools.cache
def heads():
    """The parameters, and gradients and curvature by state and number of a head."""
    model, x, y = Heads(), inputs(), labels()
    params = model.init(jax.random.key(1), x, 0)["params"]

    def loss_fn(params, x, y, number):
        return cross_entropy(model.apply({"params": params}, x, number), y)

    layers = lbopt.trace_layers(loss_fn, params, x, y, jnp.asarray(0))
    f = lbopt.value_grad_and_curvature(loss_fn, layers)
    return params, layers, lambda params, number, due: f(params, x, y, number, due=due)


@pytest.mark.parametrize(
    ("options", "renewals", "squares"),
    [
        ({}, [3, 3, 2], []),
        # Due at 0 and 4, and until then seen: at 0 and 6, at 1 and 4, at 2 and 5.
        ({"periods": Periods(4), "eigenvalues": "corrected"}, [2, 2, 2], [2, 1, 1]),
        ({"stale_threshold": 0.0, "factor_decay": 0.0}, [3, 3, 2], []),
    ],
    ids=["kfac", "ekfac", "sp_ngd"],
)
def test_a_head_that_runs_in_some_steps_has_its_own_statistics(
    options, renewals, squares
):
    params, layers, evaluate = heads()
    tx = lbopt.scale_by_kfac(layers, **options)

    @quick_jit
    def step(state, number):
        _, grads, curvature = evaluate(params, number, due=lbopt.refresh(state))
        return tx.update(grads, state, curvature=curvature)

    def updates_of(numbers):
        state = tx.init(params)
        for number in numbers:
            updates, state = step(state, jnp.asarray(number))
        return updates, lbopt.curvature_state(state)

    mixed, state = updates_of([0, 1, 2, 0, 1, 2, 0, 1])
    alone, _ = updates_of([1] * 8)
    # The same batch throughout: the averages are the statistics themselves, up to the
    # rounding of inverses of conditions up to 1e3.
    assert_close(mixed, alone, rtol=1e-4, atol=1e-4)
    assert not state.rejected.any()
    assert state.refresh.renewals[::2].tolist() == renewals
    assert [int(one.renewals) for one in state.moments.values()] == squares
    rows = np.c_[inputs(), np.ones(BATCH)]
    for factors in state.factors.values():
        a = linalg.unpack(factors.a)
        assert_close(np.asarray(a), rows.T @ rows / BATCH)
