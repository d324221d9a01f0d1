"""The stop button, at any moment: everything stays usable, and the next run gives what an undisturbed one gives."""

import copy
import os
import signal
import sys
import threading
import time
from queue import Empty

import pytest
import torch
from jupyter_client.manager import start_new_kernel
from test_data import mirror  # noqa: F401  (fixture)
from torch.utils.data import TensorDataset
from tracing import traced

import lora_helpers.finetuning
import lora_helpers.widgets.drawing
from lora_helpers import (
    DigitPad,
    LoRAExplorer,
    RichBoyNet,
    ScalingLab,
    add_lora,
    evaluate,
    factorised,
    freeze_base,
    load_mnist,
    lora_disabled,
    lora_layers,
    only_digit,
    pretrained_base,
    scaling,
    train,
    train_side_by_side,
)
from lora_helpers.data import FILES, Mnist
from lora_helpers.finetuning import FineTuner, Settings
from lora_helpers.widgets.explorer_picture import summarise


PLACES = int(os.environ.get("LORA_PLACES", 25))  # in the code, where the explorer is interrupted


@pytest.fixture(scope="module")
def mnist():
    """A tenth of the sample: enough for everything to run."""
    sample = load_mnist("sample")
    return Mnist(*(TensorDataset(*(t[::10].clone() for t in part.tensors)) for part in (sample.train, sample.test)), "sample")


@pytest.fixture(scope="module")
def trained(mnist):
    torch.manual_seed(0)
    net = RichBoyNet(30, 40)
    train(net, mnist.train, epochs=3, seed=0, progress=False)
    return net


@pytest.fixture
def base(trained):
    return copy.deepcopy(trained)


def stop_at(call, monkeypatch, target, number):
    """Runs `call` with an interrupt at the `number`-th call of `target`; the patch is gone afterwards."""
    calls = 0

    def interrupted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == number:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    module, _, name = target.rpartition(".")
    real = getattr(sys.modules[module], name)
    with monkeypatch.context() as patch:
        patch.setattr(target, interrupted)
        with pytest.raises(KeyboardInterrupt):
            call()
    assert calls == number


def bits(net):
    return {name: t.detach().clone() for name, t in net.state_dict().items()}


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


def is_whole(net):
    return not any("forward" in vars(module) for module in net.modules())


TRAINING = ["torch.nn.functional.log_softmax", "lora_helpers.backpropagation.frozen_backward", "lora_helpers.training.adam"]
BY_AUTOGRAD = ["torch.nn.functional.cross_entropy", "torch.autograd.backward"]


class OwnNet(RichBoyNet):
    """Trained by autograd: what its class computes is not known."""


@pytest.mark.parametrize("target", TRAINING + BY_AUTOGRAD)
@pytest.mark.parametrize("number", [1, 2, 7])
@pytest.mark.parametrize("mode", [True, False])
def test_training(base, mnist, monkeypatch, target, number, mode):
    def run(net):
        return train(net, only_digit(mnist.train, 9), max_batches=10, seed=0, progress=False)

    torch.manual_seed(0)
    fresh = freeze_base(add_lora(base, rank=2)).train(mode)
    if target in BY_AUTOGRAD:
        fresh.__class__ = OwnNet
    whole, stopped = copy.deepcopy(fresh), copy.deepcopy(fresh)
    losses = run(whole)
    stop_at(lambda: run(stopped), monkeypatch, target, number)
    assert stopped.training == mode and is_whole(stopped)
    originals = [name for name in bits(fresh) if "original" in name or "bias" in name]
    assert all(torch.equal(bits(stopped)[name], bits(fresh)[name]) for name in originals)
    with lora_disabled(stopped), lora_disabled(whole):
        assert torch.equal(evaluate(stopped, mnist.test).predictions, evaluate(whole, mnist.test).predictions)
    run(stopped)  # it can be trained on
    assert run(fresh) == losses and same(bits(fresh), bits(whole))


@pytest.mark.parametrize("batch", [1, 5, 10])
def test_training_by_its_own_callback(base, mnist, batch):
    def stop(done):
        if done == batch:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(base, mnist.train, max_batches=10, after_batch=stop)
    assert is_whole(base) and base.training


