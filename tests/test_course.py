"""The course without a browser: exercises, guesses, quizzes, the preflight and the look for a projector."""

import copy
import importlib.metadata
import sys
import warnings

import pytest
import torch
from matplotlib.text import Text
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.data import TensorDataset

from lora_helpers import preflight, projector_mode
from lora_helpers.course import ex1_mlp as ex1
from lora_helpers.course import ex2_scaling_math as ex2
from lora_helpers.course import ex3_parametrization as ex3
from lora_helpers.course import ex4_digit_9 as ex4
from lora_helpers.course import ex5_your_turn as ex5
from lora_helpers.course import preflight as preflight_module
from lora_helpers.course.exercise import RIGHT, UNCHECKABLE, Exercise, exercise
from lora_helpers.course.predict import PredictChoice, PredictNumber, PredictRanking
from lora_helpers.course.quiz import Question
from lora_helpers.data import only_digit
from lora_helpers.lora import LoRAParametrization, add_lora, count_parameters, freeze_base, lora_disabled
from lora_helpers.model import RichBoyNet
from lora_helpers.plots import plot_losses
from lora_helpers.training import Evaluation, evaluate, train

MODULES = {"ex1": ex1, "ex2": ex2, "ex3": ex3, "ex4": ex4, "ex5": ex5}
EXERCISES = {
    f"{notebook}.{name}": e
    for notebook, module in MODULES.items()
    for name, e in vars(module).items()
    if isinstance(e, Exercise)
}
each_exercise = pytest.mark.parametrize("e", EXERCISES.values(), ids=EXERCISES)

# --- answers that learners give, and what the check must make of them; first the longer ones


def measured(part="test", labels="test", answer=lambda logits: logits.argmax(dim=1), share=torch.mean):
    def accuracy(net, mnist):
        hits = answer(net(getattr(mnist, part).tensors[0])) == getattr(mnist, labels).tensors[1]
        return share(hits.float())

    return accuracy


def best_image(net, mnist):
    return (net(mnist.test.tensors[0]).argmax(dim=0) == mnist.test.tensors[1]).float().mean()


def scaled(factor):
    return lambda self, W: W + factor(self) * (self.lora_B @ self.lora_A) if self.enabled else W


def in_place(self, weight):
    if self.enabled:
        weight += (self.alpha / self.rank) * (self.lora_B @ self.lora_A).detach()
    return weight


def freeze_by(keep):
    def freeze(net):
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(keep(name))

    return freeze


def keep_parametrized(value):
    return lambda layer: parametrize.remove_parametrizations(layer, "weight", leave_parametrized=value)


def merge_by_hand(change):
    def merge(layer):
        lora, weight = (
            layer.parametrizations.weight[0],
            layer.parametrizations.weight.original.detach().clone(),
        )
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        with torch.no_grad():
            layer.weight.copy_(change(weight, lora))

    return merge


def merge_into_new_layer(change_bias=lambda bias: bias):
    def merge(layer):
        new = nn.Linear(layer.in_features, layer.out_features)
        new.bias = nn.Parameter(change_bias(layer.bias.detach()))
        new.weight = nn.Parameter(
            (layer.parametrizations.weight.original + layer.parametrizations.weight[0].delta).detach()
        )
        return new

    return merge


def merge_but_keep(layer):
    with torch.no_grad():
        layer.parametrizations.weight.original += layer.parametrizations.weight[0].delta


def merge_twice(layer):
    merge_but_keep(layer)
    keep_parametrized(True)(layer)


def cached_inside(layer, batches):
    outputs = []
    for batch in batches:
        with parametrize.cached():
            outputs.append(layer(batch))
    return outputs


def one_big_batch(layer, batches):
    return list(layer(torch.cat(batches)).split([len(batch) for batch in batches]))


def compared(equal=torch.equal, wanted=lambda name: True, all_or_any=all):
    def proof(net, copies):
        return all_or_any(
            equal(p, copies[name.replace("parametrizations.weight.original", "weight")])
            for name, p in net.named_parameters()
            if "lora_" not in name and wanted(name)
        )

    return proof


def proof_by_assert(net, copies):
    assert compared()(net, copies)
    return True


def computed_weights(net, copies):
    layers = (name.split(".") for name in copies)
    return all(torch.equal(getattr(net.get_submodule(n), kind), copies[f"{n}.{kind}"]) for n, kind in layers)


def shares(share=lambda right, whole: right / whole):
    return lambda c, d: [share(c[d, d], whole.sum()) for whole in (c[d], c[:, d])]


def unchanged(net):
    return net


def taught(add=add_lora, freeze=freeze_base, lesson=lambda mnist: only_digit(mnist.train, 9), test=evaluate):
    def teach(net, mnist):
        freeze(add(net))
        train(net, lesson(mnist), max_batches=30, progress=False)
        return test(net, mnist.test)

    return teach


def without_lora(net, dataset):
    with lora_disabled(net):
        return evaluate(net, dataset)


def before_training(net, mnist):
    before = evaluate(net, mnist.test)
    taught()(net, mnist)
    return before


def taught_by_hand(net, mnist):
    freeze_base(add_lora(net, rank=2))
    images, labels = only_digit(mnist.train, 9).tensors
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    for _ in range(5):
        loss = nn.functional.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return evaluate(net, mnist.test)


