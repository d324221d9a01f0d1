"""Notebook 1, The MLP: its exercises and its quiz."""

import torch
from torch.utils.data import TensorDataset

from lora_helpers.course.exercise import LearnerError, Uncheckable, Wrong, call, compare, exercise, mentions, need_tensor, numbers, same
from lora_helpers.course.quiz import Question, Quiz
from lora_helpers.data import Mnist
from lora_helpers.model import RichBoyNet
from lora_helpers.training import Evaluation


@exercise(
    hints=(
        "Think of a layer with 3 inputs and 2 outputs, and draw an arrow for each number it holds.",
        "Each of the outputs weighs every input: that is the weight. What else is added to an output?",
        "The bias has one number for each output.",
    ),
    solution="""
        def count(in_features, out_features):
            return in_features * out_features + out_features
    """,
    reason="Every pair of an input and an output has a weight, and every output has a bias.",
)
def layer_parameters(count):
    """How many parameters has a Linear layer?"""
    for n_in, n_out in ((5, 3), (784, 1000)):
        compare(
            call(count, n_in, n_out),
            n_in * n_out + n_out,
            {
                "bias forgotten": (n_in * n_out, "The weight is right; now look at `linear1.bias` in the table above."),
                "one bias for each input": (
                    n_in * n_out + n_in, "The bias is added to the *outputs*: look at the shape of `linear1.bias`."
                ),
                "one bias for the whole layer": (n_in * n_out + 1, "Each *output* has a bias of its own: look at the shape of `linear1.bias`."),
                "sides added, not multiplied": (
                    n_in + n_out, "Each output weighs *every* input, so the sides multiply: look at the weight's shape."
                ),
                "a bias for each side": (
                    n_in * n_out + n_in + n_out, "Only the outputs have a bias; nothing is added to an input."
                ),
                "one layer for all": (
                    785_000, "That is `linear1`, whatever layer was asked about: use `in_features` and `out_features` instead of numbers."
                ),
            },
            f"Try {n_in} inputs and {n_out} outputs on paper, then compare with the table above.",
        )  # fmt: skip
    return "One number for each pair of input and output, and one for each output."


@exercise(
    hints=(
        "`labels == digit` is a row of True and False. For which images is it True?",
        "A mask keeps what is True. You want to keep the *others*.",
    ),
    solution="""
        def all_but(labels, digit):
            return labels != digit
    """,
    reason="A mask keeps the places where it is True, so it must be True for every other digit.",
)
def all_but(mask):
    """Which images stay when one digit is left out?"""
    for values, digit in (((9, 1, 9, 4, 0), 9), ((4, 4, 2, 9, 7, 2), 4)):
        labels = torch.tensor(values)
        try:
            given = call(mask, labels.clone(), digit)
        except LearnerError as error:
            if isinstance(error.error, IndexError):
                raise Uncheckable("Return the mask alone: the images are taken by it afterwards, not in your function.") from None
            raise
        if isinstance(given, bool):
            raise Wrong(
                "one answer for all", f"That is a single {given}. One True or False for each label is asked for: compare the whole tensor, with a number."
            )
        if isinstance(given, tuple) and len(given) == 1 and isinstance(given[0], torch.Tensor):
            given = given[0]  # torch.where gives the places so, and images[...] takes them so
        numbers(given)  # says in words what holds no numbers
        chosen = torch.as_tensor(given)
        if chosen.ndim == 2 and chosen.shape[1] == 1:
            raise Wrong("places in a column", "Those are places, but each in brackets of its own, so `images[...]` would keep them. The mask itself will do.")
        if chosen.dtype == torch.bool and chosen.shape != labels.shape:
            raise Wrong(None, f"The mask needs one True or False for each of the {len(labels)} labels; yours has {chosen.numel()}.")
        if chosen.dtype == torch.int64 and torch.equal(chosen, labels[labels != digit]):
            raise Wrong("labels instead of places", "You return the labels that stay; `images[...]` needs to know *where* they are.")
        if chosen.shape == labels.shape and not chosen.dtype == torch.bool and chosen.le(1).all() and chosen.ge(0).all():
            raise Wrong(
                "0 and 1 for False and True",
                "Numbers are taken for *places*: `images[[0, 1, 1]]` is the first image and twice the second. Keep what the comparison gives.",
            )
        if chosen.dtype not in (torch.bool, torch.int64):
            raise Uncheckable(f"A mask of True and False (or a tensor of places) is asked for; yours holds {chosen.dtype}.")
        try:
            kept = labels[chosen]
        except IndexError:
            raise Uncheckable("One of your places is outside the labels.") from None
        if torch.equal(kept, labels[labels == digit]):
            raise Wrong(
                "it keeps what it should leave out",
                "`labels == digit` is True for the digit itself, and a mask keeps what is True. A well-known tutorial has this bug.",
            )
        if not torch.equal(kept, labels[labels != digit]):
            raise Wrong(None, f"Of the labels {list(values)} without {digit}, yours keeps {kept.tolist()}.")
    return "The mask is True for what stays. Printing the labels that are left is the quickest check of such a line."


