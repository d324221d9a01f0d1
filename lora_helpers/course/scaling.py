"""Notebook 2, The α/r scaling math: its exercises and its quiz."""

import math

import torch
from torch.nn import functional as F

from lora_helpers.course.exercise import LearnerError, Uncheckable, Wrong, call, compare, exercise, kind_of, need_tensor
from lora_helpers.course.quiz import Question, Quiz


@exercise(
    hints=(
        "How many rows and columns has A? And B?",
        "A is r × in_features, B is out_features × r. Both are stored, one beside the other.",
    ),
    solution="""
        def lora_parameters(in_features, out_features, rank):
            return rank * (in_features + out_features)
    """,
    reason="A holds r·in numbers and B holds out·r; they are stored side by side, so they add.",
)
def lora_parameters(count):
    """How many numbers do A and B hold at rank r?"""
    for n_in, n_out, r in ((11, 5, 3), (784, 1000, 4)):
        compare(
            call(count, n_in, n_out, r),
            r * (n_in + n_out),
            {
                "the product, not the factors": (n_in * n_out, "That is the size of BA, which is never stored. Count A and B themselves."),
                "multiplied where it adds": (r * n_in * n_out, "A and B stand side by side: their numbers add."),
                "A alone": (r * n_in, "B is stored too."),
                "B alone": (r * n_out, "A is stored too."),
                "rank forgotten": (n_in + n_out, "Right at rank 1. How many rows has A at rank r?"),
                "rank squared": (r * r * (n_in + n_out), "Only one side of each matrix is r."),
                "rank added, not multiplied": (r + n_in + n_out, "A has r rows of in_features numbers: its sides multiply. So do B's."),
                "the two sizes multiplied": (r * n_in * r * n_out, "A and B stand side by side: add their numbers."),
                "brackets forgotten": (r * n_in + n_out, "`rank * in + out` multiplies the first alone: put `(in + out)` in brackets."),
                "a bias counted": (
                    r * (n_in + n_out) + n_out, "LoRA here adapts the weight alone; A and B have no bias."
                ),
            },
            f"Write down the shapes of A and B for in = {n_in}, out = {n_out}, r = {r}.",
        )  # fmt: skip
    return "It grows with the *sum* of the sides; the full matrix grows with their product."


@exercise(
    hints=(
        "Set the size of the adapter equal to the size of the weight, and solve for r.",
        "r = 784·1000 / (784 + 1000) = 439.46…; which whole rank is the first beyond it?",
    ),
    solution="first_rank_that_does_not_pay = 440",
    reason="At 439 the adapter still has fewer numbers than the weight (783,176 of 784,000), at 440 it has more (784,960).",
)
def break_even(rank):
    """The first whole rank at which the adapter of linear1 (784 → 1000) has more numbers than its weight."""
    compare(
        rank,
        440,
        {
            "the full rank": (784, "784 is the highest rank that ΔW can have. Long before it, A and B together outgrow the weight."),
            "one too low": (439, "At 439 the adapter is still a little smaller than the weight; the first that does *not* pay is asked for."),
            "one too high": (441, "At the rank just below yours the adapter is larger than the weight already; the *first* such rank is asked for."),
            "linear2 instead": (667, "That is the answer for `linear2` (1000 → 2000); asked is `linear1` (784 → 1000)."),
            "not a whole rank": (784_000 / 1784, "There is no rank between two whole numbers."),
            "half of one side": (392, "Half a side is the answer for a square weight. Compare the two sizes as they are."),
            "half the mean side": (892 / 2, "Nearly: the break-even rank is in·out/(in + out), which is half the mean only for a square."),
        },
        "Compare r·(784 + 1000) with 784·1000.",
    )
    return "For a square d × d weight it is d/2. Anyone who uses rank 8 or 16 is far below it."


@exercise(
    hints=(
        "Which of B @ A and A @ B has the shape of the weight, (out_features, in_features)?",
        "The scale is the constant α shared out over r directions.",
        "(alpha / rank) * (B @ A)",
    ),
    solution="""
        def update(A, B, alpha, rank):
            return (alpha / rank) * (B @ A)
    """,
    reason="B (out × r) times A (r × in) has the weight's shape, and α/r is LoRA's scale (section 4.1).",
)
def update(delta):
    """ΔW from A, B, α and r."""
    A, B, alpha, rank = torch.randn(2, 5), torch.randn(4, 2), 7, 2
    try:
        given = call(delta, A.clone(), B.clone(), alpha, rank)
    except LearnerError as error:
        if "shapes cannot be multiplied" in str(error.error):
            raise Wrong(
                "A and B swapped", "The inner sides must meet: A is r × in and B is out × r, so only one order gives out × in."
            ) from None
        if "must match the size" in str(error.error) and "(784)" in str(error.error):
            raise Wrong("W added", "That `W` is one of a cell above, and of another size. Asked is the update alone, from A and B.") from None
        if "must match the size" in str(error.error):
            raise Wrong("entry by entry", "`*` multiplies two tensors entry by entry; the matrix product is `@`.") from None
        raise
    return _judge_update(given, B @ A, alpha, rank)


