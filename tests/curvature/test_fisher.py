"""The three Fisher matrices, what is due, and what each of them costs."""

import inspect
import itertools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import lbopt
from tests import oracles
from tests.curvature.test_capture import Lifted, lifted_pair
from tests.problems import (
    BATCH,
    CLASSES,
    Mlp,
    Problem,
    all_finite,
    assert_close,
    assert_equal,
    classify,
    cross_entropy,
    inputs,
    labels,
)

SAMPLES = 4096
# A mean over SAMPLES draws is off by about std / √SAMPLES; entries of one draw scatter
# by no more than a few times the largest entry.
MONTE_CARLO = 6 / SAMPLES**0.5


def categorical(f, y):
    return cross_entropy(f, y)


def bernoulli(f, y):
    hot = jax.nn.one_hot(y, CLASSES)
    return jnp.mean(jnp.sum(optax.sigmoid_binary_cross_entropy(f, hot), -1))


def normal(f, y):
    return jnp.mean(jnp.sum(jnp.square(f - jax.nn.one_hot(y, CLASSES)), -1)) / 2


LOSSES = {f.__name__: f for f in (categorical, bernoulli, normal)}


def problem_of(distribution, model=None):
    model = Mlp() if model is None else model

    def loss_fn(params, x, y):
        f = lbopt.likelihood(model.apply({"params": params}, x), distribution)
        return LOSSES[distribution](f, y)

    return classify(model)._replace(loss_fn=loss_fn)


@pytest.mark.parametrize("distribution", LOSSES)
def test_the_exact_fisher_pulls_back_that_of_the_outputs(distribution):
    problem = problem_of(distribution)
    curvature = problem.captured(fisher="exact")
    params, (x, _) = problem.params, problem.args
    top = params["last"]["kernel"]
    pre = x @ params["first"]["kernel"] + params["first"]["bias"][None]
    roots = oracles.output_fisher(jnp.tanh(pre) @ top, distribution)
    jacobian = jax.vmap(jax.jacobian(lambda z: jnp.tanh(z) @ top))(pre)
    pulled = oracles.exact_fisher(
        np.asarray(jacobian), jnp.tanh(pre) @ top, distribution
    )
    assert_close(curvature["last"].g, np.mean(roots, 0))
    assert_close(curvature["first"].g, pulled)
    assert_close(curvature["last"].a, jnp.tanh(pre).T @ jnp.tanh(pre) / BATCH)


@pytest.mark.parametrize("distribution", LOSSES)
def test_sampled_labels_converge_to_the_exact_fisher(distribution):
    problem = problem_of(distribution)
    layers = problem.trace()
    f = lbopt.value_grad_and_curvature(problem.loss_fn, layers, fisher="sampled")
    exact = problem.evaluate(layers, fisher="exact")[2]

    @jax.jit
    def draw(keys):
        return jax.vmap(lambda key: f(problem.params, *problem.args, rng=key))(keys)

    loss, grads, curvature = draw(jax.random.split(jax.random.key(7), SAMPLES))
    first = jax.tree.map(lambda x: x[0], (loss, grads))
    assert_close(first, problem.untapped())  # the parameter gradient is the true loss's
    assert float(jnp.ptp(grads["first"]["kernel"], axis=0).max()) == 0
    for path in exact:
        mean = np.mean(curvature[path].g, 0)
        error = np.abs(mean - exact[path].g).max() / np.abs(exact[path].g).max()
        assert error < MONTE_CARLO, (path, error)
        assert float(jnp.ptp(curvature[path].g, axis=0).max()) > 0
        assert_close(curvature[path].a[-1], exact[path].a)


