"""A network with adapters, as if trained."""

import torch

from lora_helpers import lora_layers


def stir(net, name=None):
    """As if trained: B of the adapter `name`, or of all, is not zero."""
    with torch.no_grad():
        for adapters in lora_layers(net).values():
            for adapter in [a for a in adapters if name in (None, a.name)]:
                adapter.lora_B.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    return net
