"""Notebook 1, The MLP: exercises 1.1 to 1.5, in this order, and the quiz."""

import torch
from torch.utils.data import TensorDataset

from lora_helpers.course.exercise import (
    Uncheckable,
    Wrong,
    call,
    compare,
    exercise,
    mentions,
    need_tensor,
    numbers,
    same,
)
from lora_helpers.course.quiz import Quiz, read_quiz
from lora_helpers.data import Mnist
from lora_helpers.model import RichBoyNet
from lora_helpers.training import Evaluation


@exercise(
    hints="""
        `labels == digit` is a row of True and False. For which images is it True?
        A mask keeps the images where it is True. You want to keep the *others*.
    """,
    solution="""
        def all_but(labels, digit):
            return labels != digit
    """,
    reason="A mask keeps the places where it is True, so it must be True for every other digit.",
    replies="""
        the mask is used already: Return only the mask. It is applied later, outside your function.
        one answer for all: Return one True or False for each label: compare the tensor with a number.
        places in a column: Each place is in its own brackets, so `images[...]` would keep them. Return the
            mask itself.
        labels instead of places: You return the labels. `images[...]` needs to know *where* they are.
        0 and 1 for False and True: Numbers mean *places*: `images[[0, 1, 1]]` is the first image and twice
            the second. Return what the comparison gives.
        it keeps what it should leave out: `labels == digit` is True for the digit itself, and a mask keeps
            what is True. A well-known tutorial has this bug.
    """,
)
def all_but(mask):
    """Which images stay when one digit is left out?"""
    for values, digit in (((9, 1, 9, 4, 0), 9), ((4, 4, 2, 9, 7, 2), 4)):
        labels = torch.tensor(values)
        wanted = labels[labels != digit]
        given = call(mask, labels.clone(), digit, errors={"IndexError": "the mask is used already"})
        try:
            kept = labels[_mask_or_places(given, labels, wanted)]
        except IndexError:
            raise Uncheckable("One of your places is outside the labels.") from None
        if torch.equal(kept, labels[labels == digit]):
            raise Wrong("it keeps what it should leave out")
        if not torch.equal(kept, wanted):
            raise Wrong(None, f"Without {digit}, your mask keeps {kept.tolist()} from {list(values)}.")
    return "The mask is True for what stays. To check such a line quickly, print the labels that are left."


