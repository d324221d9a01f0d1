"""The scaling experiments: what is algebra exactly, what is trained in bands over seeds."""

import copy
import math
from dataclasses import replace
from statistics import mean

import pytest
import torch

from lora_helpers import LoRAParametrization, RichBoyNet, count_parameters, evaluate, load_mnist, only_digit, pretrained_base, scaling, train
from lora_helpers.lora import lora_layers
from lora_helpers.scaling import Setting

RANKS = (1, 2, 4, 8, 16, 32, 64)


@pytest.fixture(scope="module")
def mnist():
    return load_mnist("sample")


@pytest.fixture(scope="module")
def base(mnist):
    return pretrained_base(mnist, progress=False)


@pytest.fixture(scope="module")
def sample_runs(base, mnist):
    return scaling.sweep(base, mnist, scaling.ladder(ranks=(4, 16, 64), seeds=(0, 1)), progress=False)


# ---------------------------------------------------------------- exact


def test_each_rule_reaches_lora_through_alpha():
    for rank in RANKS:
        for rule, scale in (("α", 1), ("α/√r", rank**-0.5), ("α/r", 1 / rank)):
            alpha = scaling.alpha_for(rule, rank, 3)
            assert LoRAParametrization(5, 4, rank, alpha).scale == pytest.approx(3 * scale)
            assert Setting(rank=rank, alpha=3, rule=rule).scale == pytest.approx(3 * scale)


def test_slope_finds_an_exponent_and_refuses_what_has_none():
    assert scaling.slope(RANKS, [7 * r**-1.5 for r in RANKS]) == pytest.approx(-1.5)
    for ranks, values in (((4,), (1,)), ((4, 4), (1, 2)), ((1, 2), (1, 0)), ((1, 2), (1, math.nan)), ((1, 2), (1,))):
        with pytest.raises(ValueError, match="An exponent needs"):
            scaling.slope(ranks, values)


def test_the_exponent_of_the_mean_is_not_tilted_by_one_unlucky_draw():
    pairs = [(r, r * luck) for r in RANKS for luck in ((1e-3, 1.999) if r == 1 else (1, 1))]
    assert scaling.slope_of_means(pairs) == pytest.approx(1, abs=1e-3)
    assert math.isnan(scaling.slope_of_means([(1, -1.0), (1, 0.5), (4, 2.0)]))


@pytest.mark.parametrize("n_in, n_out, rank", [(784, 1000, 439.46), (1000, 2000, 666.67), (2000, 10, 9.95)])
def test_break_even_rank_is_where_a_and_b_hold_as_much_as_the_weight(n_in, n_out, rank):
    exact = scaling.break_even_rank(n_in, n_out)
    assert exact == pytest.approx(rank, abs=0.005)
    assert exact * (n_in + n_out) == pytest.approx(n_in * n_out)
    for r, cheaper in ((math.floor(exact), True), (math.floor(exact) + 1, False)):
        lora = sum(p.numel() for p in LoRAParametrization(n_in, n_out, r).parameters())
        assert (lora < n_in * n_out) is cheaper


def test_initial_gradients_of_the_four_starts(base, mnist):
    starts = {s.name: s for s in scaling.four_starts(base, mnist)}
    before = evaluate(base, mnist.test).accuracy
    a_random, b_random, zero, both = starts.values()
    assert list(starts) == ["A random, B zero", "A zero, B random", "A zero, B zero", "A random, B random"]
    assert (a_random.gradient_A, zero.gradient_A, zero.gradient_B, b_random.gradient_B) == (0, 0, 0, 0)
    assert a_random.gradient_B > 0 and b_random.gradient_A > 0 and both.gradient_A > 0 and both.gradient_B > 0
    for start in (a_random, b_random, zero):
        assert start.delta == 0 and start.accuracy == pytest.approx(before, abs=1e-3)
    assert both.delta > 0 and both.accuracy < before / 2


