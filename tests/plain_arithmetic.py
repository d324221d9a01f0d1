"""Puts plain autograd in the place of `fast.py`, or another number of threads: see test_same_figures.py."""

import torch
from torch.nn import functional as F

from lora_helpers import experiments, model, training


def use_threads(count):
    torch.set_num_threads(count)


class PlainNets:
    """What `Fast` does, by the networks themselves and autograd."""

    def __init__(self, nets):
        self.nets = nets

    def batches(self, images, labels, chosen):
        for places in chosen:
            yield images[places], labels[places], None

    def backpropagate(self, images, labels, products=None):
        losses = []
        with torch.enable_grad():
            for net, x, y in zip(self.nets, images, labels):
                net.zero_grad()
                loss = F.cross_entropy(net(x), y)
                loss.backward()
                losses.append(loss.detach())
        return torch.stack(losses)


class PlainImages:
    """What `ImagesToTest` does, by the network itself."""

    def __init__(self, net, images):
        self.images = images

    def answers(self, net):
        with torch.no_grad():
            return torch.cat([net(part).argmax(dim=1) for part in self.images.split(500)])


def use_autograd(double=False):
    """From now on nothing is written out; with `double`, the stored base and all that is made of it is
    float64."""
    training.is_plain = training.is_trainable_plain = lambda net: False
    experiments.Fast, experiments.ImagesToTest = PlainNets, PlainImages
    if double:
        read = model.pretrained_base
        model.pretrained_base = lambda *args: read(*args).double()
