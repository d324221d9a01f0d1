"""Notebook 4, Digit-9 fine-tuning: exercises 4.1 to 4.5, in this order, and the quiz."""

import warnings

import torch
from torch import nn
from torch.utils.data import TensorDataset

from lora_helpers.course.exercise import Uncheckable, Wrong, call, compare, exercise, kind_of, numbers, same
from lora_helpers.course.quiz import Quiz, read_quiz
from lora_helpers.data import Mnist
from lora_helpers.lora import add_lora, lora_layers
from lora_helpers.model import LAYERS, RichBoyNet
from lora_helpers.training import Evaluation, evaluate


@exercise(
    hints="""
        Adam keeps a running mean of the gradient, and one of its square, for every trained parameter.
        How many parameters does LoRA train at rank 1?
    """,
    solution="adam_numbers = 2 * 6_794",
    reason="Two running means for each trained parameter. Full fine-tuning keeps 2 × 2,807,010 = 5,614,020.",
    replies="""
        one for each parameter: This is how many are trained. Adam keeps *two* means of each gradient.
        frozen parameters counted: The base is frozen, and Adam keeps nothing for frozen parameters.
        the whole network: These are all parameters. Adam keeps numbers only for the trained ones.
        full fine-tuning: This is what *full* fine-tuning needs.
        bytes, not numbers: This is how many bytes they take. The question asks how many numbers.
        the gradient counted too: The gradient is needed too, but it is not part of Adam's memory.
    """,
)
def adam_memory(kept):
    """How many numbers does Adam keep in memory while rank-1 LoRA is trained?"""
    mistakes = {
        "one for each parameter": 6_794,
        "frozen parameters counted": 2 * 2_813_804,
        "the whole network": 2_813_804,
        "full fine-tuning": 2 * 2_807_010,
        "bytes, not numbers": 4 * 13_588,
        "the gradient counted too": 3 * 6_794,
    }
    compare(kept, 13_588, mistakes, "First count the trained parameters: a cell above prints them.")
    return "LoRA saves this memory, and it stores only 6,794 numbers for each task. The network itself grew."


@exercise(
    hints="""
        Go through the copies, and compare each with its parameter in `net`.
        `linear1.weight` is now `linear1.parametrizations.weight.original`. A bias has kept its name.
        Bit for bit: `torch.equal`. And return True only after the *last* comparison.
    """,
    solution="""
        def unchanged(net, copies):
            now = dict(net.named_parameters())
            return all(torch.equal(now[name.replace("weight", "parametrizations.weight.original")], copied)
                       for name, copied in copies.items())
    """,
    reason="It compares every copy bit for bit, biases too. `all` is True only if every comparison is True.",
    replies="""
        it stops instead of answering: `assert` stops the program. Return True or False.
        a proof that nothing passes: Nothing moved, and you say that it did. Print what you compare.
        the computed weight compared: Only A and B had moved, and you say that the base changed.
            `layer.weight` is the *computed* weight. The base is `.original`.
        a proof that cannot fail: Every parameter was changed, and you still say that nothing moved.
        one equal taken for all equal: `any` is True as soon as one is equal. All must be equal.
        a return inside the loop: Only the first is compared: `return` ends the function. Answer after the
            last comparison.
        only the last comparison counts: Each turn of the loop overwrites the last result. Keep all, or stop
            at the first False.
        biases not checked: A bias belongs to the base too.
        weights not checked: LoRA changed the names of the weights: do you look up the new names?
        not every layer checked: Compare the parameters of all three layers.
        nearly equal taken for equal: One weight had moved by a millionth. `allclose` ignores that, so compare
            bit for bit.
        differences that cancel: Compare the numbers, not their sum.
    """,
)
def unchanged(proof):
    """Is every base parameter what it was?"""
    if not _answer(proof, lambda net: None):
        raise Wrong("a proof that nothing passes")
    if not _answer(proof, lambda net: [lora.lora_B.fill_(1) for (lora,) in lora_layers(net).values()]):
        raise Wrong("the computed weight compared")
    if _answer(proof, lambda net: [parameter.add_(1) for parameter in net.parameters()]):
        raise Wrong("a proof that cannot fail")
    parts = [f"{layer}.{kind}" for layer in LAYERS for kind in ("weight", "bias")]
    seen = [part for part in parts if not _answer(proof, lambda net, part=part: _base(net, part).add_(1))]
    if seen != parts:
        _judge_unseen([part for part in parts if part not in seen], seen)
    if _answer(proof, lambda net: _base(net, "linear2.weight")[0, 0].mul_(1 + 1e-6)):
        raise Wrong("nearly equal taken for equal")
    if _answer(proof, lambda net: _base(net, "linear3.weight").copy_(_base(net, "linear3.weight").flip(0))):
        raise Wrong("differences that cancel")
    return "It sees a moved bias, a moved layer and a tiny change, and it ignores A and B."