@pytest.mark.parametrize("number", [1, 40, 90])
def test_pre_training_caches_nothing_half_done(mnist, monkeypatch, tmp_path, number):
    monkeypatch.setenv("LORA_CACHE", str(tmp_path / "elsewhere"))
    whole = bits(pretrained_base(mnist, progress=False))
    monkeypatch.setenv("LORA_CACHE", str(tmp_path / "cache"))
    stream = torch.get_rng_state()
    stop_at(lambda: pretrained_base(mnist, progress=False), monkeypatch, "lora_helpers.training.adam", number)
    assert torch.equal(torch.get_rng_state(), stream) and not (tmp_path / "cache").exists()
    assert same(bits(pretrained_base(mnist, progress=False)), whole)


@pytest.mark.parametrize("context", [factorised, lora_disabled])
def test_a_block_puts_everything_back(base, context):
    net = freeze_base(add_lora(base))
    with pytest.raises(KeyboardInterrupt), context(net):
        raise KeyboardInterrupt
    assert is_whole(net) and all(adapter.enabled for found in lora_layers(net).values() for adapter in found)


SETTINGS = [scaling.Setting(rank, rule=rule, optimizer=optimizer) for rank, rule, optimizer in ((1, "α/r", "Adam"), (4, "α", "SGD"), (4, "α/r", "Adam"))]
EXPERIMENTS = {
    "sweep": lambda base, mnist: scaling.sweep(base, mnist, SETTINGS, batches=5, at=(1, 3), progress=False),
    "learning curves": lambda base, mnist: scaling.learning_curves(base, mnist, SETTINGS, batches=5),
    "full fine-tuning": lambda base, mnist: [{k: t.sum().item() for k, t in scaling.full_fine_tuning(base, mnist, batches=5).items()}],
}


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("target, number", [("lora_helpers.training.adam", 1), ("lora_helpers.training.adam", 4), ("a gradient", 3)])
def test_sweeps(base, mnist, monkeypatch, name, target, number):
    def run():
        return EXPERIMENTS[name](base, mnist)

    if target == "a gradient":
        target = BY_AUTOGRAD[1] if name == "full fine-tuning" else TRAINING[0]
    state, stream = bits(base), torch.get_rng_state()
    whole = repr(run())
    stop_at(run, monkeypatch, target, number)
    assert same(bits(base), state) and is_whole(base) and torch.equal(torch.get_rng_state(), stream)
    assert repr(run()) == whole


def test_a_sweep_while_it_tests(base, mnist, monkeypatch):
    whole = repr(EXPERIMENTS["sweep"](base, mnist))
    stop_at(lambda: EXPERIMENTS["sweep"](base, mnist), monkeypatch, "lora_helpers.training._compared", 2)
    assert repr(EXPERIMENTS["sweep"](base, mnist)) == whole


@pytest.mark.parametrize("number", [1, 4])
def test_training_side_by_side(base, mnist, monkeypatch, number):
    fresh = [freeze_base(add_lora(copy.deepcopy(base), rank=rank, generator=torch.Generator().manual_seed(0))) for rank in (1, 3)]
    nets, twins = copy.deepcopy(fresh), copy.deepcopy(fresh)
    train_side_by_side(twins, mnist.train, max_batches=5, seed=0)
    stop_at(lambda: train_side_by_side(nets, mnist.train, max_batches=5, seed=0), monkeypatch, TRAINING[0], number)
    assert all(map(is_whole, nets))
    train_side_by_side(fresh, mnist.train, max_batches=5, seed=0)
    assert all(same(bits(net), bits(twin)) for net, twin in zip(fresh, twins))


@pytest.mark.parametrize("number", [1, 3])
def test_a_download(mirror, monkeypatch, tmp_path, number):  # noqa: F811
    import socket

    import torchvision.datasets.mnist  # noqa: F401  (patched below)

    cache = tmp_path / "cache"
    monkeypatch.delenv("LORA_MNIST_ROOT", raising=False)
    monkeypatch.setenv("LORA_CACHE", str(cache))
    target = "torchvision.datasets.mnist.download_and_extract_archive"
    stop_at(lambda: load_mnist("full"), monkeypatch, target, number)
    assert socket.getdefaulttimeout() is None and not cache.exists()
    stop_at(lambda: load_mnist("full"), monkeypatch, "shutil.copyfile", number)
    kept = {path.name for path in cache.rglob("*") if path.is_file()}
    assert kept == set(list(FILES)[: number - 1]), "whole files or none"
    assert len(load_mnist("full").test) == 10_000


# Widgets


@pytest.fixture(scope="module")
def undisturbed(trained, mnist):
    return LoRAExplorer(trained, mnist, rank=3)