def others(result, digit):
    return (result.recall.sum() - result.recall[digit]) / 9


def harmonic(a, b):
    return 2 * a * b / (a + b)


def stacked(A1, B1, A2, B2):
    return torch.cat([A1, A2]), torch.cat([B1, B2], 1)


ONE_A, ONE_B = torch.ones(2, 5), torch.ones(4, 2)
ZERO_A, ZERO_B = torch.zeros(2, 5), torch.zeros(4, 2)
ADD, FREEZE, MAKE, TRAIN = "add LoRA", "freeze the base", "make the optimiser", "train"
# By exercise: RIGHT, or the misconception that must be named, or None if no name fits; and the answer.
ANSWERS = {
    ex1.all_but: [
        (RIGHT, lambda labels, digit: (labels != digit).nonzero().flatten()),
        (RIGHT, lambda labels, digit: torch.tensor([int(label) != digit for label in labels])),
        (RIGHT, lambda labels, digit: labels.sub_(digit) != 0),
        (RIGHT, lambda labels, digit: torch.where(labels != digit)),
        ("the mask is used already", lambda labels, digit: torch.zeros(2)[labels != digit]),
        ("it keeps what it should leave out", lambda labels, digit: labels == digit),
        ("labels instead of places", lambda labels, digit: labels[labels != digit]),
        ("0 and 1 for False and True", lambda labels, digit: (labels != digit).long()),
        ("one answer for all", lambda labels, digit: labels is not digit),
        ("one answer for all", lambda labels, digit: labels != str(digit)),
        ("places in a column", lambda labels, digit: (labels != digit).nonzero()),
        (None, lambda labels, digit: labels != 9),
    ],
    ex1.layer_parameters: [
        (RIGHT, lambda i, o: sum(p.numel() for p in nn.Linear(i, o).parameters())),
        (RIGHT, lambda i, o: torch.tensor((i + 1) * o)),
        ("bias forgotten", lambda i, o: i * o),
        ("one bias for each input", lambda i, o: i * o + i),
        ("one bias for the whole layer", lambda i, o: i * o + 1),
        ("sides added, not multiplied", lambda i, o: i + o),
        ("a bias for each side", lambda i, o: i * o + i + o),
        ("one layer for all", lambda i, o: 785_000),
        (None, lambda i, o: 18),
    ],
    ex1.accuracy: [
        (RIGHT, lambda net, mnist: sum(int(net(i[None]).argmax()) == int(n) for i, n in mnist.test) / 40),
        (RIGHT, lambda net, mnist: evaluate(net, mnist.test).accuracy),
        ("tested on the training set", measured("train", "train")),
        ("the best of the images, not of the logits", best_image),
        ("all ten logits compared", measured(answer=lambda logits: logits)),
        ("one answer for all images", measured(answer=torch.argmax)),
        ("images and labels of different sets", measured("train")),
        ("wrong answers instead of right ones", measured(share=lambda hits: 1 - hits.mean())),
        ("a count, not a share", measured(share=torch.sum)),
        ("percent, not a share", measured(share=lambda hits: 100 * hits.mean())),
    ],
    ex1.wrong_per_digit: [
        (RIGHT, lambda c: c.clone().fill_diagonal_(0).sum(dim=1)),
        (RIGHT, lambda c: [int(c[d].sum() - c[d, d]) for d in range(10)]),
        (RIGHT, lambda c: c[..., :].sum(dim=1) - c.diagonal()),
        ("rows and columns swapped", lambda c: c.sum(0) - c.diagonal()),
        ("right answers counted", lambda c: c.diagonal()),
        ("right answers not taken away", lambda c: c.sum(1)),
        ("a share, not a count", lambda c: (c.sum(1) - c.diagonal()) / c.sum(1)),
        ("one sum for all", lambda c: c.sum() - c.trace()),
        ("subtracted the wrong way round", lambda c: c.diagonal() - c.sum(1)),
        ("calls counted", lambda c: c.sum(0)),
        ("the whole matrix added up", lambda c: c.sum() - c.diagonal()),
        ("a return inside the loop", lambda c: c[0].sum() - c[0, 0]),
    ],
    ex1.keep_copies: [
        (RIGHT, lambda net: copy.deepcopy(net.state_dict())),
        (RIGHT, lambda net: {n: torch.tensor(p.tolist()) for n, p in net.named_parameters()}),
        ("no memory of its own", lambda net: net.state_dict()),
        ("biases left out", lambda net: {n: p for n, p in net.named_parameters() if "weight" in n}),
        ("a return inside the loop", lambda net: {"linear1.weight": net.linear1.weight.detach().clone()}),
        ("still part of the graph", lambda net: {n: p.clone() for n, p in net.named_parameters()}),
        (None, lambda net: {"linear1.bias": net.linear1.bias}),
    ],
    ex2.lora_parameters: [
        (RIGHT, lambda i, o, r: torch.zeros(r, i).numel() + torch.zeros(o, r).numel()),
        ("the product, not the factors", lambda i, o, r: i * o),
        ("multiplied where it adds", lambda i, o, r: r * i * o),
        ("A alone", lambda i, o, r: r * i),
        ("B alone", lambda i, o, r: r * o),
        ("rank forgotten", lambda i, o, r: i + o),
        ("rank squared", lambda i, o, r: r * r * (i + o)),
        ("a bias counted", lambda i, o, r: r * (i + o) + o),
        ("brackets forgotten", lambda i, o, r: r * i + o),
        ("rank added, not multiplied", lambda i, o, r: r + i + o),
        ("the two sizes multiplied", lambda i, o, r: r * i * r * o),
    ],
    ex2.break_even: [
        (RIGHT, 440.0),
        (RIGHT, torch.tensor(440)),
        ("half of one side", 392),
        ("the full rank", 784),
        ("one too low", 439),
        ("one too high", 441),
        ("linear2 instead", 667),
        ("not a whole rank", 439.46),
        ("half the mean side", 446),
        (None, 10),
    ],
    ex2.update: [
        (RIGHT, lambda A, B, alpha, r: B @ A * alpha / r),
        (RIGHT, lambda A, B, alpha, r: torch.einsum("or,ri->oi", B, A).mul(alpha).div(r)),
        ("one number for a matrix", lambda A, B, alpha, r: (B @ A).norm()),
        ("α·r for α/r", lambda A, B, alpha, r: alpha * r * (B @ A)),
        ("r/α for α/r", lambda A, B, alpha, r: r / alpha * (B @ A)),
        ("scale forgotten", lambda A, B, alpha, r: B @ A),
        ("α for α/r", lambda A, B, alpha, r: alpha * (B @ A)),
        ("1/r for α/r", lambda A, B, alpha, r: (B @ A) / r),
        ("α/√r for α/r", lambda A, B, alpha, r: alpha / r**0.5 * (B @ A)),
        ("α//r for α/r", lambda A, B, alpha, r: alpha // r * (B @ A)),
        ("scaled twice", lambda A, B, alpha, r: (alpha / r * B) @ (alpha / r * A)),
        ("entry by entry", lambda A, B, alpha, r: alpha / r * (B * A)),
        ("A and B swapped", lambda A, B, alpha, r: alpha / r * (A @ B)),
        ("transposed", lambda A, B, alpha, r: alpha / r * (A.T @ B.T)),
        ("W added", lambda A, B, alpha, r: torch.zeros(1000, 784) + alpha / r * (B @ A)),
        ("made from other tensors", lambda A, B, alpha, r: torch.zeros(1000, 784)),
        (None, lambda A, B, alpha, r: torch.zeros(4, 5)),
    ],
    ex2.mixed_ranks: [
        (RIGHT, lambda r, a: {n: a[n] / r[n] for n in a}),
        ("one α for all layers", lambda r, a: {n: a["linear1"] / r[n] for n in r}),
        ("the first or smallest α for all layers", lambda r, a: {n: [*a.values()][0] / r[n] for n in r}),
        ("the last or largest α for all layers", lambda r, a: {n: max(a.values()) / r[n] for n in r}),
        ("the last or largest α for all layers", lambda r, a: {n: [*a.values()][-1] / r[n] for n in r}),
        ("one rank for all layers", lambda r, a: {n: a[n] / r["linear1"] for n in r}),
        ("matched by place, not by name", lambda r, a: {n: x / r[n] for n, x in zip(r, a.values())}),
        ("r/α for α/r", lambda r, a: {n: r[n] / a[n] for n in r}),
        ("α·r for α/r", lambda r, a: {n: r[n] * a[n] for n in r}),
    ],
    ex2.dead_start: [
        (RIGHT, (nn.Parameter(ZERO_A), ONE_B * 0, " B")),
        (RIGHT, (ZERO_A, ZERO_B, "(b)")),
        ("only B is zero", (ONE_A, ZERO_B, "b")),
        ("only A is zero", (ZERO_A, ONE_B, "b")),
        ("nothing is zero", (ONE_A, ONE_B, "b")),
        ("nothing is zero", (1e-30 * ONE_A, 1e-30 * ONE_B, "b")),
        ("A and B swapped", (ZERO_B, ZERO_A, "b")),
        ("ΔW = 0 taken for the reason", (ZERO_A, ZERO_B, "a")),
        ("the optimiser blamed", (ZERO_A, ZERO_B, "c")),
        ("the learning rate blamed", (ZERO_A, ZERO_B, "d")),
        (None, (torch.zeros(2, 6), ZERO_B, "b")),
    ],
    ex3.forward: [
        (RIGHT, lambda s, W: torch.addmm(W, s.lora_B, s.lora_A, alpha=s.alpha / s.rank) if s.enabled else W),
        ("a ready-made part", lambda self, W: W + self.delta if self.enabled else W),
        ("the update alone", lambda self, W: self.delta),
        ("scale forgotten", scaled(lambda s: 1)),
        ("α·r for α/r", scaled(lambda s: s.alpha * s.rank)),
        ("r/α for α/r", scaled(lambda s: s.rank / s.alpha)),
        ("α for α/r", scaled(lambda s: s.alpha)),
        ("α//r for α/r", scaled(lambda s: s.alpha // s.rank)),
        ("no update", lambda self, W: W),
        ("BA alone", lambda self, W: self.lora_B @ self.lora_A),
        ("subtracted", scaled(lambda s: -s.scale)),
        ("A and B swapped", lambda self, W: W + self.scale * (self.lora_A @ self.lora_B)),
        ("transposed", lambda self, W: W + self.scale * (self.lora_A.T @ self.lora_B.T)),
        ("entry by entry", lambda self, W: W + self.scale * (self.lora_B * self.lora_A)),
        ("switch ignored", lambda self, W: W + self.delta),
        ("nothing comes back when off", lambda self, W: W + self.delta if self.enabled else None),
        ("the base changed in place", in_place),
        ("no gradient reaches B", lambda self, W: W + self.delta.detach() if self.enabled else W),
    ],
    ex3.freeze: [
        (RIGHT, freeze_base),
        ("layers called by name", lambda net: net.linear2.requires_grad_(False)),
        ("base not frozen", lambda net: None),
        ("base not frozen", lambda net: setattr(net, "requires_grad", False)),
        ("LoRA frozen too", freeze_by(lambda name: False)),
        ("the wrong half frozen", freeze_by(lambda name: "weight.0.lora" not in name)),
        ("found by the text lora", freeze_by(lambda name: "lora_A" in name or "lora_B" in name)),
        ("biases not frozen", freeze_by(lambda name: not name.endswith("original"))),
        ("a parameter overlooked", freeze_by(lambda name: "original" not in name and "bias" not in name)),
        (None, freeze_by(lambda name: "linear1" in name)),
    ],
    ex3.compute_once: [
        (RIGHT, one_big_batch),
        ("the cache ends too soon", cached_inside),
        ("no cache", lambda layer, batches: [layer(batch) for batch in batches]),
        (None, lambda layer, batches: one_big_batch(layer, batches[:4]) + one_big_batch(layer, batches[4:])),
        (None, lambda layer, batches: [batch @ torch.zeros(5, 4) for batch in batches]),
    ],
    ex3.merge: [
        (RIGHT, merge_by_hand(lambda W, lora: W + lora.delta)),
        (RIGHT, merge_into_new_layer()),
        ("scale forgotten in the merge", merge_by_hand(lambda W, lora: W + lora.lora_B @ lora.lora_A)),
        ("the adapter was lost", keep_parametrized(False)),
        ("merged while LoRA was off", keep_parametrized(True)),
        ("the update alone", merge_by_hand(lambda W, lora: lora.delta)),
        ("α·r for α/r", merge_by_hand(lambda W, lora: W + lora.rank**2 * lora.delta)),
        ("α for α/r", merge_by_hand(lambda W, lora: W + lora.rank * lora.delta)),
        ("the bias was lost", merge_into_new_layer(torch.randn_like)),
        ("the bias was lost", merge_into_new_layer(torch.zeros_like)),
        ("added twice", merge_but_keep),
        ("added twice", merge_twice),
        ("still parametrized", lambda layer: None),
        ("no weight is left", lambda layer: delattr(layer, "parametrizations")),
    ],
    ex3.order: [
        (RIGHT, [ADD, MAKE, FREEZE, TRAIN]),
        (RIGHT, [FREEZE, ADD, MAKE, TRAIN]),
        ("optimiser made too early", [MAKE, ADD, FREEZE, TRAIN]),
        ("optimiser made too early", [FREEZE, MAKE, ADD, TRAIN]),
        ("base not frozen", [ADD, MAKE, TRAIN, FREEZE]),
        ("LoRA added after training", [MAKE, TRAIN, ADD, FREEZE]),
        ("training without an optimiser", [ADD, FREEZE, TRAIN, MAKE]),
    ],
    ex4.adam_memory: [
        (RIGHT, 6794 * 2.0),
        ("one for each parameter", 6794),
        ("the whole network", 2_813_804),
        ("frozen parameters counted", 2 * 2_813_804),
        ("full fine-tuning", 5_614_020),
        ("the gradient counted too", 20_382),
        ("bytes, not numbers", 54_352),
    ],
    ex4.unchanged: [
        (RIGHT, compared(lambda a, b: (a == b).all())),
        ("a proof that nothing passes", lambda net, copies: net.parameters() == copies),
        ("it stops instead of answering", proof_by_assert),
        ("a proof that cannot fail", lambda net, copies: True),
        ("a proof that cannot fail", lambda net, copies: all(torch.equal(c, c) for c in copies.values())),
        ("biases not checked", compared(wanted=lambda name: "bias" not in name)),
        ("not every layer checked", compared(wanted=lambda name: "linear3" not in name)),
        ("a return inside the loop", compared(wanted=lambda name: name == "linear1.bias")),
        ("only the last comparison counts", compared(wanted=lambda name: name == "linear3.bias")),
        ("weights not checked", compared(wanted=lambda name: "bias" in name)),
        ("one equal taken for all equal", compared(all_or_any=any)),
        ("nearly equal taken for equal", compared(torch.allclose)),
        ("differences that cancel", compared(lambda a, b: bool((a.double() - b).sum().abs() < 1e-9))),
        ("the computed weight compared", computed_weights),
    ],
    ex4.recall_and_precision: [
        (RIGHT, lambda c, d: torch.stack(shares()(c, d))),
        (RIGHT, lambda c, d: dict(zip(("recall", "precision"), shares()(c, d)))),
        ("recall and precision swapped", lambda c, d: shares()(c, d)[::-1]),
        ("recall twice", lambda c, d: shares()(c, d)[:1] * 2),
        ("precision twice", lambda c, d: shares()(c, d)[1:] * 2),
        ("divided by the wrong answers", shares(lambda right, whole: right / (whole - right))),
        ("rounded", shares(lambda right, whole: round(float(right / whole), 2))),
        ("shares of wrong answers", shares(lambda right, whole: 1 - right / whole)),
        ("percent, not shares", shares(lambda right, whole: 100 * right / whole)),
        ("shares of all images", lambda c, d: [c[d, d] / c.sum()] * 2),
        ("counts, not shares", shares(lambda right, whole: right)),
        ("whole division", shares(lambda right, whole: right // whole)),
        ("the digit 9 only", lambda c, d: shares()(c, 9)),
    ],
    ex4.bill: [
        (RIGHT, torch.tensor(587) - 447),
        ("the gain counted as a loss", 368),
        ("a share, not a count", 0.014),
        ("answers before, not the change", 447),
        ("answers after, not the change", 587),
        ("only the nine looked at", 14 - 128),
        ("the nine's gain as a positive number", 114),
        ("the gain left out", 254),
        ("before and after swapped", -140),
        (None, [9, 3, 15, 39, 109, 8, 31, 26, 14, -114]),
        (None, 0),
    ],
    ex4.experiment: [
        (RIGHT, taught()),
        (RIGHT, taught_by_hand),
        ("no LoRA", taught(add=unchanged, freeze=unchanged)),
        ("trained on other digits", taught(lesson=lambda mnist: mnist.train)),
        ("base not frozen", taught(freeze=unchanged)),
        ("nothing was trained", lambda net, mnist: evaluate(freeze_base(add_lora(net)), mnist.test)),
        ("A and B frozen too", taught(freeze=lambda net: net.requires_grad_(False))),
        ("LoRA added too late, or never", taught(add=unchanged)),
        ("trained on the test set", taught(lesson=lambda mnist: only_digit(mnist.test, 9))),
        ("tested on the training set", lambda net, m: [taught()(net, m), evaluate(net, m.train)][1]),
        ("tested with LoRA off, or too early", taught(test=without_lora)),
        ("tested with LoRA off, or too early", before_training),
    ],
    ex5.largest_rank: [
        (RIGHT, lambda budget: max([r for r in range(100) if r * 6794 <= budget])),
        ("over the budget", lambda budget: budget // 6794 + 1),
        ("not a whole rank", lambda budget: budget / 6794),
        ("the base counted", lambda budget: (budget - 2_807_010) // 6794),
        ("only one layer counted", lambda budget: budget // 1784),
        ("a comma within a number", lambda budget: (budget // 6, 794)),
        (None, lambda budget: 7),
    ],
    ex5.score: [
        (RIGHT, lambda r, d: float(harmonic(r.recall[d], r.recall[[n for n in range(10) if n != d]].mean()))),
        ("only the taught digit", lambda r, d: r.recall[d]),
        ("only what was kept", others),
        ("the smaller of the two", lambda r, d: min(r.recall[d], others(r, d))),
        ("the product", lambda r, d: r.recall[d] * others(r, d)),
        ("the geometric mean", lambda r, d: (r.recall[d] * others(r, d)).sqrt()),
        ("the 2 forgotten", lambda r, d: harmonic(r.recall[d], others(r, d)) / 2),
        ("brackets forgotten", lambda r, d: 2 * r.recall[d] * others(r, d) / r.recall[d] + others(r, d)),
        ("divided by ten, not nine", lambda r, d: harmonic(r.recall[d], 0.9 * others(r, d))),
        ("percent, not a share", lambda r, d: 100 * harmonic(r.recall[d], others(r, d))),
        ("rounded", lambda r, d: round(float(harmonic(r.recall[d], others(r, d))), 3)),
        ("a sum for the mean of nine", lambda r, d: harmonic(r.recall[d], 9 * others(r, d))),
        ("the others left out", lambda r, d: harmonic(r.recall[d], r.precision[d])),
        ("accuracy", lambda r, d: r.accuracy),
        ("a plain mean", lambda r, d: (r.recall[d] + others(r, d)) / 2),
        ("precision for recall", lambda r, d: r.precision[d]),
        ("all ten recalled alike", lambda r, d: r.recall.mean()),
        ("the digit counted among the others", lambda r, d: harmonic(r.recall[d], r.recall.mean())),
        (None, lambda r, d: harmonic(r.recall[9], others(r, 9))),
    ],
    ex5.add_adapters: [
        (RIGHT, lambda A1, B1, A2, B2: list(stacked(A2, B2, A1, B1))),
        ("a larger rank than needed", lambda A1, B1, A2, B2: (torch.eye(9), B1 @ A1 + B2 @ A2)),
        ("A and B added apart", lambda A1, B1, A2, B2: (A1 + A2, B1 + B2)),
        ("A and B averaged apart", lambda A1, B1, A2, B2: ((A1 + A2) / 2, (B1 + B2) / 2)),
        ("stacked in two orders", lambda A1, B1, A2, B2: stacked(A1, B2, A2, B1)),
        ("only one of them", lambda A1, B1, A2, B2: (A1, B1)),
        ("halved", lambda A1, B1, A2, B2: stacked(A1 / 2, B1, A2 / 2, B2)),
        (
            "stacked along the wrong side",
            lambda A1, B1, A2, B2: [torch.hstack([A1, A2]), torch.vstack([B1, B2])],
        ),
        ("stacked along the wrong side", lambda A1, B1, A2, B2: torch.cat([A1, B1])),
        ("A and B swapped", lambda A1, B1, A2, B2: stacked(A1, B1, A2, B2)[::-1]),
        (None, lambda A1, B1, A2, B2: (torch.cat([A1, A2]), B1)),
    ],
    ex5.adapter_bytes: [
        (RIGHT, lambda rank: 4 * count_parameters(add_lora(RichBoyNet(), rank)).lora),
        ("numbers, not bytes", lambda rank: 6794 * rank),
        ("bits", lambda rank: 32 * 6794 * rank),
        ("the whole network", lambda rank: 4 * (2_807_010 + 6794 * rank)),
        ("the base instead", lambda rank: 4 * 2_807_010),
        ("one layer of three", lambda rank: 4 * 1784 * rank),
        ("kilobytes", lambda rank: 4 * 6794 * rank / 1024),
        ("double precision", lambda rank: 8 * 6794 * rank),
        ("half precision", lambda rank: 2 * 6794 * rank),
        ("rank forgotten", lambda rank: 4 * 6794),
        ("rank squared", lambda rank: 4 * 6794 * rank * rank),
    ],
}
ROWS = [(e, name, answer) for e, rows in ANSWERS.items() for name, answer in rows]


@pytest.mark.parametrize("e, expected, answer", ROWS, ids=[f"{e.__name__}: {name}" for e, name, _ in ROWS])
def test_a_right_answer_is_right_and_each_misconception_has_its_own_reply(e, expected, answer):
    verdict = e.check(*(answer if type(answer) is tuple else (answer,)))
    wanted = (RIGHT, None) if expected == RIGHT else ("wrong", expected)
    assert (verdict.state, verdict.misconception) == wanted, verdict
    assert len(verdict.words) > 10 and e.replies.get(expected, "") in repr(verdict)


def test_every_reply_is_tested_and_every_notebook_has_four_exercises():
    for name, e in EXERCISES.items():
        tested = {expected for expected, _ in ANSWERS[e]} - {
            RIGHT,
            None,
            "rounded",
            "a comma within a number",
        }
        assert tested == set(e.replies), name
    for notebook in MODULES:
        assert sum(name.startswith(notebook) for name in EXERCISES) >= 4


# --- every exercise


def solved(e):
    """The answers of the exercise's own solution, run as a learner would run it."""
    names = globals() | {"LoRAParametrization": LoRAParametrization}
    names |= {"published_before": ex4.PUBLISHED_BEFORE, "published_after": ex4.PUBLISHED_AFTER}
    made = {}
    exec(e.solution_code, names, made)
    return list(made.values())


@each_exercise
def test_the_solution_is_right_and_the_random_stream_is_left_alone(e):
    state = torch.get_rng_state()
    verdict = e.check(*solved(e))
    assert verdict.state == "right" and verdict.misconception is None, verdict
    assert torch.equal(torch.get_rng_state(), state)
    assert e.solution_code in repr(e.solution())


@each_exercise
def test_hints_go_step_by_step(e):
    own = Exercise(e._judge, e._hints, e.solution_code, e._reason, e.replies)
    steps = [repr(own.hint()) for _ in range(len(own._hints) + 1)]
    assert len(own._hints) >= 2 and len(set(steps[:-1])) == len(own._hints) and steps[-1] == steps[-2]
    assert e.__doc__.endswith(("?", ".")), "the question"


@each_exercise
def test_a_blank_is_not_attempted(e):
    blanks = (lambda *_: ..., ...)
    for blank in blanks:
        verdict = e.check(*[blank] * len(solved(e)))
        assert verdict.state == "not attempted"
        assert "Not attempted yet" in repr(verdict) and "**" not in repr(verdict)


def test_a_blank_that_still_stands_in_the_code_is_not_attempted():
    def begun(in_features, out_features):
        weight = ...  # noqa: F841
        return in_features * out_features

    def only_dots(net): ...

    assert ex1.layer_parameters.check(begun).state == "not attempted"
    assert ex1.keep_copies.check(only_dots).state == "not attempted"


def recursive(*arguments):
    return recursive(*arguments)


class Hostile:
    def __eq__(self, other):
        raise RuntimeError("not comparable")

    def __repr__(self):
        raise RuntimeError("not printable")


@each_exercise
def test_garbage_and_code_that_stops_are_answered_in_words(e):
    count, asks_for_function = len(solved(e)), callable(solved(e)[0])
    garbage = [None, "garbage", float("nan"), [], {}, [None], object(), nn.Linear, Hostile(), 3 + 4j]
    garbage += [torch.zeros(0), lambda: 1, lambda *_: "text", lambda *_: Hostile(), lambda *_: None]
    for answer in garbage:
        verdict = e.check(*[answer] * count)
        assert verdict.state in ("wrong", "cannot be checked") and len(verdict.words) > 10
    stopping = [(recursive, "without end"), (lambda *_: nonexistent_name, "nonexistent_name")]  # noqa: F821
    for function, words in [*stopping, (lambda *_: sys.exit(), "SystemExit")]:
        verdict = e.check(*[function] * count)
        assert verdict.state == "cannot be checked" and (words in verdict.words or not asks_for_function)
    assert e.check(*[1] * (count + 1)).state == "cannot be checked"


def assign_tensor(layer):
    keep_parametrized(True)(layer)
    layer.weight = torch.zeros(4, 5)


def cached_without_brackets(layer, batches):
    with parametrize.cached:
        return [layer(batch) for batch in batches]


MORE = [
    (ex1.all_but, "must be imported first", lambda labels, digit: np.not_equal(labels, digit)),  # noqa: F821
    (ex1.all_but, "as in the line `def", lambda labels, digit: label != digit),  # noqa: F821
    (ex1.all_but, "leave the line `def", lambda labels: labels != 9),
    (ex1.all_but, "For each entry use `~`", lambda labels, digit: not labels == digit),
    (ex1.all_but, "Is the name after the dot", lambda labels, digit: labels.diag_al()),
    (ex1.all_but, "brackets of a call missing", lambda labels, digit: labels.detach.clone()),
    (ex1.all_but, "Is a `*` missing", lambda labels, digit: labels(digit)),
    (ex1.all_but, "print its keys", lambda labels, digit: {}[digit]),
    (ex1.all_but, "Print both shapes", lambda labels, digit: (labels != digit) & torch.ones(3).bool()),
    (ex1.all_but, "`print` only shows", lambda labels, digit: print(end="")),
    (ex1.layer_parameters, "asks for a function. This is a number (int).", 785_000),
    (ex1.layer_parameters, "add them up", lambda i, o: (i * o, o)),
    (ex1.accuracy, "`.accuracy`", lambda net, mnist: evaluate(net, mnist.test)),
    (ex2.break_even, "without brackets", [440]),
    (ex3.forward, "`self.scale`", lambda self, weight: weight + scale * self.lora_B),  # noqa: F821
    (
        ex3.merge,
        "Remove the parametrization first",
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(4, 5))),
    ),
    (ex3.merge, "another `nn.Parameter`", assign_tensor),
    (ex3.compute_once, "brackets of a call missing", cached_without_brackets),
    (ex3.compute_once, "Square brackets", lambda layer, batches: (layer(batch) for batch in batches)),
    (ex3.compute_once, "append", lambda layer, batches: [row for b in batches for row in layer(b)]),
    (ex3.compute_once, "Is the bias", lambda layer, batches: [b @ layer.weight.T for b in batches]),
    (ex4.bill, "Remove the quotes", "140"),
    (ex4.adam_memory, "Write 6794", (12, 794)),
    (ex4.experiment, "used a copy", lambda net, mnist: taught()(copy.deepcopy(net), mnist)),
    (ex5.add_adapters, "whose product it is", lambda A1, B1, A2, B2: B1 @ A1 + B2 @ A2),
]


@pytest.mark.parametrize("e, words, answer", MORE)
def test_other_mistakes_come_with_where_to_look(e, words, answer):
    verdict = e.check(answer)
    assert verdict.state in ("wrong", UNCHECKABLE) and words in verdict.words, verdict


def test_an_interrupt_is_not_swallowed_and_a_judge_that_breaks_says_so():
    def interrupted(*_):
        raise KeyboardInterrupt

    @exercise(hints="a\nb", solution="x = 1", reason="", replies="")
    def broken(answer):
        """A question?"""
        raise ZeroDivisionError("inside")

    with pytest.raises(KeyboardInterrupt):
        ex1.layer_parameters.check(interrupted)
    assert broken.check(1).state == UNCHECKABLE and "ZeroDivisionError" in broken.check(1).words


def test_the_spoiled_images_of_exercise_4_5_warn_nobody():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        verdict = ex4.experiment.check(taught(lesson=lambda mnist: mnist.train))
    assert verdict.misconception == "trained on other digits"


# --- the project of notebook 5


def test_the_halves_share_every_digit_fairly():
    labels = torch.arange(10).repeat_interleave(6)
    images = torch.arange(60.0).reshape(60, 1, 1, 1).expand(60, 1, 28, 28)
    first, second = ex5.halves(TensorDataset(images, labels))
    assert torch.equal(first.tensors[1].bincount(), second.tensors[1].bincount())
    both = torch.cat([first.tensors[0], second.tensors[0]])[:, 0, 0, 0]
    assert torch.equal(both.sort().values, torch.arange(60.0))


def test_the_score_is_0_where_nothing_is_right():
    nothing = Evaluation((1 - torch.eye(10)).long(), torch.zeros(0, dtype=torch.int64))
    (score,) = solved(ex5.score)
    assert score(nothing, 9) == ex5.fair_score(nothing, 9) == 0


def test_the_settings_of_the_project_are_checked():
    good = {"digit": 5, "budget": 30_000, "batches": 100, "share": 0.0}
    ex5.check_settings(**good)
    for name, value in ("digit", "5"), ("budget", (30, 0)), ("share", 50), ("share", -0.1), ("batches", 0):
        with pytest.raises(ValueError, match=f"{name} is .*must be"):
            ex5.check_settings(**good | {name: value})


# --- guesses and quizzes


def test_a_number_is_guessed_kept_and_revealed():
    question = PredictNumber("How many nines are wrong?", 0, 200)
    question.slider.set_state({"value": 40})  # the path of a move in the browser
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
    unknown = question.reveal(float("nan"))
    assert "measured: nan" in repr(unknown) and "width" not in unknown._repr_html_()


def test_a_choice_is_guessed_and_revealed():
    question = PredictChoice("Which layer is largest?", ["linear1", "linear2"])
    question.button.click()
    assert not question.kept and "skip" in question._status.value
    question.radio.value = "linear1"
    assert repr(question.reveal("linear2")).startswith("your guess: linear1 · measured: linear2. A surprise")
    question.radio.value = "linear2"
    assert "You had it" in repr(question.reveal("linear2"))


def test_a_ranking_needs_each_item_once_and_names_one_chosen_twice():
    question = PredictRanking("Which pays most?", [4, 7, 0])
    for place, item in zip(question.places, ("4", "4", "0")):
        place.value = item
    for _ in range(2):
        assert question.guess is None and "You chose 4 for the places 1st and 2nd" in question._status.value
        question.button.click()
    question.places[1].value = "7"
    assert question.guess == ("4", "7", "0")
    revealed = "your guess: 4 > 7 > 0 · measured: 4 > 0 > 7. 1 of 3 in the right place."
    assert repr(question.reveal([4, 0, 7])) == revealed


def test_an_answer_is_folded_until_the_learner_has_guessed():
    question = PredictChoice("Which <b>?", ["this <b>", "that"])
    before = question.reveal("this <b>", "A note.")
    assert repr(before) == "measured: this <b>. A note.", "what nbval compares"
    assert before._repr_html_().startswith("<details><summary>Answer</summary>")
    assert "this &lt;b&gt;" in before._repr_html_() and "A note." in before._repr_html_()
    question.radio.value = "that"
    question.button.click()
    after = question.reveal("this <b>")._repr_html_()
    assert "<details>" not in after and "that" in after and "this &lt;b&gt;" in after


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_a_quiz_answers_each_choice_and_counts_first_tries(module):
    quiz = module.quiz()
    assert len(quiz.radios) >= 3
    for radio, question, number in zip(quiz.radios, quiz.questions, range(9)):
        assert len(set(question.replies.values())) == len(question.replies)
        for index, choice in enumerate(question.replies):
            radio.set_state({"index": index})
            assert question.replies[choice] in quiz.answers[number]
            assert quiz.answers[number].startswith("✔" if choice == question.right else "✘")
    expected = sum(next(iter(q.replies)) == q.right for q in quiz.questions)
    assert quiz.score == expected and f"{expected} of {len(quiz.radios)}" in quiz._total.value
    assert expected < len(quiz.radios), "the right answer is not always the first"


def test_where_no_widget_runs_words_stand_in():
    for widget, words in (
        (PredictChoice("Which?", ["this <b>", "that"]), "this &lt;b&gt;"),
        (PredictNumber("How many?", 0, 9), "from 0 to 9"),
        (PredictRanking("Who?", ["a", "b"]), "a, b"),
        (ex1.quiz(), "<summary>Answer"),
    ):
        data = widget._repr_mimebundle_()
        assert "application/vnd.jupyter.widget-view+json" in data and words in data["text/html"]
        assert data["text/plain"] == repr(widget) and len(repr(widget)) < 120


def test_what_is_not_a_question_is_refused():
    with pytest.raises(ValueError, match="not among"):
        Question("?", "c", {"a": "", "b": ""})
    with pytest.raises(TypeError, match="must be a list"):
        PredictChoice("?", "ab")
    with pytest.raises(ValueError, match="at most 6"):
        PredictRanking("?", list("abcdefg"))


# --- preflight and projector


def test_preflight_says_ready_and_the_tick_is_answered():
    state = torch.get_rng_state()
    result = preflight()
    assert torch.equal(torch.get_rng_state(), state)
    # Speed depends on the machine, so it is not asserted.
    versions, speed, widgets = result.checks
    assert "good" in versions.state and f"torch {torch.__version__.split('+')[0]}" in versions.found
    assert speed.found.endswith(" s") and "good" in widgets.state and result.ready
    page = result._repr_mimebundle_()["text/html"]
    assert repr(result).endswith(result.verdict) and result.verdict in page and '<th scope="row">' in page
    result.box.value = True
    assert "Yes, widgets run" in result._answer.value


def test_preflight_says_what_to_do(monkeypatch, tmp_path):
    real = importlib.metadata.version
    old = {"torch": "2.0.0"}
    monkeypatch.setattr("importlib.metadata.version", lambda name: old.get(name) or real(name))
    monkeypatch.setattr(preflight_module, "jupyter_path", lambda: [str(tmp_path)])
    monkeypatch.setattr(preflight_module, "fine_tune", lambda *_, **__: None)
    result = preflight()
    assert not result.ready and result.verdict.startswith("Not ready.")
    assert "Install again" in result.verdict and "Install ipywidgets" in result.verdict
    assert "torch is 2.0.0, but must be" in repr(result) and "✘ look here" in result._table()


def test_a_slow_machine_is_ready_and_told_what_to_do(monkeypatch):
    monkeypatch.setattr(preflight_module, "fine_tune", lambda *_, **__: None)
    monkeypatch.setattr(preflight_module, "SLOW", -1.0)
    result = preflight()
    assert result.ready and result.verdict.startswith("Ready, but slow. Close other programs.")
    assert "◐ slow, but works" in result._table()


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
