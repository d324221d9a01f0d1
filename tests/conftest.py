"""Shared fixtures. CI must have Chromium and the full MNIST: there a missing one fails, elsewhere it skips."""

import os
import shutil
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores; set before anything imports torch
    os.environ.setdefault("OMP_NUM_THREADS", "1")

FULL_MNIST = Path(__file__).parents[2] / "shared" / "mnist"


def require(present, what):
    if not present:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{what} is not on this machine")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """The tests, and the kernels that nbval starts, share one fresh cache and leave the user's alone."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # that of all workers: what one has trained, the others need not
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_CACHE", str(folder / "cache"))
        yield


@pytest.fixture(scope="session")
def full_mnist_root():
    root = Path(os.environ.get("LORA_MNIST_ROOT", FULL_MNIST))
    require((root / "MNIST" / "raw").is_dir(), "the full MNIST")
    return root


@pytest.fixture(scope="session")
def chromium():
    path = shutil.which("chromium")
    require(path, "Chromium")
    return path
