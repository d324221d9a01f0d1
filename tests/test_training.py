"""Training and testing: from the stored base the figures are exact, from a new base in an honest band."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lora_helpers import (
    RichBoyNet,
    add_lora,
    evaluate,
    freeze_base,
    lora_disabled,
    lora_layers,
    only_digit,
    set_lora_enabled,
    train,
    use_adapter,
)
from lora_helpers.training import compare


@pytest.fixture(scope="module")
def digits(mnist):
    """2,000 images, for tests that need no more."""
    return TensorDataset(*(tensor[:2000] for tensor in mnist.train.tensors))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return RichBoyNet(20, 30)


# The story


def test_the_digit_9_experiment_gives_the_figures_and_the_three_proofs_of_the_lesson(base, mnist):
    before = evaluate(base, mnist.test)
    copies = {name: p.detach().clone() for name, p in base.named_parameters()}
    net = freeze_base(add_lora(base, generator=torch.Generator().manual_seed(2)))
    train(net, only_digit(mnist.train, 9), max_batches=100, seed=2, progress=False)
    after = evaluate(net, mnist.test)
    assert before.wrong_counts == [49, 15, 32, 35, 23, 29, 40, 36, 52, 102]
    assert after.wrong_counts == [61, 36, 55, 44, 144, 62, 66, 53, 82, 14]
    assert (sum(before.wrong_counts[:9]), sum(after.wrong_counts[:9])) == (311, 603)
    assert (before.accuracy, after.accuracy) == (0.9587, 0.9383)
    assert after.recall[9] > before.recall[9] and after.precision[9] < before.precision[9]
    for name, parameter in net.named_parameters():  # 1: no bit of the base has moved, biases included
        if "lora" not in name:
            assert torch.equal(parameter, copies[name.replace("parametrizations.weight.original", "weight")])
    for name, (adapter,) in lora_layers(net).items():  # 2: each weight is W + (α/r)·BA, and BA has rank 1
        delta = adapter.lora_B @ adapter.lora_A
        assert torch.equal(net.get_submodule(name).weight, copies[f"{name}.weight"] + delta)
        assert torch.linalg.matrix_rank(delta) == 1
    with lora_disabled(net):  # 3: switched off, the network answers as the base
        assert torch.equal(evaluate(net, mnist.test).predictions, before.predictions)


@pytest.mark.slow
def test_a_learners_own_base_comes_out_as_good_as_the_stored_one(base, mnist):
    """Where rounding differs, so does the training: two bases of other seeds agreed with it on 95.5 %."""
    stored = evaluate(base, mnist.test)
    torch.manual_seed(14)
    own = RichBoyNet()
    train(own, mnist.train, seed=14, progress=False)
    result = evaluate(own, mnist.test)
    assert 0.93 <= result.accuracy <= 0.97 and max(result.wrong_counts) < 250
    assert (result.predictions == stored.predictions).float().mean() >= 0.92


# train


def test_a_hundred_batches_are_a_hundred_however_few_the_images(net, digits):
    some = TensorDataset(*(tensor[:305] for tensor in digits.tensors))  # 31 batches a pass
    assert len(train(net, some, max_batches=100, progress=False)) == 100
    assert len(train(net, some, epochs=2, progress=False)) == 62
    assert len(train(net, some, batch_size=100, progress=False)) == 4


def test_a_seed_gives_the_same_training_and_it_learns(digits):
    losses = []
    for _ in range(2):
        torch.manual_seed(1)
        losses.append(train(RichBoyNet(20, 30), digits, max_batches=100, seed=3, progress=False))
    assert losses[0] == losses[1]
    assert sum(losses[0][-20:]) < sum(losses[0][:20]) / 2


def test_a_callback_is_told_each_batch_and_a_stop_keeps_what_was_trained(net, digits, capsys):
    done, start = [], net.linear1.weight.detach().clone()

    def stop(batch):
        done.append(batch)
        if batch == 3:
            raise KeyboardInterrupt

    losses = train(net.eval(), digits, progress=False, after_batch=stop)
    assert done == [1, 2, 3] and len(losses) == 3 and "Stopped after 3 of " in capsys.readouterr().out
    assert not torch.equal(net.linear1.weight, start) and not net.training


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adadelta])
def test_other_optimizers_can_be_chosen(net, digits, optimizer):
    assert len(train(net, digits, max_batches=3, progress=False, optimizer_class=optimizer)) == 3
    with pytest.raises(TypeError, match="optimizer_class is 'sgd'; it must be a class of torch.optim"):
        train(net, digits, progress=False, optimizer_class="sgd")


def test_a_training_that_diverges_says_so(net, digits):
    with pytest.warns(UserWarning, match="diverged.*smaller lr"):
        assert math.isnan(train(net, digits, max_batches=3, lr=1e30, progress=False)[-1])


def test_where_nothing_can_be_trained_the_error_says_what_to_do(net, digits):
    def refused(message):
        with pytest.raises(ValueError, match=message):
            train(net, digits, progress=False)

    freeze_base(add_lora(net, name="nine"))
    set_lora_enabled(net, False)
    refused(r"LoRA is off, call set_lora_enabled\(net, True\)")
    set_lora_enabled(net, True)
    add_lora(net, name="four").requires_grad_(False)
    refused("every parameter is frozen")
    freeze_base(net)
    use_adapter(net, "nine")
    refused(r"another adapter is in use, call freeze_base\(net\)")
    assert not any(p.any() for name, p in net.named_parameters() if "lora_B" in name)


# evaluate


def test_recall_and_precision_are_what_the_lesson_says():
    # Of three nines two are found; of four images called 9 two are nines.
    labels, answers = torch.tensor([9, 9, 9, 4, 4, 7]), torch.tensor([9, 9, 4, 9, 4, 9])
    result = compare(answers, labels)
    assert result.recall[9].item() == pytest.approx(2 / 3) and result.precision[9].item() == 0.5
    assert result.wrong_counts == [0, 0, 0, 0, 1, 0, 0, 1, 0, 1] and result.accuracy == 0.5
    assert result.confusion[9].tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0, 2], "a row is the true digit"


def test_testing_changes_nothing(net, digits):
    net.linear2.eval()
    modes, state = [module.training for module in net.modules()], torch.get_rng_state()
    weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    result = evaluate(net, digits)
    assert [module.training for module in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in net.state_dict().items())
    assert torch.equal(result.predictions, net(digits.tensors[0]).argmax(dim=1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_images_follow_the_network_to_its_dtype(net, digits, dtype):
    freeze_base(add_lora(net)).to(dtype)
    assert all(map(math.isfinite, train(net, digits, max_batches=2, progress=False)))
    assert evaluate(net, digits).confusion.sum() == 2000


def test_a_network_that_does_not_tell_ten_digits_apart_is_refused(digits):
    eleven = nn.Sequential(nn.Flatten(), nn.Linear(784, 11))
    for work in (evaluate, lambda net, data: train(net, data, progress=False)):
        with pytest.raises(ValueError, match="of shape .*, 11.*; it must be .* × 10"):
            work(eleven, digits)
