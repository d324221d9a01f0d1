"""How fast the collection is, beside the plain recipe, PEFT and loralib: `uv run python tests/benchmark.py`.

Each contender runs in a process of its own, in turn, and the next time in reverse; the table gives medians
and ranges. The whole MNIST and the stored base are used. lora_helpers runs in one thread; the others run as
they come, with PyTorch's default number of threads. Nothing is gated.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import torch

THREADS = torch.get_num_threads()  # the default, before lora_helpers sets one

from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler
from torchvision import transforms

from lora_helpers import (
    RichBoyNet,
    add_lora,
    evaluate,
    freeze_base,
    load_mnist,
    only_digit,
    pretrained_base,
    train,
)
from lora_helpers.experiments import FineTuner, Setting
from lora_helpers.training import shuffled_batches

RANKS, STOPS = (1, 8, 16, 64), (1, 2, 4, 8, 16, 32, 64)
STEPS, BATCHES, BATCH_SIZE = 200, 100, 10  # of pre-training that are timed; of fine-tuning
LAYERS = ("linear1", "linear2", "linear3")


def timed(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# ---------------------------------------------------------------- the plain recipe, as usually published


class Digits(Dataset):
    """Images that are transformed one by one, whenever they are asked for."""

    def __init__(self, part, keep=None):
        images, labels = part.tensors
        images, labels = (images, labels) if keep is None else (images[:keep], labels[:keep])
        pixels = ((images * 0.3081 + 0.1307) * 255).round().byte()
        to_image = transforms.ToPILImage()
        self.pictures, self.labels = [to_image(image) for image in pixels], labels.tolist()
        self.transform = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
        )

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(self.pictures[index]), self.labels[index]


class PlainLoRA(nn.Module):
    def __init__(self, out_features, in_features, rank):
        super().__init__()
        self.lora_A = nn.Parameter(torch.randn(rank, in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank))
        self.rank = rank

    def forward(self, weight):
        return weight + (self.lora_B @ self.lora_A) / self.rank


def plain_train(net, loader, steps):
    optimizer, losses = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-3), []
    net.train()
    while True:
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if len(losses) == steps:
                return losses


def plain_test(net, loader):
    wrong = [0] * 10
    net.eval()
    with torch.no_grad():
        for images, labels in loader:
            for scores, label in zip(net(images), labels):
                if torch.argmax(scores) != label:
                    wrong[label.item()] += 1
    return wrong


def plain():
    torch.set_num_threads(THREADS)
    mnist, net = load_mnist(), RichBoyNet()
    train_set = Digits(mnist.train, keep=15_000)
    loader = DataLoader(train_set, batch_size=BATCH_SIZE, shuffle=True)
    plain_train(net, loader, 5)
    seconds = {"pre-training, a step": timed(lambda: plain_train(net, loader, STEPS)) / STEPS}
    test, base = DataLoader(Digits(mnist.test), batch_size=BATCH_SIZE), pretrained_base()
    seconds["testing 10,000 images"] = timed(lambda: plain_test(base, test))
    assert plain_test(base, test) == evaluate(base, mnist.test).wrong_counts, "both do the same work"
    nines = [place for place, label in enumerate(train_set.labels) if label == 9]
    loader = DataLoader(train_set, batch_size=BATCH_SIZE, sampler=SubsetRandomSampler(nines))
    for rank in (1, 16):
        adapted = pretrained_base()
        for layer in (adapted.linear1, adapted.linear2, adapted.linear3):
            parametrize.register_parametrization(layer, "weight", PlainLoRA(*layer.weight.shape, rank))
        for name, parameter in adapted.named_parameters():
            parameter.requires_grad = "lora" in name
        plain_train(adapted, loader, 5)
        seconds[f"fine-tuning, 100 batches, rank {rank}"] = timed(
            lambda net=adapted: plain_train(net, loader, BATCHES)
        )
    return seconds


# ---------------------------------------------------------------- lora_helpers


def ours():
    mnist, net, quiet = load_mnist(), RichBoyNet(), {"progress": False, "seed": 0}
    train(net, mnist.train, max_batches=5, **quiet)
    seconds = {
        "pre-training, a step": timed(lambda: train(net, mnist.train, max_batches=STEPS, **quiet)) / STEPS
    }
    base, nines = pretrained_base(), only_digit(mnist.train, 9)
    evaluate(base, mnist.test)
    seconds["testing 10,000 images"] = timed(lambda: evaluate(base, mnist.test))
    for rank in RANKS:
        adapted = freeze_base(add_lora(copy.deepcopy(base), rank=rank))
        train(adapted, nines, max_batches=5, **quiet)
        spent = timed(lambda net=adapted: train(net, nines, max_batches=BATCHES, **quiet))
        seconds[f"fine-tuning at rank {rank}, a step"] = spent / BATCHES
        if rank in (1, 16):
            seconds[f"fine-tuning, 100 batches, rank {rank}"] = spent
    tuner = FineTuner(base, mnist)
    tuner.run_all([Setting(seed=99)])
    seconds["seven ranks, 100 batches each"] = timed(
        lambda: tuner._train([Setting(rank=rank) for rank in STOPS], BATCHES, {BATCHES}, None)
    )
    seconds["twenty adapters of rank 1, trained and tested"] = timed(
        lambda: tuner.run_all([Setting(seed=seed) for seed in range(1, 21)])
    )
    return seconds


# ---------------------------------------------------------------- PEFT and loralib, with the fused Adam


def rival(adapt):
    torch.set_num_threads(THREADS)
    base, (images, labels) = pretrained_base(), only_digit(load_mnist().train, 9).tensors
    batches = [(images[b], labels[b]) for b in islice(shuffled_batches(len(labels), BATCH_SIZE, 0), BATCHES)]

    def fine_tune(net, batches):
        optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-3, fused=True)
        for images, labels in batches:
            loss = F.cross_entropy(net(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    steps = {}
    for rank in STOPS:
        net = adapt(copy.deepcopy(base), rank)
        fine_tune(net, batches[:5])
        steps[rank] = timed(lambda net=net: fine_tune(net, batches)) / BATCHES
    seconds = {f"fine-tuning at rank {rank}, a step": steps[rank] for rank in RANKS}
    return seconds | {"seven ranks, 100 batches each": sum(steps.values()) * BATCHES}


def peft():
    from peft import LoraConfig, get_peft_model

    def config(rank):
        return LoraConfig(r=rank, lora_alpha=1, target_modules=list(LAYERS))

    return rival(lambda net, rank: get_peft_model(net, config(rank)))


def loralib():
    import loralib as lora

    def adapt(net, rank):
        for name in LAYERS:
            old = net.get_submodule(name)
            new = lora.Linear(old.in_features, old.out_features, r=rank, lora_alpha=1)
            new.load_state_dict(old.state_dict(), strict=False)
            setattr(net, name, new)
        lora.mark_only_lora_as_trainable(net)
        return net

    return rival(adapt)


# ---------------------------------------------------------------- what the machine can do


def floor():
    """The fused Adam alone on all parameters, and the matrix products alone of a test: what no code here
    can avoid."""
    net = RichBoyNet()
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    weights = [net.get_submodule(name).weight.detach() for name in LAYERS]
    inputs = [torch.randn(10_000, weight.shape[1]) for weight in weights]
    for x, weight in zip(inputs, weights):  # once, to warm up
        F.linear(x, weight)
    seconds = {"pre-training, a step": timed(lambda: [optimizer.step() for _ in range(STEPS)]) / STEPS}
    return seconds | {
        "testing 10,000 images": timed(lambda: [F.linear(x, w) for x, w in zip(inputs, weights)])
    }


CONTENDERS = {"plain recipe": plain, "PEFT": peft, "loralib": loralib, "lora_helpers": ours, "floor": floor}


def machine():
    cpuinfo = Path("/proc/cpuinfo")  # Linux names the processor nowhere else
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    model = next(
        (line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor()
    )
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "peft", "loralib"))
    python = f"Python {platform.python_version()}"
    return f"{model}, {os.cpu_count()} cores, {THREADS} threads by default, {python}, {versions}"


def report(results):
    print(f"\n{'milliseconds: median (range)':46}" + "".join(f"{name:>22}" for name in results))
    for row in dict.fromkeys(row for figures in results.values() for row in figures):
        cells = []
        for figures in results.values():
            values = sorted(1e3 * v for v in figures.get(row, []))
            low_high = f"({values[0]:.3g}–{values[-1]:.3g})" if values else ""
            cells.append(f"{statistics.median(values):.3g} {low_high}" if values else "")
        print(f"{row:46}" + "".join(f"{cell:>22}" for cell in cells))
    print()
    for row, own in results["lora_helpers"].items():
        others = {
            name: figures[row]
            for name, figures in results.items()
            if row in figures and name != "lora_helpers"
        }
        ratios = [
            f"{statistics.median(v) / statistics.median(own):.2f} × {name}" for name, v in others.items()
        ]
        print(f"{row:46} as fast as: {', '.join(ratios) or '–'}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        print(json.dumps(CONTENDERS[options.contender]()))
        return
    print(machine())
    results = {name: {} for name in CONTENDERS}
    for repetition in range(options.repetitions):
        for name in list(CONTENDERS)[:: -1 if repetition % 2 else 1]:
            command = [sys.executable, __file__, "--contender", name]
            said = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, encoding="utf-8"
            ).stdout
            for row, seconds in json.loads(said.splitlines()[-1]).items():
                results[name].setdefault(row, []).append(seconds)
    report(results)


if __name__ == "__main__":
    main()