@exercise(
    hints=(
        "Row = the digit that it is, column = what the network said. Where do the right answers stand?",
        "`confusion.sum(dim=1)` adds up each row: all images of that digit.",
        "Take the right ones, `confusion.diagonal()`, away from it.",
    ),
    solution="""
        def wrong_per_digit(confusion):
            return confusion.sum(dim=1) - confusion.diagonal()
    """,
    reason="A row holds all images of one digit; all but the one on the diagonal were answered wrongly.",
)
def wrong_per_digit(count):
    """How many images of each digit were answered wrongly?"""
    confusion = torch.randint(0, 9, (10, 10)) + 30 * torch.eye(10, dtype=torch.int64)
    rows, columns, right = confusion.sum(dim=1), confusion.sum(dim=0), confusion.diagonal()
    given = call(count, confusion.clone())
    compare(
        given,
        rows - right,
        {
            "rows and columns swapped": (
                columns - right,
                "You counted the images wrongly *called* each digit (the columns). Asked are the images *of* each digit (the rows).",
            ),
            "right answers counted": (right, "The diagonal holds the right answers; take it away from the rest of the row."),
            "right answers not taken away": (rows, "That is all images of each digit; the right ones, on the diagonal, are still in it."),
            "a share, not a count": ((rows - right) / rows, "Those are shares; the question asks how many."),
            "one sum for all": ((rows - right).sum(), "That is the total; keep one number for each digit with `dim=1`."),
            "taken away the wrong way round": (right - rows, "Less than none cannot be wrong: the whole row *minus* what is right."),
            "calls counted": (columns, "That is how often each answer was given. Asked are the images *of* each digit (the rows), less the right ones."),
            "the whole matrix added up": (confusion.sum() - right, "`sum()` adds up the whole matrix; `sum(dim=1)` each row."),
            "a return inside the loop": ((rows - right)[0], "That is the first digit alone: `return` ends the function at once. Collect, then return."),
        },
        "Ten numbers, one for each row, are asked for, made from the matrix that the function is given.",
    )
    return "The same ten numbers as `result.wrong_counts`."


@exercise(
    hints=(
        "`net.named_parameters()` gives names and tensors; a dictionary can be made in one line.",
        "`detach()` gives the same memory under another name. What makes memory of its own?",
        "`parameter.detach().clone()`, for every parameter, biases too.",
    ),
    solution="""
        def keep(net):
            return {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    """,
    reason="`detach` leaves the gradient behind, `clone` makes new memory: only both together give a copy that stays what it is.",
)
def keep_copies(keep):
    """A copy of every parameter that stays as it is while the network trains."""
    net = RichBoyNet(6, 5)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    kept = call(keep, net)
    if not isinstance(kept, dict):
        raise Uncheckable(f"A dictionary from names to tensors is asked for; this is a {type(kept).__name__}.")
    missing = [name for name in before if name not in kept]
    if missing and all(name.endswith("bias") for name in missing):
        raise Wrong("biases left out", f"{missing[0]} is not in it. A bias is trained too, and a proof that skips it proves less.")
    if missing and missing == list(before)[1:]:
        raise Wrong("a return inside the loop", "Only the first parameter is in it: `return` ends the function at once. Collect, then return.")
    if missing:
        named = ", ".join(missing[:3]) + ", …" * (len(missing) > 3)
        raise Wrong(None, f"{named} {'is' if len(missing) == 1 else 'are'} not in it; use the names of `named_parameters()`.")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)  # as an optimiser would: in place
    for name, value in before.items():
        copy = need_tensor(kept[name], f"kept[{name!r}]")
        if same(copy, value + 1):
            raise Wrong(
                "no memory of its own",
                f"After a step of training your {name} had changed too: `detach()`, `.data` and `state_dict()` only point at the "
                "same memory. Which call makes a new one?",
            )
        if not torch.equal(copy.detach(), value):
            raise Wrong(None, f"Your copy of {name} differs from the parameter.")
        if copy.requires_grad:
            raise Wrong("still part of the graph", f"Your {name} still asks for gradients; a copy should not: `detach()` it first.")
    return "It survived a step of training: that is what makes it a proof later."


