"""The digits are MNIST's own, all of them, and `only_digit` keeps the right ones."""

import time

import pytest
import torch
from torch.utils.data import TensorDataset
from torchvision.datasets import MNIST

from lora_helpers import Mnist, load_mnist, only_digit
from lora_helpers.data import as_tensors, check_mnist


def test_every_image_and_label_is_that_of_the_raw_files_in_their_order(mnist, raw_mnist):
    for part, train in ((mnist.train, True), (mnist.test, False)):
        raw = MNIST(raw_mnist, train=train)
        images, labels = part.tensors
        assert torch.equal(labels, raw.targets)
        for some, bytes_ in zip(images.squeeze(1).split(10_000), raw.data.split(10_000)):
            assert torch.equal((some * 0.3081 + 0.1307).mul(255).round().to(torch.uint8), bytes_)


def test_images_are_normalised_float32_and_labels_int64(mnist):
    assert repr(mnist) == "Mnist(60,000 training and 10,000 test images)"
    for part, size in ((mnist.train, 60_000), (mnist.test, 10_000)):
        images, labels = part.tensors
        assert images.dtype == torch.float32 and images.shape == (size, 1, 28, 28)
        assert labels.dtype == torch.int64 and labels.shape == (size,)
    assert abs(mnist.train.tensors[0].mean()) < 1e-3 and abs(mnist.train.tensors[0].std() - 1) < 1e-3


def test_loading_takes_seconds_at_most_and_draws_no_random_number():
    state, start = torch.get_rng_state(), time.perf_counter()
    load_mnist()
    assert torch.equal(torch.get_rng_state(), state)
    assert time.perf_counter() - start < 20  # about half a second when nothing else runs


def test_only_digit_keeps_that_digit_in_the_same_order(mnist):
    images, labels = mnist.test.tensors
    kept = only_digit(mnist.test, 9)
    assert len(kept) == 1009 and set(kept.tensors[1].tolist()) == {9}
    assert torch.equal(kept.tensors[0], images[labels == 9])


@pytest.mark.parametrize("digit", [-1, 10, 9.0, "9", None, True])
def test_a_digit_is_a_whole_number_from_0_to_9(mnist, digit):
    with pytest.raises(ValueError, match="digit is .*whole number from 0 to 9"):
        only_digit(mnist.test, digit)


def test_a_digit_that_is_not_there_is_named(mnist):
    with pytest.raises(ValueError, match="has no 3; choose another"):
        only_digit(only_digit(mnist.test, 9), 3)


IMAGES, LABELS = torch.zeros(2, 1, 28, 28), torch.tensor([1, 2])


@pytest.mark.parametrize(
    "dataset, error, words",
    [
        ([1, 2], TypeError, "dataset is a list; it must be a TensorDataset"),
        (TensorDataset(IMAGES), TypeError, "TensorDataset"),
        (TensorDataset(IMAGES, LABELS.float()), TypeError, "int64"),
        (TensorDataset(IMAGES[:0], LABELS[:0]), ValueError, "empty"),
        (TensorDataset(IMAGES, LABELS + 9), ValueError, "Labels run from 10 to 11"),
        (TensorDataset(IMAGES.byte(), LABELS), TypeError, "float32"),
        (TensorDataset(IMAGES[..., 1:], LABELS), ValueError, "1 × 28 × 27"),
        (TensorDataset(IMAGES / 0, LABELS), ValueError, "NaN or infinite"),
    ],
)
def test_what_is_not_a_set_of_digits_is_refused_in_words(dataset, error, words):
    with pytest.raises(error, match=words):
        as_tensors(dataset)


def test_what_is_not_mnist_is_refused():
    with pytest.raises(TypeError, match="what load_mnist"):
        check_mnist(TensorDataset(IMAGES, LABELS))
    check_mnist(Mnist(TensorDataset(IMAGES, LABELS), TensorDataset(IMAGES, LABELS)))
