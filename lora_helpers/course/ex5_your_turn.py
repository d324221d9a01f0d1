"""Notebook 5, Your turn: what its project uses, exercises 5.1 to 5.4, in this order, and the quiz."""

import torch
from torch.utils.data import TensorDataset

from lora_helpers.checks import check_whole
from lora_helpers.course.exercise import (
    Uncheckable,
    Wrong,
    call,
    compare,
    exercise,
    need_tensor,
    numbers,
    same,
)
from lora_helpers.course.quiz import Quiz, read_quiz
from lora_helpers.data import as_tensors
from lora_helpers.experiments import Setting
from lora_helpers.training import Evaluation

PARAMETERS_PER_RANK = 6_794  # of A and B on the three layers of RichBoyNet
BASE_PARAMETERS = 2_807_010


def check_settings(digit: int, budget: int, batches: int, share: float) -> None:
    """Raises ValueError if a setting of the project is not allowed. `add_lora` checks rank, α and layers."""
    Setting(digit=digit, batches=batches, share=share)
    check_whole("batches", batches)
    check_whole("budget", budget)


def halves(dataset: TensorDataset) -> tuple[TensorDataset, TensorDataset]:
    """Two halves of `dataset`: the images of each digit go to one and to the other in turn."""
    images, labels = as_tensors(dataset)
    places = [(labels == digit).nonzero()[:, 0] for digit in range(10)]
    parts = (torch.cat([found[start::2] for found in places]) for start in (0, 1))
    return tuple(TensorDataset(images[part], labels[part]) for part in parts)


def fair_score(result: Evaluation, digit: int) -> float:
    """From 0 to 1: the harmonic mean of the recall of `digit` and the mean recall of the other nine.

    It is near the smaller of the two, and 0 for a network that gives the same answer to every image.
    Source: van Rijsbergen, Information Retrieval (1979), chapter 7, on precision and recall.
    """
    taught = result.recall[digit].item()
    others = (result.recall.sum().item() - taught) / 9
    return 2 * taught * others / (taught + others) if taught + others else 0.0


@exercise(
    hints="""
        At rank 1 the three adapters hold 6,794 numbers (in Python 6_794), at rank 2 twice as many.
        `//` divides and rounds down, so only whole ranks are left.
    """,
    solution="""
        def largest_rank(budget):
            return budget // 6_794
    """,
    reason="Each rank costs 6,794 numbers on the three layers together, and only whole ranks count.",
    replies="""
        over the budget: Round down, even to 0.
        not a whole rank: A rank is a whole number.
        the base counted: The base is frozen. The budget is for A and B.
        only one layer counted: This is right for linear1 alone, but three layers are adapted.
    """,
)
def largest_rank(rank_for):
    """The largest rank on all three layers that a budget of trained parameters allows."""
    for budget in (50_000, 20_382, 5_000):
        ranks = budget // PARAMETERS_PER_RANK
        given = call(rank_for, budget)
        if same(given, ranks + 1):
            cost = (ranks + 1) * PARAMETERS_PER_RANK
            raise Wrong("over the budget", f"This rank costs {cost:,} numbers, and the budget is {budget:,}.")
        mistakes = {
            "not a whole rank": budget / PARAMETERS_PER_RANK,
            "the base counted": (budget - BASE_PARAMETERS) // PARAMETERS_PER_RANK,
            "only one layer counted": budget // 1_784,
        }
        words = f"The budget is {budget:,}, and one rank costs {PARAMETERS_PER_RANK:,}. How many ranks fit?"
        compare(given, ranks, mistakes, words)
    return "A budget below 6,794 allows no rank on all three layers. Adapt fewer layers then."


