"""Shared fixtures. CI must have Chromium and ../shared: there a missing one fails, elsewhere it skips."""

import os
import shutil
from pathlib import Path

import pytest

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # the workers share the cores, and the programs that they start do too
    os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARED_MNIST = Path(__file__).parents[2] / "shared" / "mnist"


def require(present, what):
    if not present:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{what} is not on this machine")


@pytest.fixture(scope="session")
def raw_mnist():
    """The folder with MNIST's four raw files."""
    require((SHARED_MNIST / "MNIST" / "raw").is_dir(), "../shared/mnist")
    return SHARED_MNIST


@pytest.fixture(scope="session")
def mnist():
    from lora_helpers import load_mnist

    return load_mnist()


@pytest.fixture
def base():
    """The stored base, fresh for each test."""
    from lora_helpers import pretrained_base

    return pretrained_base()


@pytest.fixture(scope="session")
def chromium():
    path = shutil.which("chromium")
    require(path, "Chromium")
    return path