class Scaled(nn.Module):
    """A dense layer and an array that only the diagonal block covers."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (1, CLASSES))
        return nn.Dense(CLASSES, name="dense")(x) * scale


def test_the_exact_fisher_of_a_diagonal_block():
    # The block sees its gradient summed over the batch, so examples must not mix.
    problem = problem_of("categorical", Scaled())
    curvature = problem.evaluate(fisher="exact")[2]
    x, _ = problem.args
    params = problem.params
    hidden = x @ params["dense"]["kernel"] + params["dense"]["bias"][None]
    fishers = oracles.output_fisher(hidden * params["scale"], "categorical")
    expected = np.mean(np.einsum("ic,icc->ic", np.square(hidden), fishers), 0)
    assert_close(curvature["scale"].f, expected[None])
    assert_close(curvature["dense"].g, np.mean(fishers, 0))


def test_a_loss_that_averages_tokens_states_its_terms():
    tokens, model = 3, nn.Sequential([nn.Dense(CLASSES)])
    x, y = inputs(batch=BATCH * tokens), labels(BATCH * tokens)
    flat = classify(model, x, y)

    def loss_fn(params, x, y):
        f = model.apply({"params": params}, x)
        f = lbopt.likelihood(f, "categorical", terms=BATCH * tokens)
        return cross_entropy(f, y)

    def silent(params, x, y):
        return cross_entropy(model.apply({"params": params}, x), y)

    args = (x.reshape(BATCH, tokens, -1), y.reshape(BATCH, tokens))
    problem = Problem(loss_fn, flat.params, args)
    for fisher in ("empirical", "exact"):
        assert_close(
            problem.evaluate(fisher=fisher), flat.evaluate(fisher=fisher), atol=1e-5
        )
    sampled = problem.evaluate(fisher="sampled", rng=jax.random.key(3))[2]
    assert all_finite(sampled)
    # batch_size says the same where there is no likelihood in the loss.
    silent = problem._replace(loss_fn=silent)
    stated = silent.evaluate(batch_size=BATCH * tokens)
    assert_close(stated, flat.evaluate())
    assert_close(silent.evaluate(), stated)  # and it is found


def test_has_aux():
    problem = problem_of("categorical")

    def loss_fn(params, x, y):
        return problem.loss_fn(params, x, y), {"x": jnp.sum(x)}

    with_aux = problem._replace(loss_fn=loss_fn, has_aux=True)
    for fisher, rng in (("empirical", None), ("sampled", jax.random.key(0))):
        (loss, aux), grads, curvature = with_aux.evaluate(fisher=fisher, rng=rng)
        plain = problem.evaluate(fisher=fisher, rng=rng)
        assert_equal((loss, grads, curvature), plain)
        assert_close(aux, {"x": jnp.sum(problem.args[0])})
    by_default = alone(with_aux, with_aux.trace())(jax.random.key(0), None)
    assert_close(by_default, plain[2])  # sampled


def alone(problem, layers, **options):
    """The statistics alone, compiled; takes ``rng`` and ``due``."""
    f = lbopt.curvature_only(
        problem.loss_fn, layers, has_aux=problem.has_aux, **options
    )
    return jax.jit(lambda rng, due: f(problem.params, *problem.args, rng=rng, due=due))


@pytest.mark.parametrize("fisher", ["empirical", "sampled", "exact"])
def test_the_statistics_alone_are_the_same(fisher):
    problem = problem_of("categorical", Scaled())  # a tap, and a block without one
    layers, rng = problem.trace(), jax.random.key(3)
    full = problem.evaluate(layers, fisher=fisher, rng=rng)[2]
    f = alone(problem, layers, fisher=fisher)
    mask = all_due(problem, layers)
    # Two programs, which add the same few numbers up: some units in the last place.
    assert_close(f(rng, mask), full, rtol=1e-6, atol=1e-7)
    assert all(np.any(x) for x in jax.tree.leaves(full))
    off = {**mask, "dense": mask["dense"]._replace(g=jnp.asarray(False))}
    expected = full["dense"]._replace(g=jnp.zeros_like(full["dense"].g))
    curvature = f(rng, off)
    assert not np.any(curvature["dense"].g)
    assert_close(curvature, {**full, "dense": expected}, rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------------- what is due


def all_due(problem, layers):
    return lbopt.refresh(lbopt.scale_by_kfac(layers).init(problem.params))


@pytest.mark.parametrize("fisher", ["empirical", "sampled", "exact"])
@pytest.mark.parametrize("traced", [True, False])
def test_a_statistic_that_is_not_due_is_zero_and_the_others_unchanged(fisher, traced):
    problem = problem_of("categorical")
    layers, rng = problem.trace(), jax.random.key(0)
    loss, grads, full = problem.evaluate(layers, fisher=fisher, rng=rng)
    mask = jax.tree.map(bool, all_due(problem, layers))
    f = lbopt.value_grad_and_curvature(problem.loss_fn, layers, fisher=fisher)

    def run(due):
        return f(problem.params, *problem.args, rng=rng, due=due)

    compiled = jax.jit(run)
    for path, field in itertools.product(layers, ("a", "g")):
        if not traced and path == "last":
            continue  # a program of its own for each mask
        off = {**mask, path: mask[path]._replace(**{field: False})}
        found = compiled(off) if traced else run(off)
        zeros = jnp.zeros_like(getattr(full[path], field))
        expected = {**full, path: full[path]._replace(**{field: zeros})}
        assert not np.any(getattr(found[2][path], field))
        assert_close(found, (loss, grads, expected))


def test_a_layer_that_due_does_not_name_is_not_wanted():
    problem = classify(Mlp())
    layers = problem.trace()
    mask = all_due(problem, layers)
    full = problem.evaluate(layers)[2]
    curvature = problem.evaluate(layers, due={"last": mask["last"]})[2]
    assert_close(curvature["last"], full["last"])
    assert not any(np.any(x) for x in curvature["first"])


# ---------------------------------------------------------------------- what it costs


def conditionals(compiled):
    return len(re.findall(r" conditional\(", compiled.as_text()))


def compiled(problem, wrap=lambda f: f):
    """The program with traced flags, all parts of a step."""
    layers = problem.trace()
    f = lbopt.value_grad_and_curvature(problem.loss_fn, layers)
    call = jax.jit(wrap(lambda p, args, due: f(p, *args, due=due)[2]))
    mask = all_due(problem, layers)
    return call.lower(problem.params, problem.args, mask).compile()


@pytest.mark.parametrize("lift", ["once", "remat", "scan_remat", "vmap_scan", "jit"])
def test_the_compiled_program_keeps_the_conditionals(lift):
    problem = lifted_pair(lift)[0] if lift != "once" else classify(Lifted("once"))
    assert conditionals(compiled(problem)) == 4  # two layers of two statistics


@pytest.mark.parametrize("check_vma", [False, True])
def test_the_conditionals_survive_shard_map(check_vma):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def wrap(f):
        return jax.shard_map(
            lambda *args: jax.lax.pmean(f(*args), "data"),
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec("data"), PartitionSpec()),
            out_specs=PartitionSpec(),
            check_vma=check_vma,
        )

    assert conditionals(compiled(classify(Mlp()), wrap)) == 4


def dots(function, *args):
    """Matrix products in the program before XLA's own optimisation."""
    return jax.jit(function).lower(*args).as_text().count("stablehlo.dot_general")


