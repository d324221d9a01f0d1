"""The network on which everything is shown, and the trained one that the notebooks start from."""

import hashlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn

from lora_helpers.checks import all_finite, check_whole
from lora_helpers.data import STORED

LAYERS = ("linear1", "linear2", "linear3")  # those that hold weights
BASE = STORED / "base.safetensors"
BASE_DIGEST = "3b2f7d72c5ec423a70989663eb8d0f6ee35d2068b35cf2ea63ad3c2bdd648d43"  # SHA-256


class RichBoyNet(nn.Module):
    """An MLP for MNIST, 784 → hidden_size_1 → hidden_size_2 → 10, with ReLU between.

    The name is a joke about its needless size: 2,807,010 parameters by default.

    Input: float32, N×1×28×28 or N×784. Output: raw logits, float32, N×10.

    Raises:
        ValueError: a hidden size is not a whole number of at least 1.
    """

    def __init__(self, hidden_size_1: int = 1000, hidden_size_2: int = 2000):
        super().__init__()
        check_whole("hidden_size_1", hidden_size_1)
        check_whole("hidden_size_2", hidden_size_2)
        self.linear1 = nn.Linear(28 * 28, hidden_size_1)
        self.linear2 = nn.Linear(hidden_size_1, hidden_size_2)
        self.linear3 = nn.Linear(hidden_size_2, 10)
        self.relu = nn.ReLU()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.flatten(start_dim=1)
        x = self.relu(self.linear1(x))
        x = self.relu(self.linear2(x))
        return self.linear3(x)


@torch.inference_mode(False)  # tensors made inside inference mode could never be trained
def pretrained_base(path: str | os.PathLike | None = None) -> RichBoyNet:
    """The stored base, a `RichBoyNet` trained on MNIST, float32, on the CPU; or your own, from `path`.

    How the stored base was made, and its figures: stored/README.md. Keep your own with
    `safetensors.torch.save_file(net.state_dict(), "my_base.safetensors")`.

    Raises:
        FileNotFoundError: there is no file at `path`.
        ValueError: the file does not hold the six tensors of `RichBoyNet()`, float32 and finite.
    """
    file = BASE if path is None else Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"There is no file {file}; save a network there first, or call pretrained_base()."
        )
    data = file.read_bytes()
    if path is None and hashlib.sha256(data).hexdigest() != BASE_DIGEST:
        raise ValueError(
            f"{file} is not the base that this package was made with. Install lora_helpers again."
        )
    try:
        state = load(data)
    except SafetensorError as error:
        raise ValueError(
            f"{file} is not a safetensors file, or is damaged ({error}). Save the network again."
        ) from None
    with torch.device("meta"):  # no numbers are drawn for weights that are replaced at once
        net = RichBoyNet()
    expected = {name: (tensor.shape, torch.float32) for name, tensor in net.state_dict().items()}
    if {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()} != expected:
        found = ", ".join(f"{name} {tuple(t.shape)} {t.dtype}" for name, t in sorted(state.items()))
        raise ValueError(f"{file} does not hold a RichBoyNet() in float32, but: {found or 'nothing'}.")
    if not all_finite(state.values()):
        raise ValueError(
            f"The network in {file} holds NaN or infinite values: its training diverged. Train it again."
        )
    net.load_state_dict(state, assign=True)
    return net
