"""Packs MNIST's four raw files into mnist.npz: `python lora_helpers/stored/make_mnist.py FOLDER`.

FOLDER holds `MNIST/raw`, as `torchvision.datasets.MNIST(FOLDER, download=True)` leaves it.
"""

import sys
from pathlib import Path

import numpy as np
from torchvision.datasets import MNIST

arrays = {}
for part in ("train", "test"):
    digits = MNIST(sys.argv[1], train=part == "train")
    arrays[f"{part}_images"] = digits.data.numpy()  # uint8, N×28×28, in the original order
    arrays[f"{part}_labels"] = digits.targets.to(dtype=digits.data.dtype).numpy()  # uint8, N
np.savez_compressed(Path(__file__).with_name("mnist.npz"), **arrays)
