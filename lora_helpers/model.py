"""The network that everything is shown on."""

import torch
from torch import nn

from lora_helpers.checks import check_whole


LAYERS = ("linear1", "linear2", "linear3")  # those that hold weights


class RichBoyNet(nn.Module):
    """An MLP for MNIST, 784 → hidden_size_1 → hidden_size_2 → 10, with ReLU between.

    The name is a joke about its needless size: 2,807,010 parameters by default.

    Input: float32, N×1×28×28 or N×784. Output: raw logits, float32, N×10.

    Raises:
        ValueError: a hidden size is not a whole number of at least 1.
    """

    def __init__(self, hidden_size_1: int = 1000, hidden_size_2: int = 2000):
        super().__init__()
        for name, size in (("hidden_size_1", hidden_size_1), ("hidden_size_2", hidden_size_2)):
            check_whole(name, size)
        self.linear1 = nn.Linear(28 * 28, hidden_size_1)
        self.linear2 = nn.Linear(hidden_size_1, hidden_size_2)
        self.linear3 = nn.Linear(hidden_size_2, 10)
        self.relu = nn.ReLU()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.flatten(start_dim=1)
        x = self.relu(self.linear1(x))
        x = self.relu(self.linear2(x))
        return self.linear3(x)
