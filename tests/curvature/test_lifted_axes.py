"""The axes that lifted transforms add are told from a layer's own."""

import flax.linen as nn
import pytest

from tests.problems import FEATURES, classify


class Square(nn.Module):
    """Scanned layers as many as their width, so that sizes alone say nothing."""

    axis: int
    depth: int = FEATURES

    @nn.compact
    def __call__(self, x):
        kinds = {"variable_axes": {"params": self.axis}, "split_rngs": {"params": True}}
        return nn.scan(Layer, length=self.depth, **kinds)(name="body")(x, None)[0]


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(FEATURES, name="dense")(x)), None


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("depth", [FEATURES, 3])
def test_lifted_axes_are_told_from_the_layers_own(axis, depth):
    layers = classify(Square(axis, depth)).trace()
    assert layers["body/dense"].tapped.axes == (axis,)
    assert layers["body/dense"].tapped.copies == (depth,)


def test_an_axis_without_a_common_position_falls_back():
    # The bias of rank 1 has its axis last, at 1; the kernel at 2.
    problem = classify(Square(axis=-1, depth=3))
    layers = problem.trace()
    assert [x.fallback for x in layers.values()] == [True, True]
    assert "use axis 0 in variable_axes" in layers["body/dense/kernel"].why
    with pytest.raises(ValueError, match=r"strict=True.*'body/dense/kernel'.*axis 0"):
        problem.trace(strict=True)
