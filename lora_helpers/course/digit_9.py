"""Notebook 4, Digit-9 fine-tuning: its exercises and its quiz."""

import warnings

import torch
from torch import nn
from torch.utils.data import TensorDataset

from lora_helpers.course.exercise import LearnerError, Uncheckable, Wrong, call, compare, exercise, kind_of, numbers, same
from lora_helpers.course.quiz import Question, Quiz
from lora_helpers.data import Mnist
from lora_helpers.lora import add_lora, lora_layers
from lora_helpers.model import RichBoyNet
from lora_helpers.training import Evaluation, evaluate


@exercise(
    hints=(
        "Go through the copies, and compare each with the parameter of `net` that it is a copy of.",
        "What was `linear1.weight` is now `linear1.parametrizations.weight.original`; a bias has kept its name.",
        "Equal to the bit: `torch.equal`. And return True only after the *last* comparison.",
    ),
    solution="""
        def unchanged(net, copies):
            now = dict(net.named_parameters())
            return all(torch.equal(now[name.replace("weight", "parametrizations.weight.original")], copied)
                       for name, copied in copies.items())
    """,
    reason="Every copy, those of the biases too, compared bit for bit; `all` says True only if each one agrees.",
)
def unchanged(proof):
    """Is every base parameter what it was?"""

    def verdict(change) -> bool:
        net = RichBoyNet(6, 5)
        copies = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
        add_lora(net)
        with torch.no_grad():
            change(net)
        try:
            given = call(proof, net, copies)
        except LearnerError as error:
            if isinstance(error.error, AssertionError):
                raise Wrong("it stops instead of answering", "`assert` stops the program. Return True or False: what came of the comparison.") from None
            raise
        if not isinstance(given, (bool, torch.Tensor)) or (isinstance(given, torch.Tensor) and given.numel() != 1):
            more = " `all(…)` makes one answer of many." if isinstance(given, (list, tuple)) else ""
            raise Uncheckable(f"One True or False is asked for; this is {kind_of(given)}.{more}")
        return bool(given)

    def original(layer) -> torch.Tensor:
        return layer.parametrizations.weight.original

    if not verdict(lambda net: None):
        raise Wrong("a proof that nothing passes", "Nothing at all had been changed, and you say that something moved. Print what you compare.")
    if not verdict(lambda net: [adapter.lora_B.fill_(1) for adapters in lora_layers(net).values() for adapter in adapters]):
        raise Wrong(
            "the computed weight compared",
            "Only A and B had moved, and you say that the base changed. `layer.weight` is the *computed* weight; the base is `.original`.",
        )
    if verdict(lambda net: [p.add_(1) for p in net.parameters()]):
        raise Wrong("a proof that cannot fail", "Every parameter had been changed, and you still say that nothing moved.")
    moves = {}
    for layer in ("linear1", "linear2", "linear3"):
        moves[f"{layer}.weight"] = lambda net, layer=layer: original(net.get_submodule(layer)).add_(1)
        moves[f"{layer}.bias"] = lambda net, layer=layer: net.get_submodule(layer).bias.add_(1)
    _judge_seen([name for name, move in moves.items() if not verdict(move)], list(moves))
    if verdict(lambda net: original(net.linear2)[0, 0].mul_(1 + 1e-6)):
        raise Wrong("nearly equal taken for equal", "One weight had moved by a millionth. `allclose` forgives that; a proof to the bit does not.")
    if verdict(lambda net: original(net.linear3).copy_(original(net.linear3).flip(0))):
        raise Wrong("differences that cancel", "Compare the numbers, not their sum.")
    return "It sees a moved bias, a moved layer and a single moved bit, and is not fooled by A and B."