def test_on_the_network_the_initial_gradients_are_those_of_the_chain_rule(mnist):
    """∂L/∂B = s·G·Aᵀ and ∂L/∂A = s·Bᵀ·G, G being the gradient in the whole weight: for all four starts and every layer."""
    torch.manual_seed(0)
    small = RichBoyNet(40, 30).double()
    images, labels = mnist.train.tensors[0][:10].double(), mnist.train.tensors[1][:10]
    for a_std, b_std in ((1, 0), (0, 1), (0, 0), (1, 1)):
        net = scaling.start_lora(small, Setting(rank=3, alpha=2))
        for (adapter,) in lora_layers(net).values():
            torch.nn.init.normal_(adapter.lora_A, std=a_std), torch.nn.init.normal_(adapter.lora_B, std=b_std)
        merged = copy.deepcopy(small)
        for name, (adapter,) in lora_layers(net).items():
            merged.get_submodule(name).weight.data += adapter.delta.detach()
        torch.nn.functional.cross_entropy(merged(images), labels).backward()
        torch.nn.functional.cross_entropy(net(images), labels).backward()
        for name, (adapter,) in lora_layers(net).items():
            gradient = merged.get_submodule(name).weight.grad
            assert torch.allclose(adapter.lora_B.grad, adapter.scale * gradient @ adapter.lora_A.T, rtol=1e-9, atol=1e-12)
            assert torch.allclose(adapter.lora_A.grad, adapter.scale * adapter.lora_B.T @ gradient, rtol=1e-9, atol=1e-12)