def _answer(proof, change) -> bool:
    """What the learner's proof says of a small network with LoRA after `change(net)`."""
    net = RichBoyNet(6, 5)
    copies = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    add_lora(net)
    with torch.no_grad():
        change(net)
    given = call(proof, net, copies, errors={"AssertionError": "it stops instead of answering"})
    if not isinstance(given, (bool, torch.Tensor)) or torch.as_tensor(given).numel() != 1:
        advice = " `all(…)` makes one answer of many." if isinstance(given, (list, tuple)) else ""
        raise Uncheckable(f"Return one True or False. This is {kind_of(given)}.{advice}")
    return bool(given)


def _base(net: nn.Module, part: str) -> nn.Parameter:
    """A base parameter, by its name before LoRA was added."""
    return net.get_parameter(part.replace("weight", "parametrizations.weight.original"))


def _judge_unseen(unseen: list[str], seen: list[str]) -> None:
    """Says what is wrong with a proof that did not see every change of one parameter."""
    words = f"One parameter at a time was changed. Your proof did not see that {unseen[0]} had changed."
    if not seen:
        raise Wrong("one equal taken for all equal", words)
    if len(seen) == 1 and seen[0].startswith("linear1"):  # its bias, if the loop is over the network
        raise Wrong("a return inside the loop")
    if len(seen) == 1 and seen[0].startswith("linear3"):
        raise Wrong("only the last comparison counts")
    if all(name.endswith("bias") for name in unseen):
        raise Wrong("biases not checked", words)
    if all(name.endswith("bias") for name in seen):
        raise Wrong("weights not checked", words)
    raise Wrong("not every layer checked", words)


@exercise(
    hints="""
        Recall: of all that *is* the digit (its row). Precision: of all that is *called* it (its column).
        Both have the same number on top: `confusion[digit, digit]`.
    """,
    solution="""
        def recall_and_precision(confusion, digit):
            right = confusion[digit, digit]
            return right / confusion[digit].sum(), right / confusion[:, digit].sum()
    """,
    reason="Divide the right answers by the row (the digit's images) and by the column (the calls).",
    replies="""
        recall and precision swapped: A row holds what the images *are*, a column what they are *called*.
            Recall needs the row.
        recall twice: Your second number is the recall again. Precision asks about the column.
        precision twice: Your first number is the precision too. Recall asks about the row.
        divided by the wrong answers: You divide by what is *wrong* in the row and in the column. Divide by
            the whole sum.
        shares of wrong answers: These are the shares of wrong answers.
        counts, not shares: This is how many are right. Divide by the sums of row and column.
        whole division: `//` drops the fraction. Divide with `/`.
        percent, not shares: This is right in percent. Return shares from 0 to 1.
        shares of all images: You divide by all images. Divide by the row for recall, by the column for
            precision.
        the digit 9 only: It is right for 9 and wrong for 4: use `digit` instead of a number.
    """,
)
def recall_and_precision(shares):
    """Recall and precision of a digit, as two shares."""
    confusion = torch.randint(0, 9, (10, 10)) + 30 * torch.eye(10, dtype=torch.int64)
    confusion[:9, 9] += 5
    right, row, column = confusion[9, 9].item(), confusion[9].sum().item(), confusion[:, 9].sum().item()
    recall, precision = right / row, right / column
    mistakes = {
        "recall and precision swapped": [precision, recall],
        "recall twice": [recall, recall],
        "precision twice": [precision, precision],
        "divided by the wrong answers": [right / (row - right), right / (column - right)],
        "shares of wrong answers": [1 - recall, 1 - precision],
        "counts, not shares": [right, right],
        "whole division": [0, 0],
        "percent, not shares": [100 * recall, 100 * precision],
        "shares of all images": [right / confusion.sum().item()] * 2,
    }
    given = _two_numbers(call(shares, confusion.clone(), 9))
    compare(given, [recall, precision], mistakes, "Work out one digit of the matrix above by hand.")
    fours = confusion[4, 4] / torch.stack([confusion[4].sum(), confusion[:, 4].sum()])
    if not same(_two_numbers(call(shares, confusion.clone(), 4)), fours):
        raise Wrong("the digit 9 only")
    return "A network that calls everything a 9 has recall 1. Only its precision, 0.1, shows that."


