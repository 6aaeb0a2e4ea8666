"""Second moments in eigenbases: against autodiff's gradients example by example."""

import itertools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lbopt
from lbopt.curvature import eigen_moments, factor, kronecker, linear_maps
from lbopt.curvature.eigen_moments import CorrectedDue, CorrectedStatistics
from lbopt.curvature.factor import Eigenbasis
from tests import oracles
from tests.oracles import error, quick_jit
from tests.problems import assert_close

EXACT = 1e-10  # relative, of float64
BATCH = 6


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def rotation(seed, *shape):
    return np.linalg.qr(normal(seed, *shape, shape[-1]))[0]


def dense(blocks):
    """Diagonal blocks ``[parts, rows, rows]`` as one matrix."""
    parts, size = blocks.shape[:2]
    whole = np.zeros((parts * size,) * 2)
    for i in range(parts):
        at = slice(i * size, (i + 1) * size)
        whole[at, at] = blocks[i]
    return whole


# ------------------------------------------------------------------ the sums alone


# One row, few rows (turned themselves), and many (their product is).
@pytest.mark.parametrize("shared", [1, 2, 40])
@pytest.mark.parametrize("stack", [(), (2,)])
def test_sums_are_those_of_a_loop_over_examples(shared, stack):
    a, g = normal(0, *stack, BATCH, shared, 4), normal(1, *stack, BATCH, shared, 3)
    u, v = rotation(2, *stack, 4), rotation(3, *stack, 3)
    expected = np.zeros((*stack, 4, 3))
    for at, i in itertools.product(np.ndindex(*stack), range(BATCH)):
        gradient = np.zeros((4, 3))
        for s in range(shared):
            gradient += np.outer(a[(*at, i, s)], g[(*at, i, s)])
        expected[at] += (u[at].T @ gradient @ v[at]) ** 2
    found = eigen_moments.sum_squares(*map(jnp.asarray, (a, g, u, v)))
    assert error(found, expected) < EXACT


@pytest.mark.parametrize("shared", [1, 2, 40])
def test_cut_bases_have_room_for_their_padding(shared):
    a, g = normal(0, BATCH, shared, 5), normal(1, BATCH, shared, 3)
    u, v = rotation(2, 3, 2), rotation(3, 2, 2)  # of 6 and 4 rows
    gradients = np.pad(np.einsum("nsi,nso->nio", a, g), [(0, 0), (0, 1), (0, 1)])
    expected = ((dense(u).T @ gradients @ dense(v)) ** 2).sum(0)
    found = eigen_moments.sum_squares(*map(jnp.asarray, (a, g, u, v)))
    assert error(found, expected) < EXACT


@pytest.mark.parametrize(("batch", "most"), [(12, 5), (12, 100), (7, 6), (8, 0)])
def test_chunks_divide_the_batch(batch, most):
    expected = {(12, 5): 4, (12, 100): 12, (7, 6): 1, (8, 0): 1}
    assert eigen_moments._chunk(batch, most) == expected[batch, most]


# ------------------------------------------------------------------ through a model


def gradients_by_example(loss_fn, params, *args):
    """Autodiff's gradients of each example's own loss, a leading axis."""

    def one(params, *example):
        return loss_fn(params, *(x[None] for x in example))

    own = jax.vmap(jax.grad(one), in_axes=(None, *(0 for _ in args)))
    return jax.tree.map(np.asarray, quick_jit(own)(params, *args))