WHILE_REFRESHING = [
    *((target, number) for target in TRAINING for number in (1, 30, 100)),
    ("lora_helpers.training._compared", 1),
    ("lora_helpers.finetuning.singular_values", 2),
    ("lora_helpers.finetuning.remove_lora", 1),
    ("lora_helpers.finetuning.add_lora", 1),
    ("lora_helpers.finetuning.lora_disabled", 1),
    ("lora_helpers.finetuning._has_rank_at_most", 2),
    ("lora_helpers.widgets.explorer.summarise", 1),
    ("base64.b64encode", 1),
]


@pytest.mark.parametrize("target, number", WHILE_REFRESHING)
def test_the_explorer(base, mnist, undisturbed, monkeypatch, target, number):
    explorer = LoRAExplorer(base, mnist)
    shown = explorer.summary
    stop_at(lambda: setattr(explorer, "rank", 3), monkeypatch, target, number)
    assert explorer.rank == explorer.rank_field.value == explorer.rank_slider.value == 1 and explorer.summary == shown
    assert explorer.status == "Not updated: interrupted. Set the value again." and explorer.status in explorer._trouble.value
    assert explorer._progress.layout.visibility == "hidden"
    explorer.rank = 3  # the same cell once more
    check_like(explorer, undisturbed)


def check_like(explorer, other):
    assert explorer.settings == explorer.result.settings == other.settings and not explorer.status
    assert torch.equal(explorer.result.on.predictions, other.result.on.predictions)
    assert explorer.result.norms == other.result.norms and all(explorer.proofs.values())
    assert explorer._image.value.split("alt=")[0] == other._image.value.split("alt=")[0] and explorer.rank_slider.value == other.rank_slider.value


def check_agreement(explorer, pad):
    """Controls, result, words, picture and the pad all tell of one setting, whichever it is."""
    settings, enabled = explorer.settings, explorer.enabled
    assert explorer.result.settings == settings and f"rank of ΔW at most {settings.rank}" in explorer.proofs
    assert explorer.summary == summarise(explorer.result, enabled, explorer.origin) == explorer._shown.summary
    assert explorer.summary in explorer._text.value and explorer._image.value == explorer._shown.picture and explorer.summary in explorer._image.value
    assert f"at most {settings.rank}<" in explorer._tiles.value
    fields = explorer.rank_field, explorer.alpha_field, explorer.batches_field, explorer.digit_field, explorer.share_field, explorer.seed_field
    assert Settings(*(field.value for field in fields)) == settings and explorer.switch.value == enabled
    base, on = explorer.tuner.probabilities(settings, pad.image.unsqueeze(0))
    assert torch.equal(pad.base, base[0]) and torch.equal(pad.adapted, (on if enabled else base)[0])
    assert pad.summary.startswith(f"LoRA {'on' if enabled else 'off'} · rank {settings.rank} · α {settings.alpha:g} · test image {pad.index}, ")
    assert pad.summary in pad._text.value and pad.summary in pad._image.value and pad.index_field.value == pad.index


def check_again(explorer, pad, *moves):
    """After an interrupt: all agrees, whether one goes back or makes the same move once more."""
    check_agreement(explorer, pad)
    for move, settings, enabled in moves:
        move()
        check_agreement(explorer, pad)
        assert (explorer.settings, explorer.enabled) == (settings, enabled) and not explorer.status and not pad.status