def _mask_or_places(given, labels: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The learner's answer as a mask (bool) or as places (int64)."""
    if isinstance(given, bool):
        raise Wrong("one answer for all", f"Your answer is a single {given}.")
    if isinstance(given, tuple) and len(given) == 1:
        given = given[0]  # torch.where returns the places in this form
    numbers(given)  # explains what is wrong with a value that is not made of numbers
    given = torch.as_tensor(given)
    if given.ndim == 2 and given.shape[1] == 1:
        raise Wrong("places in a column")
    if given.dtype == torch.bool and given.shape != labels.shape:
        needs = f"The mask needs one True or False for each of the {len(labels)} labels"
        raise Wrong(None, f"{needs}. Yours has {given.numel()}.")
    if given.dtype == torch.int64 and torch.equal(given, wanted):
        raise Wrong("labels instead of places")
    if given.dtype != torch.bool and given.shape == labels.shape and given.le(1).all() and given.ge(0).all():
        raise Wrong("0 and 1 for False and True")
    if given.dtype not in (torch.bool, torch.int64):
        raise Uncheckable(f"Return a mask of True and False (or a tensor of places), not of {given.dtype}.")
    return given


@exercise(
    hints="""
        Imagine a layer with 3 inputs and 2 outputs. Draw an arrow for each number that it holds.
        Each output weighs every input: that is the weight. What else is added to an output?
        The bias has one number for each output.
    """,
    solution="""
        def count(in_features, out_features):
            return in_features * out_features + out_features
    """,
    reason="Every pair of an input and an output has a weight, and every output has a bias.",
    replies="""
        bias forgotten: The weight is right. Now look at `linear1.bias` in the table above.
        one bias for each input: The bias is added to the *outputs*: look at the shape of `linear1.bias`.
        one bias for the whole layer: Each *output* has its own bias: see the shape of `linear1.bias`.
        sides added, not multiplied: Each output weighs *every* input, so multiply the two sides.
        a bias for each side: Only the outputs have a bias. Nothing is added to an input.
        one layer for all: 785,000 is only `linear1`. Use `in_features` and `out_features`.
    """,
)
def layer_parameters(count):
    """How many parameters does a Linear layer have?"""
    for n_in, n_out in ((5, 3), (784, 1000)):
        mistakes = {
            "bias forgotten": n_in * n_out,
            "one bias for each input": n_in * n_out + n_in,
            "one bias for the whole layer": n_in * n_out + 1,
            "sides added, not multiplied": n_in + n_out,
            "a bias for each side": n_in * n_out + n_in + n_out,
            "one layer for all": 785_000,
        }
        words = f"Try {n_in} inputs and {n_out} outputs on paper, then compare with the table above."
        compare(call(count, n_in, n_out), n_in * n_out + n_out, mistakes, words)
    return "One number for each pair of an input and an output, and one for each output."


@exercise(
    hints="""
        Two lines are wrong. First: which images may an honest test use?
        The network gives one row of ten logits for each image. Which dimension holds the ten?
    """,
    solution="""
        def accuracy(net, mnist):
            images, labels = mnist.test.tensors
            answers = net(images).argmax(dim=1)
            return (answers == labels).float().mean()
    """,
    reason="An honest test uses images that training never saw. Each row of logits has its own largest one.",
    replies="""
        all ten logits compared: All ten logits are compared with the label. The answer is the *place* of the
            largest: which function gives it?
        the best of the images, not of the logits: `argmax(dim=0)` picks the best *image* for each digit. Each
            image has a row of ten logits: which dimension runs along the row?
        images and labels of different sets: The numbers of answers and labels differ. Take both from the test
            set.
        tested on the training set: This is the share on images that the network was trained on. A network
            that learned them by heart gets 1.0.
        wrong answers instead of right ones: This is the share of *wrong* answers.
        a count, not a share: This is how many are right. Divide by the number of images.
        percent, not a share: This is right in percent. Return a share from 0 to 1.
        one answer for all images: No answer is right: `argmax()` without a dimension gives one place for the
            whole batch, not one answer for each image.
    """,
)
def accuracy(measure):
    """The share of unseen images with the right answer."""
    net = RichBoyNet(8, 8)
    parts = [_images_with_right_answers(net, size, right) for size, right in ((60, 45), (40, 16))]
    picks = mentions(measure, "argmax", "max", "topk", "argsort", "sort")
    ten = "the best of the images, not of the logits" if picks else "all ten logits compared"
    errors = {
        "tensor a (10)": ten,
        "tensor b (10)": ten,
        "must match the size": "images and labels of different sets",
    }
    given = call(measure, net, Mnist(*parts), errors=errors)
    if isinstance(given, Evaluation):
        raise Uncheckable("This is a whole evaluation. The share is its `.accuracy`.")
    mistakes = {
        "tested on the training set": 0.75,
        "wrong answers instead of right ones": 0.6,
        "a count, not a share": 16,
        "percent, not a share": 40,
        "one answer for all images": 0,
    }
    words = "This network is right on 45 of 60 training images and on 16 of 40 test images, so return 0.4."
    compare(given, 0.4, mistakes, words)
    return "Measured on images that training never saw, with one answer for each image."


def _images_with_right_answers(net: RichBoyNet, size: int, right: int) -> TensorDataset:
    images = torch.randn(size, 1, 28, 28)
    with torch.no_grad():
        labels = net(images).argmax(dim=1)
    labels[right:] = (labels[right:] + 1) % 10
    return TensorDataset(images, labels)


@exercise(
    hints="""
        The row is the true digit, the column is the network's answer. Where are the right answers?
        `confusion.sum(dim=1)` adds up each row: all images of that digit.
        Subtract the right answers, `confusion.diagonal()`.
    """,
    solution="""
        def wrong_per_digit(confusion):
            return confusion.sum(dim=1) - confusion.diagonal()
    """,
    reason="A row holds all images of one digit. All of them are wrong except those on the diagonal.",
    replies="""
        rows and columns swapped: You counted the images that are wrongly *called* each digit (the columns).
            Count the images *of* each digit (the rows).
        right answers counted: The diagonal holds the right answers. Subtract it from the sum of the row.
        right answers not taken away: These are all images of each digit. The right ones, on the diagonal, are
            still in it.
        a share, not a count: These are shares. The question asks how many.
        one sum for all: This is the total. Keep one number for each digit with `dim=1`.
        subtracted the wrong way round: A count cannot be negative: the row *minus* the right answers.
        calls counted: This is how often each answer was given. Count the images *of* each digit (the rows),
            minus the right ones.
        the whole matrix added up: `sum()` adds up the whole matrix. `sum(dim=1)` adds up each row.
        a return inside the loop: This is only the first digit: `return` ends the function. Collect all ten,
            then return.
    """,
)
def wrong_per_digit(count):
    """How many images of each digit got a wrong answer?"""
    confusion = torch.randint(0, 9, (10, 10)) + 30 * torch.eye(10, dtype=torch.int64)
    rows, columns, right = confusion.sum(dim=1), confusion.sum(dim=0), confusion.diagonal()
    mistakes = {
        "rows and columns swapped": columns - right,
        "right answers counted": right,
        "right answers not taken away": rows,
        "a share, not a count": (rows - right) / rows,
        "one sum for all": (rows - right).sum(),
        "subtracted the wrong way round": right - rows,
        "calls counted": columns,
        "the whole matrix added up": confusion.sum() - right,
        "a return inside the loop": (rows - right)[0],
    }
    words = "Return ten numbers, one for each row of the matrix that the function is given."
    compare(call(count, confusion.clone()), rows - right, mistakes, words)
    return "The same ten numbers as `result.wrong_counts`."


@exercise(
    hints="""
        `net.named_parameters()` gives names and tensors. You can make a dictionary in one line.
        `detach()` gives the same memory under another name. Which call makes new memory?
        `parameter.detach().clone()` for every parameter, also for the biases.
    """,
    solution="""
        def keep(net):
            return {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    """,
    reason="`detach` leaves the gradient behind, `clone` makes new memory. A copy that stays needs both.",
    replies="""
        biases left out: A bias is trained too. A proof that skips it proves less.
        a return inside the loop: It holds only the first parameter: `return` ends the function. Collect all,
            then return.
        no memory of its own: `detach()`, `.data` and `state_dict()` point to the same memory. Which call
            makes new memory?
        still part of the graph: A copy should not ask for gradients: `detach()` it first.
    """,
)
def keep_copies(keep):
    """A copy of every parameter that stays the same while the network trains."""
    net = RichBoyNet(6, 5)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    kept = call(keep, net)
    if not isinstance(kept, dict):
        raise Uncheckable(f"Return a dictionary from names to tensors. This is a {type(kept).__name__}.")
    missing = [name for name in before if name not in kept]
    if missing and all(name.endswith("bias") for name in missing):
        raise Wrong("biases left out", f"{missing[0]} is not in it.")
    if missing and missing == list(before)[1:]:
        raise Wrong("a return inside the loop")
    if missing:
        raise Wrong(None, f"These are missing: {', '.join(missing)}. Use the names of `named_parameters()`.")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)  # in place, as an optimiser does it
    for name, value in before.items():
        copy = need_tensor(kept[name], f"kept[{name!r}]")
        if same(copy, value + 1):
            raise Wrong("no memory of its own", f"After a step of training your {name} had changed too.")
        if not torch.equal(copy.detach(), value):
            raise Wrong(None, f"Your copy of {name} differs from the parameter.")
        if copy.requires_grad:
            raise Wrong("still part of the graph", f"Your {name} still asks for gradients.")
    return "It survived a step of training. This makes it a proof later."


def quiz() -> Quiz:
    """The recall quiz of notebook 1."""
    return read_quiz("""
        What is the shape of the weight of nn.Linear(784, 1000)?
        ✔ (1000, 784): One row for each output, one column for each input.
        ✘ (784, 1000): You name the sides in this order, but the weight stores one row for each output.
        ✘ (1000, 785): The bias is a separate tensor.

        Which layer of RichBoyNet holds most parameters?
        ✘ linear1: It sees the most pixels, but the product of its two sides is smaller.
        ✔ linear2: It joins the two wide sides: 1000 × 2000.
        ✘ linear3: It has only ten outputs.

        A network calls every image a 9. Which of its figures looks perfect?
        ✘ accuracy: It is right on one image in ten.
        ✘ the wrong answers of the digit 4: All of them are wrong.
        ✔ the wrong answers of the digit 9: None is wrong, so this figure alone proves nothing. Look at the
            other nine too.

        Why does copies = dict(net.named_parameters()) prove nothing later?
        ✔ It holds the same tensors, which change with the network: They are names for the same memory.
            detach().clone() makes new memory.
        ✘ It lacks the biases: They are in it, under their own names.
        ✘ It holds random numbers: It holds the parameters themselves.
    """)