def test_how_many_matrix_products_each_fisher_takes():
    # Two layers: 2 forward, 2 for the kernels and 1 to the hidden layer backward.
    problem = problem_of("categorical")
    layers, rng = problem.trace(), jax.random.key(0)
    sgd = dots(jax.value_and_grad(problem.loss_fn), problem.params, *problem.args)

    def products(make, fisher):
        f = make(problem.loss_fn, layers, fisher=fisher)
        return dots(
            lambda p, *args: f(p, *args, rng=rng), problem.params, *problem.args
        )

    empirical = products(lbopt.value_grad_and_curvature, "empirical")
    sampled = products(lbopt.value_grad_and_curvature, "sampled")
    assert (sgd, empirical) == (5, 5 + 2 * len(layers))
    # The second backward pass has no kernel gradients: 1 product more.
    assert sampled == empirical + 1
    # Alone: 2 forward, 1 to the hidden layer backward, and no kernel gradients.
    assert products(lbopt.curvature_only, "sampled") == 3 + 2 * len(layers)


def test_nothing_due_costs_nothing():
    problem = classify(Mlp())
    layers = problem.trace()
    f = lbopt.value_grad_and_curvature(problem.loss_fn, layers)
    nothing = jax.tree.map(lambda _: False, all_due(problem, layers))

    def flops(function):
        program = jax.jit(function).lower(problem.params, *problem.args).compile()
        assert conditionals(program) == 0
        return program.cost_analysis()["flops"]

    plain = flops(jax.value_and_grad(problem.loss_fn))
    assert flops(lambda p, *args: f(p, *args, due=nothing)) <= plain
    assert flops(lambda p, *args: f(p, *args)) > plain
    assert (
        dots(lambda p, *args: f(p, *args, due=nothing), problem.params, *problem.args)
        == 5
    )