def _judge_seen(seen: list[str], everything: list[str]) -> None:
    """Says what is wrong with a proof that notices only `seen`, of all parameters, when one at a time has moved."""
    if seen == everything:
        return
    unseen = [name for name in everything if name not in seen]
    if not seen:
        raise Wrong("one equal taken for all equal", "One parameter at a time had moved, and the proof saw none: `any` is content with one that is equal.")
    if len(seen) == 1 and seen[0].startswith("linear1"):  # the bias, where the loop goes through the network instead of the copies
        raise Wrong("a return inside the loop", "Only the first parameter is compared: `return` ends the function at once. Answer after the last comparison.")
    if len(seen) == 1 and seen[0].startswith("linear3"):
        raise Wrong("only the last comparison counts", "Each turn of the loop overwrites what the one before found: keep them all, or stop at the first False.")
    if all(name.endswith("bias") for name in unseen):
        raise Wrong("biases not checked", f"{unseen[0]} had moved, and the proof did not see it.")
    if all(name.endswith("weight") for name in unseen) and len(unseen) == len(everything) / 2:
        raise Wrong("weights not checked", "Every bias is compared and no weight. Their names changed when LoRA was added: are they looked up at all?")
    raise Wrong("not every layer checked", f"{unseen[0]} had moved, and the proof did not see it.")


@exercise(
    hints=(
        "Recall: of all images that *are* the digit (its row). Precision: of all that are *called* it (its column).",
        "Both have the same number on top: `confusion[digit, digit]`.",
    ),
    solution="""
        def recall_and_precision(confusion, digit):
            right = confusion[digit, digit]
            return right / confusion[digit].sum(), right / confusion[:, digit].sum()
    """,
    reason="The same right answers, shared out once over the row (the digit's images) and once over the column (the calls).",
)
def recall_and_precision(shares):
    """Recall and precision of a digit, as two shares."""
    confusion = torch.randint(0, 9, (10, 10)) + 30 * torch.eye(10, dtype=torch.int64)
    confusion[:9, 9] += 5
    right, row, column = confusion[9, 9].item(), confusion[9].sum().item(), confusion[:, 9].sum().item()
    given = _two_numbers(call(shares, confusion.clone(), 9))
    compare(
        given,
        [right / row, right / column],
        {
            "recall and precision swapped": (
                [right / column, right / row],
                "Rows are what the images *are*, columns what they are *called*. Recall goes with the row.",
            ),
            "recall twice": ([right / row, right / row], "Your second number is recall again. Precision asks about the column."),
            "precision twice": ([right / column, right / column], "Your first number is precision too. Recall asks about the row."),
            "divided by the wrong answers": (
                [right / (row - right), right / (column - right)],
                "You divide by what is *wrong* in the row and in the column; divide by all that is in it.",
            ),
            "shares of wrong answers": ([1 - right / row, 1 - right / column], "Those are the shares that are wrong."),
            "counts, not shares": ([right, right], "That is how many are right; divide by the sum of the row, and by that of the column."),
            "whole division": ([0, 0], "`//` throws the fraction away. Divide with `/`."),
            "percent, not shares": ([100 * right / row, 100 * right / column], "Right in percent; shares from 0 to 1 are asked for."),
            "shares of all images": (
                [right / confusion.sum().item()] * 2, "You divide by all images; divide by the row for recall, by the column for precision."
            ),
        },
        "Take one digit of the matrix above and work it out by hand.",
    )  # fmt: skip
    other = [confusion[4, 4] / confusion[4].sum(), confusion[4, 4] / confusion[:, 4].sum()]
    if not same(_two_numbers(call(shares, confusion.clone(), 4)), other):
        raise Wrong("the digit 9 only", "Right for 9 and wrong for 4: use `digit` instead of a number.")
    return "A network that calls everything a 9 has recall 1 and precision about 0.1. Recall alone would praise it."


def _two_numbers(given) -> list[float]:
    given = list(given.values()) if isinstance(given, dict) else given
    values = numbers(given)
    if values.shape != (2,):
        raise Uncheckable(f"Two numbers are asked for, recall and precision; yours holds {values.numel()}.")
    return values.tolist()


_BEFORE = [12, 30, 44, 106, 28, 21, 32, 37, 9, 128]  # the published run, on MNIST's 10,000 test images
_AFTER = [21, 33, 59, 145, 137, 29, 63, 63, 23, 14]


