"""How fast the collection is, beside the plain recipe, PEFT and loralib, and beside the machine's limit.

    uv run python tests/benchmark.py [--json FILE] [--repetitions 3] [--quick]

Each contender runs in a process of its own, in turn, and the next time in reverse; the table gives medians and ranges.
Full MNIST is used where LORA_MNIST_ROOT or ../shared/mnist holds it, else the bundled sample. Nothing is gated.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
RANKS = (1, 8, 64)
STOPS = (1, 2, 4, 8, 16, 32, 64)
STEPS = 200  # of pre-training that are timed
BATCHES, BATCH_SIZE = 100, 10


# The plain recipe, as it is usually published: transforms per image, default Adam, the whole W + ΔW, a Python loop over answers.


def plain_loader(train, order=None):
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    pictures, labels = pictures_of(train)

    class Digits(Dataset):
        def __len__(self):
            return len(labels)

        def __getitem__(self, index):
            return transform(pictures[index]), labels[index]

    return DataLoader(Digits(), batch_size=BATCH_SIZE, sampler=order, shuffle=train and order is None)


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


def plain_lora(net, rank=1, alpha=1, generator=None):
    import torch
    from torch import nn
    from torch.nn.utils import parametrize

    class LoRA(nn.Module):
        def __init__(self, out_features, in_features):
            super().__init__()
            self.lora_A = nn.Parameter(torch.randn(rank, in_features, generator=generator))
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


def digits(train):
    """The test images, or those of the training images that the timed steps see: any first ones, and enough nines."""
    images, labels = (mnist().train if train else mnist().test).tensors
    if not train:
        return images, labels
    keep = sorted({*range(STEPS * BATCH_SIZE), *(labels == 9).nonzero().flatten()[: BATCHES * BATCH_SIZE].tolist()})
    return images[keep], labels[keep]


def pictures_of(train):
    from torchvision.transforms.functional import to_pil_image

    images, labels = digits(train)
    pixels = ((images * 0.3081 + 0.1307) * 255).round().clamp(0, 255).byte()
    return [to_pil_image(image) for image in pixels], labels.tolist()


def same_batches(size, batches):
    """The indices of the batches that `lora_helpers.train` draws with seed 0."""
    from lora_helpers.training import shuffled_batches

    return [batch for _, batch in zip(range(batches), shuffled_batches(size, BATCH_SIZE, 0))]


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
    nines = (digits(train=True)[1] == 9).nonzero().flatten().tolist()
    loader = plain_loader(train=True, order=torch.utils.data.SubsetRandomSampler(nines))
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
    base, (images, labels) = pretrained_base(data, progress=False), only_digit(data.train, 9).tensors
    batches = [(images[batch], labels[batch]) for batch in same_batches(len(labels), BATCHES)]

    def fine_tune(net, batches):
        optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-3, fused=True)  # as quick as ours
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
    """What the machine can do; testing is measured, the other phases are reckoned from these (see `physical_limit`)."""
    import torch

    def best(work, repetitions=20):
        work()
        return min(timed(work)[0] for _ in range(repetitions))

    source, target = torch.randn(32_000_000), torch.empty(32_000_000)
    square, count = torch.randn(2000, 2000), len(mnist().test)
    products = [(torch.randn(count, columns), torch.randn(rows, columns)) for rows, columns in SHAPES]
    measured = {
        "moving a gigabyte": best(lambda: target.copy_(source)) * 1e9 / (2 * source.nbytes),
        "a billion multiply-adds": best(lambda: square @ square) * 1e9 / 2000**3,
        "testing, all test images": best(lambda: [x @ weight.T for x, weight in products], 5),
    }
    return measured | physical_limit(measured)


def physical_limit(floor):
    """The seconds of each phase if it did nothing but move, or nothing but multiply, whichever takes longer."""
    return {
        row: max(numbers * 4e-9 * floor["moving a gigabyte"], products * 1e-9 * floor["a billion multiply-adds"])
        for row, (numbers, products) in WORK.items()
    }


def least_work():
    """For each phase the float32 numbers that must pass between memory and processor, and the multiply-adds.

    Weights are read forwards and, but for the first layer, for the gradient of the layer's input. What is trained is read
    so too; its gradient is written, and Adam reads gradient, weight and two means and writes three of these back.
    """
    weights = sum(rows * columns for rows, columns in SHAPES)
    passes = 2 * weights - SHAPES[0][0] * SHAPES[0][1]  # forwards, and back to the inputs
    update = 1 + 7
    work = {
        "testing, an image": (784 + 10, weights),  # in a large batch the weights cost nothing
        "pre-training, a step": (passes + update * weights, BATCH_SIZE * (passes + weights)),
    }
    for rank in STOPS:
        adapters = rank * sum(rows + columns for rows, columns in SHAPES)
        work[f"fine-tuning at r = {rank}, a step"] = (passes + (2 + update) * adapters, BATCH_SIZE * (passes + 3 * adapters))
    steps = [work[f"fine-tuning at r = {rank}, a step"] for rank in STOPS]
    numbers, products = (BATCHES * sum(column) for column in zip(*steps))
    work["every slider stop"] = (numbers - (len(STOPS) - 1) * BATCHES * passes, products)  # the base is read once for all
    work["fine-tuning, 100 batches"] = tuple(BATCHES * amount for amount in steps[0])
    return {row: amounts for row, amounts in work.items() if "r =" not in row or any(f"r = {r}," in row for r in RANKS)}


SHAPES = ((1000, 784), (2000, 1000), (10, 2000))  # of the weights
WORK = least_work()
CONTENDERS = {"plain": plain, "lora_helpers": ours, "PEFT": peft, "loralib": loralib, "side by side": sweep, "floor": floor}


def check_same_work():
    """The plain recipe and lora_helpers have the same losses step by step from the same batches, and the same wrong answers."""
    import torch
    from torch.utils.data import TensorDataset

    from lora_helpers import add_lora, evaluate, freeze_base, only_digit, pretrained_base, train

    steps, data, (images, labels) = 30, mnist(), digits(train=True)
    nines = (labels == 9).nonzero().flatten()
    base, plain_base = pretrained_base(data, progress=False), plain_network()
    plain_base.load_state_dict(base.state_dict())
    test = evaluate(base, data.test)
    assert plain_test(plain_base, plain_loader(train=False)) == test.wrong_counts
    print(f"same work, testing: both have {sum(test.wrong_counts)} of {len(data.test):,} wrong, as many of each digit")
    seeded = [torch.Generator().manual_seed(1) for _ in range(2)]
    lora = plain_lora(plain_base, generator=seeded[0]), freeze_base(add_lora(base, generator=seeded[1]))
    everything, all_nines = TensorDataset(images, labels), only_digit(TensorDataset(images, labels), 9)
    for phase, (theirs, own), dataset, places in (
        ("pre-training", (plain_network(), plain_network()), everything, torch.arange(len(labels))),
        ("fine-tuning on nines", lora, all_nines, nines),
    ):
        order = places[torch.cat(same_batches(len(places), steps))].tolist()
        expected = plain_train(theirs, plain_loader(train=True, order=order), steps)
        found = train(own, dataset, max_batches=steps, seed=0, progress=False)
        worst = max(abs(a - b) / a for a, b in zip(expected, found))
        print(f"same work, {phase}: the losses of {steps} steps differ by at most {worst:.1e} of their size")
        assert worst < 1e-3


def in_process(name):
    command = [sys.executable, __file__, "--contender", name]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def collection():
    """Run time of each notebook, import times, memory of a kernel with notebook 4, its first answer: on the sample, the base cached."""
    figures = {}
    with tempfile.TemporaryDirectory() as cache:
        env = {name: value for name, value in os.environ.items() if name != "LORA_MNIST"} | {"LORA_CACHE": cache}
        warm = "from lora_helpers import load_mnist, pretrained_base; pretrained_base(load_mnist(), progress=False)"
        subprocess.run([sys.executable, "-c", warm], check=True, env=env)
        for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
            figures[f"notebook {path.stem}, s"], memory = run_notebook(path, env)
            if path.name.startswith("4"):
                figures["memory of its kernel at most, MB"] = memory
                figures["from opening it to the explorer's first answer, s"], _ = run_notebook(path, env, until="LoRAExplorer(base")
    imports = {"import torch": [], "import lora_helpers": [], "import lora_helpers.training": []}
    for _ in range(5):
        for code, seconds in imports.items():
            seconds.append(timed(lambda: subprocess.run([sys.executable, "-c", code], check=True))[0])
    return figures | {f"{code}, s": statistics.median(seconds) for code, seconds in imports.items()}


def run_notebook(path, env, until=None):
    """Seconds from the kernel's start to the end of the notebook, or of the cell that holds `until`; and the kernel's memory in MB."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    if until:
        last = next(place for place, cell in enumerate(notebook.cells) if until in cell.source and cell.cell_type == "code")
        del notebook.cells[last + 1 :]
    # On Linux a new process inherits the peak that getrusage gives from the one that made it; VmHWM is its own.
    watch = """
from pathlib import Path
import resource
status = Path("/proc/self/status")
peaks = [int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")] if status.exists() else []
print((peaks or [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss])[0] / 1024)"""
    notebook.cells.append(nbformat.v4.new_code_cell(watch))
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": path.parent}})
    start = time.perf_counter()
    with client.setup_kernel(env=env):
        for place, cell in enumerate(notebook.cells):
            client.execute_cell(cell, place)
        seconds = time.perf_counter() - start
    return seconds, float(notebook.cells[-1].outputs[0].text)