@exercise(
    hints="""
        You need two numbers: the recall of the digit, and the mean recall of the other nine.
        A mean gives 0.5 to a network that calls everything a 9. Which mean is 0 if one of the two is 0?
        The harmonic mean: 2·a·b / (a + b).
    """,
    solution="""
        def score(result, digit):
            taught = result.recall[digit]
            others = (result.recall.sum() - taught) / 9
            return 2 * taught * others / (taught + others) if taught + others else 0
    """,
    reason="The harmonic mean is near the smaller of the two. So the digit and the others must both be good.",
    replies="""
        only the taught digit: A network that calls everything by that digit would score 1.
        only what was kept: A network that learned nothing would score best.
        the smaller of the two: This is near, but it does not see the larger one at all.
        accuracy: In accuracy the taught digit is one of ten: to learn it badly would cost almost nothing.
        a plain mean: A network that calls everything by that digit would still score 0.5.
        the product: Two recalls of 1/2 would give 1/4. A mean lies between the two: 2ab/(a + b).
        the geometric mean: This mean sees both. Use the harmonic mean, 2ab/(a + b).
        the 2 forgotten: Two recalls of 1 would score one half: there is a 2 on top.
        brackets forgotten: `/ a + b` divides by a and then adds b: put `(a + b)` in brackets.
        a sum for the mean of nine: You add up the nine recalls of the others. Divide by 9.
        divided by ten, not nine: There are nine other digits. Divide their sum by 9.
        percent, not a share: This is right in percent. Return a score from 0 to 1.
        precision for recall: This is the precision of the digit, and the other digits are missing.
        the others left out: Recall and precision judge only that digit. What happened to the other nine?
        all ten recalled alike: Here the taught digit counts no more than any other.
        the digit counted among the others: The mean of the *other nine* must leave the digit out.
    """,
)
def score(measure):
    """A score from 0 to 1 that counts what was learned and what was kept."""
    results = []
    for digit, own, calls in ((9, 12, 8), (3, -12, 0)):  # the digit is better than the others, then worse
        confusion = torch.randint(0, 4, (10, 10)) + 20 * torch.eye(10, dtype=torch.int64)
        confusion[digit, digit] += own
        confusion[:, digit] += calls
        results.append((Evaluation(confusion, torch.zeros(0, dtype=torch.int64)), digit))
    answers = [call(measure, *pair) for pair in results]
    given = [numbers(answer).item() if numbers(answer).numel() == 1 else answer for answer in answers]
    mistakes = {name: [f(r, d, *_recalls(r, d)) for r, d in results] for name, f in _SCORES.items()}
    truth = [fair_score(*pair) for pair in results]
    words = "For two networks, return the harmonic mean of the digit's recall and the others' mean recall."
    compare(given, truth, mistakes, words)
    return "It is 0 for a network that gives one answer to everything, and it falls with the worse one."


def _recalls(result: Evaluation, digit: int) -> tuple[float, float]:
    taught = result.recall[digit].item()
    return taught, (result.recall.sum().item() - taught) / 9


def _harmonic(a: float, b: float) -> float:
    return 2 * a * b / (a + b)


# The score of each misconception, from the result r, the digit d, its recall a and the others' mean recall b.
_SCORES = {
    "only the taught digit": lambda r, d, a, b: a,
    "only what was kept": lambda r, d, a, b: b,
    "the smaller of the two": lambda r, d, a, b: min(a, b),
    "accuracy": lambda r, d, a, b: r.accuracy,
    "a plain mean": lambda r, d, a, b: (a + b) / 2,
    "the product": lambda r, d, a, b: a * b,
    "the geometric mean": lambda r, d, a, b: (a * b) ** 0.5,
    "the 2 forgotten": lambda r, d, a, b: a * b / (a + b),
    "brackets forgotten": lambda r, d, a, b: 2 * a * b / a + b,
    "a sum for the mean of nine": lambda r, d, a, b: _harmonic(a, 9 * b),
    "divided by ten, not nine": lambda r, d, a, b: _harmonic(a, 0.9 * b),
    "percent, not a share": lambda r, d, a, b: 100 * _harmonic(a, b),
    "precision for recall": lambda r, d, a, b: r.precision[d].item(),
    "the others left out": lambda r, d, a, b: _harmonic(a, r.precision[d].item()),
    "all ten recalled alike": lambda r, d, a, b: r.recall.mean().item(),
    "the digit counted among the others": lambda r, d, a, b: _harmonic(a, r.recall.mean().item()),
}


