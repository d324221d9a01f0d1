"""The engine: settings in, a tested fine-tuning out. Explorer, lab, sweeps and notebooks rely on it."""

import copy
import math
from pathlib import Path

import pytest
import torch

from lora_helpers import (
    FineTuner,
    FineTuning,
    RichBoyNet,
    Setting,
    add_lora,
    evaluate,
    fine_tune,
    only_digit,
    train,
)
from lora_helpers.data import Mnist, TensorDataset
from lora_helpers.experiments import adapters_of, lesson_places, singular_values, sweep


@pytest.fixture(scope="module")
def some(mnist):
    """A small part of MNIST, for tests that need no more."""
    return Mnist(
        *(
            TensorDataset(*(t[:n] for t in part.tensors))
            for part, n in ((mnist.train, 3000), (mnist.test, 1000))
        )
    )


@pytest.fixture
def tuner(base, some):
    return FineTuner(base, some)


def by_hand(base, mnist, setting):
    """The same fine-tuning by the public functions that notebook 4 shows."""
    net = copy.deepcopy(base)
    add_lora(net, setting.rank, setting.alpha, generator=torch.Generator().manual_seed(setting.seed))
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("lora" in name)
    train(
        net,
        only_digit(mnist.train, setting.digit),
        max_batches=setting.batches,
        seed=setting.seed,
        progress=False,
    )
    return net


def test_the_engine_gives_what_the_notebook_does_by_hand(base, mnist):
    setting = Setting(seed=2)
    result, net = FineTuner(base, mnist).run(setting)[0], by_hand(base, mnist, setting)
    assert result.on.wrong_counts == evaluate(net, mnist.test).wrong_counts
    assert result.off.wrong_counts == evaluate(base, mnist.test).wrong_counts
    assert (result.off.wrong_counts[9], result.wrong, result.others_wrong) == (102, 14, 603)


def test_side_by_side_each_is_trained_as_if_alone(base, mnist):
    settings = [Setting(rank=16), Setting(rank=1, seed=3), Setting(rank=4, digit=5, share=0.2, rule="α/√r")]
    for setting, together in zip(settings, sweep(base, mnist, settings, progress=False)):
        alone = sweep(base, mnist, [setting], progress=False)[0]
        assert together.on.wrong_counts == alone.on.wrong_counts and together.setting == setting


def test_the_result_is_with_lora_not_the_base(tuner):
    result, _ = tuner.run(Setting(rank=4))
    labels = tuner.mnist.test.tensors[1]
    assert not torch.equal(result.on.predictions, result.off.predictions)
    right = result.on.predictions == labels
    assert right[result.repaired].all() and not right[result.broken].any()
    assert len(result.repaired) - len(result.broken) == right.sum() - (result.off.predictions == labels).sum()


def test_a_setting_is_trained_once_and_its_stops_are_only_tested(tuner):
    origins = [tuner.run(Setting(batches=n))[1] for n in (100, 100, 50, 0, 150, 300)]
    assert origins == [
        "just trained",
        "remembered",
        "just tested",
        "just tested",
        "just trained",
        "just tested",
    ]
    first, again = tuner.run(Setting())[0], tuner.run(Setting())[0]
    assert first.on is again.on


def test_a_stop_equals_a_shorter_training(tuner, base, some):
    tuner.run(Setting(rank=2))
    stopped, short = tuner.run(Setting(rank=2, batches=20))[0], fine_tune(base, some, rank=2, batches=20)
    assert torch.equal(stopped.on.confusion, short.on.confusion)
    assert stopped.norms == pytest.approx(short.norms, rel=1e-5) and len(stopped.losses) == 20


def test_at_zero_batches_nothing_has_changed(tuner):
    result, _ = tuner.run(Setting(batches=0))
    assert torch.equal(result.on.predictions, result.off.predictions)
    assert len(result.repaired) == len(result.broken) == 0 and set(result.norms.values()) == {0.0}