def matrices(own, groups=1, copies=()):
    """A layer's gradients ``[n, *copies, (groups,) in (+ 1), out]``."""
    lead = (BATCH, *copies)
    kernel = own["kernel"].reshape(*lead, -1, groups, own["kernel"].shape[-1] // groups)
    rows = [kernel]
    if "bias" in own:
        rows.append(own["bias"].reshape(*lead, 1, groups, -1))
    whole = np.moveaxis(np.concatenate(rows, -3), -2, -3)
    return whole if groups > 1 else whole[..., 0, :, :]


def mask(layers):
    """What an optimizer with random bases wants of every layer that can have them."""
    due = {}
    for number, (path, layer) in enumerate(layers.items()):
        factors = layer.factor_shapes()
        if layer.block.moments is None:
            due[path] = jax.tree.map(lambda _: True, factors)
            continue
        bases = [
            jnp.asarray(rotation(2 * number + i, *layer.tapped.copies, *x.shape[:-1]))
            for i, x in enumerate((layer.block.sums.a, layer.block.sums.g))
        ]
        due[path] = CorrectedDue(True, True, True, *bases)
    return due


def moment(gradients, due):
    """``E[(U_Aᵀ ∇W U_G)²]`` over the first axis."""
    u, v = np.asarray(due.a_basis), np.asarray(due.g_basis)
    return ((np.swapaxes(u, -1, -2) @ gradients @ v) ** 2).mean(0)


class Mixture(nn.Module):
    """Layers of every kind that has second moments, and some that have none."""

    @nn.compact
    def __call__(self, words, image):
        kinds = {"param_dtype": jnp.float64}
        x = nn.Conv(4, (3, 2), strides=(1, 2), name="conv", **kinds)(image)
        x = nn.LayerNorm(name="norm", **kinds)(x)
        x = nn.Conv(4, (2, 2), feature_group_count=2, name="grouped", **kinds)(x)
        x = nn.tanh(x).mean((1, 2))
        e = nn.Embed(7, 3, name="embed", **kinds)(words).mean(1)
        x = jnp.concatenate([x, e], -1)
        x = nn.tanh(nn.Dense(5, name="dense", **kinds)(x))
        return nn.Dense(3, use_bias=False, name="top", **kinds)(x)


class Setting(NamedTuple):
    """A loss, its parameters, arguments and layers."""

    loss_fn: Any
    params: Any
    args: tuple
    layers: Any

    def evaluate(self, due, f=lbopt.value_grad_and_curvature, **options):
        evaluate = f(self.loss_fn, self.layers, **options)
        run = quick_jit(lambda p, due, *args: evaluate(p, *args, due=due))
        return run(self.params, due, *self.args)

    def curvature(self, due, **options):
        return self.evaluate(due, **options)[2]

    def with_loss(self, loss_fn):
        """Another loss of the same model."""
        layers = lbopt.trace_layers(loss_fn, self.params, *self.args)
        return self._replace(loss_fn=loss_fn, layers=layers)

    def assert_untouched(self, loss, grads):
        """Loss and gradient are those without taps."""
        expected = quick_jit(jax.value_and_grad(self.loss_fn))(self.params, *self.args)
        assert_close((loss, grads), expected, rtol=EXACT, atol=EXACT)


def setting_of(model, *args, **options):
    params = model.init(jax.random.key(0), *args)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) / x.size**0.25), params
    )

    def loss_fn(params, *args):
        f = lbopt.likelihood(model.apply({"params": params}, *args), "normal")
        return jnp.mean(jnp.sum(jnp.cosh(f), -1))

    layers = lbopt.trace_layers(loss_fn, params, *args, **options)
    return Setting(loss_fn, params, args, layers)


@pytest.fixture(scope="module")
def mixture():
    with jax.enable_x64(True):
        words = jnp.asarray(np.random.default_rng(1).integers(0, 7, (BATCH, 4)))
        return setting_of(Mixture(), words, jnp.asarray(normal(2, BATCH, 4, 4, 2)))


def test_moments_of_every_layer(mixture):
    due = mask(mixture.layers)
    found = mixture.curvature(due)
    gradients = gradients_by_example(mixture.loss_fn, mixture.params, *mixture.args)
    plain = mixture.curvature(None)
    for path, groups in (("conv", 1), ("grouped", 2), ("dense", 1), ("top", 1)):
        expected = moment(matrices(gradients[path], groups), due[path])
        assert type(found[path]) is CorrectedStatistics
        assert error(found[path].s, expected) < EXACT
        assert error(found[path].a, plain[path].a) < EXACT
        assert error(found[path].g, plain[path].g) < EXACT
    for path in ("norm", "embed"):
        assert type(found[path]) is type(plain[path])
        assert_close(found[path], plain[path])


def test_statistics_alone_and_what_is_not_due(mixture):
    due = mask(mixture.layers)
    whole = mixture.curvature(due)
    alone = mixture.evaluate(due, lbopt.curvature_only, fisher="empirical")
    assert_close(alone, whole, rtol=EXACT, atol=EXACT)
    off = due | {"dense": due["dense"]._replace(s=False)}
    found = mixture.curvature(off)
    assert not found["dense"].s.any()
    assert_close(found["dense"].a, whole["dense"].a)
    assert_close(found["conv"].s, whole["conv"].s)
    flags = eigen_moments.flags(off)
    assert len(flags) == sum(len(x.block.factors) for x in mixture.layers.values()) + 4
    assert flags.count(False) == 1


