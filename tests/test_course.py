"""The course without a browser: every checker on right answers, named mistakes, garbage and code that stops."""

import copy
import inspect
import re
import warnings

import pytest
import torch
from matplotlib.text import Text
from torch import nn
from torch.nn.utils import parametrize

from lora_helpers import (
    LoRAParametrization, PredictChoice, PredictNumber, PredictRanking, Question, RichBoyNet, add_lora, evaluate, freeze_base,
    load_mnist, lora_disabled, only_digit, plot_losses, preflight, projector_mode, train,
)  # fmt: skip
from lora_helpers.course import digit_9, mechanics, mlp, scaling, your_turn
from lora_helpers.course import preflight as preflight_module
from lora_helpers.course.exercise import Exercise, exercise, same
from lora_helpers.training import Evaluation

MODULES = (mlp, scaling, mechanics, digit_9, your_turn)
EXERCISES = {f"{m.__name__.split('.')[-1]}.{n}": e for m in MODULES for n, e in vars(m).items() if isinstance(e, Exercise)}


def many(*exercises_and_answers):
    """[(exercise, answer or tuple of answers, misconception or None)] with readable ids."""
    return [pytest.param(e, a if type(a) is tuple else (a,), m, id=f"{e.__name__}: {m or n}") for n, (e, a, m) in enumerate(exercises_and_answers)]


def solved(e):
    """The answers of the exercise's own solution, run as a learner would run it."""
    names = dict(torch=torch, nn=nn, parametrize=parametrize, LoRAParametrization=LoRAParametrization, add_lora=add_lora,
                 freeze_base=freeze_base, only_digit=only_digit, train=train, evaluate=evaluate,
                 published_after=digit_9._AFTER, published_before=digit_9._BEFORE)  # fmt: skip
    before = set(names)
    exec(e.solution_code, names)
    return [value for name, value in names.items() if name not in before | {"__builtins__"}]


@pytest.mark.parametrize("e", EXERCISES.values(), ids=EXERCISES)
def test_the_solution_shown_is_right(e):
    verdict = e.check(*solved(e))
    assert verdict.state == "right" and verdict.misconception is None, verdict
    assert e.solution_code in repr(e.solution())


@pytest.mark.parametrize("e", EXERCISES.values(), ids=EXERCISES)
def test_a_blank_is_not_attempted(e):
    count = len(solved(e))
    unfinished = (lambda *_: ..., ...)
    for blank in unfinished:
        assert e.check(*[blank] * count).state == "not attempted", blank
    assert "Not attempted yet" in repr(e.check(*[...] * count)) and "**" not in repr(e.check(*[...] * count))


def test_a_blank_still_standing_in_the_code_is_not_attempted():
    def begun(in_features, out_features):
        weight = ...
        return in_features * out_features

    def only_dots(net):
        ...

    def indexed(confusion):
        return confusion[..., :].sum(dim=1) - confusion.diagonal()

    assert mlp.layer_parameters.check(begun).state == "not attempted"
    assert mlp.keep_copies.check(only_dots).state == "not attempted"
    assert mlp.wrong_per_digit.check(indexed).state == "right"


def recursive(*arguments):
    return recursive(*arguments)


def raising(*arguments):
    return nonexistent_name  # noqa: F821


def leaving(*arguments):
    raise SystemExit


class Hostile:
    def __eq__(self, other):
        raise RuntimeError("not comparable")

    def __repr__(self):
        raise RuntimeError("not printable")


@pytest.mark.parametrize("e", EXERCISES.values(), ids=EXERCISES)
def test_garbage_and_code_that_stops_get_words(e):
    count = len(solved(e))
    function_asked = callable(solved(e)[0])
    for answer in (None, "garbage", float("nan"), [], {}, [None], object(), nn.Linear, Hostile(), 3 + 4j, torch.zeros(0), lambda: 1, lambda *_: "text",
                   lambda *_: Hostile(), lambda *_: None):  # fmt: skip
        verdict = e.check(*[answer] * count)
        assert verdict.state in ("wrong", "cannot be checked") and len(verdict.words) > 10
    for function, words in ((recursive, "without end"), (raising, "nonexistent_name"), (leaving, "SystemExit")):
        verdict = e.check(*[function] * count)
        assert verdict.state == "cannot be checked", verdict
        assert words in verdict.words or not function_asked
    assert e.check(*[1] * (count + 1)).state == "cannot be checked"


@pytest.mark.parametrize("e", EXERCISES.values(), ids=EXERCISES)
def test_hints_go_step_by_step_and_a_check_leaves_the_random_stream_alone(e):
    own = Exercise(e._judge, e._hints, e.solution_code, e._reason)
    steps = [repr(own.hint()) for _ in range(len(own._hints) + 1)]
    assert len(own._hints) >= 2 and len(set(steps[:-1])) == len(own._hints) and steps[-1] == steps[-2]
    assert e.__doc__ and e.__doc__.endswith(("?", ".")), "the question"
    state = torch.get_rng_state()
    e.check(*solved(e))
    assert torch.equal(torch.get_rng_state(), state)


def test_what_the_layer_says_comes_with_where_to_look():
    def assign_parameter(layer):
        layer.weight = nn.Parameter(torch.zeros(4, 5))

    def assign_tensor(layer):
        parametrize.remove_parametrizations(layer, "weight")
        layer.weight = torch.zeros(4, 5)

    def without_brackets(layer, batches):
        with parametrize.cached:
            return [layer(batch) for batch in batches]

    assert "remove the parametrization first" in mechanics.merge.check(assign_parameter).words
    assert "another `nn.Parameter`" in mechanics.merge.check(assign_tensor).words
    assert "brackets missing" in mechanics.compute_once.check(without_brackets).words
    assert "Square brackets make a list." in mechanics.compute_once.check(lambda layer, batches: (layer(batch) for batch in batches)).words