def _two_numbers(given) -> list[float]:
    values = numbers(list(given.values()) if isinstance(given, dict) else given)
    if values.shape != (2,):
        raise Uncheckable(f"Return two numbers, recall and precision. Yours holds {values.numel()}.")
    return values.tolist()


PUBLISHED_BEFORE = [12, 30, 44, 106, 28, 21, 32, 37, 9, 128]  # wrong answers, on MNIST's 10,000 test images
PUBLISHED_AFTER = [21, 33, 59, 145, 137, 29, 63, 63, 23, 14]


@exercise(
    hints="""
        Add up all ten numbers after, and all ten before.
        sum(after) - sum(before) holds both the gain of the nine and the loss of the others.
    """,
    solution="more_wrong = sum(published_after) - sum(published_before)",
    reason="447 answers were wrong before, 587 after: 114 fewer for the nine, and 254 more for the others.",
    replies="""
        only the nine looked at: This is the gain of the nine. The other nine digits paid for it: add their
            losses.
        the nine's gain as a positive number: This is the gain of the nine. How much did the others lose?
        the gain left out: This is what the others lost. Subtract the gain of the nine.
        before and after swapped: The sign is wrong: fine-tuning made *more* answers wrong.
        the gain counted as a loss: The errors of the nine *fell* by 114. Subtract them, do not add them.
        a share, not a count: This is a share of the 10,000. The question asks how many.
        answers before, not the change: This is how many are wrong before. How many more are wrong after?
        answers after, not the change: This is how many are wrong after. How many were wrong before?
    """,
)
def bill(more_wrong):
    """How many more answers are wrong, over all ten digits, after the published fine-tuning?"""
    before, after = sum(PUBLISHED_BEFORE), sum(PUBLISHED_AFTER)
    nine = PUBLISHED_AFTER[9] - PUBLISHED_BEFORE[9]
    others = after - before - nine
    mistakes = {
        "only the nine looked at": nine,
        "the nine's gain as a positive number": -nine,
        "the gain left out": others,
        "before and after swapped": before - after,
        "the gain counted as a loss": others - nine,
        "a share, not a count": (after - before) / 10_000,
        "answers before, not the change": before,
        "answers after, not the change": after,
    }
    compare(more_wrong, after - before, mistakes, "Ten numbers before, ten after: add each up.")
    return "140 more of 10,000: accuracy fell from 0.955 to 0.941. “Performance is maintained” is untrue."


