"""What notebook 2 measures: exact where it is algebra, and in bands over seeds where it is training."""

import copy
import math
from statistics import mean

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from lora_helpers import Mnist, RichBoyNet, only_digit, scaling, train
from lora_helpers.experiments import OPTIMIZERS, RULES, Setting, adapters_of, sweep
from lora_helpers.model import LAYERS, pretrained_base

RANKS = (1, 2, 4, 8, 16, 32, 64)
POWERS = {"α": 0, "α/√r": -0.5, "α/r": -1}  # of r in each rule's scale


@pytest.fixture(scope="module")
def some(mnist):
    """All training images, and 2,000 to test on."""
    return Mnist(mnist.train, TensorDataset(*(tensor[:2000] for tensor in mnist.test.tensors)))


@pytest.fixture(scope="module")
def base():
    return pretrained_base()


@pytest.fixture(scope="module")
def full(base, some):
    return scaling.full_fine_tuning(base, some, lr=1e-4)


@pytest.fixture(scope="module")
def runs(base, some):
    return sweep(base, some, scaling.ladder(ranks=(4, 64), seeds=(0, 1)), progress=False)


@pytest.fixture
def small():
    torch.manual_seed(0)
    return RichBoyNet(40, 30)


# ---------------------------------------------------------------- exponents


def test_an_exponent_is_found_and_what_has_none_is_refused():
    assert scaling.slope(RANKS, [7 * r**-1.5 for r in RANKS]) == pytest.approx(-1.5)
    bad = [((4,), (1,)), ((4, 4), (1, 2)), ((1, 2), (1, 0)), ((1, 2), (1, math.nan)), ((1, 2), (1,))]
    for ranks, values in bad:
        with pytest.raises(ValueError, match="An exponent needs"):
            scaling.slope(ranks, values)


# ---------------------------------------------------------------- the start and the first step