@exercise(
    hints="""
        Put B₁ and B₂ side by side, and A₁ above A₂. What is the product of the two?
        `torch.cat` along the rank: it is the rows of A (dim 0) and the columns of B (dim 1).
    """,
    solution="""
        def add_adapters(A1, B1, A2, B2):
            return torch.cat([A1, A2], dim=0), torch.cat([B1, B2], dim=1)
    """,
    reason="The product of the stacks is B₁A₁ + B₂A₂. Its rank can be r₁ + r₂, so A and B must grow.",
    replies="""
        stacked along the wrong side: The rank is the rows of A and the columns of B: stack along these.
        A and B swapped: Return A first, then B.
        A and B added apart: (B₁ + B₂)(A₁ + A₂) has two extra products, B₁A₂ and B₂A₁. To add the parts is not
            to add the updates.
        A and B averaged apart: The average mixes each A with the other's B. This is neither adapter.
        stacked in two orders: Each A met the other's B: stack both in the same order.
        only one of them: The second adapter is missing.
        halved: This is the mean of the two. The exercise asks for the sum.
        a larger rank than needed: The product is right, but a rank of 3 + 3 is enough.
    """,
)
def add_adapters(combine):
    """One A and one B whose product is the sum of two adapters' products."""
    A1, A2, B1, B2 = torch.randn(3, 9), torch.randn(3, 9), torch.randn(8, 3), torch.randn(8, 3)
    total = B1 @ A1 + B2 @ A2
    errors = {"Sizes of tensors must match": "stacked along the wrong side"}
    given = call(combine, A1.clone(), B1.clone(), A2.clone(), B2.clone(), errors=errors)
    if isinstance(given, torch.Tensor) and same(given, total):
        raise Uncheckable("You return the sum of the updates. Return A and B whose product it is.")
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise Uncheckable("Return two tensors: A, B.")
    A, B = (need_tensor(part, name) for part, name in zip(given, "AB"))
    if A.ndim != 2 or B.ndim != 2:
        raise Uncheckable(
            "A and B should be matrices. `torch.cat` joins two; `torch.stack` adds a dimension."
        )
    if A.shape == (3, 18) or B.shape == (16, 3):
        raise Wrong("stacked along the wrong side")
    if B.shape[1] != A.shape[0]:
        words = f"B has {B.shape[1]} columns and A has {A.shape[0]} rows. They must be equal."
        raise Wrong("A and B swapped" if A.shape[1] == B.shape[0] else None, words)
    mistakes = {
        "A and B added apart": (B1 + B2) @ (A1 + A2),
        "A and B averaged apart": (B1 + B2) / 2 @ ((A1 + A2) / 2),
        "stacked in two orders": B2 @ A1 + B1 @ A2,
        "only one of them": B1 @ A1,
        "halved": total / 2,
    }
    compare(B @ A, total, mistakes, "B @ A should be B₁A₁ + B₂A₂.")
    if len(A) > 6:
        raise Wrong("a larger rank than needed", f"A has {len(A)} rows, so the rank is {len(A)}.")
    return "Two adapters of rank 3 need rank 6: this is the price of an exact sum."


@exercise(
    hints="""
        How many numbers does the adapter of rank r hold on the three layers?
        A float32 takes four bytes.
    """,
    solution="""
        def adapter_bytes(rank):
            return 4 * 6_794 * rank
    """,
    reason="6,794 numbers for each rank, four bytes each. The network takes 11,228,040 bytes, only once.",
    replies="""
        numbers, not bytes: This is how many numbers. A float32 takes four bytes.
        bits: These are bits. Eight bits are a byte.
        the whole network: The base is not stored again for each adapter. This is the point of LoRA.
        rank squared: Each rank adds the same number of bytes: multiply by the rank only once.
        rank forgotten: This is right at rank 1. What about other ranks?
        the base instead: This is the base. Count only A and B.
        one layer of three: This is `linear1` alone. linear2 and linear3 have A and B too.
        kilobytes: These are units of 1,024 bytes. The question asks for bytes.
        double precision: Eight bytes would be float64. These tensors are float32.
        half precision: Two bytes would be float16. These tensors are float32.
    """,
)
def adapter_bytes(size):
    """How many bytes do the numbers of a rank-r adapter take on disk, in float32?"""
    for rank in (7, 3):  # at rank 8, r² would look like bits
        held = PARAMETERS_PER_RANK * rank
        mistakes = {
            "numbers, not bytes": held,
            "bits": 32 * held,
            "the whole network": 4 * (BASE_PARAMETERS + held),
            "rank squared": 4 * held * rank,
            "rank forgotten": 4 * PARAMETERS_PER_RANK,
            "the base instead": 4 * BASE_PARAMETERS,
            "one layer of three": 4 * 1_784 * rank,
            "kilobytes": 4 * held / 1024,
            "double precision": 8 * held,
            "half precision": 2 * held,
        }
        words = f"At rank {rank}: count the numbers of A and B on all three layers, then their bytes."
        compare(call(size, rank), 4 * held, mistakes, words)
    return "About 27 kB for each task at rank 1. A whole network takes 11 MB."


def quiz() -> Quiz:
    """The recall quiz of notebook 5."""
    return read_quiz("""
        Two adapters of rank 4 are added exactly. The sum has a rank of at most…
        ✘ 4: Only if both happen to use the same directions.
        ✔ 8: It needs the columns of both B's and the rows of both A's.
        ✘ 16: Ranks add. They do not multiply.

        Which of these best prevents forgetting?
        ✔ a share of the other digits among the training images: Then training corrects a network that gives
            the taught digit too often.
        ✘ a larger α: It makes the update larger, and with it the forgetting.
        ✘ more batches of the same digit: They push further in the same direction.

        What must be stored for ten tasks on one base?
        ✘ ten networks: This is full fine-tuning.
        ✘ ten adapters: An adapter is an update *to* a base. Without the base it is useless.
        ✔ one base and ten adapters: And each adapter is small.

        You merged an adapter and now subtract it again. Are the base's bits back?
        ✔ Perhaps not, because both steps round: Keep the base, or switch LoRA off instead.
        ✘ Yes, always: In float32 a few of the weights differ by rounding.
    """)