def test_the_base_and_the_random_stream_are_left_alone(base, some):
    copies = {name: p.detach().clone() for name, p in base.named_parameters()}
    state = torch.get_rng_state()
    fine_tune(base, some, batches=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, copies[name]) and p.requires_grad for name, p in base.named_parameters())


def test_every_proof_holds_and_each_can_fail(tuner):
    assert all(tuner.proofs(Setting(rank=4)).values()) and len(tuner.proofs(Setting())) == 4
    net = tuner._net
    with torch.no_grad():
        net.linear2.bias[0] += 1
        assert not tuner.proofs(Setting())["base weights unchanged to the bit"]
        assert not tuner.proofs(Setting())["LoRA off = base, to the bit"]
        assert not tuner.proofs(Setting())["B = 0 changes nothing"]
    tuner._memory[Setting(batches=0)].stops[100] = tuner.run(Setting(rank=4))[0].adapters
    with pytest.raises(RuntimeError):  # an adapter of rank 4 is not one of rank 1
        tuner.proofs(Setting())


def test_the_numbers_of_delta_w_are_those_of_the_matrix_itself(tuner):
    result, _ = tuner.run(Setting(rank=4, alpha=3, rule="α/√r"))
    for name, (A, B) in result.adapters.items():
        delta = 3 / math.sqrt(4) * B @ A
        values = torch.linalg.svdvals(delta)[:4]
        assert result.norms[name] == pytest.approx(delta.norm().item(), rel=1e-4)
        assert torch.allclose(result.singular_values[name], values, rtol=1e-3, atol=1e-5)
    assert len(singular_values(torch.randn(16, 20), torch.randn(10, 16))) == 10


def test_probabilities_are_those_of_both_networks(tuner, base):
    images = tuner.mnist.test.tensors[0][:5]
    off, on = tuner.probabilities(Setting(rank=2), images)
    with torch.no_grad():
        assert torch.allclose(off, base(images).softmax(dim=1), atol=1e-6)
    result = tuner.run(Setting(rank=2))[0]
    assert torch.equal(on.argmax(dim=1), result.on.predictions[:5]) and not torch.equal(on, off)


def test_a_lesson_is_the_digit_and_the_share_of_others_asked_for(some):
    labels = some.train.tensors[1]
    for share in (0, 0.2, 0.5):
        chosen = labels[lesson_places(labels, Setting(share=share))]
        assert (chosen == 9).sum() == (labels == 9).sum()
        assert (chosen != 9).float().mean().item() == pytest.approx(share, abs=0.01)
    one, other = (lesson_places(labels, Setting(share=0.5, seed=seed)) for seed in (0, 1))
    assert not torch.equal(one, other) and len(lesson_places(labels, Setting(digit=None))) == len(labels)


@pytest.mark.parametrize(
    "rule, alpha, rank, scale", [("α/r", 16, 4, 4), ("α/√r", 16, 4, 8), ("α", 3, 4, 3), ("α/r", 1, 1, 1)]
)
def test_the_scale_follows_the_rule_and_lora_uses_it(rule, alpha, rank, scale):
    setting = Setting(rank=rank, alpha=alpha, rule=rule)
    assert setting.scale == pytest.approx(scale)
    net = setting.add_to(RichBoyNet(9, 9))
    assert {adapter.scale for adapter in adapters_of(net).values()} == {setting.scale}


def test_both_starts_draw_a_as_described():
    for start, std in (("normal", 1), ("kaiming", (3 * 1000) ** -0.5)):
        adapter = adapters_of(Setting(rank=64, start=start).add_to(RichBoyNet()))["linear2"]
        assert adapter.lora_A.std().item() == pytest.approx(std, rel=0.02) and not adapter.lora_B.any()