def test_what_python_says_comes_with_where_to_look():
    def unknown_name(labels, digit):
        return label != digit  # noqa: F821

    def for_one(labels):
        return labels != 9

    def no_import(labels, digit):
        return np.not_equal(labels, digit)  # noqa: F821

    def no_self(self, weight):
        return weight + scale * self.lora_B @ self.lora_A  # noqa: F821

    assert "`self.scale`" in mechanics.forward.check(no_self).words
    for function, words in (
        (lambda labels, digit: torch.zeros(2)[labels != digit], "Return the mask alone"),
        (no_import, "must be imported first"),
        (unknown_name, "spelled as in the line `def"),
        (for_one, "leave the line `def"),
        (lambda labels, digit: not labels == digit, "use `~`"),
        (lambda labels, digit: labels.diag_al(), "Is the name behind the point"),
        (lambda labels, digit: labels.detach.clone(), "brackets of a call missing"),
        (lambda labels, digit: labels(digit), "Is a `*` missing"),
        (lambda labels, digit: {}[digit], "print its keys"),
        (lambda labels, digit: (labels != digit) & torch.ones(3, dtype=torch.bool), "`.shape` of both"),
        (lambda labels, digit: print(end=""), "`print` only shows"),
    ):
        verdict = mlp.all_but.check(function)
        assert verdict.state == "cannot be checked" and words in verdict.words, verdict
    assert "Without the quotes" in digit_9.bill.check("140").words
    assert "A function is asked for; this is a number (int)." in mlp.layer_parameters.check(785_000).words
    assert "`.accuracy`" in mlp.accuracy.check(lambda net, mnist: evaluate(net, mnist.test)).words
    assert "worked on a copy" in digit_9.experiment.check(on_a_copy).words
    assert "finite" in scaling.dead_start.check(torch.full((2, 5), torch.nan), ZERO_B, "b").words
    assert "as their product" in your_turn.add_adapters.check(lambda A1, B1, A2, B2: B1 @ A1 + B2 @ A2).words
    assert "add them up" in mlp.layer_parameters.check(lambda i, o: (i * o, o)).words
    assert "write 6794" in digit_9.adam_memory.check((12, 794)).words
    assert "write 6794" in your_turn.largest_rank.check(lambda budget: (budget // 6, 794)).words
    assert "append" in mechanics.compute_once.check(lambda layer, batches: [row for b in batches for row in layer(b)]).words
    assert "without brackets" in scaling.break_even.check([440]).words
    assert "is the bias in it" in mechanics.compute_once.check(lambda layer, batches: [b @ layer.weight.T for b in batches]).words


@pytest.mark.parametrize("e", EXERCISES.values(), ids=EXERCISES)
def test_no_two_mistakes_look_alike(e, monkeypatch):
    """Else the reply to one would be untrue of the other."""
    seen = []
    judge = inspect.unwrap(e._judge)
    monkeypatch.setitem(judge.__globals__, "compare", lambda given, truth, found, *_: seen.append((truth, found)))
    e.check(*solved(e))
    for truth, found in seen[:1]:
        values = [("right", truth), *((name, value) for name, (value, _) in found.items())]
        for n, (name, value) in enumerate(values):
            for other, another in values[n + 1 :]:
                assert not same(value, another), (name, other)


def test_the_score_shown_is_0_where_nothing_is_right():
    nothing = Evaluation(torch.ones(10, 10, dtype=torch.int64).fill_diagonal_(0), torch.zeros(0, dtype=torch.int64))
    (score,) = solved(your_turn.score)
    assert score(nothing, 9) == your_turn.fair_score(nothing, 9) == 0


def test_an_interrupt_is_not_swallowed():
    def interrupted(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mlp.layer_parameters.check(interrupted)


def test_the_poison_of_exercise_4_5_warns_nobody():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert digit_9.experiment.check(taught(digit=lambda mnist: mnist.train)).misconception == "trained on other digits"


def test_a_judge_that_breaks_says_so():
    @exercise(hints=("a", "b"), solution="x = 1", reason="")
    def broken(answer):
        """A question?"""
        raise ZeroDivisionError("inside")

    assert broken.check(1).state == "cannot be checked" and "ZeroDivisionError" in broken.check(1).words


def test_at_least_four_exercises_and_a_quiz_belong_to_each_notebook():
    for module in MODULES:
        assert len([e for e in vars(module).values() if isinstance(e, Exercise) and e.__module__ == module.__name__]) >= 4


# --- notebook 1


def confusion_shares(c):
    return (c.sum(1) - c.diagonal()) / c.sum(1)


def weights_only(net):
    return {n: p.detach().clone() for n, p in net.named_parameters() if "weight" in n}


def measured(part, dim=1, factor=1.0, wrong=False, total=False):
    def accuracy(net, mnist):
        images, labels = getattr(mnist, part).tensors
        hits = (net(images).argmax(dim=dim) != labels) if wrong else (net(images).argmax(dim=dim) == labels)
        return factor * (hits.sum() if total else hits.float().mean())

    return accuracy


def answers_to_other_labels(net, mnist):
    return (net(mnist.test.tensors[0]).argmax(dim=1) == mnist.train.tensors[1]).float().mean()


def accuracy_in_batches(net, mnist):
    right = sum(int(net(image[None]).argmax()) == int(label) for image, label in mnist.test)
    return right / len(mnist.test)


RIGHT_1 = many(
    (mlp.layer_parameters, lambda i, o: sum(p.numel() for p in nn.Linear(i, o).parameters()), None),
    (mlp.layer_parameters, lambda i, o: torch.tensor((i + 1) * o), None),
    (mlp.all_but, lambda labels, digit: (labels != digit).nonzero().flatten(), None),
    (mlp.all_but, lambda labels, digit: torch.tensor([int(label) != digit for label in labels]), None),
    (mlp.all_but, lambda labels, digit: labels.sub_(digit) != 0, None),
    (mlp.all_but, lambda labels, digit: torch.where(labels != digit), None),
    (mlp.wrong_per_digit, lambda c: c.clone().fill_diagonal_(0).sum(dim=1), None),
    (mlp.wrong_per_digit, lambda c: [int(c[d].sum() - c[d, d]) for d in range(10)], None),
    (mlp.keep_copies, lambda net: copy.deepcopy(net.state_dict()), None),
    (mlp.keep_copies, lambda net: {n: torch.tensor(p.tolist()) for n, p in net.named_parameters()}, None),
    (mlp.accuracy, accuracy_in_batches, None),
    (mlp.accuracy, lambda net, mnist: evaluate(net, mnist.test).accuracy, None),
)
WRONG_1 = many(
    (mlp.layer_parameters, lambda i, o: i * o, "bias forgotten"),
    (mlp.layer_parameters, lambda i, o: i * o + i, "one bias for each input"),
    (mlp.layer_parameters, lambda i, o: i + o, "sides added, not multiplied"),
    (mlp.layer_parameters, lambda i, o: i * o + 1, "one bias for the whole layer"),
    (mlp.layer_parameters, lambda i, o: i * o + i + o, "a bias for each side"),
    (mlp.layer_parameters, lambda i, o: 785_000, "one layer for all"),
    (mlp.layer_parameters, lambda i, o: (i * o, o), None),
    (mlp.layer_parameters, lambda i, o: 18, None),
    (mlp.all_but, lambda labels, digit: labels == digit, "it keeps what it should leave out"),
    (mlp.all_but, lambda labels, digit: labels[labels != digit], "labels instead of places"),
    (mlp.all_but, lambda labels, digit: (labels != digit).int(), "0 and 1 for False and True"),
    (mlp.all_but, lambda labels, digit: (labels != digit).long(), "0 and 1 for False and True"),
    (mlp.all_but, lambda labels, digit: labels != 9, None),
    (mlp.all_but, lambda labels, digit: labels is not digit, "one answer for all"),
    (mlp.all_but, lambda labels, digit: labels != str(digit), "one answer for all"),
    (mlp.all_but, lambda labels, digit: (labels != digit).nonzero(), "places in a column"),
    (mlp.wrong_per_digit, lambda c: c.sum(0) - c.diagonal(), "rows and columns swapped"),
    (mlp.wrong_per_digit, lambda c: c.diagonal(), "right answers counted"),
    (mlp.wrong_per_digit, lambda c: c.sum(1), "right answers not taken away"),
    (mlp.wrong_per_digit, confusion_shares, "a share, not a count"),
    (mlp.wrong_per_digit, lambda c: c.sum() - c.trace(), "one sum for all"),
    (mlp.wrong_per_digit, lambda c: c.diagonal() - c.sum(1), "taken away the wrong way round"),
    (mlp.wrong_per_digit, lambda c: c.sum(0), "calls counted"),
    (mlp.wrong_per_digit, lambda c: c.sum() - c.diagonal(), "the whole matrix added up"),
    (mlp.wrong_per_digit, lambda c: next(c[d].sum() - c[d, d] for d in range(10)), "a return inside the loop"),
    (mlp.keep_copies, lambda net: {n: p.detach() for n, p in net.named_parameters()}, "no memory of its own"),
    (mlp.keep_copies, lambda net: net.state_dict(), "no memory of its own"),
    (mlp.keep_copies, weights_only, "biases left out"),
    (mlp.keep_copies, lambda net: next({n: p.detach().clone()} for n, p in net.named_parameters()), "a return inside the loop"),
    (mlp.keep_copies, lambda net: {n: p.clone() for n, p in net.named_parameters()}, "still part of the graph"),
    (mlp.keep_copies, lambda net: {"linear1.bias": net.linear1.bias}, None),
    (mlp.accuracy, measured("train"), "tested on the training set"),
    (mlp.accuracy, measured("test", dim=0), "the best of the images, not of the logits"),
    (mlp.accuracy, lambda net, mnist: (net(mnist.test.tensors[0]) == mnist.test.tensors[1]).float().mean(), "all ten logits compared"),
    (mlp.accuracy, measured("test", dim=None), "one answer for all images"),
    (mlp.accuracy, answers_to_other_labels, "images and labels of different sets"),
    (mlp.accuracy, measured("test", wrong=True), "wrong answers instead of right ones"),
    (mlp.accuracy, measured("test", total=True), "a count, not a share"),
    (mlp.accuracy, measured("test", factor=100), "percent, not a share"),
)

# --- notebook 2

RANDOM_A, RANDOM_B = torch.ones(2, 5), torch.ones(4, 2)
ZERO_A, ZERO_B = torch.zeros(2, 5), torch.zeros(4, 2)
RIGHT_2 = many(
    (scaling.lora_parameters, lambda i, o, r: torch.zeros(r, i).numel() + torch.zeros(o, r).numel(), None),
    (scaling.break_even, 440.0, None),
    (scaling.break_even, torch.tensor(440), None),
    (scaling.update, lambda A, B, alpha, r: B @ A * alpha / r, None),
    (scaling.update, lambda A, B, alpha, r: torch.einsum("or,ri->oi", B, A).mul(alpha).div(r), None),
    (scaling.dead_start, (nn.Parameter(ZERO_A), RANDOM_B * 0, " B"), None),
    (scaling.dead_start, (ZERO_A, ZERO_B, "(b)"), None),
    (scaling.mixed_ranks, lambda ranks, alphas: {n: alphas[n] / ranks[n] for n in alphas}, None),
)
WRONG_2 = many(
    (scaling.lora_parameters, lambda i, o, r: i * o, "the product, not the factors"),
    (scaling.lora_parameters, lambda i, o, r: r * i * o, "multiplied where it adds"),
    (scaling.lora_parameters, lambda i, o, r: r * i, "A alone"),
    (scaling.lora_parameters, lambda i, o, r: r * o, "B alone"),
    (scaling.lora_parameters, lambda i, o, r: i + o, "rank forgotten"),
    (scaling.lora_parameters, lambda i, o, r: r * r * (i + o), "rank squared"),
    (scaling.lora_parameters, lambda i, o, r: r * (i + o) + o, "a bias counted"),
    (scaling.lora_parameters, lambda i, o, r: r * i + o, "brackets forgotten"),
    (scaling.lora_parameters, lambda i, o, r: r + i + o, "rank added, not multiplied"),
    (scaling.lora_parameters, lambda i, o, r: r * i * r * o, "the two sizes multiplied"),
    (scaling.lora_parameters, lambda i, o, r: (r * i, r * o), None),
    (scaling.break_even, [440], None),
    (scaling.break_even, 392, "half of one side"),
    (scaling.break_even, 784, "the full rank"),
    (scaling.break_even, 439, "one too low"),
    (scaling.break_even, 441, "one too high"),
    (scaling.break_even, 667, "linear2 instead"),
    (scaling.break_even, 784 * 1000 / 1784, "not a whole rank"),
    (scaling.break_even, 439.46, "not a whole rank"),
    (scaling.break_even, 446, "half the mean side"),
    (scaling.break_even, 10, None),
    (scaling.update, lambda A, B, alpha, rank: (B @ A).norm(), "one number for a matrix"),
    (scaling.update, lambda A, B, alpha, r: alpha * r * (B @ A), "α·r for α/r"),
    (scaling.update, lambda A, B, alpha, r: r / alpha * (B @ A), "r/α for α/r"),
    (scaling.update, lambda A, B, alpha, r: B @ A, "scale forgotten"),
    (scaling.update, lambda A, B, alpha, r: alpha * (B @ A), "α for α/r"),
    (scaling.update, lambda A, B, alpha, r: (B @ A) / r, "1/r for α/r"),
    (scaling.update, lambda A, B, alpha, r: alpha / r**0.5 * (B @ A), "α/√r for α/r"),
    (scaling.update, lambda A, B, alpha, r: alpha // r * (B @ A), "α//r for α/r"),
    (scaling.update, lambda A, B, alpha, r: alpha / r * (B * A), "entry by entry"),
    (scaling.update, lambda A, B, alpha, r: alpha / r * (A @ B), "A and B swapped"),
    (scaling.update, lambda A, B, alpha, r: alpha / r * (A.T @ B.T), "transposed"),
    (scaling.update, lambda A, B, alpha, r: (alpha / r * B) @ (alpha / r * A), "scaled twice"),
    (scaling.update, lambda A, B, alpha, r: torch.zeros(1000, 784) + alpha / r * (B @ A), "W added"),
    (scaling.update, lambda A, B, alpha, r: torch.zeros(1000, 784), "made from other tensors"),
    (scaling.update, lambda A, B, alpha, r: torch.zeros(4, 5), None),
    (scaling.dead_start, (RANDOM_A, ZERO_B, "b"), "only B is zero"),
    (scaling.dead_start, (ZERO_A, RANDOM_B, "b"), "only A is zero"),
    (scaling.dead_start, (RANDOM_A, RANDOM_B, "b"), "nothing is zero"),
    (scaling.dead_start, (1e-30 * RANDOM_A, 1e-30 * RANDOM_B, "b"), "nothing is zero"),
    (scaling.dead_start, (ZERO_B, ZERO_A, "b"), "A and B swapped"),
    (scaling.dead_start, (torch.zeros(2, 6), ZERO_B, "b"), None),
    (scaling.dead_start, (ZERO_A, ZERO_B, "a"), "ΔW = 0 taken for the reason"),
    (scaling.dead_start, (ZERO_A, ZERO_B, "c"), "the optimiser blamed"),
    (scaling.dead_start, (ZERO_A, ZERO_B, "d"), "the learning rate blamed"),
    (scaling.mixed_ranks, lambda ranks, alphas: {n: alphas["linear1"] / ranks[n] for n in ranks}, "one α for all layers"),
    (scaling.mixed_ranks, lambda ranks, alphas: {n: next(iter(alphas.values())) / ranks[n] for n in ranks}, "the first or smallest α for all layers"),
    (scaling.mixed_ranks, lambda ranks, alphas: {n: max(alphas.values()) / ranks[n] for n in ranks}, "the last or largest α for all layers"),
    (scaling.mixed_ranks, lambda ranks, alphas: {n: [*alphas.values()][-1] / ranks[n] for n in ranks}, "the last or largest α for all layers"),
    (scaling.mixed_ranks, lambda ranks, alphas: {n: alphas[n] / ranks["linear1"] for n in ranks}, "one rank for all layers"),
    (scaling.mixed_ranks, lambda r, a: {n: x / y for n, x, y in zip(r, a.values(), r.values())}, "matched by place, not by name"),
    (scaling.mixed_ranks, lambda ranks, alphas: {n: ranks[n] / alphas[n] for n in ranks}, "r/α for α/r"),
    (scaling.mixed_ranks, lambda ranks, alphas: {n: ranks[n] * alphas[n] for n in ranks}, "α·r for α/r"),
)

# --- notebook 3


def scaled(factor):
    return lambda self, W: W + factor(self) * (self.lora_B @ self.lora_A) if self.enabled else W


def in_place(self, weight):
    if self.enabled:
        weight += (self.alpha / self.rank) * (self.lora_B @ self.lora_A).detach()
    return weight


def freeze_then(keep):
    def freeze(net):
        net.requires_grad_(False)
        keep(net)

    return freeze


def unfreeze_by_name(net):
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("lora_A" in name or "lora_B" in name)


def freeze_known_names(net):
    for name, parameter in net.named_parameters():
        if "original" in name or "bias" in name:
            parameter.requires_grad_(False)


def freeze_by_set(net):
    free = {id(p) for module in net.modules() if isinstance(module, LoRAParametrization) for p in module.parameters()}
    for parameter in net.parameters():
        parameter.requires_grad = id(parameter) in free


def freeze_weights_only(net):
    for name, parameter in net.named_parameters():
        if name.endswith("original"):
            parameter.requires_grad_(False)


def freeze_attribute(net):
    for module in net.modules():
        module.requires_grad = isinstance(module, LoRAParametrization)


def freeze_wrong_half(net):
    for module in net.modules():
        if isinstance(module, LoRAParametrization):
            module.requires_grad_(False)


def merge_by_hand(change):
    def merge(layer):
        lora, weight = layer.parametrizations.weight[0], layer.parametrizations.weight.original.detach().clone()
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        with torch.no_grad():
            layer.weight.copy_(change(weight, lora))

    return merge


def merge_into_new_layer(layer):
    lora = layer.parametrizations.weight[0]
    new = nn.Linear(layer.in_features, layer.out_features)
    new.bias = layer.bias
    new.weight = nn.Parameter((layer.parametrizations.weight.original + lora.delta).detach())
    return new


def merge_with_another_bias(layer):
    new = merge_into_new_layer(layer)
    new.bias = nn.Parameter(torch.randn(4))
    return new


def merge_without_bias(layer):
    new = merge_into_new_layer(layer)
    nn.init.zeros_(new.bias)
    return new


def merge_but_keep(layer):
    with torch.no_grad():
        layer.parametrizations.weight.original += layer.parametrizations.weight[0].delta


def merge_into_original_twice(layer):
    merge_but_keep(layer)
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


def cached_inside(layer, batches):
    outputs = []
    for batch in batches:
        with parametrize.cached():
            outputs.append(layer(batch))
    return outputs


def one_big_batch(layer, batches):
    return list(layer(torch.cat(batches)).split([len(batch) for batch in batches]))


def half_cached(layer, batches):
    with parametrize.cached():
        first = [layer(batch) for batch in batches[:4]]
    return first + [layer(batch) for batch in batches[4:]]


A, F_, O, T = "add LoRA", "freeze the base", "make the optimiser", "train"
RIGHT_3 = many(
    (mechanics.forward, lambda self, W: W + self.delta if self.enabled else W, None),
    (mechanics.forward, lambda self, W: torch.addmm(W, self.lora_B, self.lora_A, alpha=self.scale) if self.enabled else W, None),
    (mechanics.freeze, freeze_base, None),
    (mechanics.freeze, freeze_by_set, None),
    (mechanics.order, [A, O, F_, T], None),
    (mechanics.order, [A, F_, O, T], None),
    (mechanics.merge, merge_by_hand(lambda W, lora: W + lora.delta), None),
    (mechanics.merge, merge_into_new_layer, None),
    (mechanics.compute_once, one_big_batch, None),
)
WRONG_3 = many(
    (mechanics.forward, lambda self, W: self.delta, "the update alone"),
    (mechanics.forward, scaled(lambda s: 1), "scale forgotten"),
    (mechanics.forward, scaled(lambda s: s.alpha * s.rank), "α·r for α/r"),
    (mechanics.forward, scaled(lambda s: s.rank / s.alpha), "r/α for α/r"),
    (mechanics.forward, scaled(lambda s: s.alpha), "α for α/r"),
    (mechanics.forward, lambda self, W: W, "no update"),
    (mechanics.forward, scaled(lambda s: -s.scale), "subtracted"),
    (mechanics.forward, lambda self, W: W + self.scale * (self.lora_A @ self.lora_B), "A and B swapped"),
    (mechanics.forward, lambda self, W: W + self.scale * (self.lora_A.T @ self.lora_B.T), "transposed"),
    (mechanics.forward, lambda self, W: W + self.delta, "switch ignored"),
    (mechanics.forward, in_place, "the base changed in place"),
    (mechanics.forward, lambda self, W: W + self.delta.detach() if self.enabled else W, "no gradient reaches B"),
    (mechanics.forward, scaled(lambda s: s.alpha // s.rank), "α//r for α/r"),
    (mechanics.forward, lambda self, W: W + self.scale * (self.lora_B * self.lora_A), "entry by entry"),
    (mechanics.forward, lambda self, W: self.lora_B @ self.lora_A, "BA alone"),
    (mechanics.forward, lambda self, W: W + self.delta if self.enabled else None, "nothing comes back when off"),
    (mechanics.freeze, lambda net: net.linear2.requires_grad_(False), "layers called by name"),
    (mechanics.freeze, lambda net: None, "base not frozen"),
    (mechanics.freeze, freeze_attribute, "base not frozen"),
    (mechanics.freeze, freeze_then(lambda net: None), "LoRA frozen too"),
    (mechanics.freeze, freeze_wrong_half, "the wrong half frozen"),
    (mechanics.freeze, unfreeze_by_name, "found by the text lora"),
    (mechanics.freeze, freeze_weights_only, "biases not frozen"),
    (mechanics.freeze, freeze_known_names, "a parameter overlooked"),
    (mechanics.order, [O, A, F_, T], "optimiser made too early"),
    (mechanics.order, [F_, O, A, T], "optimiser made too early"),
    (mechanics.order, [A, O, T, F_], "base not frozen"),
    (mechanics.order, [O, T, A, F_], "LoRA added after training"),
    (mechanics.order, [A, F_, T, O], "training without an optimiser"),
    (mechanics.merge, merge_by_hand(lambda W, lora: W + lora.lora_B @ lora.lora_A), "scale forgotten in the merge"),
    (mechanics.merge, lambda layer: parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False), "the adapter was lost"),
    (mechanics.merge, lambda layer: parametrize.remove_parametrizations(layer, "weight"), "the adapter was lost"),
    (mechanics.merge, merge_by_hand(lambda W, lora: lora.delta), "the update alone"),
    (mechanics.merge, merge_by_hand(lambda W, lora: W + lora.alpha * lora.rank * lora.lora_B @ lora.lora_A), "α·r for α/r"),
    (mechanics.merge, merge_by_hand(lambda W, lora: W + lora.alpha * lora.lora_B @ lora.lora_A), "α for α/r"),
    (mechanics.merge, merge_with_another_bias, "the bias was lost"),
    (mechanics.merge, merge_without_bias, "the bias was lost"),
    (mechanics.merge, merge_but_keep, "added twice"),
    (mechanics.merge, merge_into_original_twice, "added twice"),
    (mechanics.merge, lambda layer: None, "still parametrized"),
    (mechanics.merge, lambda layer: delattr(layer, "parametrizations"), "no weight is left"),
    (mechanics.compute_once, cached_inside, "the cache ends too soon"),
    (mechanics.compute_once, lambda layer, batches: [layer(batch) for batch in batches], "no cache"),
    (mechanics.compute_once, half_cached, None),
    (mechanics.compute_once, lambda layer, batches: [batch @ torch.zeros(5, 4) for batch in batches], None),
)

# --- notebook 4


def compared(equal=torch.equal, wanted=lambda name: True, layers=("linear1", "linear2", "linear3"), all_or_any=all):
    def proof(net, copies):
        return all_or_any(
            equal(p, copies[name.replace("parametrizations.weight.original", "weight")])
            for name, p in net.named_parameters()
            if "lora_" not in name and wanted(name) and name.split(".")[0] in layers
        )

    return proof


def proof_by_loop(net, copies):
    for name, copied in copies.items():
        layer, kind = name.split(".")
        layer = net.get_submodule(layer)
        now = layer.parametrizations.weight.original if kind == "weight" else layer.bias
        if not bool((now == copied).all()):
            return False
    return True


def proof_by_assert(net, copies):
    assert proof_by_loop(net, copies)
    return True


def taught(add=True, freeze=True, digit=lambda mnist: only_digit(mnist.train, 9), part="test", off=False, steps=30, early=False):
    def teach(net, mnist):
        before = evaluate(net, mnist.test)
        if add:
            add_lora(net)
        if freeze and add:
            freeze_base(net)
        if steps:
            train(net, digit(mnist), max_batches=steps, progress=False)
        if early:
            return before
        if off:
            with lora_disabled(net):
                return evaluate(net, getattr(mnist, part))
        return evaluate(net, getattr(mnist, part))

    return teach


def nothing_left_to_train(net, mnist):
    add_lora(net).requires_grad_(False)
    train(net, only_digit(mnist.train, 9), max_batches=3, progress=False)


def frozen_before_lora(net, mnist):
    add_lora(freeze_base(net))


def on_a_copy(net, mnist):
    return taught()(copy.deepcopy(net), mnist)


def by_hand(net, mnist):
    freeze_base(add_lora(net, rank=2))
    images, labels = mnist.train.tensors
    images, labels = images[labels == 9], labels[labels == 9]
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    for _ in range(5):
        loss = nn.functional.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return evaluate(net, mnist.test)


RIGHT_4 = many(
    (digit_9.unchanged, proof_by_loop, None),
    (digit_9.unchanged, compared(lambda a, b: (a == b).all()), None),
    (digit_9.recall_and_precision, lambda c, d: torch.stack([c[d, d] / c.sum(1)[d], c[d, d] / c.sum(0)[d]]), None),
    (digit_9.recall_and_precision, lambda c, d: {"recall": float(c[d, d] / c[d].sum()), "precision": float(c[d, d] / c[:, d].sum())}, None),
    (digit_9.bill, torch.tensor(587) - 447, None),
    (digit_9.adam_memory, 6794 * 2.0, None),
    (digit_9.experiment, taught(), None),
    (digit_9.experiment, by_hand, None),
)
WRONG_4 = many(
    (digit_9.unchanged, lambda net, copies: net.parameters() == copies, "a proof that nothing passes"),
    (digit_9.unchanged, proof_by_assert, "it stops instead of answering"),
    (digit_9.unchanged, lambda net, copies: True, "a proof that cannot fail"),
    (digit_9.unchanged, lambda net, copies: all(torch.equal(c, c) for c in copies.values()), "a proof that cannot fail"),
    (digit_9.unchanged, compared(wanted=lambda name: "bias" not in name), "biases not checked"),
    (digit_9.unchanged, compared(layers=("linear1", "linear2")), "not every layer checked"),
    (digit_9.unchanged, compared(wanted=lambda name: name == "linear1.bias"), "a return inside the loop"),
    (digit_9.unchanged, compared(wanted=lambda name: name == "linear3.bias"), "only the last comparison counts"),
    (digit_9.unchanged, compared(wanted=lambda name: "bias" in name), "weights not checked"),
    (digit_9.unchanged, compared(all_or_any=any), "one equal taken for all equal"),
    (digit_9.unchanged, compared(torch.allclose), "nearly equal taken for equal"),
    (digit_9.unchanged, compared(lambda a, b: bool((a.double() - b.double()).sum().abs() < 1e-9)), "differences that cancel"),
    (digit_9.unchanged, lambda net, copies: all(torch.equal(net.get_parameter(n) if "bias" in n else net.get_submodule(n[:7]).weight, c)
                                                for n, c in copies.items()), "the computed weight compared"),
    (digit_9.recall_and_precision, lambda c, d: (c[d, d] / c[:, d].sum(), c[d, d] / c[d].sum()), "recall and precision swapped"),
    (digit_9.recall_and_precision, lambda c, d: (c[d, d] / c[d].sum(), c[d, d] / c[d].sum()), "recall twice"),
    (digit_9.recall_and_precision, lambda c, d: (c[d, d] / c[:, d].sum(), c[d, d] / c[:, d].sum()), "precision twice"),
    (digit_9.recall_and_precision, lambda c, d: (c[d, d] / (c[d].sum() - c[d, d]), c[d, d] / (c[:, d].sum() - c[d, d])),
     "divided by the wrong answers"),
    (digit_9.recall_and_precision, lambda c, d: (round(float(c[d, d] / c[d].sum()), 2), round(float(c[d, d] / c[:, d].sum()), 2)), "rounded"),
    (digit_9.recall_and_precision, lambda c, d: (1 - c[d, d] / c[d].sum(), 1 - c[d, d] / c[:, d].sum()), "shares of wrong answers"),
    (digit_9.recall_and_precision, lambda c, d: (100 * c[d, d] / c[d].sum(), 100 * c[d, d] / c[:, d].sum()), "percent, not shares"),
    (digit_9.recall_and_precision, lambda c, d: (c[d, d] / c.sum(), c[d, d] / c.sum()), "shares of all images"),
    (digit_9.recall_and_precision, lambda c, d: (c[d, d], c[d, d]), "counts, not shares"),
    (digit_9.recall_and_precision, lambda c, d: (c[d, d] // c[d].sum(), c[d, d] // c[:, d].sum()), "whole division"),
    (digit_9.recall_and_precision, lambda c, d: (c[9, 9] / c[9].sum(), c[9, 9] / c[:, 9].sum()), "the digit 9 only"),
    (digit_9.bill, 368, "the gain counted as a loss"),
    (digit_9.bill, 0.014, "a share, not a count"),
    (digit_9.bill, 447, "answers before, not the change"),
    (digit_9.bill, [9, 3, 15, 39, 109, 8, 31, 26, 14, -114], None),
    (digit_9.bill, 14 - 128, "only the nine looked at"),
    (digit_9.bill, 114, "the nine's gain as a positive number"),
    (digit_9.bill, 254, "the gain left out"),
    (digit_9.bill, -140, "before and after swapped"),
    (digit_9.bill, 587, "answers after, not the change"),
    (digit_9.bill, 0, None),
    (digit_9.adam_memory, 6794, "one for each parameter"),
    (digit_9.adam_memory, 2_813_804, "the whole network"),
    (digit_9.adam_memory, 2 * 2_813_804, "frozen parameters counted"),
    (digit_9.adam_memory, 5_614_020, "full fine-tuning"),
    (digit_9.adam_memory, 20_382, "the gradient counted too"),
    (digit_9.adam_memory, 54_352, "bytes, not numbers"),
    (digit_9.experiment, taught(add=False), "no LoRA"),
    (digit_9.experiment, taught(digit=lambda mnist: mnist.train), "trained on other digits"),
    (digit_9.experiment, taught(freeze=False), "base not frozen"),
    (digit_9.experiment, taught(steps=0), "nothing was trained"),
    (digit_9.experiment, nothing_left_to_train, "A and B frozen too"),
    (digit_9.experiment, frozen_before_lora, "LoRA added too late, or never"),
    (digit_9.experiment, taught(digit=lambda mnist: only_digit(mnist.test, 9)), "trained on the test set"),
    (digit_9.experiment, taught(digit=lambda mnist: mnist.test), "trained on the test set"),
    (digit_9.experiment, taught(part="train"), "tested on the training set"),
    (digit_9.experiment, taught(off=True), "tested with LoRA off, or too early"),
    (digit_9.experiment, taught(early=True), "tested with LoRA off, or too early"),
)

# --- notebook 5


def others(result, digit):
    return (result.recall.sum() - result.recall[digit]) / 9


def harmonic(a, b):
    return 2 * a * b / (a + b)


RIGHT_5 = many(
    (your_turn.largest_rank, lambda budget: max([r for r in range(1000) if r * 6794 <= budget]), None),
    (your_turn.largest_rank, lambda budget: int(budget / 6794), None),
    (your_turn.score, lambda r, d: float(harmonic(r.recall[d], r.recall[[n for n in range(10) if n != d]].mean())), None),
    (your_turn.add_adapters, lambda A1, B1, A2, B2: [torch.cat([A2, A1]), torch.cat([B2, B1], 1)], None),
    (your_turn.adapter_bytes, lambda rank: sum(p.numel() * p.element_size() for n, p in add_lora(RichBoyNet(), rank=rank)
                                               .named_parameters() if "lora_" in n), None),
)
WRONG_5 = many(
    (your_turn.largest_rank, lambda budget: budget // 6794 + 1, "over the budget"),
    (your_turn.largest_rank, lambda budget: budget / 6794, "not a whole rank"),
    (your_turn.largest_rank, lambda budget: (budget - 2_807_010) // 6794, "the base counted"),
    (your_turn.largest_rank, lambda budget: budget // 1784, "only one layer counted"),
    (your_turn.largest_rank, lambda budget: 7, None),
    (your_turn.score, lambda r, d: r.recall[d], "only the taught digit"),
    (your_turn.score, others, "only what was kept"),
    (your_turn.score, lambda r, d: min(r.recall[d], others(r, d)), "the smaller of the two"),
    (your_turn.score, lambda r, d: r.recall[d] * others(r, d), "the product"),
    (your_turn.score, lambda r, d: (r.recall[d] * others(r, d)).sqrt(), "the geometric mean"),
    (your_turn.score, lambda r, d: harmonic(r.recall[d], others(r, d)) / 2, "the 2 forgotten"),
    (your_turn.score, lambda r, d: 2 * r.recall[d] * others(r, d) / r.recall[d] + others(r, d), "brackets forgotten"),
    (your_turn.score, lambda r, d: harmonic(r.recall[d], 0.9 * others(r, d)), "divided by ten, not nine"),
    (your_turn.score, lambda r, d: 100 * harmonic(r.recall[d], others(r, d)), "percent, not a share"),
    (your_turn.score, lambda r, d: round(float(harmonic(r.recall[d], others(r, d))), 3), "rounded"),
    (your_turn.score, lambda r, d: harmonic(r.recall[d], 9 * others(r, d)), "a sum for the mean of nine"),
    (your_turn.score, lambda r, d: harmonic(r.recall[d], r.precision[d]), "the others left out"),
    (your_turn.score, lambda r, d: r.accuracy, "accuracy"),
    (your_turn.score, lambda r, d: (r.recall[d] + others(r, d)) / 2, "a plain mean"),
    (your_turn.score, lambda r, d: r.precision[d], "precision for recall"),
    (your_turn.score, lambda r, d: r.recall.mean(), "all ten recalled alike"),
    (your_turn.score, lambda r, d: harmonic(r.recall[d], r.recall.mean()), "the digit counted among the others"),
    (your_turn.score, lambda r, d: harmonic(r.recall[9], others(r, 9)), None),
    (your_turn.add_adapters, lambda A1, B1, A2, B2: (torch.eye(A1.shape[1]), B1 @ A1 + B2 @ A2), "a larger rank than needed"),
    (your_turn.add_adapters, lambda A1, B1, A2, B2: (A1 + A2, B1 + B2), "A and B added apart"),
    (your_turn.add_adapters, lambda A1, B1, A2, B2: ((A1 + A2) / 2, (B1 + B2) / 2), "A and B averaged apart"),
    (your_turn.add_adapters, lambda A1, B1, A2, B2: (torch.cat([A1, A2]), torch.cat([B2, B1], 1)), "stacked in two orders"),
    (your_turn.add_adapters, lambda A1, B1, A2, B2: (A1, B1), "only one of them"),
    (your_turn.add_adapters, lambda A1, B1, A2, B2: (torch.cat([A1, A2]), torch.cat([B1, B2], 1) / 2), "halved"),
    (your_turn.add_adapters, lambda A1, B1, A2, B2: (torch.cat([A1, A2], 1), torch.cat([B1, B2], 0)), "stacked along the wrong side"),
    (your_turn.add_adapters, lambda A1, B1, A2, B2: (torch.cat([B1, B2], 1), torch.cat([A1, A2])), "A and B swapped"),
    (your_turn.adapter_bytes, lambda rank: 6794 * rank, "numbers, not bytes"),
    (your_turn.adapter_bytes, lambda rank: 32 * 6794 * rank, "bits"),
    (your_turn.adapter_bytes, lambda rank: 4 * (2_807_010 + 6794 * rank), "the whole network"),
    (your_turn.adapter_bytes, lambda rank: 4 * 2_807_010, "the base instead"),
    (your_turn.adapter_bytes, lambda rank: 4 * 1784 * rank, "one layer of three"),
    (your_turn.adapter_bytes, lambda rank: 4 * 6794 * rank / 1024, "kilobytes"),
    (your_turn.adapter_bytes, lambda rank: 8 * 6794 * rank, "double precision"),
    (your_turn.adapter_bytes, lambda rank: 4 * 6794, "rank forgotten"),
    (your_turn.adapter_bytes, lambda rank: 4 * 6794 * rank * rank, "rank squared"),
    (your_turn.adapter_bytes, lambda rank: 2 * 6794 * rank, "half precision"),
)


@pytest.mark.parametrize("e, answers, _", RIGHT_1 + RIGHT_2 + RIGHT_3 + RIGHT_4 + RIGHT_5)
def test_a_right_answer_written_differently_is_right(e, answers, _):
    assert e.check(*answers).state == "right", e.check(*answers)


@pytest.mark.parametrize("e, answers, misconception", WRONG_1 + WRONG_2 + WRONG_3 + WRONG_4 + WRONG_5)
def test_each_misconception_has_its_own_reply(e, answers, misconception):
    verdict = e.check(*answers)
    assert verdict.state == "wrong", verdict
    assert verdict.misconception == misconception, verdict
    assert len(verdict.words) > 10 and "Traceback" not in verdict.words


def test_no_misconception_is_without_a_test():
    tested = {(p.values[0].__name__, p.values[2]) for p in WRONG_1 + WRONG_2 + WRONG_3 + WRONG_4 + WRONG_5}
    for module in MODULES:
        for name, e in vars(module).items():
            if isinstance(e, Exercise) and e.__module__ == module.__name__:
                source = inspect.getsource(e._judge)
                if name == "update":
                    source += inspect.getsource(scaling._judge_update)
                named = re.findall(r'^ +"([^"]{4,50})": \(', source, re.M) + re.findall(r'Wrong\(\s*"([^"]+)"', source)
                for misconception in named:
                    assert (name, misconception) in tested, (name, misconception)


# --- predictions, quiz, preflight, projector


def test_a_number_is_guessed_kept_and_revealed():
    question = PredictNumber("How many nines are wrong?", 0, 200)
    assert question.guess is None
    assert repr(question.reveal(12)) == "measured: 12."
    question.slider.set_state({"value": 40})  # the path a move in the browser takes
    assert question.field.value == question.guess == 40
    question.button.click()
    assert question.kept and question.field.disabled and question.slider.disabled
    question.field.value = 12
    assert question.guess == 40, "hindsight does not count"
    assert repr(question.reveal(12)) == "your guess: 40 · measured: 12. Too high by 28."
    assert repr(question.reveal(41, "Nearly all.")).endswith("Close. Nearly all.")
    assert "width: 30%" in question.reveal(12)._repr_html_()


def test_the_lowest_number_can_be_meant():
    question = PredictNumber("How many?", 0.0, 1.0, step=0.01)
    question.button.click()
    assert question.kept and question.guess == 0
    assert repr(question.reveal(0.0)) == "your guess: 0.0 · measured: 0.0. Close."
    assert "measured: nan" in repr(question.reveal(float("nan"))) and question.reveal(float("nan"))._repr_html_()


def test_a_choice_is_guessed_and_revealed():
    question = PredictChoice("Which layer is largest?", ["linear1", "linear2"])
    question.button.click()
    assert not question.kept and "skip" in question._status.value
    question.radio.value = "linear1"
    assert repr(question.reveal("linear2")).startswith("your guess: linear1 · measured: linear2. A surprise")
    question.radio.value = "linear2"
    assert "You had it" in repr(question.reveal("linear2"))


def test_a_ranking_needs_each_item_once():
    question = PredictRanking("Which pays most?", [4, 7, 0])
    for place, item in zip(question.places, ("4", "4", "0")):
        place.value = item
    assert question.guess is None and "two places" in question._status.value
    question.places[1].value = "7"
    assert question.guess == ("4", "7", "0")
    assert repr(question.reveal([4, 0, 7])) == "your guess: 4 > 7 > 0 · measured: 4 > 0 > 7. 1 of 3 in their place."


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__.split(".")[-1])
def test_a_quiz_answers_each_choice_and_counts_first_tries(module):
    quiz = module.quiz()
    assert len(quiz.radios) >= 3
    for number, (radio, question) in enumerate(zip(quiz.radios, quiz._questions)):
        assert len(set(question.replies.values())) == len(question.replies)
        for index, choice in enumerate(question.replies):
            radio.set_state({"index": index})
            assert question.replies[choice] in quiz.answers[number]
            assert quiz.answers[number].startswith("✔" if choice == question.right else "✘")
    expected = sum(next(iter(q.replies)) == q.right for q in quiz._questions)
    assert quiz.score == expected and f"{expected} of {len(quiz.radios)}" in quiz._total.value
    assert expected < len(quiz.radios), "the right answer is not always the first"


def test_where_no_widget_runs_words_stand_in():
    for widget, words in ((PredictChoice("Which?", ["this <b>", "that"]), "this &lt;b&gt;"), (mlp.quiz(), "<summary>Answer"),
                          (PredictNumber("How many?", 0, 9), "from 0 to 9"), (PredictRanking("Who?", ["a", "b"]), "a, b")):  # fmt: skip
        data = widget._repr_mimebundle_()
        assert "application/vnd.jupyter.widget-view+json" in data and words in data["text/html"]
        assert data["text/plain"] == repr(widget) and len(repr(widget)) < 120


def test_a_question_without_its_right_answer_is_refused():
    with pytest.raises(ValueError, match="not among"):
        Question("?", "c", {"a": "", "b": ""})


def test_preflight_says_ready_and_the_tick_is_answered():
    state = torch.get_rng_state()
    result = preflight()
    assert torch.equal(torch.get_rng_state(), state)
    # Widgets and packages are there; speed depends on the machine, so its verdict is not asserted.
    found = {check.what: check for check in result.checks}
    assert found["versions"].state == "good" and f"torch {torch.__version__.split('+')[0]}" in found["versions"].found
    assert "3,000 training" in found["digits"].found and found["base network"].state == found["widgets"].state == "good"
    assert repr(result).endswith(result.verdict) and result.verdict in result._repr_mimebundle_()["text/html"]
    result.box.value = True
    assert "Yes, widgets run" in result._answer.value


def test_preflight_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_MNIST", "full")
    monkeypatch.setattr("lora_helpers.data.DOWNLOAD_TIMEOUT", 0.1)
    monkeypatch.setenv("LORA_MNIST_ROOT", str(tmp_path / "nothing"))
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", ["http://127.0.0.1:9/"])
    versions = {"torch": "2.0.0"}
    real = preflight_module.importlib.metadata.version
    monkeypatch.setattr(preflight_module.importlib.metadata, "version", lambda name: versions.get(name) or real(name))
    monkeypatch.setattr(preflight_module, "jupyter_path", lambda: [str(tmp_path)])
    result = preflight()
    assert not result.ready and result.verdict.startswith("Not ready.")
    for words in ("Install again", "Unset LORA_MNIST", "Install ipywidgets"):
        assert words in result.verdict
    assert [check.state for check in result.checks].count("look here") == 3 and "✘ look here" in result._table()
    assert "torch is 2.0.0, needed is" in repr(result)


def test_a_slow_machine_is_ready_and_told_what_to_do(monkeypatch):
    monkeypatch.setattr(preflight_module, "SLOW", 0.0)
    result = preflight()
    assert result.ready and result.verdict.startswith("Ready, but slow here. Close what else runs") and "TEACHING.md" in result.verdict
    assert "slow, but works" in repr(result) and "◐ slow, but works" in result._table()


def test_a_base_that_is_not_cached_is_no_obstacle(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_CACHE", str(tmp_path))
    result = preflight()
    found = {check.what: check for check in result.checks}["base network"]
    assert result.ready and found.state == "good" and "to be trained" in found.found and not list(tmp_path.iterdir())
    monkeypatch.setattr(preflight_module, "_writable", lambda folder: False)
    found = preflight_module._base(cached=False)
    assert found.state == "slow, but works" and "LORA_CACHE" in found.advice


def test_large_type_and_back(capsys):
    picture = plot_losses([2.0, 1.0, 0.5])
    usual = picture.png()
    try:
        projector_mode()
        assert picture.png() != usual
        sizes = [text.get_fontsize() for text in picture.findobj(Text)]
    finally:
        projector_mode(False)
    assert picture.png() == usual and sizes == [text.get_fontsize() for text in picture.findobj(Text)]
    with pytest.raises(TypeError, match="True or False"):
        projector_mode("on")


@pytest.mark.parametrize("wrong", [{"digit": "5"}, {"budget": (30, 0)}, {"share": 50}, {"share": -0.1}, {"share": 1.0}, {"batches": 0}])
def test_the_settings_of_the_project_are_checked(wrong):
    good = {"digit": 5, "budget": 30_000, "batches": 100, "share": 0.0}
    your_turn.check_settings(**good)
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is .*must be"):
        your_turn.check_settings(**good | wrong)