def test_one_step_is_what_the_algebra_says():
    gradient = scaling.low_rank_gradient(30, 20, rank=3).double()
    lr = 1e-3
    for step in scaling.first_steps(gradient, ranks=(4,), seeds=(5,), lr=lr, a_std=0.7):
        a = 0.7 * torch.randn(4, 20, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        s = scaling.RULES[step.rule](4)
        sgd, adam = -lr * s**2 * gradient @ a.T @ a, -lr * s * torch.sign(gradient @ a.T) @ a
        delta = sgd if step.optimizer == "SGD" else adam
        assert step.norm == pytest.approx(delta.norm().item(), rel=1e-5)
        assert step.useful == pytest.approx(-(delta * gradient).sum().item(), rel=1e-5)


def test_adams_epsilon_and_dead_rows_do_not_matter_to_the_algebra():
    gradient = scaling.low_rank_gradient(30, 20, rank=3).double()
    gradient[::2] = 0
    adam = [s for s in scaling.first_steps(gradient, ranks=(4,), seeds=(0,)) if s.optimizer == "Adam"]
    assert all(0 < s.norm < math.inf for s in adam)


def test_the_two_slopes_of_the_first_step_are_those_of_the_algebra():
    steps = scaling.first_steps(scaling.low_rank_gradient(), seeds=range(10))
    norm, useful = scaling.first_step_slopes(steps, "norm"), scaling.first_step_slopes(steps, "useful")
    expected = {"α": 0, "α/√r": -0.5, "α/r": -1}
    for rule, scale in expected.items():
        assert mean(norm["Adam", rule]) == pytest.approx(0.5 + scale, abs=0.02)
        assert mean(useful["Adam", rule]) == pytest.approx(1 + scale, abs=0.1)
        assert mean(norm["SGD", rule]) == pytest.approx(0.5 + 2 * scale, abs=0.1)
        assert mean(useful["SGD", rule]) == pytest.approx(1 + 2 * scale, abs=0.15)
        # The scale enters once under Adam and twice under SGD: exactly, draw by draw.
        for optimizer, power in (("Adam", 1), ("SGD", 2)):
            for slopes in (norm, useful):
                for with_rule, without in zip(slopes[optimizer, rule], slopes[optimizer, "α"]):
                    assert with_rule == pytest.approx(without + power * scale, abs=2e-3)


def test_a_smaller_a_shrinks_the_first_step_once_under_adam_and_twice_under_sgd(base, mnist):
    gradient = scaling.weight_gradient(base, only_digit(mnist.train, 9))
    assert gradient.shape == (2000, 1000) and torch.linalg.matrix_rank(gradient) <= 10
    gradient = gradient.double()
    large, small = (scaling.first_steps(gradient, ranks=(4,), seeds=(0,), a_std=std) for std in (1, 1 / 50))
    for one, other in zip(large, small):
        assert one.norm / other.norm == pytest.approx({"Adam": 50, "SGD": 2500}[one.optimizer], rel=1e-2)


@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
def test_scale_start_and_learning_rate_have_an_exact_symmetry(mnist, optimizer):
    torch.manual_seed(0)
    small = RichBoyNet(40, 30)
    assert scaling.twins_apart(small, mnist, c=3, optimizer=optimizer, steps=20) < 1e-12
    if optimizer == "Adam":
        assert scaling.twins_apart(small, mnist, c=3, optimizer=optimizer, steps=20, rescale_A=False) > 1e-3
        assert 1e-9 < scaling.twins_apart(small, mnist, c=3, optimizer=optimizer, steps=20, eps=1e-8) < 0.1


def test_the_best_low_rank_part_is_of_that_rank_and_beats_any_other():
    matrix = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    for rank, part in scaling.best_low_rank(matrix, (1, 5, 20)).items():
        assert torch.linalg.matrix_rank(part) == rank
        missing = torch.linalg.svdvals(matrix)[rank:].norm()
        assert (matrix - part).norm() == pytest.approx(missing.item(), abs=1e-4)


def test_singular_values_of_the_three_kinds(base):
    updates = {name: torch.outer(torch.ones(len(w)), torch.ones(w.shape[1])) for name, w in ((n, base.get_submodule(n).weight) for n in scaling.WEIGHTS)}
    for name, kinds in scaling.spectra(base, updates).items():
        weight = base.get_submodule(name).weight.detach()
        assert list(kinds) == ["ΔW", "W", "random"] and all(len(values) == min(weight.shape) for values in kinds.values())
        assert kinds["ΔW"][0] == pytest.approx(weight.numel() ** 0.5, rel=1e-4) and kinds["ΔW"][1:].max() < 1e-4 * kinds["ΔW"][0]
        assert torch.allclose(kinds["W"], torch.linalg.svdvals(weight), atol=1e-4)


def test_the_part_along_and_the_rest_are_perpendicular_and_make_the_whole():
    draw = torch.Generator().manual_seed(0)
    delta, direction = ({"layer": torch.randn(6, 5, generator=draw)} for _ in range(2))
    part = scaling.parts_along(delta, direction)["layer"]
    assert ((delta["layer"] - part) * direction["layer"]).sum().abs() < 1e-5
    assert torch.linalg.matrix_rank(torch.stack([part.flatten(), direction["layer"].flatten()])) == 1


@pytest.mark.parametrize("alike, cosine", [(True, 1), (False, 0)])
def test_mean_cosine_of_copies_and_of_perpendicular_terms(alike, cosine):
    adapter = LoRAParametrization(4, 4, rank=4)
    with torch.no_grad():
        for tensor in (adapter.lora_A, adapter.lora_B):
            tensor.copy_(torch.ones(4, 4) if alike else torch.eye(4))
    assert scaling.mean_cosine(adapter) == pytest.approx(cosine, abs=1e-6)


def test_a_curve_holds_the_two_signals_through_the_adapter(mnist):
    torch.manual_seed(0)
    small, settings = RichBoyNet(40, 30), [Setting(4, 16, start="kaiming"), Setting(4, 16, start="kaiming", optimizer="SGD", lr=1e-2)]
    for setting, curve in zip(settings, scaling.learning_curves(small, mnist, settings, batches=5, progress=False)):
        net = scaling.start_lora(small, setting)
        losses = train(net, mnist.train, max_batches=5, lr=setting.lr, seed=0, progress=False, optimizer_class=scaling.OPTIMIZERS[setting.optimizer])
        assert curve.losses == pytest.approx(losses, rel=1e-3) and len(curve.gradients) == 5
        images, labels = mnist.test.tensors
        x = net.relu(net.linear1(images.flatten(1))).detach()
        z = net.linear2(x).detach().requires_grad_()
        torch.nn.functional.cross_entropy(net.linear3(net.relu(z)), labels, reduction="sum").backward()
        delta = net.linear2.parametrizations.weight[0].delta.detach()
        assert curve.forwards == pytest.approx((x @ delta.T).square().mean().sqrt().item(), rel=1e-2)
        assert curve.backwards == pytest.approx((z.grad @ delta).square().mean().sqrt().item(), rel=1e-2)


def test_product_norm_is_that_of_the_product():
    b, a = torch.randn(30, 4), torch.randn(4, 20)
    assert scaling.product_norm(b, a, 0.25) == pytest.approx((0.25 * b @ a).norm().item(), rel=1e-5)


def test_both_starts_are_as_described(base):
    for start, std in (("normal", 1), ("kaiming", (3 * 1000) ** -0.5)):
        net = scaling.start_lora(base, Setting(rank=64, start=start))
        adapter = net.linear2.parametrizations.weight[0]
        assert adapter.lora_A.std().item() == pytest.approx(std, rel=0.02) and not adapter.lora_B.any()
    with pytest.raises(ValueError, match="start is 'he'; it must be one of 'normal', 'kaiming'"):
        scaling.start_lora(base, Setting(start="he"))


def test_costs_are_counted_not_estimated(base, mnist):
    table = {(c.method, c.rank): c for c in scaling.costs(base, mnist.train, ranks=(1, 8), steps=1)}
    assert table["full", None].trained == 2_807_010
    for rank in (1, 8):
        thin, built = table["factorised", rank], table["parametrization", rank]
        assert thin.trained == built.trained == 6_794 * rank
        assert thin.checkpoint_bytes == built.checkpoint_bytes
    for cost in table.values():
        assert cost.optimizer_bytes == 8 * cost.trained and cost.milliseconds > 0
        assert 4 * cost.trained < cost.checkpoint_bytes < 4 * cost.trained + 2000  # float32 and a small header


def test_shuffling_pixels_keeps_them_all_and_is_one_order(mnist):
    shuffled = scaling.shuffled_pixels(mnist)
    for before, after in zip((mnist.train.tensors[0], mnist.test.tensors[0]), (shuffled.train.tensors[0], shuffled.test.tensors[0])):
        assert torch.equal(before.flatten(1).sort().values, after.flatten(1).sort().values)
    order = torch.randperm(784, generator=torch.Generator().manual_seed(0))
    assert torch.equal(shuffled.test.tensors[0][3].flatten(), mnist.test.tensors[0][3].flatten()[order])


def test_full_fine_tuning_changes_weights_only_and_adding_it_gives_that_network(base, mnist):
    copies = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    updates = scaling.full_fine_tuning(base, mnist, batches=3)
    tuned = scaling.with_updates(base, updates)
    assert all(torch.equal(tensor, copies[name]) for name, tensor in base.state_dict().items())
    for name, tensor in tuned.state_dict().items():
        assert torch.equal(tensor, copies[name]) is name.endswith("bias")


def test_settings_of_one_scale_are_trained_once_and_measured_at_every_stop(base, mnist, monkeypatch):
    trained, real = [], scaling._train_together
    monkeypatch.setattr(scaling, "_train_together", lambda nets, chunk, *others: trained.extend(chunk) or real(nets, chunk, *others))
    settings = scaling.ladder(ranks=(1,), seeds=(0,)) + [Setting(rank=1, alpha=2.0)]
    runs = scaling.sweep(base, mnist, settings, progress=False, batches=3, at=(1,))
    assert len(trained) == 2 and [r.setting for r in runs] == settings
    assert runs[0].sizes == runs[2].sizes != runs[3].sizes
    assert set(runs[0].sizes) == {1, 3} and runs[0].final is runs[0].sizes[3]


def test_a_training_that_diverges_says_so(base, mnist):
    wild, tame = scaling.sweep(base, mnist, [Setting(rank=4, optimizer="SGD", lr=1e30), Setting()], batches=5, progress=False)
    assert not wild.finite and tame.finite


def test_side_by_side_each_is_trained_as_if_alone(base, mnist):
    settings = [Setting(rank=4), Setting(rank=2, lr=1e-4, seed=1), Setting(rank=4, optimizer="SGD", lr=1e-2)]
    together = scaling.sweep(base, mnist, settings, batches=5, progress=False)
    for setting, run in zip(settings, together):
        net = scaling.start_lora(base, setting)
        train(net, only_digit(mnist.train, 9), max_batches=5, lr=setting.lr, seed=setting.seed, progress=False,
              optimizer_class=scaling.OPTIMIZERS[setting.optimizer])  # fmt: skip
        alone = net.linear2.parametrizations.weight[0].delta.norm().item()
        assert run.final["linear2"].norm == pytest.approx(alone, rel=1e-3)


def test_training_leaves_the_random_stream_and_the_base_alone(base, mnist):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    scaling.sweep(base, mnist, [Setting(start="kaiming")], batches=2, progress=False)
    assert torch.equal(torch.rand(2), expected)
    assert count_parameters(base).lora == 0 and all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("field, value", [("optimizer", "adam"), ("rule", "r")])
def test_unknown_words_are_refused(base, mnist, field, value):
    with pytest.raises(ValueError, match=f"{field} is {value!r}; it must be one of"):
        scaling.sweep(base, mnist, [replace(Setting(), **{field: value})], batches=1, progress=False)


def test_gaps_in_a_grid_are_between_a_higher_alpha_and_a_higher_rate():
    right = {(1, 0.1): 0.9, (1, 0.2): 0.8, (1, 0.4): 0.5, (2, 0.1): 0.7, (2, 0.2): 0.6, (2, 0.4): 0.1}
    runs = [scaling.Run(Setting(alpha=alpha, lr=lr), {}, 0, accuracy, 0.0, finite=lr < 0.4) for (alpha, lr), accuracy in right.items()]
    assert scaling.accuracy_gaps(runs, 1) == [pytest.approx(0.8 - 0.7)]  # (2, 0.1) and (1, 0.2); that of (2, 0.2) and (1, 0.4) diverged
    assert scaling.accuracy_gaps([replace(run, finite=True) for run in runs], 2) == [pytest.approx(0.7 - 0.5)]


def test_stored_result_names_its_command():
    text = scaling.stored_result("Adam, A ~ N(0, 1)")
    assert text.startswith("uv run python -m lora_helpers.scaling --full") and "scale α/r  · r 64" in text
    with pytest.raises(ValueError, match="the parts begin with"):
        scaling.stored_result("RMSprop")


# ---------------------------------------------------------------- in bands, over seeds


def average(runs, rule, rank, value):
    return mean(value(r) for r in runs if (r.setting.rule, r.setting.rank) == (rule, rank))


def test_the_ordering_of_the_table_on_the_sample(base, mnist, sample_runs):
    accuracy = {(rule, rank): average(sample_runs, rule, rank, lambda r: r.accuracy) for rule in scaling.RULES for rank in (16, 64)}
    norm = {(rule, rank): average(sample_runs, rule, rank, lambda r: r.final["linear2"].norm) for rule in scaling.RULES for rank in (4, 64)}
    assert accuracy["α/r", 64] > accuracy["α/√r", 64] > accuracy["α", 64] and accuracy["α", 64] < 1 / 2
    assert abs(accuracy["α/r", 64] - accuracy["α/r", 16]) < 0.06
    assert norm["α/r", 64] < norm["α/√r", 64] < norm["α", 64]
    assert norm["α/r", 64] < 0.5 * norm["α/r", 4] and norm["α", 64] > 1.2 * norm["α", 4]
    before = evaluate(base, mnist.test).wrong_counts[9]
    wrong = {(rule, rank): average(sample_runs, rule, rank, lambda r: r.wrong) for rule in scaling.RULES for rank in (4, 16, 64)}
    called = {(rule, rank): average(sample_runs, rule, rank, lambda r: r.called) for rule in scaling.RULES for rank in (4, 16, 64)}
    assert max(wrong["α/r", rank] for rank in (4, 16, 64)) < 0.6 * before  # repaired at every rank
    assert wrong["α", 64] <= wrong["α/√r", 64] <= wrong["α/r", 64]
    assert called["α", 64] > 0.8 > called["α", 4] and called["α", 64] > called["α/√r", 64] > called["α/r", 64]


def test_along_full_fine_tuning_alpha_over_r_is_level_and_no_scale_grows(base, mnist):
    directions = scaling.full_fine_tuning(base, mnist, lr=1e-4, progress=False)
    settings = scaling.ladder(ranks=(4, 64), rules=("α", "α/r"), seeds=(0, 1, 2))
    runs = scaling.sweep(base, mnist, settings, directions=directions, progress=False)
    for layer in ("linear1", "linear2"):
        along = {(rule, rank): average(runs, rule, rank, lambda r: r.final[layer].along) for rule in ("α", "α/r") for rank in (4, 64)}
        assert 0.5 < along["α/r", 64] / along["α/r", 4] < 2 and along["α", 64] > 2 * along["α", 4]


def test_alpha_against_the_learning_rate_once_under_adam_and_squared_under_sgd(base, mnist):
    for optimizer, lr, power in (("Adam", 2.5e-4, 1), ("SGD", 2.5e-3, 2)):
        settings = [Setting(4, 4, optimizer=optimizer, lr=lr), *(Setting(4, 1, optimizer=optimizer, lr=lr * 4**p) for p in (1, 2))]
        corner, *others = (run.accuracy for run in scaling.sweep(base, mnist, settings, progress=False))
        gaps = [abs(corner - other) for other in others]
        assert gaps.index(min(gaps)) + 1 == power, (optimizer, corner, others)


def test_a_small_start_brings_the_norm_nearer_to_level(base, mnist):
    settings = scaling.ladder(ranks=(4, 64), rules=("α/r",), seeds=(0, 1), start="kaiming")
    runs = scaling.sweep(base, mnist, settings, progress=False, at=(1,))
    for layer in scaling.WEIGHTS:
        for first, last in zip(*(scaling.norm_slopes(runs, layer, batches)["α/r"] for batches in (1, 100))):
            assert first == pytest.approx(-0.5, abs=0.06) and last > first + 0.2


def test_under_sgd_it_is_the_square_root_that_keeps_what_is_learned(base, mnist):
    settings = scaling.ladder(ranks=(4, 64), rules=("α/√r", "α/r"), seeds=(0, 1), optimizer="SGD", lr=1e-2)
    runs = scaling.sweep(base, mnist, settings, progress=False)
    wrong = {(rule, rank): average(runs, rule, rank, lambda r: r.wrong) for rule in ("α/√r", "α/r") for rank in (4, 64)}
    before = evaluate(base, mnist.test).wrong_counts[9]
    assert wrong["α/r", 64] > wrong["α/r", 4] and wrong["α/r", 64] > before / 2
    assert wrong["α/√r", 64] < before / 2


def test_with_alpha_over_r_the_norm_falls_like_one_over_root_r_on_full_mnist(full_mnist_root):
    full = load_mnist("full", root=full_mnist_root)
    base = pretrained_base(full, seed=1, progress=False)  # that of test_the_story_on_full_mnist, which is cached then
    settings = scaling.ladder(ranks=(4, 16, 64), rules=("α/r",), seeds=(0, 1)) + scaling.ladder(ranks=(64,), rules=("α", "α/√r"), seeds=(0, 1))
    runs = scaling.sweep(base, full, settings, progress=False)
    level = [run for run in runs if run.setting.rule == "α/r"]
    slopes = scaling.norm_slopes(level, "linear2")["α/r"]
    assert mean(slopes) == pytest.approx(-0.5, abs=0.15), slopes
    assert max(r.accuracy for r in level) - min(r.accuracy for r in level) < 0.06
    at_64 = {rule: (average(runs, rule, 64, lambda r: r.accuracy), average(runs, rule, 64, lambda r: r.wrong)) for rule in scaling.RULES}
    assert at_64["α/r"][0] > at_64["α/√r"][0] > at_64["α"][0] and at_64["α"][1] <= at_64["α/√r"][1] <= at_64["α/r"][1]
    assert at_64["α/r"][1] < 0.6 * evaluate(base, full.test).wrong_counts[9]