def test_one_step_is_what_the_algebra_says():
    gradient = scaling.low_rank_gradient(30, 20, rank=3).double()
    gradient[::2] = 0  # rows without a gradient, as of units that are silent, do not matter
    for step in scaling.first_steps(gradient, ranks=(4,), seeds=(5,), lr=1e-3, a_std=0.7):
        A = 0.7 * torch.randn(4, 20, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        s = 4 ** POWERS[step.rule]
        sgd, adam = -1e-3 * s**2 * gradient @ A.T @ A, -1e-3 * s * torch.sign(gradient @ A.T) @ A
        delta = sgd if step.optimizer == "SGD" else adam
        assert step.norm == pytest.approx(delta.norm().item(), rel=1e-5)
        assert step.useful == pytest.approx(-(delta * gradient).sum().item(), rel=1e-5)


def test_the_scale_enters_the_first_step_once_under_adam_and_twice_under_sgd():
    steps = scaling.first_steps(scaling.low_rank_gradient(), seeds=range(10))
    norm, useful = (scaling.first_step_slopes(steps, quantity) for quantity in ("norm", "useful"))
    for optimizer, times in (("Adam", 1), ("SGD", 2)):
        for rule, power in POWERS.items():
            assert mean(norm[optimizer, rule]) == pytest.approx(0.5 + times * power, abs=0.1)
            assert mean(useful[optimizer, rule]) == pytest.approx(1 + times * power, abs=0.15)
            for slopes in (norm, useful):  # the scale's own part is exact, draw by draw
                for with_rule, without in zip(slopes[optimizer, rule], slopes[optimizer, "α"]):
                    assert with_rule == pytest.approx(without + times * power, abs=2e-3)


def test_a_smaller_a_shrinks_the_first_step_once_under_adam_and_twice_under_sgd(base, mnist):
    gradient = scaling.weight_gradient(base, only_digit(mnist.train, 9))
    assert gradient.shape == (2000, 1000) and torch.linalg.matrix_rank(gradient) <= 10
    options = {"gradient": gradient.double(), "ranks": [4], "seeds": [0]}
    large, small = (scaling.first_steps(**options, a_std=std) for std in (1, 1 / 50))
    for one, other in zip(large, small):
        assert one.norm / other.norm == pytest.approx({"Adam": 50, "SGD": 2500}[one.optimizer], rel=2e-2)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_alpha_and_the_learning_rate_can_be_exchanged_exactly_if_a_is_rescaled_too(small, mnist, optimizer):
    assert scaling.twins_apart(small, mnist, optimizer=optimizer) < 1e-12
    if optimizer == "Adam":
        assert scaling.twins_apart(small, mnist, rescale_A=False) > 1e-3
        assert 1e-9 < scaling.twins_apart(small, mnist, eps=1e-8) < 0.1


# ---------------------------------------------------------------- parts of an update


def test_the_best_low_rank_part_has_that_rank_and_misses_least():
    matrix = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    for rank, part in scaling.best_low_rank(matrix, (1, 5, 20)).items():
        assert torch.linalg.matrix_rank(part) == rank
        missing = torch.linalg.svdvals(matrix)[rank:].norm().item()
        assert (matrix - part).norm().item() == pytest.approx(missing, abs=1e-4)


def test_spectra_are_the_singular_values_of_the_update_the_weight_and_a_random_matrix(small):
    updates = {name: torch.ones_like(small.get_submodule(name).weight) for name in LAYERS}
    for name, kinds in scaling.spectra(small, updates).items():
        weight = small.get_submodule(name).weight.detach()
        assert list(kinds) == ["ΔW", "W", "random"]
        assert kinds["ΔW"][0].item() == pytest.approx(weight.numel() ** 0.5, rel=1e-4)  # of rank one
        assert kinds["ΔW"][1:].max() < 1e-4 * kinds["ΔW"][0]
        assert torch.allclose(kinds["W"], torch.linalg.svdvals(weight), atol=1e-4)


def test_the_part_along_a_direction_and_the_rest_are_perpendicular(runs):
    A, B = runs[0].adapters["linear3"]
    delta = runs[0].scale * B @ A
    direction = torch.randn(delta.shape, generator=torch.Generator().manual_seed(0))
    part = scaling.parts_along({"linear3": delta}, {"linear3": direction})["linear3"]
    assert ((delta - part) * direction).sum().abs() < 1e-3 * delta.norm() * direction.norm()
    assert torch.linalg.matrix_rank(torch.stack([part.flatten(), direction.flatten()])) == 1
    length = abs(scaling.part_along(runs[0], "linear3", direction))  # of a run the same, without building ΔW
    assert length == pytest.approx(part.norm().item(), rel=1e-2)
    assert scaling.norm_after(runs[0], "linear3") == pytest.approx(delta.norm().item(), rel=1e-4)


def test_full_fine_tuning_changes_weights_only_and_leaves_the_base_alone(base, some):
    copies = copy.deepcopy(base.state_dict())
    tuned = scaling.with_updates(base, scaling.full_fine_tuning(base, some, batches=3)).state_dict()
    assert all(torch.equal(tensor, copies[name]) for name, tensor in base.state_dict().items())
    assert all(torch.equal(tensor, copies[name]) is name.endswith("bias") for name, tensor in tuned.items())


# ---------------------------------------------------------------- long trainings and costs


def test_a_curve_holds_the_losses_and_the_two_signals_through_the_adapter(small, some):
    settings = [Setting(4, 16, start="kaiming"), Setting(4, 16, optimizer="SGD", lr=1e-2)]
    curves = scaling.learning_curves(small, some, settings, batches=5, progress=False)
    for setting, curve in zip(settings, curves):
        net, kind = scaling.start_lora(small, setting), OPTIMIZERS[setting.optimizer]
        options = {"lr": setting.lr, "seed": 0, "optimizer_class": kind, "progress": False}
        losses = train(net, some.train, max_batches=5, **options)
        assert curve.losses == pytest.approx(losses, rel=1e-3) and len(curve.gradients) == 5
        x = net.relu(net.linear1(some.test.tensors[0].flatten(1))).detach()
        z = net.linear2(x).detach().requires_grad_()
        cross_entropy(net.linear3(net.relu(z)), some.test.tensors[1], reduction="sum").backward()
        delta = adapters_of(net)["linear2"].delta.detach()
        signals = [signal.square().mean().sqrt().item() for signal in (x @ delta.T, z.grad @ delta)]
        assert [curve.forwards, curve.backwards] == pytest.approx(signals, rel=1e-2)


def test_shuffled_pixels_are_the_same_pixels_in_one_order_for_all(some):
    shuffled = scaling.shuffled_pixels(some, test_images=600)
    order = torch.randperm(784, generator=torch.Generator().manual_seed(0))
    for before, after in ((some.train[:], shuffled.train), (some.test[:600], shuffled.test)):
        assert torch.equal(after.tensors[0][::500].flatten(1), before[0][::500].flatten(1)[:, order])
        assert torch.equal(after.tensors[1], before[1])


def test_costs_are_counted_not_estimated(base, mnist):
    table = scaling.costs(base, mnist.train, ranks=(1, 8), steps=1)
    assert [cost.trained for cost in table] == [2_807_010, *2 * (6_794, 8 * 6_794)]
    assert [cost.method for cost in table] == ["full", *2 * ["parametrization"], *2 * ["written out"]]
    for cost in table:
        assert cost.optimizer_bytes == 8 * cost.trained and cost.milliseconds > 0
        assert 4 * cost.trained < cost.checkpoint_bytes < 4 * cost.trained + 2000  # float32, a small header


# ---------------------------------------------------------------- trained: what notebook 2 says


def average(runs, rule, rank, value):
    return mean(value(r) for r in runs if (r.setting.rule, r.setting.rank) == (rule, rank))


def test_at_rank_64_alpha_over_r_keeps_the_network_and_no_scale_ruins_it(runs):
    kept, root, ruined = (average(runs, rule, 64, lambda r: r.on.accuracy) for rule in RULES)
    assert kept > 0.9 and kept > root + 0.2 > ruined + 0.4
    assert average(runs, "α", 64, lambda r: r.called) > 0.8  # nearly everything is called a 9
    assert max(r.wrong for r in runs) <= 3 and runs[0].off.wrong_counts[9] == 25  # repaired in every case


def test_under_adam_the_norm_falls_like_one_over_root_r_and_the_useful_part_stays_level(runs, full):
    assert mean(scaling.norm_slopes(runs)["α/r"]) == pytest.approx(-0.5, abs=0.1)
    assert mean(scaling.norm_slopes(runs)["α"]) > 0.1
    for layer in ("linear1", "linear2"):
        useful = scaling.slopes_by_rule(runs, lambda r, on=layer: scaling.part_along(r, on, full[on]))
        assert abs(mean(useful["α/r"])) < 0.15 and mean(useful["α"]) > 0.3


def test_a_small_start_brings_the_norm_nearer_to_level(base, some):
    settings = scaling.ladder(ranks=(4, 64), rules=("α/r",), seeds=(0, 1), start="kaiming")
    started = sweep(base, some, settings, stops=(1,), progress=False)
    for layer in LAYERS:
        first, last = (mean(scaling.norm_slopes(started, layer, batches)["α/r"]) for batches in (1, 100))
        assert first == pytest.approx(-0.5, abs=0.03) and abs(last) < 0.1


def test_under_sgd_alpha_over_r_learns_little_at_rank_64_and_alpha_over_root_r_learns_still(base, some):
    settings = scaling.ladder(ranks=(64,), rules=("α/√r", "α/r"), seeds=(0, 1), optimizer="SGD", lr=1e-2)
    with_sgd = sweep(base, some, settings, progress=False)
    wrong = {rule: average(with_sgd, rule, 64, lambda r: r.wrong) for rule in ("α/√r", "α/r")}
    assert wrong["α/√r"] < 5 and wrong["α/r"] > 25 / 2


def test_four_times_alpha_is_like_four_times_the_rate_under_adam_and_sixteen_under_sgd(base, some):
    for optimizer, lr, factor in (("Adam", 2.5e-4, 4), ("SGD", 2.5e-3, 16)):
        common = {"rank": 4, "optimizer": optimizer}
        settings = [Setting(alpha=4, lr=lr, **common), *(Setting(lr=lr * by, **common) for by in (4, 16))]
        corner, by_4, by_16 = (r.on.accuracy for r in sweep(base, some, settings, progress=False))
        assert (abs(corner - by_4) < abs(corner - by_16)) is (factor == 4)
