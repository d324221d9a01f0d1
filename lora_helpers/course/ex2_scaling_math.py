"""Notebook 2, The α/r scaling math: exercises 2.1 to 2.5, in this order, and the quiz."""

import math

import torch
from torch.nn import functional as F

from lora_helpers.course.exercise import Uncheckable, Wrong, call, compare, exercise, kind_of, need_tensor
from lora_helpers.course.quiz import Quiz, read_quiz


@exercise(
    hints="""
        How many rows and columns does A have? And B?
        A is r × in_features, B is out_features × r. Both are stored.
    """,
    solution="""
        def lora_parameters(in_features, out_features, rank):
            return rank * (in_features + out_features)
    """,
    reason="A holds r·in numbers and B holds out·r. Both are stored, so add them.",
    replies="""
        the product, not the factors: This is the size of BA, which is never stored. Count A and B themselves.
        multiplied where it adds: A and B are stored side by side: add their numbers.
        A alone: B is stored too.
        B alone: A is stored too.
        rank forgotten: This is right at rank 1. How many rows does A have at rank r?
        rank squared: Only one side of each matrix is r.
        rank added, not multiplied: A has r rows of in_features numbers: multiply its two sides. Do the same
            for B.
        the two sizes multiplied: A and B are stored side by side: add their sizes.
        brackets forgotten: `rank * in + out` multiplies only `in`: put `(in + out)` in brackets.
        a bias counted: LoRA adapts only the weight here. A and B have no bias.
    """,
)
def lora_parameters(count):
    """How many numbers do A and B hold at rank r?"""
    for n_in, n_out, r in ((11, 5, 3), (784, 1000, 4)):
        mistakes = {
            "the product, not the factors": n_in * n_out,
            "multiplied where it adds": r * n_in * n_out,
            "A alone": r * n_in,
            "B alone": r * n_out,
            "rank forgotten": n_in + n_out,
            "rank squared": r * r * (n_in + n_out),
            "rank added, not multiplied": r + n_in + n_out,
            "the two sizes multiplied": r * n_in * r * n_out,
            "brackets forgotten": r * n_in + n_out,
            "a bias counted": r * (n_in + n_out) + n_out,
        }
        words = f"Write down the shapes of A and B for in = {n_in}, out = {n_out}, r = {r}."
        compare(call(count, n_in, n_out, r), r * (n_in + n_out), mistakes, words)
    return "It grows with the *sum* of the sides. The full matrix grows with their product."


@exercise(
    hints="""
        Set the size of the adapter equal to the size of the weight, and solve for r.
        r = 784·1000 / (784 + 1000) = 439.46…. Which is the first whole rank above it?
    """,
    solution="first_rank_that_does_not_pay = 440",
    reason="The weight has 784,000 numbers. The adapter has 783,176 at rank 439 and 784,960 at rank 440.",
    replies="""
        the full rank: 784 is the highest rank of ΔW. A and B together outgrow the weight much earlier.
        one too low: At 439 the adapter is still a little smaller. Find the first rank that does *not* pay.
        one too high: One rank less already has more numbers than the weight. Find the *first* such rank.
        linear2 instead: This is the answer for `linear2` (1000 → 2000). The question is about `linear1`.
        not a whole rank: A rank is a whole number.
        half of one side: This is right for a square weight. Compare the two sizes as they are.
        half the mean side: This is near. The exact value is in·out/(in + out), which is half the mean only
            for a square.
    """,
)
def break_even(rank):
    """The first whole rank at which the adapter of linear1 (784 → 1000) has more numbers than its weight."""
    mistakes = {
        "the full rank": 784,
        "one too low": 439,
        "one too high": 441,
        "linear2 instead": 667,
        "not a whole rank": 784_000 / 1784,
        "half of one side": 392,
        "half the mean side": 892 / 2,
    }
    compare(rank, 440, mistakes, "Compare r·(784 + 1000) with 784·1000.")
    return "For a square d × d weight it is d/2. Ranks such as 8 or 16 are far below it."