@exercise(
    hints=(
        "Two lines are wrong. First: which images may an honest test look at?",
        "The network gives one row of ten logits for each image; along which dimension is the largest of the ten?",
    ),
    solution="""
        def accuracy(net, mnist):
            images, labels = mnist.test.tensors
            answers = net(images).argmax(dim=1)
            return (answers == labels).float().mean()
    """,
    reason="Only images that training never saw tell how well it reads new ones, and each row of logits has its own largest one.",
)
def accuracy(measure):
    """The share of unseen images that are answered rightly."""
    net = RichBoyNet(8, 8)
    with torch.no_grad():
        parts = []
        for size, right in ((60, 45), (40, 16)):
            images = torch.randn(size, 1, 28, 28)
            labels = net(images).argmax(dim=1)
            labels[right:] = (labels[right:] + 1) % 10
            parts.append(TensorDataset(images, labels))
    try:
        given = call(measure, net, Mnist(*parts, "sample"))
    except LearnerError as error:
        ten = "must match the size" in str(error.error) and "(10)" in str(error.error)
        if ten and not mentions(measure, "argmax", "max", "topk", "argsort", "sort"):
            raise Wrong(
                "all ten logits compared",
                "The ten logits of each image are compared with its label. Its answer is the *place* of the largest of them: which function gives it?",
            ) from None
        if ten:
            raise Wrong(
                "the best of the images, not of the logits",
                "`argmax(dim=0)` picks the best *image* for each digit. Each image has a row of ten logits: which dimension runs along it?",
            ) from None
        if "must match the size" in str(error.error):
            raise Wrong(
                "images and labels of different sets", "There are more answers than labels, or fewer: both must come from the test set."
            ) from None
        raise
    if isinstance(given, Evaluation):
        raise Uncheckable("That is a whole evaluation; the share is its `.accuracy`.")
    compare(
        given,
        0.4,
        {
            "tested on the training set": (
                0.75, "That is the share on images the network has been trained on: a network that learned them by heart gets 1.0."
            ),
            "wrong answers instead of right ones": (0.6, "That is the share of *wrong* answers."),
            "a count, not a share": (16, "That is how many are right; divide by the number of images."),
            "percent, not a share": (40, "Right in percent; the question asks for a share from 0 to 1."),
            "one answer for all images": (
                0, "Not one is right: `argmax()` without a dimension gives one place for the whole batch, not one answer for each image."
            ),
        },
        "On a network that is right on 45 of 60 training and 16 of 40 test images, 0.4 is expected.",
    )  # fmt: skip
    if not 0 <= numbers(given).item() <= 1:
        raise Wrong(None, "A share lies between 0 and 1.")
    return "Measured on images that training never saw, and one answer for each image."


def quiz() -> Quiz:
    """The recall quiz of notebook 1."""
    return Quiz((
        Question(
            "What is the shape of the weight of nn.Linear(784, 1000)?",
            "(1000, 784)",
            {
                "(1000, 784)": "One row for each output, one column for each input.",
                "(784, 1000)": "That is the order in which you name the sides; the weight stores one row for each output.",
                "(1000, 785)": "The bias is a tensor of its own.",
            },
        ),
        Question(
            "Which layer of RichBoyNet holds most parameters?",
            "linear2",
            {
                "linear1": "It sees the most pixels, but its two sides multiply to less.",
                "linear2": "It joins the two wide sides: 1000 × 2000.",
                "linear3": "It has only ten outputs.",
            },
        ),
        Question(
            "A network calls every image a 9. Which of its figures looks perfect?",
            "the wrong answers of the digit 9",
            {
                "accuracy": "It is right on one image in ten.",
                "the wrong answers of the digit 4": "All of them are wrong.",
                "the wrong answers of the digit 9": "None is wrong, so this figure alone proves nothing. Look at the other nine as well.",
            },
        ),
        Question(
            "Why does copies = dict(net.named_parameters()) prove nothing later?",
            "It holds the same tensors, which change with the network",
            {
                "It holds the same tensors, which change with the network": "Names for the same memory. detach().clone() makes memory of its own.",
                "It lacks the biases": "They are in it, under their own names.",
                "It holds random numbers": "It holds the parameters themselves.",
            },
        ),
    ))  # fmt: skip
