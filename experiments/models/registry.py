"""The models by the names that `--model` takes."""

from collections.abc import Callable
from typing import Literal

from experiments.models import alexnet, convnet, preact_resnet, resnet

Model = resnet.ResNet | preact_resnet.PreactResNet | alexnet.AlexNet | convnet.ConvNet

ModelName = Literal[
    "resnet8",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "preact_resnet8",
    "preact_resnet32",
    "alexnet",
    "alexnet_bn",
    "convnet",
    "convnet_wide",
]
"""Names of the models; `resnet8` is the demo's."""

MODELS: dict[ModelName, Callable[..., Model]] = {
    "resnet8": resnet.ResNet8,
    "resnet20": resnet.ResNet20,
    "resnet32": resnet.ResNet32,
    "resnet44": resnet.ResNet44,
    "resnet56": resnet.ResNet56,
    "resnet18": resnet.ResNet18,
    "resnet34": resnet.ResNet34,
    "resnet50": resnet.ResNet50,
    "resnet101": resnet.ResNet101,
    "preact_resnet8": preact_resnet.PreactResNet8,
    "preact_resnet32": preact_resnet.PreactResNet32,
    "alexnet": alexnet.AlexNet,
    "alexnet_bn": alexnet.AlexNetBN,
    "convnet": convnet.ConvNet,
    "convnet_wide": convnet.WideConvNet,
}
"""Constructors by name.

All take `num_classes`, `norm_momentum` and `dtype`; those of residual networks also
take `remat` and `axis_name`, and those of `ResNet` `zero_init_residual`.
"""