@exercise(
    hints="""
        Which of B @ A and A @ B has the shape of the weight, (out_features, in_features)?
        The scale is the constant α divided by the r directions.
        (alpha / rank) * (B @ A)
    """,
    solution="""
        def update(A, B, alpha, rank):
            return (alpha / rank) * (B @ A)
    """,
    reason="B (out × r) times A (r × in) has the weight's shape, and α/r is LoRA's scale (section 4.1).",
    replies="""
        A and B swapped: A is r × in and B is out × r. Which order gives out × in?
        W added: This `W` is from a cell above and has another size. Return only the update, from A and B.
        entry by entry: `*` multiplies two tensors entry by entry. The matrix product is `@`.
        transposed: A weight is (out_features, in_features). Yours is the other way round.
        one number for a matrix: This is one number, such as a norm. Return ΔW, a matrix of the weight's
            shape.
        made from other tensors: Use what the function is given, not what a cell above made.
        α·r for α/r: Your update grows with the rank. α is *divided* by the number of directions, r.
        r/α for α/r: The fraction is upside down: a larger α should make the update larger.
        scale forgotten: BA is right. The scale α/r is missing.
        α for α/r: Your scale is α, not α/r. A real library shipped this, and its adapters were unusable.
        1/r for α/r: You divide by r, but α is missing.
        α//r for α/r: `//` drops the fraction: 7 // 2 is 3. Divide with `/`.
        scaled twice: The scale is in it twice. Multiply the product BA by it, not A and B each.
        α/√r for α/r: This is the scale of rsLoRA. Use the scale of the original paper.
    """,
)
def update(delta):
    """ΔW from A, B, α and r."""
    A, B, alpha, rank = torch.randn(2, 5), torch.randn(4, 2), 7, 2
    product = B @ A
    errors = {
        "shapes cannot be multiplied": "A and B swapped",
        "(784)": "W added",
        "must match the size": "entry by entry",
    }
    given = need_tensor(call(delta, A.clone(), B.clone(), alpha, rank, errors=errors), "ΔW")
    if given.shape == product.T.shape:
        raise Wrong("transposed")
    if not given.ndim:
        raise Wrong("one number for a matrix")
    if given.shape != product.shape:
        shapes = f"{tuple(product.shape)}. Yours is {tuple(given.shape)}."
        raise Wrong("made from other tensors", f"From this A and B, ΔW has the shape {shapes}")
    mistakes = {
        "α·r for α/r": alpha * rank * product,
        "r/α for α/r": rank / alpha * product,
        "scale forgotten": product,
        "α for α/r": alpha * product,
        "1/r for α/r": product / rank,
        "α//r for α/r": alpha // rank * product,
        "scaled twice": (alpha / rank) ** 2 * product,
        "α/√r for α/r": alpha / math.sqrt(rank) * product,
    }
    words = f"For α = {alpha} and r = {rank}, compare with (α/r)·BA, worked out by hand."
    compare(given, (alpha / rank) * product, mistakes, words)
    return "It has the weight's shape, and its rank is at most r."


@exercise(
    hints="""
        Print `ranks` and `alphas`: are they the same for all layers?
        Each layer has its own α and its own r, so each has its own scale.
    """,
    solution="""
        def scales(ranks, alphas):
            return {layer: alphas[layer] / ranks[layer] for layer in ranks}
    """,
    reason="Each adapter has its own scale. If you look it up by name, the order does not matter.",
    replies="""
        one α for all layers: You use the α of linear1 everywhere.
        the last or largest α for all layers: You divide 12 by each rank, but each layer has its own α.
        the first or smallest α for all layers: You use 5, the first and smallest α, everywhere. A real
            library took the first α it found.
        one rank for all layers: You use the rank of linear1 everywhere.
        matched by place, not by name: The two dictionaries have different orders. Look up each layer by its
            name.
        r/α for α/r: The fraction is upside down.
        α·r for α/r: α is *divided* by the number of directions, r.
    """,
)
def mixed_ranks(scales):
    """The scale of each layer, where layers differ in rank and in α."""
    ranks = {"linear1": 4, "linear2": 16, "linear3": 2}
    alphas = {"linear3": 5, "linear1": 8, "linear2": 12}  # in another order; linear1 is never first
    given = call(scales, dict(ranks), dict(alphas))
    if not isinstance(given, dict) or set(given) != set(ranks):
        found = f"This is {kind_of(given)}."
        if isinstance(given, dict):
            found = f"Yours has {', '.join(map(str, given)) or 'none'}. (A `return` inside a loop ends it.)"
        raise Uncheckable(f"Return a dictionary with one scale for each of {', '.join(ranks)}. {found}")
    mistakes = {
        "one α for all layers": [8 / rank for rank in ranks.values()],
        "the last or largest α for all layers": [12 / rank for rank in ranks.values()],
        "the first or smallest α for all layers": [5 / rank for rank in ranks.values()],
        "one rank for all layers": [alphas[layer] / 4 for layer in ranks],
        "matched by place, not by name": [5 / 4, 8 / 16, 12 / 2],
        "r/α for α/r": [rank / alphas[layer] for layer, rank in ranks.items()],
        "α·r for α/r": [rank * alphas[layer] for layer, rank in ranks.items()],
    }
    truth = [alphas[layer] / rank for layer, rank in ranks.items()]
    words = "Return one scale for each layer: its own α divided by its own r."
    compare([given[layer] for layer in ranks], truth, mistakes, words)
    return "Each adapter has its own scale, whatever the order of the layers."