@exercise(
    hints="""
        Three things are wrong: what is trained, on which images, and where it is tested.
        Does a line freeze the base? Is the comparison `!= 9` what you want?
        An honest test uses `mnist.test`.
    """,
    solution="""
        def teach_nine(net, mnist):
            freeze_base(add_lora(net, rank=1))
            train(net, only_digit(mnist.train, 9), max_batches=30, progress=False)
            return evaluate(net, mnist.test)
    """,
    reason="Freeze everything except LoRA, train only on nines, and test on images that training never saw.",
    replies="""
        A and B frozen too: `train` found nothing to train. `freeze_base` leaves A and B free.
        LoRA added too late, or never: A and B are needed before they are there: call `add_lora` first.
        no LoRA: After your function the network has no A and B: add LoRA, and leave it there.
        trained on other digits: The check had spoiled every training image that is not a 9, and your weights
            show it: which images does your mask keep?
        base not frozen: Freeze everything except A and B before training.
        nothing was trained: Every B is still zero. Are A and B frozen, or was the optimiser made before they
            were?
        tested on the training set: These figures are from training images. Test on `mnist.test`.
        tested with LoRA off, or too early: These are the base's figures. Train, then test with LoRA on.
        trained on the test set: The check had spoiled the test images, and your weights show it: train on
            `mnist.train`.
    """,
)
def experiment(teach):
    """Repair the experiment: only A and B learn, only from nines, tested on unseen images."""
    labels, test_labels = torch.arange(60) % 10, torch.arange(40) % 10
    images, spoiled = torch.randn(60, 1, 28, 28), torch.full((60, 1, 28, 28), torch.finfo(torch.float32).max)
    lesson = TensorDataset(torch.where((labels == 9).reshape(-1, 1, 1, 1), images, spoiled), labels)
    test = TensorDataset(torch.randn(40, 1, 28, 28), test_labels)
    net = _loud_net()
    copies = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    before = evaluate(net, test)
    given = _run_quietly(teach, net, Mnist(lesson, test))
    if not isinstance(given, Evaluation):
        raise Uncheckable(f"Return what `evaluate` gives. This is {kind_of(given)}.")
    _judge_trained(net, copies)
    if len(given.predictions) == len(labels):
        raise Wrong("tested on the training set")
    if len(given.predictions) != len(test):
        raise Wrong(None, f"The test has {len(test)} images. Yours used {len(given.predictions)}.")
    if same(given.confusion, before.confusion) and not same(evaluate(net, test).confusion, before.confusion):
        raise Wrong("tested with LoRA off, or too early")
    again = _loud_net()
    _run_quietly(teach, again, Mnist(lesson, TensorDataset(spoiled[:40], test_labels)))
    if not all(parameter.isfinite().all() for parameter in again.parameters()):
        raise Wrong("trained on the test set")
    return "Only A and B learned, only from nines, and the figures are from unseen images."


def _judge_trained(net: nn.Module, copies: dict[str, torch.Tensor]) -> None:
    """Whether LoRA, and only LoRA, learned from nines."""
    parameters = dict(net.named_parameters())
    if not lora_layers(net):
        if all(torch.equal(parameters[name], copied) for name, copied in copies.items()):
            raise Uncheckable("`net` did not change: your function used a copy, or did nothing. Train `net`.")
        raise Wrong("no LoRA")
    if not all(parameter.isfinite().all() for parameter in parameters.values()):
        raise Wrong("trained on other digits")
    for name, copied in copies.items():
        original = name.replace("weight", "parametrizations.weight.original")
        if not torch.equal(parameters.get(name, parameters.get(original)), copied):
            raise Wrong("base not frozen", f"{name} has changed.")
    if not any(adapter.lora_B.any() for adapters in lora_layers(net).values() for adapter in adapters):
        raise Wrong("nothing was trained")


def _run_quietly(teach, net: nn.Module, mnist: Mnist):
    # If a training diverges on spoiled images, the check caused it. A warning would mislead the learner.
    errors = {
        "every parameter is frozen": "A and B frozen too",
        "has no LoRA": "LoRA added too late, or never",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(teach, net, mnist, errors=errors)


def _loud_net() -> RichBoyNet:
    """A small network with weights so large that a spoiled image overflows in it."""
    net = RichBoyNet(16, 12)
    nn.init.normal_(net.linear1.weight)
    return net


def quiz() -> Quiz:
    """The recall quiz of notebook 4."""
    return read_quiz("""
        Which figure shows that a network calls too many digits 9?
        ✘ the recall of 9: It looks only at the nines. It is perfect if everything is called 9.
        ✘ the loss of the fine-tuning: It saw only nines, so it is lowest if everything is called 9.
        ✔ the precision of 9: It is the share of real nines among all that is called 9.

        The training images were all nines. Why did the fours suffer so much?
        ✔ What raises the logit of 9 is found in fours too: So the fours lost the largest share of
            their lead, and nothing in the training rewarded keeping it.
        ✘ The fours were trained on too: Only nines were.
        ✘ There are more fours: MNIST has slightly fewer fours than nines.

        LoRA is switched off. The outputs are…
        ✘ near the base's, up to rounding: This is true after merging and subtracting. With LoRA off, the
            stored weight itself is used.
        ✔ the base's, to the bit: The stored weights never moved, and with LoRA off they are used.
        ✘ random: Nothing is random here.

        What does LoRA as a parametrization save here?
        ✔ Adam's memory and stored gradients of the base, and storage for each task: All three.
        ✘ parameters in the network: The network grew by 6,794.
        ✘ computing time in every step: A parametrization builds the whole W + ΔW at each step. Two thin
            products are fast.
    """)
