"""Slow and obviously right: what the library must agree with.

Nothing here imports ``lbopt``.  A layer's parameters are one vector: kernel as a matrix
``[in, out]`` with the bias as last row, row by row.
"""

import functools
import itertools
import math
from collections import defaultdict

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

LAYERS = (nn.Dense, nn.DenseGeneral, nn.Conv, nn.ConvTranspose, nn.Embed, nn.BatchNorm)


# Tests spend their time compiling programs that run once on a handful of numbers.
quick_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)

# ------------------------------------------------------------------ exact Fisher blocks


def lookup(tree, path):
    for key in path.split("/"):
        tree = tree[key]
    return tree


def jacobians(f, params, x):
    """``d f(params, x) / d params``, in the structure of the parameters."""
    return jax.tree.map(np.asarray, quick_jit(jax.jacrev(f))(params, x))


def layer_jacobian(jac, outputs, path):
    """One layer's part of it: ``[n, events, in (+ 1) × out]``."""
    own, n, events = lookup(jac, path), len(outputs), math.prod(outputs.shape[1:])
    names = [name for name in ("kernel", "bias") if name in own]
    return np.concatenate([own[name].reshape(n, events, -1) for name in names], -1)


def output_fisher(f, distribution):
    """The Fisher matrix with respect to the outputs: ``[n, events, events]``."""
    f = np.asarray(f, np.float64)
    n, classes = f.shape[0], f.shape[-1]
    events = math.prod(f.shape[1:])
    if distribution == "normal":
        return np.broadcast_to(np.eye(events), (n, events, events))
    if distribution == "bernoulli":
        p = 1 / (1 + np.exp(-f.reshape(n, events)))
        return np.stack([np.diag(q * (1 - q)) for q in p])
    p = np.exp(f - f.max(-1, keepdims=True))
    p = (p / p.sum(-1, keepdims=True)).reshape(n, -1, classes)
    blocks = np.zeros((n, events, events))
    for i, t in np.ndindex(*p.shape[:2]):
        own = slice(t * classes, (t + 1) * classes)
        blocks[i, own, own] = np.diag(p[i, t]) - np.outer(p[i, t], p[i, t])
    return blocks


def exact_fisher(left, outputs, distribution, right=None):
    """``E_x E_y~model[D D'ᵀ]`` from one or two layers' Jacobians."""
    inner = output_fisher(outputs, distribution)
    right = left if right is None else right
    return np.einsum("nep,neg,ngq->pq", left, inner, right, optimize=True) / len(left)


def gauss_newton(jac, outputs, y, loss_of_output):
    """``E_x[Jᵀ H J]`` with H the loss's Hessian at the outputs of one example."""
    n, events = jac.shape[:2]
    hessian = quick_jit(jax.vmap(jax.hessian(loss_of_output)))(outputs, y)
    hessian = np.asarray(hessian).reshape(n, events, events)
    return np.einsum("nep,neg,ngq->pq", jac, hessian, jac, optimize=True) / n


def empirical_fisher(jac):
    """``E_x[D Dᵀ]`` from the Jacobian of the per-example losses ``[n, 1, p]``."""
    gradients = jac[:, 0]
    return gradients.T @ gradients / len(gradients)


# ------------------------------------------------------- inputs and output gradients


def layer_calls(loss, params, *examples, whole=False):
    """Every layer call's input and output gradient, one example at a time.

    Zeros are added to the layers' outputs and differentiated by.  ``whole`` runs the
    batch at once, as a model that couples examples needs it; the loss is its mean.

    Returns:
      ``{path: [(inputs [n, ...], output_grads [n, ...]), ...]}``, one pair per call.
    """

    def run(shifts, params, *one):
        calls, inputs = defaultdict(int), {}

        def interceptor(next_fun, args, kwargs, context):
            outputs = next_fun(*args, **kwargs)
            called = context.method_name in ("__call__", "attend")
            if not (called and isinstance(context.module, LAYERS)):
                return outputs
            path = "/".join(context.module.path)
            key = f"{path}#{calls[path]}"
            calls[path] += 1
            inputs[key] = (args[0], outputs)
            return outputs if shifts is None else outputs + shifts[key]

        with nn.intercept_methods(interceptor):
            return loss(params, *one), inputs

    n = len(examples[0])
    size = n if whole else 1

    def part(i):
        return [x[i : i + size] for x in examples]

    _, shapes = jax.eval_shape(lambda *a: run(None, *a), params, *part(0))
    shifts = {key: jnp.zeros(s[1].shape, s[1].dtype) for key, s in shapes.items()}
    differentiate = quick_jit(jax.grad(run, has_aux=True))
    seen = [differentiate(shifts, params, *part(i)) for i in range(0, n, size)]
    found = defaultdict(list)
    for key in shifts:
        rows = [(inputs[key][0], size * grads[key]) for grads, inputs in seen]
        found[key.split("#")[0]].append(
            tuple(np.concatenate([np.asarray(r[j]) for r in rows]) for j in (0, 1))
        )
    return dict(found)


# ------------------------------------------------------------------ factors


def with_ones(rows):
    return np.concatenate([rows, np.ones_like(rows[..., :1])], -1)