@exercise(
    hints="""
        In the table above, which row learned nothing? Make such an A of shape (2, 5) and B of shape (4, 2).
        A start with only B = 0 learns. So “ΔW is zero” cannot be the reason.
    """,
    solution="""
        dead_A, dead_B = torch.zeros(2, 5), torch.zeros(4, 2)
        why = "b"
    """,
    reason="dL/dB = s·G·Aᵀ and dL/dA = s·Bᵀ·G. If A and B are zero, both gradients stay zero.",
    replies="""
        A and B swapped: A should be (2, 5) and B (4, 2).
        only B is zero: This is the start of LoRA itself: B moves in the first step, A from the second. It
            learns.
        only A is zero: This is the start of LoRA, mirrored: A moves in the first step, B from the second. It
            learns.
        nothing is zero: A and B hold numbers that are not zero, and twenty steps moved them.
        ΔW = 0 taken for the reason: If only B is zero, ΔW is zero too, and yet it learns. A value of zero can
            still have a slope that is not zero.
        the optimiser blamed: Adam adds a small ε to prevent this, and SGD does not move either. Look at the
            gradients themselves.
        the learning rate blamed: No learning rate helps: any rate times a gradient of zero is zero.
    """,
)
def dead_start(A, B, why):
    """A start from which LoRA never learns anything, and the reason."""
    A, B = need_tensor(A, "A").detach().clone().float(), need_tensor(B, "B").detach().clone().float()
    if A.shape == (4, 2) and B.shape == (2, 5):
        raise Wrong("A and B swapped")
    if A.shape != (2, 5) or B.shape != (4, 2):
        raise Wrong(None, f"A should be (2, 5) and B (4, 2), not {tuple(A.shape)} and {tuple(B.shape)}.")
    if not (A.isfinite().all() and B.isfinite().all()):
        raise Uncheckable("A and B should hold finite numbers. Yours hold a `nan` or an `inf`.")
    if _moves(A, B):
        if A.any() and B.any():
            raise Wrong("nothing is zero")
        raise Wrong("only B is zero" if A.any() else "only A is zero")
    reason = why.strip(" '\"().:").lower() if isinstance(why, str) else ""
    if reason not in ("a", "b", "c", "d"):
        raise Uncheckable('Nothing moves, as the exercise asks. Now write one letter in `why`, such as "a".')
    if reason != "b":
        blamed = {"a": "ΔW = 0 taken for the reason", "c": "the optimiser blamed"}
        raise Wrong(blamed.get(reason, "the learning rate blamed"))
    return "Twenty steps of Adam moved nothing: the gradient of each matrix has the other one as a factor."


def _moves(A: torch.Tensor, B: torch.Tensor) -> bool:
    """Whether twenty steps of training change A (2×5) or B (4×2)."""
    trained = [A.clone().requires_grad_(), B.clone().requires_grad_()]
    optimizer = torch.optim.Adam(trained, lr=0.1)
    x, W = torch.randn(6, 5), torch.randn(4, 5)
    for _ in range(20):
        loss = F.cross_entropy(F.linear(x, W + trained[1] @ trained[0]), torch.arange(6) % 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return not (torch.equal(trained[0], A) and torch.equal(trained[1], B))


def quiz() -> Quiz:
    """The recall quiz of notebook 2."""
    return read_quiz("""
        The rank r is the number of…
        ✘ columns of A and rows of B: These are the sides of the layer: in_features and out_features.
        ✘ layers with an adapter: Each adapted layer has its own A and B.
        ✔ rows of A and columns of B: It is the inner side of the product BA.

        What does LoRA do to the weight W?
        ✔ W stays whole, and an update of low rank is added: W + (α/r)·BA.
        ✘ It splits W into two thin matrices: W keeps its rank, which may be full. Only the *update* is thin.
        ✘ It removes the small entries of W: This is pruning, another idea.

        Both A and B start random. What goes wrong?
        ✘ Nothing is ever learned: This happens if both are zero. If both are random, both get gradients.
        ✔ The network is changed before the first step: BA is not zero, so ΔW is noise at the start.
        ✘ BA has full rank: Its rank is still at most r.

        α stays 1 and r grows; A starts from N(0, 1), and Adam trains our network. What does ‖ΔW‖ do?
        ✘ It stays the same: People often say so, but it is false here: see the table.
        ✘ It grows with r: It grows without a scale. α/r takes away more than the new directions add.
        ✔ It falls, about like 1/√r: But the repaired nines stay nearly the same from rank 4 on.
    """)