def test_a_reduced_layer_has_one_row_an_example():
    layer = nn.Conv(3, (2, 2), param_dtype=jnp.float64)
    x = jnp.asarray(normal(2, BATCH, 3, 3, 2))
    options = {"weight_sharing": "reduce", "batch_size": BATCH}
    setting = setting_of(nn.Sequential([layer]), x, **options)
    due = mask(setting.layers)
    found = setting.curvature(due)["layers_0"].s
    ((inputs, g),) = oracles.layer_calls(setting.loss_fn, setting.params, x)["layers_0"]
    pads = [oracles.same_padding(3, 2, 1, 1)] * 2
    a = oracles.conv_patches(inputs, (2, 2), (1, 1), pads, (1, 1), (1, 1))
    a = oracles.with_ones(a).mean(1)
    gradients = a[:, :, None] * g.reshape(BATCH, -1, 3).sum(1)[:, None]
    assert error(found, moment(gradients, due["layers_0"])) < EXACT


class Linear(nn.Module):
    """One dense layer."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, param_dtype=jnp.float64, name="dense")(x)


def linear():
    return setting_of(Linear(), jnp.asarray(normal(3, BATCH, 4)))


def test_expected_moments_are_those_of_every_coordinate():
    setting = linear()
    due = mask(setting.layers)
    found = setting.curvature(due, fisher="exact")["dense"].s
    expected = 0.0
    for c in range(3):

        def coordinate(p, x, c=c):
            return jnp.sum(Linear().apply({"params": p}, x)[:, c])

        own = gradients_by_example(coordinate, setting.params, *setting.args)["dense"]
        expected = expected + moment(matrices(own), due["dense"])
    assert error(found, expected) < EXACT


def by_example(apply, params, x):
    return jax.vmap(lambda x: apply({"params": params}, x))(x)


def compiled(apply, params, x):
    return jax.jit(lambda params, x: apply({"params": params}, x))(params, x)


@pytest.mark.parametrize("run", [by_example, compiled])
def test_a_loss_may_map_or_compile_its_model(run):
    setting = linear()

    def loss_fn(params, x):
        return jnp.mean(jnp.sum(jnp.cosh(run(Linear().apply, params, x)), -1))

    due = mask(setting.layers)
    found = setting.with_loss(loss_fn).curvature(due)
    assert_close(found, setting.curvature(due), rtol=EXACT, atol=EXACT)


# ------------------------------------------------------------------ copies


class Body(nn.Module):
    """One residual layer, in the form that a scan wants."""

    @nn.compact
    def __call__(self, x, _):
        dense = nn.Dense(x.shape[-1], param_dtype=jnp.float64, name="dense")
        return x + nn.tanh(dense(x)), None


class Lifted(nn.Module):
    """Copies of a layer along some axes of its arrays."""

    axes: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        kind = nn.scan(
            nn.remat(Body, prevent_cse=False),
            variable_axes={"params": self.axes[-1]},
            split_rngs={"params": True},
            length=3,
        )
        if len(self.axes) == 1:
            return kind(name="body")(x, None)[0]
        kind = nn.vmap(
            kind,
            variable_axes={"params": self.axes[0]},
            split_rngs={"params": True},
            in_axes=None,
            out_axes=1,
            axis_size=2,
        )
        return jnp.sum(kind(name="body")(x, None)[0], 1)


def lifted(axes):
    return setting_of(Lifted(axes), jnp.asarray(normal(3, BATCH, 4)))


@pytest.mark.parametrize(
    ("axes", "copies"), [((0,), (3,)), ((1,), (3,)), ((0, 0), (2, 3))]
)
def test_each_copy_has_its_own_bases(axes, copies):
    setting = lifted(axes)
    due = mask(setting.layers)
    found = setting.curvature(due)["body/dense"].s
    own = gradients_by_example(setting.loss_fn, setting.params, *setting.args)
    own = own["body"]["dense"]
    if axes == (1,):  # the copies of a scan, first
        own = {name: np.moveaxis(x, 2, 1) for name, x in own.items()}
    expected = moment(matrices(own, copies=copies), due["body/dense"])
    assert found.shape == (*copies, 5, 4)
    assert error(found, expected) < EXACT


@pytest.mark.parametrize("norm", [optax.tree.norm, lambda p: optax.tree.norm(p, ord=1)])
def test_a_penalty_on_all_parameters_does_not_see_the_bases(norm):
    plain = lifted((0,))
    setting = plain._replace(loss_fn=lambda p, x: plain.loss_fn(p, x) + norm(p))
    setting.assert_untouched(*setting.evaluate(mask(plain.layers))[:2])


# ------------------------------------------------------------------ bases and solves


def bases_of(*vectors):
    zero = jnp.zeros([])
    return [Eigenbasis(zero, (), jnp.asarray(v)) for v in vectors]


@pytest.mark.parametrize("shape", [(), (2,)])  # whole, and cut into two parts
def test_moments_in_other_bases_are_the_diagonal_there(shape):
    parts = [rotation(seed, *shape, size) for seed, size in enumerate((4, 3, 4, 3))]
    u, v, u_new, v_new = (dense(x) if shape else x for x in parts)
    s = normal(5, len(u), len(v)) ** 2
    old, new = np.kron(u, v), np.kron(u_new, v_new)
    expected = np.diag(new.T @ old @ np.diag(s.ravel()) @ old.T @ new)
    found = eigen_moments.carried(
        jnp.asarray(s), bases_of(*parts[:2]), bases_of(*parts[2:])
    )
    assert error(np.ravel(found), expected) < EXACT
    assert error(jnp.sum(found), s.sum()) < EXACT


def test_the_same_bases_change_nothing():
    bases = bases_of(rotation(0, 2, 4), rotation(1, 2, 3))  # of two copies
    s = jnp.asarray(normal(2, 2, 4, 3) ** 2)
    assert error(eigen_moments.carried(s, bases, bases), s) < EXACT


# Blocks of 3, because eigenvectors of two rows may be a symmetric matrix.
@pytest.mark.parametrize("block_size", [None, 3])
def test_natural_gradient_is_the_dense_solve(block_size):
    x, y, w = normal(0, 9, 7), normal(1, 9, 5), normal(2, 7, 5)
    linear = linear_maps.dense_linear((7, 5), False, True)
    block = kronecker.kronecker_block(linear, "expand", jnp.float64)
    block = eigen_moments.in_eigenbases(block.cut(block_size))
    factors = kronecker.KroneckerFactors(*(jnp.asarray(m.T @ m) for m in (x, y)))
    inverses = block.invert(block.pack(factors), 0.3)
    u, v = (np.asarray(basis.vectors) for basis in inverses)
    u, v = (x if block_size is None else dense(x) for x in (u, v))
    s = normal(3, len(u), len(v)) ** 2
    basis = np.kron(u, v)
    padded = np.pad(w, [(0, len(u) - 7), (0, len(v) - 5)])
    full = basis @ np.diag(s.ravel() + 0.3) @ basis.T
    expected = np.linalg.solve(full, padded.ravel()).reshape(s.shape)[:7, :5]
    leaves = {"kernel": jnp.asarray(w)}
    found = block.moments.precondition(inverses, jnp.asarray(s), leaves)
    assert error(found["kernel"], expected) < EXACT
    # With the eigenvalues of the product it is the inverse of A ⊗ G + λ I.
    own = eigen_moments.kronecker_eigenvalues(block.factors, inverses)
    found = block.moments.precondition(inverses, own, leaves)
    a, g = (oracles.cut(m.T @ m, block_size) for m in (x, y))
    expected = np.linalg.solve(np.kron(a, g) + 0.3 * np.eye(35), w.ravel())
    assert error(found["kernel"], expected.reshape(7, 5)) < EXACT


# Blocks of at most 4 rows leave one row of padding in the last block of each factor.
@pytest.mark.parametrize(
    ("block_size", "values_a", "values_g"),
    [
        (None, [[0, 0, 0, 1, 1, 3, 5]], [[0, 0, 1, 1, 4]]),
        (4, [[0, 0, 2, 2], [0, 0, 3]], [[0, 0, 2], [1, 1]]),
        (None, [[1, 2, 3, 4, 5, 6, 7]], [[0, 0, 0, 0, 0]]),
    ],
)
def test_equal_eigenvalues_leave_no_choice_of_basis(block_size, values_a, values_g):
    linear = linear_maps.dense_linear((7, 5), False, True)
    block = kronecker.kronecker_block(linear, "expand", jnp.float64)
    block = eigen_moments.in_eigenbases(block.cut(block_size))
    kinds = block.factors
    rows, signals, w = normal(0, BATCH, 1, 7), normal(1, BATCH, 1, 5), normal(2, 7, 5)
    gradients = np.einsum("nsi,nso->nio", rows, signals)

    def spaces_of(values, seed):
        """A factor of these eigenvalues, and the projector on each one's space."""
        sizes = [len(part) for part in values]
        matrix, projectors = np.zeros((sum(sizes),) * 2), []
        for i, part in enumerate(values):
            first, q = sum(sizes[:i]), np.zeros((sum(sizes), len(part)))
            q[first : first + len(part)] = rotation(seed + i, len(part))
            matrix += q @ np.diag(part) @ q.T
            own = [q[:, np.asarray(part) == d] for d in sorted(set(part))]
            projectors += [x @ x.T for x in own]
        return matrix, projectors

    def natural(spaces, others):
        """∇W divided by one mean second moment in each pair of spaces."""
        found = np.zeros((7, 5))
        for p, q in itertools.product(spaces, others):
            square = np.sum((p @ gradients @ q) ** 2, (1, 2)).mean()
            found += p @ w @ q / (square / (np.trace(p) * np.trace(q)) + 0.3)
        return found

    def bases(matrices, seed):
        """Eigenbases, turned at random where eigenvalues are equal."""
        packed = block.pack(kronecker.KroneckerFactors(*map(jnp.asarray, matrices)))
        found = []
        for k, basis in enumerate(block.invert(packed, 0.3)):
            values = np.asarray(basis.values)
            turn = rotation(seed + k, *values.shape)
            same = np.abs(values[..., :, None] - values[..., None, :]) < 1e-9
            # Orthogonal within each space: the polar factor of what is left of a turn.
            u, _, v = np.linalg.svd(np.where(same, turn, 0))
            vectors = np.asarray(basis.vectors) @ (u @ v)
            found.append(basis._replace(vectors=jnp.asarray(vectors)))
        return eigen_moments.Eigenbases(*found)

    def solve(basis, s):
        leaves = {"kernel": jnp.asarray(w)}
        return block.moments.precondition(basis, s, leaves)["kernel"]

    (a, spaces), (g, others) = spaces_of(values_a, 10), spaces_of(values_g, 20)
    later = [spaces_of(values_a, 30)[0], spaces_of(values_g, 40)[0]]
    carried = []
    for seed in (50, 60):
        basis, then = bases((a, g), seed), bases(later, seed + 5)
        vectors = [x.vectors for x in basis]
        s = eigen_moments.sum_squares(jnp.asarray(rows), jnp.asarray(signals), *vectors)
        s = eigen_moments.pooled(kinds, basis, s / BATCH)
        assert error(solve(basis, s), natural(spaces, others)) < EXACT
        s = eigen_moments.pooled(kinds, then, eigen_moments.carried(s, basis, then))
        carried.append(solve(then, s))
    assert error(*carried) < EXACT


def test_moments_of_eigenvalues_that_are_apart_stay_as_they_are():
    basis = [
        Eigenbasis(jnp.zeros([]), jnp.sort(jnp.asarray(normal(k, 2, n) ** 2)), ())
        for k, n in enumerate((4, 3))
    ]
    s = jnp.asarray(normal(2, 2, 4, 3) ** 2)
    kinds = factor.symmetric(4), factor.symmetric(3)
    np.testing.assert_array_equal(eigen_moments.pooled(kinds, basis, s), s)


# ------------------------------------------------------------------------ errors


def test_a_layer_without_two_symmetric_factors_has_none(mixture):
    due = mask(mixture.layers)
    with pytest.raises(
        ValueError, match=r"due\['norm'\] is a CorrectedDue, not a Unit"
    ):
        mixture.curvature(due | {"norm": due["dense"]})
