"""The digits: a bundled sample that needs no network, and the full MNIST."""

import hashlib
import os
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import TensorDataset

from lora_helpers.cache import cache_folder, keep_file, set_aside
from lora_helpers.checks import all_finite, check_whole

MEAN, STD = 0.1307, 0.3081  # of MNIST's training pixels, scaled to [0, 1]
SAMPLE_TRAIN_PER_DIGIT = 300  # of 500; with 300/200 and three epochs fewer nines are wrong at every seed tried: tests/seeds.py
DOWNLOAD_TIMEOUT = 20  # seconds without a byte before a download gives up; one that trickles goes on
FILES = {  # of MNIST, unpacked, with their MD5 sums
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


@dataclass(frozen=True)
class Mnist:
    """Digits to train and to test on.

    Attributes:
        train, test: each a `TensorDataset` of images, float32, N×1×28×28, normalised with
            mean 0.1307 and standard deviation 0.3081, and labels, int64, N.
        source: "sample" (the 5,000 bundled images) or "full" (MNIST's 70,000).

    Raises:
        ValueError: `source` is neither.
    """

    train: TensorDataset
    test: TensorDataset
    source: str

    def __post_init__(self):
        if self.source not in ("sample", "full"):
            raise ValueError(f"source is {self.source!r}; it must be 'sample' or 'full': it says how long a base is pre-trained.")

    @property
    def pretraining_epochs(self) -> int:
        """Passes over `train` that make a good base: 3 on the small sample, 1 on full MNIST."""
        return {"sample": 3, "full": 1}[self.source]

    def __repr__(self) -> str:
        return f"Mnist({self.source}: {len(self.train):,} training and {len(self.test):,} test images)"


def load_mnist(source: str | None = None, root: str | os.PathLike | None = None) -> Mnist:
    """Loads the digits, normalised once.

    Args:
        source: "sample", the 5,000 genuine images in this package (no network): 300 of each
            digit to train, 200 to test; or "full", MNIST's 60,000 and 10,000. Default: the
            environment variable LORA_MNIST, else "sample".
        root: for "full", the folder that holds, or is to hold, `MNIST/raw`. Default: the
            environment variable LORA_MNIST_ROOT (a relative one counts from the current folder,
            or the nearest above it that has the files), else the cache folder. Files missing
            there are downloaded by torchvision; in the cache, damaged ones too.

    Raises:
        ValueError: `source` is neither "sample" nor "full".
        TypeError: `root` is no path.
        RuntimeError: the full MNIST is not in `root` and could not be downloaded, or its files are damaged.

    Source: mean and deviation as in PyTorch's MNIST example; files by
    https://docs.pytorch.org/vision/stable/generated/torchvision.datasets.MNIST.html
    """
    if root is not None and not isinstance(root, (str, os.PathLike)):
        raise TypeError(f"root is {root!r}; it must be the path of a folder, such as '../shared/mnist'.")
    source = os.environ.get("LORA_MNIST") or "sample" if source is None else source
    if source == "sample":
        return _load_sample()
    if source == "full":
        return _load_full(Path(root) if root else _usual_root())
    raise ValueError(
        f"source is {source!r}; allowed are 'sample' (5,000 bundled images) and 'full' (70,000). "
        "Pass one of them to load_mnist, or set LORA_MNIST to it."
    )


def only_digit(dataset: TensorDataset, digit: int) -> TensorDataset:
    """The part of `dataset` whose label is `digit`, in the same order: images M×1×28×28 and int64 labels, M.

    Raises:
        ValueError: `digit` is not a whole number from 0 to 9, or the dataset has none of it.
    """
    check_whole("digit", digit, 0, 9)
    images, labels = as_tensors(dataset)
    keep = labels == digit
    if not keep.any():
        raise ValueError(f"The dataset of {len(labels)} images holds no {digit}; choose another digit.")
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
        raise TypeError(f"The images are {images.dtype}; they must be floating-point, normalised as load_mnist() does it.")
    if images[0].numel() != 28 * 28:
        raise ValueError(f"Each image is {' × '.join(map(str, images.shape[1:])) or 'one number'}; it must hold 28 × 28 values.")
    if not all_finite([images]):
        raise ValueError("The images hold values that are NaN or infinite; take them anew from load_mnist().")
    return images, labels


def _normalised(images: torch.Tensor, labels: torch.Tensor) -> TensorDataset:
    pixels = images.unsqueeze(1).to(torch.float32).div_(255)
    device = torch.get_default_device()
    return TensorDataset(pixels.sub_(MEAN).div_(STD).to(device), labels.to(device, torch.int64))


def _load_sample() -> Mnist:
    path = Path(__file__).parent / "sample" / "mnist_sample.npz"
    with np.load(path, allow_pickle=False) as file:
        images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"])
    position = torch.arange(len(labels), device="cpu") % 500  # the file is sorted by digit, 500 of each
    train = position < SAMPLE_TRAIN_PER_DIGIT
    return Mnist(_normalised(images[train], labels[train]), _normalised(images[~train], labels[~train]), "sample")


def _load_full(root: Path) -> Mnist:
    raw = root / "MNIST" / "raw"
    if root == _cached_root():
        _set_damaged_aside(raw)
    if _is_complete(root):
        return _read(raw)
    with tempfile.TemporaryDirectory() as work:  # an interrupted download leaves nothing behind
        return _read(_download(Path(work), root))


def _download(work: Path, root: Path) -> Path:
    from torchvision.datasets import MNIST  # slow to import, and only needed here

    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torchvision offers no time limit of its own
    try:
        MNIST(work, download=True)
    except (RuntimeError, OSError, ValueError) as error:
        raise RuntimeError(
            f"The full MNIST is not in {root} and could not be fetched: {error}\n"
            "Go on without a network: load_mnist('sample'), or unset LORA_MNIST. If you have the "
            "files, pass root=FOLDER or set LORA_MNIST_ROOT to the folder that holds MNIST/raw."
        ) from error
    finally:
        socket.setdefaulttimeout(previous)
    for name in FILES:
        if not os.path.isfile(root / "MNIST" / "raw" / name):
            keep_file(work / "MNIST" / "raw" / name, root / "MNIST" / "raw" / name)
    return work / "MNIST" / "raw"


def _read(raw: Path) -> Mnist:
    return Mnist(_read_part(raw, "train"), _read_part(raw, "t10k"), "full")


def _read_part(raw: Path, part: str) -> TensorDataset:
    from torchvision.datasets.mnist import read_image_file, read_label_file

    try:
        images, labels = read_image_file(raw / f"{part}-images-idx3-ubyte"), read_label_file(raw / f"{part}-labels-idx1-ubyte")
        if images.shape[1:] != (28, 28) or len(images) != len(labels) or labels.max() > 9:
            raise ValueError(f"images {tuple(images.shape)}, labels {tuple(labels.shape)} up to {labels.max()}")
    except Exception as error:  # torchvision checks with assert, index and reshape
        raise RuntimeError(
            f"The {part} files in {raw} are not MNIST's, or are damaged ({type(error).__name__}: {error}). "
            "Delete them to have them downloaded again, or pass another root."
        ) from error
    return _normalised(images, labels)


def _set_damaged_aside(raw: Path) -> None:
    for name, expected in FILES.items():
        try:
            if os.path.lexists(raw / name) and not (raw / name).is_file():
                raise OSError("it is no file")  # opening a named pipe would wait for ever
            with (raw / name).open("rb") as file:
                found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            found = error
        if found != expected:
            set_aside(raw / name, found if isinstance(found, OSError) else "its content is not MNIST's")


def _cached_root() -> Path:
    return cache_folder() / "mnist"


def _usual_root() -> Path:
    named = os.environ.get("LORA_MNIST_ROOT")
    if not named:
        return _cached_root()
    # A notebook runs in its own folder, which is not the one where the variable was set.
    places = [folder / named for folder in (Path.cwd(), *Path.cwd().parents)]
    return next((place for place in places if _is_complete(place)), places[0])


def _is_complete(root: Path) -> bool:
    return all(os.path.isfile(root / "MNIST" / "raw" / name) for name in FILES)  # False, not an error, for a path that cannot be