def _judge_update(given, product: torch.Tensor, alpha: float, rank: int) -> str:
    if tuple(need_tensor(given, "ΔW").shape) == tuple(product.T.shape) != tuple(product.shape):
        raise Wrong("transposed", "A weight is (out_features, in_features); yours is the other way round.")
    if not given.ndim:
        raise Wrong("one number for a matrix", "That is a single number, such as a norm. ΔW itself is asked for, a matrix of the weight's shape.")
    if given.shape != product.shape:
        raise Wrong(
            "made from other tensors", f"From the A and B given here ΔW is {tuple(product.shape)}; yours is {tuple(given.shape)}. "
            "Use what the function is given, not what a cell above made."
        )  # fmt: skip
    compare(
        given,
        (alpha / rank) * product,
        {
            "α·r for α/r": (alpha * rank * product, "Your update grows with the rank; α is *shared out* over the r directions."),
            "r/α for α/r": (rank / alpha * product, "The fraction is upside down: with a larger α the update should be larger."),
            "scale forgotten": (product, "BA is right; the scale α/r is missing."),
            "α for α/r": (alpha * product, "The scale is α instead of α/r: a real library shipped this, and its adapters were unusable."),
            "1/r for α/r": (product / rank, "You divide by r but leave α out."),
            "α//r for α/r": (alpha // rank * product, "`//` throws the fraction away: 7 // 2 is 3. Divide with `/`."),
            "scaled twice": ((alpha / rank) ** 2 * product, "The scale is in it twice: multiply the product BA by it, not A and B each."),
            "α/√r for α/r": (alpha / math.sqrt(rank) * product, "That is rsLoRA's scale; asked is the original paper's."),
        },
        f"For α = {alpha} and r = {rank}, compare with (α/r)·BA worked out by hand.",
    )
    return "Its shape is the weight's, its rank at most r."


_WHY = {
    "a": "Because ΔW is zero, the loss does not change.",
    "b": "Because the gradient of each has the other as a factor.",
    "c": "Because Adam divides by the size of the gradient.",
    "d": "Because the learning rate is too small for zeros.",
}


@exercise(
    hints=(
        "Two tensors, A of shape (2, 5) and B of shape (4, 2). In the table above, which row learned nothing?",
        "Does a start with only B = 0 learn? Then 'ΔW is zero' cannot be the reason.",
    ),
    solution="""
        A, B = torch.zeros(2, 5), torch.zeros(4, 2)
        why = "b"
    """,
    reason="dL/dB = s·G·Aᵀ and dL/dA = s·Bᵀ·G: with both zero, both gradients are zero, at the first step and at every later one.",
)
def dead_start(A, B, why):
    """A start from which LoRA never learns anything, and the reason."""
    A, B = (need_tensor(part, name).detach().clone().float() for part, name in ((A, "A"), (B, "B")))
    if A.shape != (2, 5) or B.shape != (4, 2):
        swapped = A.shape == (4, 2) and B.shape == (2, 5)
        raise Wrong("A and B swapped" if swapped else None, f"A should be (2, 5) and B (4, 2); yours are {tuple(A.shape)} and {tuple(B.shape)}.")
    if not (A.isfinite().all() and B.isfinite().all()):
        raise Uncheckable("A and B should hold finite numbers; in yours there is a `nan` or an `inf`.")
    start = [A.clone(), B.clone()]
    A.requires_grad_(), B.requires_grad_()
    optimizer = torch.optim.Adam([A, B], lr=0.1)
    x, W = torch.randn(6, 5), torch.randn(4, 5)
    for _ in range(20):
        loss = F.cross_entropy(F.linear(x, W + B @ A), torch.arange(6) % 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    moved = [not torch.equal(now, then) for now, then in zip((A, B), start)]
    if any(moved):
        if start[0].any() and not start[1].any():
            raise Wrong("only B is zero", "That is LoRA's own start: B moved in the first step, A from the second. It learns.")
        if start[1].any() and not start[0].any():
            raise Wrong("only A is zero", "The mirror image of LoRA's start: A moved in the first step, B from the second. It learns.")
        raise Wrong("nothing is zero", "Neither A nor B is zero all over, and twenty steps moved them.")
    if not isinstance(why, str) or why.strip(" '\"().:").lower() not in _WHY:
        raise Uncheckable(f"The start is dead, as asked. Now `why` should be one letter in quotes: {', '.join(_WHY)}.")
    why = why.strip(" '\"().:").lower()
    replies = {
        "a": ("ΔW = 0 taken for the reason", "With B alone zero, ΔW is zero too, and yet it learns. Zero *now* does not mean zero slope."),
        "c": ("the optimiser blamed", "Adam adds a small ε to avoid that, and SGD would stay put as well. Look at the gradients themselves."),
        "d": ("the learning rate blamed", "No rate helps: any rate times a gradient of zero is zero."),
    }
    if why in replies:
        raise Wrong(*replies[why])
    return "Twenty steps of Adam moved nothing: each gradient waits for the other matrix."


@exercise(
    hints=(
        "Print `ranks` and `alphas`: do the layers share them?",
        "Each layer has its own α and its own r, so each has its own scale.",
    ),
    solution="""
        def scales(ranks, alphas):
            return {layer: alphas[layer] / ranks[layer] for layer in ranks}
    """,
    reason="The scale belongs to an adapter, not to a network. Looked up by name, it cannot depend on the order of the layers.",
)
def mixed_ranks(scales):
    """The scale of each layer, where layers differ in rank and in α."""
    ranks = {"linear1": 4, "linear2": 16, "linear3": 2}
    alphas = {"linear3": 5, "linear1": 8, "linear2": 12}  # in another order, on purpose; linear1 has no extreme α and no extreme place
    given = call(scales, dict(ranks), dict(alphas))
    if not isinstance(given, dict) or set(given) != set(ranks):
        found = f"yours has {', '.join(map(str, given)) or 'none'}" if isinstance(given, dict) else f"this is {kind_of(given)}"
        raise Uncheckable(f"A dictionary with one scale for each of {', '.join(ranks)} is asked for; {found}. (A `return` inside a loop ends it.)")
    as_list = [given[layer] for layer in ranks]
    compare(
        as_list,
        [alphas[layer] / rank for layer, rank in ranks.items()],
        {
            "one α for all layers": ([8 / r for r in ranks.values()], "Your α is that of linear1 everywhere."),
            "the last or largest α for all layers": ([12 / r for r in ranks.values()], "You divide 12 by each rank, but each layer has its own α."),
            "the first or smallest α for all layers": (
                [5 / r for r in ranks.values()],
                "You use one α for all, the first or the smallest, whatever the layer; a real library took the first that came.",
            ),
            "one rank for all layers": ([alphas[layer] / 4 for layer in ranks], "Your r is that of linear1 everywhere."),
            "matched by place, not by name": (
                [a / r for a, r in zip(alphas.values(), ranks.values())],
                "The two dictionaries are in different orders; look up each layer by its name.",
            ),
            "r/α for α/r": ([rank / alphas[layer] for layer, rank in ranks.items()], "The fraction is upside down."),
            "α·r for α/r": ([rank * alphas[layer] for layer, rank in ranks.items()], "α is *shared out* over the r directions."),
        },
        "One scale for each layer is asked for: its own α divided by its own r.",
    )
    return "Each adapter carries its own scale, whatever the order of the layers."


def quiz() -> Quiz:
    """The recall quiz of notebook 2."""
    return Quiz((
        Question(
            "The rank r is the number of…",
            "rows of A and columns of B",
            {
                "columns of A and rows of B": "Those are the sides of the layer: in_features and out_features.",
                "layers with an adapter": "Each adapted layer has its own A and B.",
                "rows of A and columns of B": "The inner side, at which the two meet in BA.",
            },
        ),
        Question(
            "What does LoRA do to the weight W?",
            "W stays whole; an update of low rank is added",
            {
                "W stays whole; an update of low rank is added": "W + (α/r)·BA.",
                "It splits W into two thin matrices": "W may have full rank, and it keeps it: only the *update* is thin.",
                "It removes the small entries of W": "That is pruning, another idea.",
            },
        ),
        Question(
            "Both A and B start random. What goes wrong?",
            "The network is changed before the first step",
            {
                "Nothing is ever learned": "That is both *zero*. With both random, both receive gradients.",
                "The network is changed before the first step": "BA is not zero, so ΔW is noise at the start.",
                "BA has full rank": "Its rank is still at most r.",
            },
        ),
        Question(
            "α stays 1 and r grows; A starts from N(0, 1), and Adam trains our network. What does ‖ΔW‖ do?",
            "It falls, about like 1/√r",
            {
                "It stays the same": "The usual sentence, and false here: see the table.",
                "It grows with r": "It does so without the scale; α/r takes more away than the extra directions add.",
                "It falls, about like 1/√r": "The nines repaired stay nearly level from rank 4 on.",
            },
        ),
    ))  # fmt: skip
