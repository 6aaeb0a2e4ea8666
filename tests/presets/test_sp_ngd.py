"""The presets against the paper's tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lbopt
from lbopt import presets
from tests.problems import Mlp, classify

IMAGES = 1_281_167
# Table 2 of the paper: steps, and the last rate over the first (sp_ngd.md, 6.2).
ROWS = {
    4_096: (10_948, 8.6e-6),
    8_192: (5_434, 2.4e-4),
    16_384: (2_737, 2.4e-4),
    32_768: (1_760, 2.5e-4),
    65_536: (1_173, 4.9e-4),
    131_072: (873, 1.4e-3),
}


@pytest.mark.parametrize("size", ROWS)
def test_the_papers_rows(size):
    preset, (steps, last) = presets.OSAWA_2022[size], ROWS[size]
    per_epoch = IMAGES / size
    # The table's steps leave the last, incomplete batch of each epoch out or in.
    assert abs(preset.epochs * per_epoch / steps - 1) < 0.01
    schedule = preset.schedule(per_epoch)
    assert float(schedule(0)) == pytest.approx(preset.learning_rate)
    before = float(schedule(preset.start * per_epoch * 0.99))
    assert before == pytest.approx(preset.learning_rate)
    end = float(schedule(preset.epochs * per_epoch)) / preset.learning_rate
    assert end == pytest.approx(last, rel=0.03)
    assert (preset.stale_threshold is None) == (size >= 65_536)


def test_the_released_code_differs_where_it_does():
    for size, code in presets.OSAWA_2019.items():
        paper = presets.OSAWA_2022[size]
        changed = {
            name
            for name in paper._fields
            if getattr(paper, name) != getattr(code, name)
        }
        expected = {"norm_damping", "rescale", "velocity"}
        expected |= {"stale_threshold"} if size < 65_536 else set()
        if size == 131_072:
            expected |= {"power", "start", "end", "epochs"}
        assert changed == expected


@pytest.mark.parametrize("table", [presets.OSAWA_2022, presets.OSAWA_2019])
def test_a_preset_is_an_optimizer(table):
    problem = classify(Mlp())
    layers = problem.trace()
    tx = table[32_768].optimizer(layers, steps_per_epoch=40)
    _, grads, curvature = problem.evaluate(layers)
    state = tx.init(problem.params)
    updates, state = jax.jit(
        lambda g, s: tx.update(g, s, problem.params, curvature=curvature)
    )(grads, state)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(updates))
    kernel = np.asarray(problem.params["first"]["kernel"] + updates["first"]["kernel"])
    target = np.sqrt(2 * kernel.shape[1])
    if table is presets.OSAWA_2022:
        assert np.linalg.norm(kernel) == pytest.approx(target, rel=1e-5)
    else:
        assert np.linalg.norm(kernel) <= target * (1 + 1e-5)
    assert lbopt.refresh(state)["first"].a.dtype == bool
