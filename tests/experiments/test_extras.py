"""The optional dependencies can be installed, and none of them is needed to import."""

import os
import subprocess
import sys
import tomllib

import pytest

from tests.test_processes import ROOT

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
    "optional-dependencies"
]
ACCELERATORS = ("cuda12", "cuda13", "tpu")
OTHERS = tuple(name for name in EXTRAS if name not in ACCELERATORS)
GROUPS = [
    *((name,) for name in EXTRAS),
    OTHERS,
    *((name, *OTHERS) for name in ACCELERATORS),
]


@pytest.mark.slow
@pytest.mark.parametrize("python", ["3.11", "3.13"])
@pytest.mark.parametrize("extras", GROUPS, ids="-".join)
def test_extras_resolve(extras, python):
    """Needs the package index; says what it found (see it with -rP)."""
    # libtpu asks for a C library of 2020; uv's name for Linux means one of 2018.
    platform = "x86_64-manylinux_2_31" if "tpu" in extras else "x86_64-manylinux_2_28"
    result = subprocess.run(
        [
            *(sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml"),
            *(f"--python-version={python}", f"--python-platform={platform}"),
            *("--quiet", "--no-header", "--no-annotate"),
            *(f"--extra={name}" for name in extras),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found = dict(line.split("==") for line in result.stdout.split() if "==" in line)
    print(result.stdout)
    assert {"jax", "flax", "optax"} <= found.keys()
    for name, package in (("cuda12", "jax-cuda12-plugin"), ("tpu", "libtpu")):
        assert (name in extras) == (package in found)


@pytest.mark.slow
def test_importing_needs_no_accelerator():
    """Not even where variables speak of one; a login node has none."""
    env = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    env |= {"CUDA_VISIBLE_DEVICES": "0,1", "CUDA_HOME": "/usr/local/cuda"}
    env |= {"NVIDIA_VISIBLE_DEVICES": "all"}
    program = "import lbopt, experiments.imagenet_resnet50, jax; print(jax.devices())"
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", program]
    subprocess.run(command, cwd=ROOT, env=env, check=True)