@exercise(
    hints=(
        "Add up all ten numbers after, and all ten before.",
        "sum(after) - sum(before): the nine's gain is in it, and so is what the others lost.",
    ),
    solution="more_wrong = sum(published_after) - sum(published_before)",
    reason="447 wrong answers before, 587 after: nine's errors fell by 114, and the others' rose by 254.",
)
def bill(more_wrong):
    """How many more answers are wrong, over all ten digits, after the published fine-tuning?"""
    gain, loss = _AFTER[9] - _BEFORE[9], sum(_AFTER[:9]) - sum(_BEFORE[:9])
    compare(
        more_wrong,
        gain + loss,
        {
            "only the nine looked at": (gain, "That is what the nine gained. The other nine digits paid for it: put them on the bill."),
            "the nine's gain as a positive number": (-gain, "That is what the nine gained; what did the others lose?"),
            "the gain left out": (loss, "That is what the others lost; the nine's gain comes off it."),
            "before and after swapped": (-gain - loss, "The sign is the other way round: fine-tuning made *more* answers wrong."),
            "the gain counted as a loss": (loss - gain, "The nine's errors *fell*: its 114 come off the bill, they do not go on it."),
            "a share, not a count": ((gain + loss) / 10_000, "That is a share of the 10,000; asked is how many."),
            "answers before, not the change": (sum(_BEFORE), "That is how many are wrong before; take them from those after."),
            "answers after, not the change": (sum(_AFTER), "That is how many are wrong after; take those before away."),
        },
        "Ten numbers before, ten after: add each up.",
    )
    return "140 more wrong of 10,000: accuracy fell from 0.955 to 0.941. “Performance is maintained” would be untrue."


@exercise(
    hints=(
        "Adam keeps, for every parameter it trains, a running mean of the gradient and one of its square.",
        "How many parameters are trained with LoRA at rank 1?",
    ),
    solution="adam_numbers = 2 * 6_794",
    reason="Two running means for each trained parameter. Full fine-tuning keeps 2 × 2,807,010 = 5,614,020.",
)
def adam_memory(kept):
    """How many numbers Adam keeps in memory while rank-1 LoRA is trained."""
    compare(
        kept,
        13_588,
        {
            "one for each parameter": (6_794, "That is how many are trained; Adam keeps *two* running means of each gradient."),
            "frozen parameters counted": (2 * 2_813_804, "Adam keeps nothing for what it does not train: the base is frozen."),
            "the whole network": (2_813_804, "Those are all parameters; Adam keeps numbers only for the trained ones."),
            "full fine-tuning": (2 * 2_807_010, "That is what *full* fine-tuning needs."),
            "bytes, not numbers": (4 * 13_588, "That is how many bytes they take; asked is how many numbers."),
            "the gradient counted too": (3 * 6_794, "The gradient is needed as well, but it is not part of Adam's memory."),
        },
        "Count the trained parameters first; the cell after freezing printed them.",
    )
    return "That, and one stored adapter of 6,794 numbers for each task, is what LoRA saves. The network itself grew."


