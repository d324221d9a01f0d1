"""Another device than the CPU: what decides where tensors are made, and the same figures on a GPU."""

import os
import subprocess
import sys

import pytest
import torch
from torch.overrides import TorchFunctionMode

from lora_helpers import (
    LoRAExplorer, LoRAParametrization, ParametrizationInspector, RichBoyNet, add_lora, evaluate, fine_tune, freeze_base, load_adapter, load_mnist,
    lora_disabled, merge_lora, only_digit, pretrained_base, save_adapter, scaling, show_digits, train, train_side_by_side,
)  # fmt: skip


class NoHiddenPlace(TorchFunctionMode):
    """Refuses what fails as soon as PyTorch's default device is a GPU: numbers drawn on it by a generator of the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        drawn = function in (torch.randn, torch.rand, torch.randint, torch.randperm)
        assert not (drawn and kwargs.get("generator") is not None and "device" not in kwargs), f"{function.__name__} with a generator, but no device"
        return function(*args, **kwargs)


def test_whatever_a_generator_draws_says_where():
    with pytest.raises(AssertionError, match="randn with a generator"), NoHiddenPlace():
        torch.randn(2, generator=torch.Generator())
    mnist = load_mnist()
    base = pretrained_base(mnist)
    with NoHiddenPlace():
        fine_tune(base, mnist, batches=2, share=0.5)
        explorer = LoRAExplorer(base, mnist)
        explorer.batches = 20
        assert all(explorer.proofs.values()) and " · 20 batches of digit 9" in explorer.summary
        assert ParametrizationInspector().result
        gradient = scaling.weight_gradient(base, only_digit(mnist.train, 9))
        scaling.first_steps(gradient, ranks=[1, 2], seeds=[0])
        scaling.low_rank_gradient(5, 4, rank=2)
        scaling.spectra(base, {"linear3": torch.randn(10, 2000)})
        scaling.sweep(base, mnist, [scaling.Setting(start="kaiming")], batches=1, progress=False)
        scaling.shuffled_pixels(mnist)


def test_a_device_that_is_not_there_is_refused_with_a_word():
    result = subprocess.run(
        [sys.executable, "-c", "import lora_helpers"], env={**os.environ, "LORA_DEVICE": "gpu"}, capture_output=True, text=True
    )  # fmt: skip
    assert result.returncode and "LORA_DEVICE is 'gpu'" in result.stderr and "Unset it to work on the CPU" in result.stderr


def test_the_default_device_is_where_images_and_networks_are_made():
    torch.set_default_device("meta")
    try:
        assert LoRAParametrization(3, 2).lora_A.device.type == "meta"
        mnist = load_mnist()
    finally:
        torch.set_default_device(None)
    assert {tensor.device.type for part in (mnist.train, mnist.test) for tensor in part.tensors} == {"meta"}


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


@pytest.fixture
def cuda():
    """The base and the images as `LORA_DEVICE=cuda` gives them."""
    torch.set_default_device("cuda")
    try:
        mnist = load_mnist()
        yield pretrained_base(mnist, progress=False), mnist
    finally:
        torch.set_default_device(None)


def devices(net):
    return {parameter.device.type for parameter in net.parameters()}


@on_a_gpu
def test_the_base_is_that_of_the_cpu(cuda):
    base, mnist = cuda
    assert devices(base) == {"cuda"} and mnist.train.tensors[0].is_cuda and mnist.test.tensors[1].is_cuda
    with torch.device("cpu"):
        same = pretrained_base(load_mnist(), progress=False)
    assert all(torch.equal(one.cpu(), other) for one, other in zip(base.parameters(), same.parameters()))
    assert abs(evaluate(base, mnist.test).accuracy - evaluate(same, mnist.test).accuracy) < 0.002


@on_a_gpu
def test_the_experiment_on_a_gpu(cuda, tmp_path):
    base, mnist = cuda
    before = evaluate(base, mnist.test)
    copies = [parameter.clone() for parameter in base.parameters()]
    images = mnist.test.tensors[0]
    logits = base(images)
    freeze_base(add_lora(base, generator=torch.Generator().manual_seed(0)))
    assert devices(base) == {"cuda"}
    assert torch.equal(base(images), logits)  # B is zero
    train(base, only_digit(mnist.train, 9), max_batches=100, seed=0, progress=False)
    after = evaluate(base, mnist.test)
    assert after.wrong_counts[9] * 2 <= before.wrong_counts[9]
    assert (after.predictions == mnist.test.tensors[1]).sum().item() == after.confusion.trace().item()
    frozen = [p for name, p in base.named_parameters() if "lora" not in name]
    assert all(any(torch.equal(copy, p) for p in frozen) for copy in copies)
    with lora_disabled(base):
        assert torch.equal(base(images), logits)
    save_adapter(base, tmp_path / "nine")
    loaded = load_adapter(pretrained_base(mnist), tmp_path / "nine")
    assert devices(loaded) == {"cuda"} and torch.equal(loaded(images), base(images))
    adapted = base(images).detach()
    merge_lora(base)
    assert torch.allclose(base(images), adapted, atol=1e-3)


@on_a_gpu
def test_a_network_moved_by_hand_takes_its_adapters_along():
    mnist = load_mnist()
    base = pretrained_base(mnist, progress=False).to("cuda", torch.float64)
    net = freeze_base(add_lora(base, rank=2))
    assert devices(net) == {"cuda"} and {p.dtype for p in net.parameters()} == {torch.float64}
    train(net, only_digit(mnist.train, 9), max_batches=5, progress=False)
    assert evaluate(net, mnist.test).predictions.device.type == "cpu"  # that of the images


@on_a_gpu
def test_one_seed_gives_one_adapter_on_both(cuda):
    base, mnist = cuda
    with torch.device("cpu"):
        images = load_mnist()
        there, here = fine_tune(base, mnist, rank=2), fine_tune(pretrained_base(images), images, rank=2)
    assert abs(there.on.accuracy - here.on.accuracy) < 0.02
    for name, norm in here.norms.items():
        assert there.norms[name] == pytest.approx(norm, rel=0.02)


@on_a_gpu
def test_the_explorer_proves_its_claims_on_a_gpu(cuda):
    explorer = LoRAExplorer(*cuda)
    for change in ({"rank": 8}, {"share": 0.5}, {"enabled": False}):
        for name, value in change.items():
            setattr(explorer, name, value)
        assert all(explorer.proofs.values()) and explorer.result.settings == explorer.shown[0], explorer.summary
    assert "image/png" in explorer._repr_mimebundle_()[0]


@on_a_gpu
def test_side_by_side_as_alone_on_a_gpu(cuda):
    base, mnist = cuda
    nines = only_digit(mnist.train, 9)

    def adapted(rank):
        with_base = pretrained_base(mnist)
        return freeze_base(add_lora(with_base, rank=rank, generator=torch.Generator().manual_seed(rank)))

    together, alone = [adapted(1), adapted(4)], [adapted(1), adapted(4)]
    train_side_by_side(together, nines, max_batches=20, seed=0)
    for net, twin in zip(together, alone):
        train(twin, nines, max_batches=20, seed=0, progress=False)
        assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(net.parameters(), twin.parameters()))


@on_a_gpu
def test_the_experiments_of_scaling_on_a_gpu(cuda):
    base, mnist = cuda
    full = scaling.full_fine_tuning(base, mnist, lr=1e-4, progress=False)
    runs = scaling.sweep(base, mnist, scaling.ladder(ranks=(1, 4), seeds=[0]), at=(1,), directions=full, progress=False)
    assert all(run.finite and run.wrong < 16 for run in runs)
    assert scaling.spectra(base, full)["linear1"]["ΔW"][0] > 0
    assert [start.delta for start in scaling.four_starts(base, mnist)][:3] == [0, 0, 0]
    curves = scaling.learning_curves(base, scaling.shuffled_pixels(mnist), [scaling.Setting(rank=4)], batches=3, progress=False)
    assert len(curves[0].losses) == 3 and curves[0].forwards > 0
    assert len(scaling.costs(base, mnist.train, ranks=[1], steps=2)) == 3
    assert scaling.twins_apart(base, mnist, steps=2) < 1e-9


@on_a_gpu
def test_pictures_of_what_lies_on_a_gpu(cuda):
    base, mnist = cuda
    assert show_digits(mnist.train)
    assert ParametrizationInspector(torch.nn.Linear(6, 5)).result
    assert RichBoyNet(4, 3)(mnist.test.tensors[0][:2]).is_cuda
