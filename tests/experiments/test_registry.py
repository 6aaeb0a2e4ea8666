"""Names of models: all there, and constructors of one signature."""

import functools
import typing

import jax
import jax.numpy as jnp
import pytest

from experiments import classifier, settings
from experiments.data import pipeline
from experiments.models import registry, resnet

RESNETS = ["resnet8", "resnet20", "resnet32", "resnet44", "resnet56"]
RESNETS += ["resnet18", "resnet34", "resnet50", "resnet101"]
OTHERS = ["preact_resnet8", "preact_resnet32", "alexnet", "alexnet_bn", "convnet"]
OTHERS += ["convnet_wide"]


def data(num_classes) -> typing.Any:
    return pipeline.Data(
        train=typing.cast(typing.Any, None),
        test=typing.cast(typing.Any, None),
        image_shape=(67, 67, 3),
        num_classes=num_classes,
        steps_per_epoch=1.0,
    )


def test_names_and_constructors_agree():
    assert typing.get_args(registry.ModelName) == tuple(registry.MODELS)
    assert list(registry.MODELS) == RESNETS + OTHERS


@pytest.mark.parametrize("name", RESNETS + OTHERS)
def test_models_are_built_and_give_logits(name):
    config = settings.Config(model=name, norm_momentum=0.25, dtype="bfloat16")
    model = classifier.build_model(config, data(7))
    assert (model.num_classes, model.norm_momentum) == (7, 0.25)
    assert model.dtype == jnp.bfloat16
    images = jax.ShapeDtypeStruct((2, 67, 67, 3), jnp.float32)
    init = functools.partial(model.init, train=True)
    variables = jax.eval_shape(init, jax.random.key(0), images)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    apply = functools.partial(
        model.apply, train=False, mutable=["intermediates"], capture_intermediates=True
    )
    logits, state = jax.eval_shape(apply, variables, images)
    assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)
    seen = state["intermediates"]
    hidden = {key: seen[key] for key in seen if key not in ("head", "__call__")}
    assert {x.dtype for x in jax.tree.leaves(hidden)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("name", RESNETS)
def test_resnets_take_zero_init_residual(name):
    config = settings.Config(model=name, zero_init_residual=True)
    model = classifier.build_model(config, data(7))
    assert isinstance(model, resnet.ResNet)
    assert model.zero_init_residual


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_refuse_zero_init_residual(name):
    config = settings.Config(model=name, zero_init_residual=True)
    with pytest.raises(ValueError, match=f"zero_init_residual: {name} .*resnet"):
        classifier.build_model(config, data(7))