# --------------------------------------------------------------------------- messages


def unchecked(function, *args, **kwargs):
    """A call as users make it; the test run checks types before we do."""
    return inspect.unwrap(function)(*args, **kwargs)


def test_unknown_words():
    problem = classify(Mlp())
    layers = problem.trace()
    message = r"fisher='true' must be 'empirical', 'sampled' or 'exact'"
    with pytest.raises(ValueError, match=message):
        unchecked(
            lbopt.value_grad_and_curvature, problem.loss_fn, layers, fisher="true"
        )
    message = "distribution='poisson' must be 'categorical', 'normal' or 'bernoulli'"
    with pytest.raises(ValueError, match=message):
        unchecked(lbopt.likelihood, jnp.zeros((2, 3)), "poisson")
    with pytest.raises(ValueError, match=r"terms=0 must be a whole number, ≥ 1"):
        lbopt.likelihood(jnp.zeros((2, 3)), "normal", terms=0)
    with pytest.raises(ValueError, match=r"batch_size=0 must be a whole number, ≥ 1"):
        lbopt.value_grad_and_curvature(problem.loss_fn, layers, batch_size=0)
    message = "layers=dict must be the table that lbopt.trace_layers returns"
    with pytest.raises(ValueError, match=message):
        unchecked(lbopt.value_grad_and_curvature, problem.loss_fn, dict(layers))


def test_the_sampled_fisher_needs_a_key():
    problem = problem_of("categorical")
    f = lbopt.value_grad_and_curvature(
        problem.loss_fn, problem.trace(), fisher="sampled"
    )
    for function in (f, lbopt.curvature_only(problem.loss_fn, problem.trace())):
        with pytest.raises(ValueError, match="fisher='sampled' draws labels: pass rn"):
            function(problem.params, *problem.args)


def test_a_key_that_would_not_reach_the_loss_is_refused_before_the_loss_runs():
    problem, key = classify(Mlp()), jax.random.key(0)
    layers = problem.trace()

    def noisy(params, x, y, rng=None):
        x = x if rng is None else x + jax.random.normal(rng, x.shape)
        return problem.loss_fn(params, x, y)

    message = "would not reach that of loss_fn=noisy; pass it as one of the loss's posi"
    with pytest.raises(ValueError, match=f"rng=.* {message}"):
        lbopt.trace_layers(noisy, problem.params, *problem.args, rng=key)
    for function in (lbopt.value_grad_and_curvature, lbopt.curvature_only):
        for name in ("empirical", "sampled"):
            f = function(noisy, layers, fisher=name)
            with pytest.raises(ValueError, match=f"rng=.* {message}"):
                f(problem.params, *problem.args, rng=key)
    f = lbopt.value_grad_and_curvature(lambda *args, **kw: noisy(*args, **kw), layers)
    with pytest.raises(ValueError, match=r"rng=.* would not reach"):
        f(problem.params, *problem.args, rng=key)


def test_due_from_another_model():
    problem, other = classify(Mlp()), classify(Scaled())
    f = lbopt.value_grad_and_curvature(problem.loss_fn, problem.trace())
    due = all_due(other, other.trace())
    message = (
        r"due has entries \['dense', 'scale'\].*\['first', 'last'\].*lbopt.refresh"
    )
    with pytest.raises(ValueError, match=message):
        f(problem.params, *problem.args, due=due)
    renamed = {"first": due["scale"]}
    message = r"due\['first'\] is a DiagonalFactors, not a KroneckerFactors"
    with pytest.raises(ValueError, match=message):
        f(problem.params, *problem.args, due=renamed)