@exercise(
    hints=(
        "Three things are wrong: what is trained, on which images, and where it is tested.",
        "Is there a line that freezes the base? Is the comparison `!= 9` what you want?",
        "An honest test uses `mnist.test`.",
    ),
    solution="""
        def teach_nine(net, mnist):
            freeze_base(add_lora(net, rank=1))
            train(net, only_digit(mnist.train, 9), max_batches=30, progress=False)
            return evaluate(net, mnist.test)
    """,
    reason="Freeze what is not LoRA, train on nines alone, and test on images that training never saw.",
)
def experiment(teach):
    """Repair the experiment: only A and B learn, only from nines, tested on unseen images."""
    net = _loud_net()
    base = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    labels = torch.arange(60) % 10
    images = torch.randn(60, 1, 28, 28)
    poison = torch.finfo(images.dtype).max  # an image of it ruins what trains on it
    lesson = TensorDataset(torch.where((labels == 9).reshape(-1, 1, 1, 1), images, poison), labels)
    test = TensorDataset(torch.randn(40, 1, 28, 28), torch.arange(40) % 10)
    before = evaluate(net, test)
    try:
        given = _run_quietly(teach, net, Mnist(lesson, test, "sample"))
    except LearnerError as error:
        if "every parameter is frozen" in str(error.error):
            raise Wrong("A and B frozen too", "`train` found nothing that it may change. `freeze_base`, after `add_lora`, leaves A and B free.") from None
        if "has no LoRA" in str(error.error):
            raise Wrong("LoRA added too late, or never", "A and B were looked for before any were there: `add_lora` comes first.") from None
        raise
    if not isinstance(given, Evaluation):
        raise Uncheckable(f"Return what `evaluate` gives; this is {kind_of(given)}.")
    parameters = dict(net.named_parameters())
    if not lora_layers(net) and all(name in parameters and torch.equal(parameters[name], value) for name, value in base.items()):
        raise Uncheckable("`net` is as it was before: your function worked on a copy, or did nothing. Add LoRA to `net` itself, and train that.")
    if not lora_layers(net):
        raise Wrong("no LoRA", "After your function the network has no A and B: add LoRA, and leave it there.")
    if not all(parameter.isfinite().all() for parameter in parameters.values()):
        raise Wrong(
            "trained on other digits",
            "The check had spoiled every training image that is not a 9, and it shows in your weights: which images does your mask keep?",
        )
    for name, value in base.items():
        if not torch.equal(parameters.get(name, parameters.get(name.replace("weight", "parametrizations.weight.original"))), value):
            raise Wrong("base not frozen", f"{name} moved. Everything but A and B should be frozen before training.")
    adapters = [adapter for found in lora_layers(net).values() for adapter in found]
    if not any(adapter.lora_B.any() for adapter in adapters):
        raise Wrong("nothing was trained", "Every B is still zero. Were A and B frozen too, or the optimiser made before they were?")
    if len(given.predictions) == len(labels):
        raise Wrong("tested on the training set", "The figures come from the images it was trained on; an honest test uses `mnist.test`.")
    if len(given.predictions) != len(test):
        raise Wrong(None, f"The test has {len(test)} images; yours was made on {len(given.predictions)}.")
    if same(given.confusion, before.confusion) and not same(evaluate(net, test).confusion, before.confusion):
        raise Wrong("tested with LoRA off, or too early", "Your figures are the base's: test after training, with LoRA on.")
    again = _loud_net()
    _run_quietly(teach, again, Mnist(lesson, TensorDataset(torch.full_like(test.tensors[0], poison), test.tensors[1]), "sample"))
    if not all(parameter.isfinite().all() for parameter in again.parameters()):
        raise Wrong("trained on the test set", "The check had spoiled the test images, and it shows in your weights: train on `mnist.train`.")
    return "Only A and B learned, only from nines, and the figures come from unseen images."


def _run_quietly(teach, net: nn.Module, mnist: Mnist):
    # That a training on poison diverges is the check's doing: a warning of it would mislead.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(teach, net, mnist)


def _loud_net() -> RichBoyNet:
    """A small network with weights so large that a poisoned image overflows in it."""
    net = RichBoyNet(16, 12)
    nn.init.normal_(net.linear1.weight)
    return net


def quiz() -> Quiz:
    """The recall quiz of notebook 4."""
    return Quiz((
        Question(
            "Which figure shows that a network calls too many digits 9?",
            "the precision of 9",
            {
                "the recall of 9": "It only asks what happened to the nines, and is perfect when everything is called 9.",
                "the loss of the fine-tuning": "It saw nothing but nines, so calling all of them 9 is all it asks.",
                "the precision of 9": "Of all that is called 9, how much is one.",
            },
        ),
        Question(
            "The training images were all nines. Why did the fours suffer so much?",
            "What raises the logit of 9 is found in fours too",
            {
                "What raises the logit of 9 is found in fours too": "So they lost most of their lead over it, and nothing in the training asked to keep it.",
                "The fours were trained on too": "Only nines were.",
                "There are more fours": "There are as many of each digit in the sample.",
            },
        ),
        Question(
            "LoRA is switched off. The outputs are…",
            "the base's, to the bit",
            {
                "near the base's, up to rounding": "That would be so after merging and subtracting again. Off, the stored weight itself is used.",
                "the base's, to the bit": "The stored weights never moved, and off, they are what is used.",
                "random": "Nothing is drawn at random here.",
            },
        ),
        Question(
            "What does LoRA as a parametrization save here?",
            "Adam's memory and stored gradients of the base, and storage for each task",
            {
                "Adam's memory and stored gradients of the base, and storage for each task": "That is what it saves.",
                "parameters in the network": "The network grew by 6,794.",
                "computing time in every step": "A parametrization builds the whole W + ΔW at each step; only the factorised form is quick.",
            },
        ),
    ))  # fmt: skip