def report(results, names):
    print(f"\n{'milliseconds, median (range)':36}" + "".join(f"{name:>24}" for name in names))
    for row in dict.fromkeys(row for figures in results.values() for row in figures):
        cells = []
        for name in names:
            values = sorted(1e3 * v for v in results[name].get(row, []))
            cells.append(f"{statistics.median(values):.3g} ({values[0]:.3g}–{values[-1]:.3g})" if values else "")
        print(f"{row:36}" + "".join(f"{cell:>24}" for cell in cells))
    print("\nAt the least, each phase")
    for row, (numbers, products) in WORK.items():
        print(f"{row:36} moves {numbers * 4e-6:.4g} MB and multiplies {products * 2e-6:.4g} MFLOP")
    print()
    for row, rivals, own in (  # with the goal for each
        ("pre-training, a step", {"plain": 5, "floor": None}, "lora_helpers"),
        ("testing, all test images", {"plain": 10, "floor": 1.3}, "lora_helpers"),
        ("fine-tuning, 100 batches", {"plain": 5, "floor": None}, "lora_helpers"),
        *((f"fine-tuning at r = {rank}, a step", {"PEFT": 1.5, "loralib": None, "floor": None}, "lora_helpers") for rank in RANKS),
        ("every slider stop", {"PEFT": 2, "loralib": None, "floor": None}, "side by side"),
    ):
        own_time = statistics.median(results[own][row])
        for name, goal in rivals.items():
            ratio = statistics.median(results[name][row]) / own_time
            verdict = f"{1 / ratio:.2f} times the floor" if name == "floor" else f"{ratio:.2f} times as fast as {name}"
            sign = "≤" if name == "floor" else "≥"
            print(f"{row:36} {verdict:40}" + (f"goal {sign} {goal}" if goal else ""))


