"""The digits: the whole MNIST, read from one file of this package."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import TensorDataset
from torchvision.transforms.v2.functional import normalize

from lora_helpers.checks import all_finite, check_whole

STORED = Path(__file__).parent / "stored"  # what the package ships, and the scripts that made it
MEAN, STD = 0.1307, 0.3081  # of MNIST's training pixels, scaled to [0, 1]


@dataclass(frozen=True)
class Mnist:
    """Digits to train and to test on.

    Attributes:
        train, test: each a `TensorDataset` of images, float32, N×1×28×28, normalised with
            mean 0.1307 and standard deviation 0.3081, and labels, int64, N.
    """

    train: TensorDataset
    test: TensorDataset

    def __repr__(self) -> str:
        return f"Mnist({len(self.train):,} training and {len(self.test):,} test images)"


def load_mnist() -> Mnist:
    """Loads MNIST's 60,000 training and 10,000 test images, in the original order, normalised.

    Source: mean and standard deviation as in PyTorch's MNIST example,
    https://github.com/pytorch/examples/tree/main/mnist; the files' origin is in stored/README.md.
    """
    with np.load(STORED / "mnist.npz", allow_pickle=False) as file:
        return Mnist(*(_part(file[f"{part}_images"], file[f"{part}_labels"]) for part in ("train", "test")))


def _part(images: np.ndarray, labels: np.ndarray) -> TensorDataset:
    pixels = torch.from_numpy(images).unsqueeze(1).to(torch.float32).div_(255)
    return TensorDataset(normalize(pixels, [MEAN], [STD], inplace=True), torch.from_numpy(labels).long())


def only_digit(dataset: TensorDataset, digit: int) -> TensorDataset:
    """The part of `dataset` whose label is `digit`, in the same order: images M×1×28×28, labels M.

    Raises:
        ValueError: `digit` is not a whole number from 0 to 9, or the dataset has none of it.
    """
    check_whole("digit", digit, 0, 9)
    images, labels = as_tensors(dataset)
    keep = labels == digit
    if not keep.any():
        raise ValueError(f"The dataset of {len(labels)} images has no {digit}; choose another digit.")
    return TensorDataset(images[keep], labels[keep])


def check_mnist(mnist: Mnist) -> None:
    """Raises TypeError unless `mnist` is a `Mnist`."""
    if not isinstance(mnist, Mnist):
        raise TypeError(f"mnist is a {type(mnist).__name__}; it must be what load_mnist() returns.")


def as_tensors(dataset: TensorDataset) -> tuple[torch.Tensor, torch.Tensor]:
    """The images and labels of `dataset`, checked.

    Raises:
        TypeError: not a `TensorDataset` of floating-point images and int64 labels.
        ValueError: it is empty, an image does not hold 28×28 finite values, or a label is not 0 to 9.
    """
    tensors = dataset.tensors if isinstance(dataset, TensorDataset) else ()
    if len(tensors) != 2 or tensors[1].dtype != torch.int64 or tensors[1].ndim != 1:
        raise TypeError(
            f"dataset is a {type(dataset).__name__}; it must be a TensorDataset(images, labels) "
            "with int64 labels, such as load_mnist().train."
        )
    images, labels = tensors
    if len(labels) == 0:
        raise ValueError("The dataset is empty; it must hold at least one image.")
    if labels.min() < 0 or labels.max() > 9:
        raise ValueError(f"Labels run from {labels.min()} to {labels.max()}; they must be 0 to 9.")
    if not images.is_floating_point():
        raise TypeError(f"The images are {images.dtype}; they must be float32, as load_mnist() gives them.")
    if images[0].numel() != 28 * 28:
        shape = " × ".join(map(str, images.shape[1:])) or "one number"
        raise ValueError(f"Each image is {shape}; it must hold 28 × 28 values.")
    if not all_finite([images]):
        raise ValueError("The images hold NaN or infinite values; load them again with load_mnist().")
    return images, labels