def test_the_explorer_wherever_it_is_at_work(base, mnist, undisturbed, monkeypatch):
    """An interrupt at lines evenly spread over all that the package runs from the beginning of a move on."""
    monkeypatch.setattr("lora_helpers.widgets.explorer.PATIENCE", 1e9)  # no bar for slow machines: each move runs the same lines
    explorer = LoRAExplorer(base, mnist, batches=0)
    pad = DigitPad(explorer, index=3)

    def move():
        explorer.apply(Settings(rank=3, batches=5))

    def back():
        explorer.apply(Settings(batches=0))

    for _ in range(2):  # the first move also draws what stays
        explorer.tuner._memory.clear()
        back()
        total = len(traced(move, "lora_helpers"))
    for part in range(PLACES):
        explorer.tuner._memory.clear()
        back()
        with pytest.raises(KeyboardInterrupt):
            traced(move, "lora_helpers", stop=part * total // PLACES)
            pytest.fail(str(part))
        moves = (move, Settings(rank=3, batches=5), True), (back, Settings(batches=0), True)
        check_again(explorer, pad, *moves[:: 1 if part % 2 else -1])
    explorer.tuner._memory.clear()
    explorer.apply(Settings(rank=3))
    check_like(explorer, undisturbed)


def by_code(explorer):
    explorer.rank = 3


def by_apply(explorer):
    explorer.apply(Settings(rank=3, alpha=2))


def by_the_switch(explorer):
    explorer.enabled = False


@pytest.fixture(scope="module")
def followed(trained, mnist):
    """An explorer and a pad that follows it; all that the test below shows is trained and drawn."""
    explorer = LoRAExplorer(trained, mnist)
    pad = DigitPad(explorer, index=3)
    for move in (by_code, by_apply):
        move(explorer)
        explorer.apply(Settings())
    return explorer, pad


@pytest.mark.parametrize(
    "move, settings, enabled",
    [
        (by_code, Settings(rank=3), True),
        pytest.param(by_apply, Settings(rank=3, alpha=2), True, marks=pytest.mark.slow),
        pytest.param(by_the_switch, Settings(), False, marks=pytest.mark.slow),
    ],
)
def test_at_each_line_of_the_explorer_and_its_pad(followed, move, settings, enabled):
    """From the first line of a move to its last, the first and the last time that each is run."""
    explorer, pad = followed
    files = "lora_helpers/widgets/"

    def back():
        explorer.enabled = True
        explorer.apply(Settings())

    for _ in range(2):  # the first move also draws what stays
        back()
        lines = traced(lambda: move(explorer), files)
    theirs = [number for number, (path, _) in enumerate(lines) if path.endswith(("common.py", "explorer.py", "drawing.py"))]
    places = {lines[number]: number for number in reversed(theirs)}.values(), {lines[number]: number for number in theirs}.values()
    for stop in sorted({*places[0], *places[1]}):
        back()
        with pytest.raises(KeyboardInterrupt):
            traced(lambda: move(explorer), files, stop=stop)
            pytest.fail(str(lines[stop]))
        assert explorer.status in ("", "Not updated: interrupted. Set the value again."), lines[stop]
        moves = (lambda: move(explorer), settings, enabled), (back, Settings(), True)
        check_again(explorer, pad, *moves[:: 1 if stop % 2 else -1])


def test_an_interrupt_in_the_pad_moves_both_on(base, mnist, monkeypatch):
    explorer = LoRAExplorer(base, mnist)
    pad = DigitPad(explorer, index=3)
    real, interrupts = lora_helpers.widgets.drawing._answer, [KeyboardInterrupt()]

    def interrupted_once(probabilities):
        if interrupts:
            raise interrupts.pop()
        return real(probabilities)

    monkeypatch.setattr("lora_helpers.widgets.drawing._answer", interrupted_once)
    with pytest.raises(KeyboardInterrupt):
        explorer.rank = 3
    assert explorer.rank == 3 and not explorer.status and not pad.status
    check_again(explorer, pad, (lambda: explorer.apply(Settings()), Settings(), True), (lambda: setattr(explorer, "rank", 3), Settings(rank=3), True))


def test_an_interrupt_while_another_thread_is_at_work(base, mnist, monkeypatch, request):
    """The move of the slider's thread and the one that waited for it are both shown."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest-xdist's workers ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    explorer = LoRAExplorer(base, mnist)
    pad = DigitPad(explorer, index=3)
    real, entered, go_on = lora_helpers.finetuning.train, threading.Event(), threading.Event()

    def slow(*args, **kwargs):
        entered.set()
        assert go_on.wait(60)
        return real(*args, **kwargs)

    monkeypatch.setattr("lora_helpers.finetuning.train", slow)
    slider = threading.Thread(target=setattr, args=(explorer.rank_slider, "value", 8.0))
    slider.start()
    assert entered.wait(60)
    for move, settings in ((lambda: explorer.apply(Settings(seed=5)), Settings(rank=8)), (lambda: setattr(explorer, "rank", 2), Settings(rank=2))):
        threading.Timer(0.3, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT]).start()  # by then, it waits
        with pytest.raises(KeyboardInterrupt):
            move()
        assert explorer.settings == settings
    go_on.set()
    slider.join(60)
    check_agreement(explorer, pad)
    assert explorer.settings == Settings(rank=2) and not explorer.status
    mover = threading.Thread(target=setattr, args=(explorer, "rank", 4))
    mover.start()
    mover.join(60)
    assert explorer.result.settings.rank == 4, "the lock is free for other threads"
    check_agreement(explorer, pad)


def test_a_preset_and_the_panels_that_follow(base, mnist, monkeypatch):
    explorer = LoRAExplorer(base, mnist)
    pad = DigitPad(explorer, index=3)
    stop_at(explorer.preset_buttons["no scaling: α = r"].click, monkeypatch, TRAINING[0], 5)
    assert explorer.settings == Settings() and pad.summary.startswith("LoRA on · rank 1 · α 1 ")
    explorer.preset_buttons["no scaling: α = r"].click()
    assert explorer.result.settings == Settings(rank=16, alpha=16) and pad.summary.startswith("LoRA on · rank 16 · α 16 ")
    stop_at(lambda: setattr(pad, "index", 7), monkeypatch, "lora_helpers.finetuning.lora_disabled", 1)
    assert pad.index == 3 and "interrupted" in pad.status
    pad.index = 7
    assert "test image 7" in pad.summary and not pad.status


@pytest.mark.parametrize("target, number", [(TRAINING[0], 1), (TRAINING[0], 90), ("lora_helpers.training._compared", 3)])
def test_the_scaling_lab(trained, mnist, monkeypatch, target, number):
    monkeypatch.setattr("lora_helpers.widgets.scaling_lab.RANKS", (1, 2, 4, 8, 16))
    lab = ScalingLab(trained, mnist)
    stop_at(lambda: setattr(lab, "alpha", 2.0), monkeypatch, target, number)
    assert lab.alpha == lab.alpha_field.value == 1 and "α 1 " in lab.summary and "interrupted" in lab.status
    lab.alpha = 2.0
    assert {result.settings.alpha for result in lab.results.values()} == {2.0} and not lab.status


def test_an_interrupt_of_the_explorers_own_making_leaves_no_explorer(base, mnist, monkeypatch):
    state = bits(base)
    stop_at(lambda: LoRAExplorer(base, mnist), monkeypatch, TRAINING[0], 3)
    assert same(bits(base), state) and is_whole(base)
    assert LoRAExplorer(base, mnist).result.settings == Settings()


def test_a_fine_tuner_remembers_only_whole_trainings(base, mnist, monkeypatch):
    tuner = FineTuner(base, mnist)
    stop_at(lambda: tuner.run(Settings(batches=20)), monkeypatch, TRAINING[0], 60)
    assert not tuner._memory
    assert tuner.run(Settings(batches=20))[1] == "just trained"


# A real kernel and a real signal

SET_UP = """
import copy, time, torch
from lora_helpers import *
mnist = load_mnist("sample")
torch.manual_seed(0)
base = RichBoyNet(30, 40)
train(base, mnist.train, epochs=1, seed=0, progress=False)
kept = copy.deepcopy(base.state_dict())
explorer = LoRAExplorer(base, mnist)

def whole_run():
    net = freeze_base(add_lora(copy.deepcopy(base), generator=torch.Generator().manual_seed(0)))
    return train(net, only_digit(mnist.train, 9), max_batches=50, seed=0, progress=False)

expected = whole_run()
net = freeze_base(add_lora(copy.deepcopy(base)))
"""
CELLS = [
    "train(net, mnist.train, epochs=100_000)",
    "train(net, mnist.train, epochs=100_000, progress=False)",
    "while True: evaluate(net, mnist.test)",
    "for seed in range(10_000): explorer.seed = seed",
    "scaling.sweep(base, mnist, [scaling.Setting(seed=seed) for seed in range(10_000)])",
]
CHECK = """
assert all(torch.equal(tensor, kept[name]) for name, tensor in base.state_dict().items())
assert not any("forward" in vars(module) for module in net.modules())
assert whole_run() == expected
explorer.apply(Settings(rank=2))
assert explorer.result.settings == explorer.settings == Settings(rank=2) and all(explorer.proofs.values()) and not explorer.status
"""


def test_a_real_signal_to_a_real_kernel():
    manager, client = start_new_kernel()
    try:
        assert client.execute_interactive(SET_UP + "from lora_helpers import scaling\nfrom lora_helpers.finetuning import Settings", timeout=120,
                                          output_hook=print)["content"]["status"] == "ok"  # fmt: skip
        for number, cell in enumerate(CELLS):
            client.execute(cell)
            while client.get_iopub_msg(timeout=60)["content"].get("execution_state") != "busy":
                pass
            time.sleep(0.3 + 0.17 * number)
            manager.interrupt_kernel()
            content = client.get_shell_msg(timeout=60)["content"]
            assert (content["status"], content.get("ename")) == ("error", "KeyboardInterrupt"), cell
            drain(client)
            content = client.execute_interactive(CHECK, timeout=60, output_hook=print)["content"]
            assert content["status"] == "ok", (cell, content)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def drain(client):
    try:
        while True:
            client.get_iopub_msg(timeout=0.3)
    except Empty:
        pass