BAD = {
    "rank": (0, 1.5, "4", True, None),
    "alpha": (0, -1, math.nan, math.inf, "1"),
    "rule": ("r/α", None),
    "batches": (-1, 1.5),
    "digit": (-1, 10, "9"),
    "share": (-0.1, 0.9, True, "half"),
    "seed": (-1, 2**63),
    "optimizer": ("adam", torch.optim.Adam),
    "lr": (0, -1, math.nan),
    "start": ("he",),
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in BAD.items() for value in values])
def test_a_bad_setting_is_named_with_what_is_allowed(name, value):
    with pytest.raises(ValueError, match=f"{name} is .*must be"):
        Setting(**{name: value})


def test_a_rank_that_no_layer_can_have_is_refused_and_nothing_is_lost(tuner):
    with pytest.raises(ValueError, match="rank is 1001; it must be at most 1000"):
        tuner.run(Setting(rank=1001))
    assert isinstance(tuner.run(Setting())[0], FineTuning)


def test_a_training_that_diverges_says_so_and_a_sweep_goes_on(tuner):
    wild = Setting(optimizer="SGD", lr=1e30, batches=5)
    with pytest.raises(ValueError, match="diverged"):
        tuner.run(wild)
    (one, _), (other, _) = tuner.run_all([wild, Setting(batches=5)])
    assert one.diverged and not other.diverged


def test_a_base_that_cannot_be_used_is_refused(base, some):
    with pytest.raises(TypeError, match="base is a Linear"):
        FineTuner(torch.nn.Linear(784, 10), some)
    with pytest.raises(TypeError, match="mnist is a TensorDataset"):
        FineTuner(base, some.test)
    with pytest.raises(ValueError, match="already has LoRA"):
        FineTuner(add_lora(copy.deepcopy(base)), some)
    with torch.no_grad():
        base.linear1.bias[0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        FineTuner(base, some)


def test_at_rank_1_all_rules_are_one_training_also_when_memory_lets_go_of_it(tuner, monkeypatch):
    monkeypatch.setattr("lora_helpers.experiments.MEMORY", 1)
    settings = [Setting(rule=rule, batches=n) for n in (3, 5) for rule in ("α/r", "α/√r", "α")]
    settings.append(Setting(rank=2, batches=4))
    results = [result for result, _ in tuner.run_all(settings)]
    assert [result.setting for result in results] == settings
    assert results[0].on is results[1].on is results[2].on and results[3].on is results[5].on
    assert results[0].norms != results[3].norms


def test_memory_is_bounded_and_what_it_let_go_is_trained_again(tuner, monkeypatch):
    monkeypatch.setattr("lora_helpers.experiments.MEMORY", 1)
    first = tuner.run(Setting(batches=5))[0]
    tuner.run(Setting(batches=5, seed=1))
    assert len(tuner._memory) == 1
    assert all(tuner.proofs(Setting(batches=5)).values())
    assert tuner.run(Setting(batches=5))[0].on.wrong_counts == first.on.wrong_counts


@pytest.mark.parametrize(
    "change", ["two threads", "autograd", pytest.param("float64", marks=pytest.mark.slow)]
)
def test_counts_do_not_depend_on_threads_or_rounding(base, mnist, change, monkeypatch):
    """The ten wrong counts of notebook 4, base and LoRA on, to the last image."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    import plain_arithmetic

    expected = fine_tune(base, mnist, seed=2)
    if change == "two threads":
        torch.set_num_threads(2)
    else:
        for module in (plain_arithmetic.training, plain_arithmetic.experiments):
            for name in ("is_plain", "is_trainable_plain", "Fast", "ImagesToTest"):
                if hasattr(module, name):
                    monkeypatch.setattr(
                        module, name, getattr(module, name)
                    )  # so that it is put back afterwards
        plain_arithmetic.use_autograd()
    try:
        found = fine_tune(base.double() if change == "float64" else base, mnist, seed=2)
    finally:
        torch.set_num_threads(1)
    assert found.off.wrong_counts == expected.off.wrong_counts
    assert found.on.wrong_counts == expected.on.wrong_counts