def report_collection(figures):
    for name, value in figures.items():
        print(f"{name:60} {value:.3g}" + ("    goal ≤ 800" if name.startswith("memory") else ""))
    for name, goal in (("import lora_helpers", "    goal ≤ 1.3"), ("import lora_helpers.training", "")):
        print(f"{name:31} takes {figures[f'{name}, s'] / figures['import torch, s']:.2f} times as long as import torch{goal}")


def machine():
    import torch

    cpuinfo = Path("/proc/cpuinfo")  # Linux names the processor nowhere else
    models = [line.partition(": ")[2] for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    return {
        "platform": platform.platform(),
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "peft", "loralib")},
    }


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
    print(mnist(), *(f"{name} {value}" for name, value in machine().items()), sep=", ")
    check_same_work()
    results = {name: {} for name in CONTENDERS}
    for repetition in range(options.repetitions):
        for name in list(CONTENDERS)[:: -1 if repetition % 2 else 1]:
            for row, seconds in in_process(name).items():
                results[name].setdefault(row, []).append(seconds)
    report(results, list(CONTENDERS))
    figures = {} if options.quick else collection()
    if figures:
        report_collection(figures)
    if options.json:
        limits = {name: statistics.median(results["floor"][name]) for name in ("moving a gigabyte", "a billion multiply-adds")}
        speeds = {"GB/s": 1 / limits["moving a gigabyte"], "GFLOP/s": 2 / limits["a billion multiply-adds"]}
        work = {row: {"MB": numbers * 4e-6, "MFLOP": products * 2e-6} for row, (numbers, products) in WORK.items()}
        figures = {"machine": machine() | speeds, "least work": work, "seconds": results, "collection": figures}
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
