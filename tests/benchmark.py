"""How fast the collection is, beside the plain recipe, PEFT and loralib, and beside the machine's limit.

    uv run python tests/benchmark.py [--json FILE] [--repetitions 3] [--quick]

Each contender runs in a process of its own, in turn, several times; the table gives medians and ranges.
Full MNIST is used where LORA_MNIST_ROOT or ../shared/mnist holds it, else the bundled sample. Nothing is gated.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RANKS = (1, 8, 64)
STOPS = (1, 2, 4, 8, 16, 32, 64)
STEPS = 200  # of pre-training that are timed
BATCHES, BATCH_SIZE = 100, 10


# The plain recipe, as it is usually published: transforms per image, default Adam, the whole W + ΔW, a Python loop over answers.


def plain_loader(train, indices=None):
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    pictures, labels = pictures_of(train)

    class Digits(Dataset):
        def __len__(self):
            return len(labels)

        def __getitem__(self, index):
            return transform(pictures[index]), labels[index]

    return DataLoader(Digits(), batch_size=BATCH_SIZE, sampler=indices, shuffle=train and indices is None)


def plain_network():
    import torch
    from torch import nn

    class RichBoyNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear1, self.linear2, self.linear3 = nn.Linear(784, 1000), nn.Linear(1000, 2000), nn.Linear(2000, 10)
            self.relu = nn.ReLU()

        def forward(self, image):
            x = image.view(-1, 784)
            return self.linear3(self.relu(self.linear2(self.relu(self.linear1(x)))))

    torch.manual_seed(0)
    return RichBoyNet()


def plain_train(net, loader, steps):
    import torch
    from torch import nn

    loss_function = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.001)
    losses = []
    net.train()
    while True:
        for image, label in loader:
            optimizer.zero_grad()
            loss = loss_function(net(image), label)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if len(losses) == steps:
                return losses


def plain_test(net, loader):
    import torch

    wrong = [0] * 10
    net.eval()
    with torch.no_grad():
        for images, labels in loader:
            for scores, label in zip(net(images), labels):
                if torch.argmax(scores) != label:
                    wrong[label.item()] += 1
    return wrong


def plain_lora(net, rank=1, alpha=1):
    import torch
    from torch import nn
    from torch.nn.utils import parametrize

    class LoRA(nn.Module):
        def __init__(self, out_features, in_features):
            super().__init__()
            self.lora_A = nn.Parameter(torch.randn(rank, in_features))
            self.lora_B = nn.Parameter(torch.zeros(out_features, rank))

        def forward(self, weight):
            return weight + (self.lora_B @ self.lora_A) * (alpha / rank)

    for layer in (net.linear1, net.linear2, net.linear3):
        parametrize.register_parametrization(layer, "weight", LoRA(*layer.weight.shape))
    for name, parameter in net.named_parameters():
        parameter.requires_grad = "lora" in name
    return net


# The same digits and the same batches for everybody.


def mnist():
    from lora_helpers import load_mnist

    root = Path(os.environ.get("LORA_MNIST_ROOT") or ROOT.parent / "shared" / "mnist")
    return load_mnist("full", root=root) if (root / "MNIST" / "raw").is_dir() else load_mnist("sample")


def pictures_of(train):
    from torchvision.transforms.functional import to_pil_image

    data = mnist()
    images, labels = (data.train if train else data.test).tensors
    pixels = (images * 0.3081 + 0.1307).clamp(0, 1)
    if train:  # the timed steps and the nines see no more than these
        keep = sorted({*range(STEPS * BATCH_SIZE), *(labels == 9).nonzero().flatten()[: BATCHES * BATCH_SIZE].tolist()})
        pixels, labels = pixels[keep], labels[keep]
    return [to_pil_image(image) for image in pixels], labels.tolist()


def same_batches(images, labels, batches):
    """The batches that `lora_helpers.train` draws with seed 0."""
    from lora_helpers.training import _batches

    return [(images[batch], labels[batch]) for _, batch in zip(range(batches), _batches(len(labels), BATCH_SIZE, 0))]


def timed(work):
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


# The contenders; each returns seconds by name.


def plain():
    import torch
    from lora_helpers import pretrained_base

    loader, net = plain_loader(train=True), plain_network()
    plain_train(net, loader, 5)
    seconds = {}
    seconds["pre-training, a step"] = timed(lambda: plain_train(net, loader, STEPS))[0] / STEPS
    test = plain_loader(train=False)
    seconds["testing, all test images"] = timed(lambda: plain_test(net, test))[0]
    nines = [i for i, label in enumerate(loader.dataset[k][1] for k in range(len(loader.dataset))) if label == 9]
    loader = plain_loader(train=True, indices=torch.utils.data.SubsetRandomSampler(nines))
    net.load_state_dict(pretrained_base(mnist(), progress=False).state_dict())  # the base that the others start from
    adapted = plain_lora(net)
    plain_train(adapted, loader, 5)
    seconds["fine-tuning, 100 batches"] = timed(lambda: plain_train(adapted, loader, BATCHES))[0]
    return seconds


def ours():
    from lora_helpers import RichBoyNet, add_lora, evaluate, freeze_base, only_digit, pretrained_base, train

    data = mnist()
    net, quiet = RichBoyNet(), {"progress": False, "seed": 0}
    train(net, data.train, max_batches=5, **quiet)
    seconds = {}
    seconds["pre-training, a step"] = timed(lambda: train(net, data.train, max_batches=STEPS, **quiet))[0] / STEPS
    evaluate(net, data.test)
    seconds["testing, all test images"] = timed(lambda: evaluate(net, data.test))[0]
    base, nines = pretrained_base(data, progress=False), only_digit(data.train, 9)
    for rank in RANKS:
        adapted = freeze_base(add_lora(copy.deepcopy(base), rank=rank))
        train(adapted, nines, max_batches=5, **quiet)
        spent = timed(lambda: train(adapted, nines, max_batches=BATCHES, **quiet))[0]
        seconds[f"fine-tuning at r = {rank}, a step"] = spent / BATCHES
        if rank == 1:
            seconds["fine-tuning, 100 batches"] = spent
    return seconds


def rival(adapt):
    import torch
    from torch.nn import functional as F

    from lora_helpers import only_digit, pretrained_base

    data = mnist()
    base, batches = pretrained_base(data, progress=False), same_batches(*only_digit(data.train, 9).tensors, BATCHES)

    def fine_tune(net, batches):
        optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-3)
        for images, labels in batches:
            loss = F.cross_entropy(net(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    seconds = {}
    for rank in STOPS:
        net = adapt(copy.deepcopy(base), rank)
        fine_tune(net, batches[:5])
        seconds[f"fine-tuning at r = {rank}, a step"] = timed(lambda: fine_tune(net, batches))[0] / BATCHES
    seconds["every slider stop"] = sum(seconds.values()) * BATCHES
    return {name: s for name, s in seconds.items() if name == "every slider stop" or any(f"r = {r}," in name for r in RANKS)}


def peft():
    from peft import LoraConfig, get_peft_model

    layers = ["linear1", "linear2", "linear3"]
    return rival(lambda net, rank: get_peft_model(net, LoraConfig(r=rank, lora_alpha=1, target_modules=layers)))


def loralib():
    import loralib as lora

    def adapt(net, rank):
        for name in ("linear1", "linear2", "linear3"):
            old = net.get_submodule(name)
            new = lora.Linear(old.in_features, old.out_features, r=rank, lora_alpha=1)
            new.load_state_dict(old.state_dict(), strict=False)
            setattr(net, name, new)
        lora.mark_only_lora_as_trainable(net)
        return net

    return rival(adapt)


def sweep():
    from lora_helpers import add_lora, freeze_base, only_digit, pretrained_base, train_side_by_side

    data = mnist()
    base, nines = pretrained_base(data, progress=False), only_digit(data.train, 9)
    nets = [freeze_base(add_lora(copy.deepcopy(base), rank=rank)) for rank in STOPS]
    train_side_by_side(nets, nines, max_batches=5, seed=0)
    return {"every slider stop": timed(lambda: train_side_by_side(nets, nines, max_batches=BATCHES, seed=0))[0]}


def floor():
    """What the machine can do, and what each phase must move and multiply at least."""
    import torch

    def best(work, repetitions=20):
        work()
        return min(timed(work)[0] for _ in range(repetitions))

    source, target = torch.randn(32_000_000), torch.empty(32_000_000)
    bandwidth = 2 * source.nbytes / best(lambda: target.copy_(source))
    square = torch.randn(2000, 2000)
    flops = 2 * 2000**3 / best(lambda: square @ square)
    w1, w2, w3 = torch.randn(1000, 784), torch.randn(2000, 1000), torch.randn(10, 2000)
    count, weights = len(mnist().test), w1.numel() + w2.numel() + w3.numel()
    x1, x2, x3 = torch.randn(count, 784), torch.randn(count, 1000), torch.randn(count, 2000)
    print(f"memory {bandwidth / 1e9:.0f} GB/s, matrix products {flops / 1e9:.0f} GFLOP/s", file=sys.stderr)
    return {
        "testing, all test images": best(lambda: (x1 @ w1.T, x2 @ w2.T, x3 @ w3.T), 5),
        # forward, gradient of the input of layers 2 and 3, gradient of every weight; Adam reads and writes w, m, v and reads g
        "pre-training, a step": 2 * BATCH_SIZE * (3 * weights - w1.numel()) / flops + 4 * weights * (3 * 2 + 2) / bandwidth,
        # forward, gradient of the input of layers 2 and 3; the weights are read for each
        **{f"fine-tuning at r = {rank}, a step": 2 * BATCH_SIZE * (2 * weights - w1.numel()) / flops for rank in RANKS},
    }


CONTENDERS = {"plain": plain, "lora_helpers": ours, "PEFT": peft, "loralib": loralib, "side by side": sweep, "floor": floor}


def check_same_work():
    """The plain recipe and lora_helpers compute the same losses from the same batches."""
    import torch
    from torch.nn import functional as F

    from lora_helpers import add_lora, freeze_base, train

    data = mnist()
    first, second = plain_network(), plain_network()
    start = copy.deepcopy(first.state_dict())
    for lora in (False, True):
        if lora:
            first.load_state_dict(start), second.load_state_dict(start)
            torch.manual_seed(1), plain_lora(first)
            torch.manual_seed(1), freeze_base(add_lora(second))
        optimizer = torch.optim.Adam([p for p in first.parameters() if p.requires_grad], lr=1e-3)
        expected = []
        for images, labels in same_batches(*data.train.tensors, 30):
            loss = F.cross_entropy(first(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            expected.append(loss.item())
        found = train(second, data.train, max_batches=30, seed=0, progress=False)
        worst = max(abs(a - b) / max(abs(a), 1e-3) for a, b in zip(expected, found))
        print(f"same work, {'fine-tuning' if lora else 'pre-training'}: the losses of 30 steps differ by at most {worst:.1e} of their size")
        assert worst < 1e-2


def in_process(name):
    command = [sys.executable, __file__, "--contender", name]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def collection():
    """Run time of each notebook, import times, memory of a kernel with notebook 4, its first answer."""
    import nbformat
    from nbclient import NotebookClient

    figures = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        if path.name.startswith("4"):
            watch = "import resource\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
            notebook.cells.append(nbformat.v4.new_code_cell(watch))
        client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": path.parent}})
        figures[f"notebook {path.stem}, s"] = timed(client.execute)[0]
        if path.name.startswith("4"):
            figures["memory of its kernel at most, MB"] = float(notebook.cells[-1].outputs[0].text)
    answer = "from lora_helpers import *; m = load_mnist(); LoRAExplorer(pretrained_base(m, progress=False), m).summary"
    for name, code in (("import torch, s", "import torch"), ("import lora_helpers' training, s", "import lora_helpers.training"),
                       ("from a new process to the explorer's first answer, s", answer)):  # fmt: skip
        command = [sys.executable, "-c", code]
        figures[name] = statistics.median(timed(lambda: subprocess.run(command, check=True))[0] for _ in range(5))
    return figures


def report(results, names):
    print(f"\n{'milliseconds, median (range)':36}" + "".join(f"{name:>24}" for name in names))
    for row in dict.fromkeys(row for figures in results.values() for row in figures):
        cells = []
        for name in names:
            values = sorted(1e3 * v for v in results[name].get(row, []))
            cells.append(f"{statistics.median(values):.3g} ({values[0]:.3g}–{values[-1]:.3g})" if values else "")
        print(f"{row:36}" + "".join(f"{cell:>24}" for cell in cells))
    print()
    for row, rivals, own in (
        ("pre-training, a step", ["plain"], "lora_helpers"),
        ("testing, all test images", ["plain", "floor"], "lora_helpers"),
        ("fine-tuning, 100 batches", ["plain"], "lora_helpers"),
        *((f"fine-tuning at r = {rank}, a step", ["PEFT", "loralib", "floor"], "lora_helpers") for rank in RANKS),
        ("every slider stop", ["PEFT", "loralib"], "side by side"),
    ):
        own_time = statistics.median(results[own][row])
        for name in rivals:
            ratio = statistics.median(results[name][row]) / own_time
            verdict = f"{1 / ratio:.2f} times the floor" if name == "floor" else f"{ratio:.2f} times as fast as {name}"
            print(f"{row:36} {verdict}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write every figure there")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="leave out the notebooks and imports")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        print(json.dumps(CONTENDERS[options.contender]()))
        return
    print(mnist())
    check_same_work()
    results = {name: {} for name in CONTENDERS}
    for _ in range(options.repetitions):
        for name in CONTENDERS:
            for row, seconds in in_process(name).items():
                results[name].setdefault(row, []).append(seconds)
    report(results, list(CONTENDERS))
    figures = {} if options.quick else collection()
    for name, value in figures.items():
        print(f"{name:60} {value:.3g}")
    if options.json:
        options.json.write_text(json.dumps({"seconds": results, "collection": figures}, indent=1))


if __name__ == "__main__":
    main()