def second_moments(inputs, output_grads, sharing="expand"):
    """The two factors of rows ``[n, S, in]`` and ``[n, S, out]``, summed one by one."""
    n, shared = inputs.shape[:2]
    a = np.zeros((inputs.shape[-1],) * 2)
    g = np.zeros((output_grads.shape[-1],) * 2)
    for i in range(n):
        if sharing == "reduce":
            mean, total = inputs[i].mean(0), output_grads[i].sum(0)
            a += np.outer(mean, mean) / n
            g += np.outer(total, total) / n
            continue
        for s in range(shared):
            a += np.outer(inputs[i, s], inputs[i, s]) / (n * shared)
            g += np.outer(output_grads[i, s], output_grads[i, s]) / n
    return a, g


def pi(a, g):
    """π of Martens & Grosse 2015 §6.3 with the trace norm."""
    return math.sqrt((np.trace(a) / len(a)) / (np.trace(g) / len(g)))


def damped_factors(a, g, damping):
    """``A + π √λ I`` and ``G + √λ / π I``."""
    root, p = math.sqrt(damping), pi(a, g)
    return a + p * root * np.eye(len(a)), g + root / p * np.eye(len(g))


def natural_gradient(a, g, damping, gradient):
    """The dense solve with the Kronecker product of the damped factors."""
    a, g = damped_factors(a, g, damping)
    flat = np.linalg.solve(np.kron(a, g), np.asarray(gradient, np.float64).reshape(-1))
    return flat.reshape(gradient.shape)


# ------------------------------------------------------------------ convolutions


def same_padding(size, kernel, stride, dilation):
    """TensorFlow's rule: ``⌈size / stride⌉`` outputs, the odd zero on the right."""
    out = -(-size // stride)
    total = max((out - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
    return total // 2, total - total // 2


def convolved(x, kernel, stride=1, pad=0):
    """A convolution of NHWC images by ``jax.lax``, with ``pad`` zeros on each side."""
    padding = ((pad, pad), (pad, pad))
    layout = ("NHWC", "HWIO", "NHWC")
    return np.asarray(
        jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), padding, dimension_numbers=layout
        )
    )


def conv_patches(x, size, strides, padding, input_dilation, kernel_dilation):
    """The input under every kernel position, by loops over every index.

    Returns:
      ``[n, locations, kernel positions × channels]``.
    """
    n, *spatial, channels = x.shape
    rank = range(len(size))
    outputs = [
        (
            (spatial[d] - 1) * input_dilation[d]
            + 1
            + sum(padding[d])
            - kernel_dilation[d] * (size[d] - 1)
            - 1
        )
        // strides[d]
        + 1
        for d in rank
    ]
    patches = np.zeros((n, math.prod(outputs), math.prod(size), channels))
    for t, location in enumerate(itertools.product(*map(range, outputs))):
        for k, position in enumerate(itertools.product(*map(range, size))):
            at = [
                location[d] * strides[d]
                + position[d] * kernel_dilation[d]
                - padding[d][0]
                for d in rank
            ]
            inside = all(
                at[d] % input_dilation[d] == 0
                and 0 <= at[d] // input_dilation[d] < spatial[d]
                for d in rank
            )
            if inside:
                index = tuple(at[d] // input_dilation[d] for d in rank)
                patches[:, t, k] = x[(slice(None), *index)]
    return patches.reshape(n, math.prod(outputs), -1)


# ------------------------------------------------------------------ normalisation


def normalised(x, axes, epsilon, *, mask=None, centred=True):
    """``(x − mean) / √(var + ε)`` over some axes, from the definition."""
    x = np.asarray(x, np.float64)
    weight = np.ones_like(x) if mask is None else np.broadcast_to(mask, x.shape) * 1.0
    count = weight.sum(axes, keepdims=True)
    mean = (weight * x).sum(axes, keepdims=True) / count if centred else 0.0
    var = (weight * (x - mean) ** 2).sum(axes, keepdims=True) / count
    return (x - mean) / np.sqrt(var + epsilon)


def unit_wise(x_hat, output_grads, names=("scale", "bias")):
    """``[channels, k, k]`` from ``[n, S, channels]``, example by example."""
    n, _, channels = x_hat.shape
    f = np.zeros((channels, len(names), len(names)))
    for i, c in itertools.product(range(n), range(channels)):
        own = {
            "scale": (output_grads[i, :, c] * x_hat[i, :, c]).sum(),
            "bias": output_grads[i, :, c].sum(),
        }
        gradient = np.array([own[name] for name in names])
        f[c] += np.outer(gradient, gradient) / n
    return f


def full_norm(x_hat, output_grads, names=("scale", "bias")):
    """``[k channels, k channels]`` from ``[n, S, channels]``, example by example."""
    n, _, channels = x_hat.shape
    f = np.zeros((len(names) * channels,) * 2)
    for i in range(n):
        own = {
            "scale": (output_grads[i] * x_hat[i]).sum(0),
            "bias": output_grads[i].sum(0),
        }
        gradient = np.concatenate([own[name] for name in names])
        f += np.outer(gradient, gradient) / n
    return f


# ------------------------------------------------------------------ comparisons


def error(actual, expected):
    """The relative error, in the Frobenius norm."""
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def cut(matrix, block_size):
    """A matrix without the entries outside its equal diagonal blocks."""
    parts = 1 if block_size is None else -(-len(matrix) // block_size)
    block = np.arange(len(matrix)) // -(-len(matrix) // parts)
    return np.where(block[:, None] == block, matrix, 0)
