"""The bundled sample, the full MNIST, and what happens when neither can be had."""

import gzip
import hashlib
import http.server
import tempfile
import threading

import pytest
import torch
from torch.utils.data import TensorDataset
from torchvision.datasets import MNIST

from lora_helpers import data, load_mnist, only_digit


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.delenv("LORA_MNIST", raising=False)
    monkeypatch.delenv("LORA_MNIST_ROOT", raising=False)


def test_the_sample_is_split_by_digit():
    mnist = load_mnist()
    for part, each in ((mnist.train, 300), (mnist.test, 200)):
        images, labels = part.tensors
        assert images.dtype == torch.float32 and images.shape == (10 * each, 1, 28, 28)
        assert labels.dtype == torch.int64 and labels.bincount().tolist() == [each] * 10
    assert torch.isclose(mnist.train.tensors[0].min(), torch.tensor(-0.1307 / 0.3081))
    assert mnist.source == "sample"


def test_the_sample_is_genuine_and_its_halves_are_apart(full_mnist_root):
    known = {image.tobytes() for image in MNIST(full_mnist_root, train=True).data.numpy()}
    halves = []
    for part in (load_mnist().train, load_mnist().test):
        pixels = (part.tensors[0] * 0.3081 + 0.1307).mul(255).round().to(torch.uint8).squeeze(1)
        halves.append({image.tobytes() for image in pixels.numpy()})
    assert halves[0] | halves[1] <= known
    assert not halves[0] & halves[1]


def test_full_from_a_folder_and_from_the_environment(full_mnist_root, monkeypatch):
    mnist = load_mnist("full", root=full_mnist_root)
    assert mnist.train.tensors[0].shape == (60_000, 1, 28, 28) and len(mnist.test) == 10_000
    monkeypatch.setenv("LORA_MNIST", "full")
    monkeypatch.setenv("LORA_MNIST_ROOT", str(full_mnist_root))
    assert torch.equal(load_mnist().test.tensors[0], mnist.test.tensors[0])
    assert load_mnist("sample").source == "sample", "an argument outranks the environment"


def test_an_unknown_source_names_the_allowed_ones():
    with pytest.raises(ValueError, match="'sample'.*'full'"):
        load_mnist("fashion")


def test_what_is_no_folder_or_no_source_is_named():
    with pytest.raises(TypeError, match="root is 5"):
        load_mnist("full", root=5)
    with pytest.raises(ValueError, match="source is 'other'"):
        data.Mnist(load_mnist().train, load_mnist().test, "other")


def test_a_complete_folder_needs_no_temporary_one(full_mnist_root, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    assert len(load_mnist("full", root=full_mnist_root).test) == 10_000


@pytest.fixture
def mirror(tmp_path, full_mnist_root, monkeypatch):
    """A server on localhost that stands in for MNIST's mirrors."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    resources = []
    for name, _ in MNIST.resources:
        raw = (full_mnist_root / "MNIST" / "raw" / name.removesuffix(".gz")).read_bytes()
        (folder / name).write_bytes(gzip.compress(raw, 1))
        resources.append((name, hashlib.md5((folder / name).read_bytes()).hexdigest()))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=folder)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    monkeypatch.setattr(MNIST, "resources", resources)
    yield folder
    server.shutdown()
    server.server_close()


def test_full_is_downloaded_once_and_kept(mirror, tmp_path):
    root = tmp_path / "root"
    assert len(load_mnist("full", root=root).train) == 60_000
    for file in mirror.iterdir():
        file.unlink()
    assert len(load_mnist("full", root=root).test) == 10_000, "the second time needs no server"


def test_a_failed_download_says_how_to_go_on(mirror, tmp_path):
    next(mirror.glob("t10k-labels*")).unlink()
    with pytest.raises(RuntimeError, match=r"load_mnist\('sample'\)"):
        load_mnist("full", root=tmp_path / "root")


def test_a_silent_server_is_given_up(tmp_path, monkeypatch):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{silent.getsockname()[1]}/"])
        monkeypatch.setattr(data, "DOWNLOAD_TIMEOUT", 0.3)
        with pytest.raises(RuntimeError, match="could not be fetched"):
            load_mnist("full", root=tmp_path)
    assert socket.getdefaulttimeout() is None


def test_only_digit():
    nines = only_digit(load_mnist().test, 9)
    assert len(nines) == 200 and set(nines.tensors[1].tolist()) == {9}


@pytest.mark.parametrize("digit", [-1, 10, 9.0, "9", True, None])
def test_only_digit_refuses_what_is_no_digit(digit):
    with pytest.raises(ValueError, match="0 to 9"):
        only_digit(load_mnist().test, digit)


def test_only_digit_of_nothing():
    with pytest.raises(ValueError, match="empty"):
        only_digit(TensorDataset(torch.zeros(0, 1, 28, 28), torch.zeros(0, dtype=torch.int64)), 9)
    with pytest.raises(ValueError, match="holds no 9"):
        only_digit(only_digit(load_mnist().test, 3), 9)
    with pytest.raises(TypeError, match="TensorDataset"):
        only_digit([1, 2, 3], 9)


def test_a_relative_root_also_counts_from_the_folders_above(full_mnist_root, monkeypatch, tmp_path):
    notebooks = tmp_path / "project" / "notebooks"
    notebooks.mkdir(parents=True)
    (tmp_path / "digits").symlink_to(full_mnist_root.resolve())
    monkeypatch.chdir(notebooks)
    monkeypatch.setenv("LORA_MNIST_ROOT", "../digits")  # as given in the project's folder
    assert len(load_mnist("full").test) == 10_000
