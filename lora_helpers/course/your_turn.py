"""Notebook 5, Your turn: its exercises and its quiz."""

import torch
from torch.utils.data import TensorDataset

from lora_helpers.checks import check_whole
from lora_helpers.course.exercise import LearnerError, Uncheckable, Wrong, call, compare, exercise, need_tensor, numbers, same
from lora_helpers.course.quiz import Question, Quiz
from lora_helpers.data import as_tensors
from lora_helpers.finetuning import Settings
from lora_helpers.training import Evaluation

PARAMETERS_PER_RANK = 6_794  # of A and B on the three layers of RichBoyNet


def check_settings(digit: int, budget: int, batches: int, share: float) -> None:
    """Raises ValueError, saying what is allowed, where a setting of the project is out of range; rank, α and layers `add_lora` checks."""
    Settings(digit=digit, batches=batches, share=share)
    check_whole("batches", batches)
    check_whole("budget", budget)


def halves(dataset: TensorDataset) -> tuple[TensorDataset, TensorDataset]:
    """`dataset` in two parts: of each digit every other image, and those between."""
    images, labels = as_tensors(dataset)
    places = [(labels == digit).nonzero()[:, 0] for digit in range(10)]
    parts = (torch.cat([found[start::2] for found in places]) for start in (0, 1))
    return tuple(TensorDataset(images[part], labels[part]) for part in parts)


def fair_score(result: Evaluation, digit: int) -> float:
    """From 0 to 1: the harmonic mean of the recall of `digit` and the mean recall of the other nine.

    Near the smaller of the two; 0 for a network that gives one answer to everything.
    Source: van Rijsbergen, Information Retrieval (1979), chapter 7, where precision and recall are joined so.
    """
    taught = result.recall[digit].item()
    others = (result.recall.sum().item() - taught) / 9
    return 2 * taught * others / (taught + others) if taught + others else 0.0


@exercise(
    hints=(
        "At rank 1 the three adapters together hold 6,794 numbers (write 6_794 in Python); at rank 2, twice as many.",
        "Whole division, `//`, leaves no part of a rank over.",
    ),
    solution="""
        def largest_rank(budget):
            return budget // 6_794
    """,
    reason="Each rank costs 6,794 numbers on the three layers together, so the budget holds as many ranks as fit whole.",
)
def largest_rank(rank_for):
    """The largest rank on all three layers that a budget of trained parameters allows."""
    for budget in (50_000, 20_382, 5_000):
        ranks = budget // PARAMETERS_PER_RANK
        compare(
            call(rank_for, budget),
            ranks,
            {
                "over the budget": (
                    ranks + 1,
                    f"With {budget:,} numbers, that rank costs {(ranks + 1) * PARAMETERS_PER_RANK:,}: round down{'' if ranks else ', to 0'}.",
                ),
                "not a whole rank": (budget / PARAMETERS_PER_RANK, "A rank is a whole number."),
                "the base counted": ((budget - 2_807_010) // PARAMETERS_PER_RANK, "The base is frozen; the budget is for A and B."),
                "only one layer counted": (budget // 1_784, "That is what linear1 alone would allow; three layers are adapted."),
            },
            f"With a budget of {budget:,}: how often does the cost of one rank, {PARAMETERS_PER_RANK:,}, fit into it whole?",
        )
    return "And a budget below 6,794 allows no rank on all three layers; fewer layers might do."


@exercise(
    hints=(
        "You need two recalls: of the digit, and the mean of the other nine.",
        "A mean of the two gives 0.5 to a network that calls everything a 9. Which mean is 0 as soon as one of the two is 0?",
        "The harmonic mean: 2·a·b / (a + b).",
    ),
    solution="""
        def score(result, digit):
            taught = result.recall[digit]
            others = (result.recall.sum() - taught) / 9
            return 2 * taught * others / (taught + others) if taught + others else 0
    """,
    reason="The harmonic mean is near the smaller of the two, so neither the digit nor the other nine can be sacrificed.",
)
def score(measure):
    """A score from 0 to 1 that counts what was learned and what was kept."""
    cases = []
    for digit, own, calls in ((9, 12, 8), (3, -12, 0)):  # the taught digit once better than the others, once worse
        confusion = torch.randint(0, 4, (10, 10)) + 20 * torch.eye(10, dtype=torch.int64)
        confusion[digit, digit] += own
        confusion[:, digit] += calls
        result = Evaluation(confusion, torch.zeros(0, dtype=torch.int64))
        cases.append((call(measure, result, digit), result, digit))
    given = [float(numbers(answer)) if numbers(answer).numel() == 1 else answer for answer, *_ in cases]
    taught = [result.recall[digit].item() for _, result, digit in cases]
    others = [(result.recall.sum().item() - a) / 9 for a, (_, result, _) in zip(taught, cases)]
    both = list(zip(taught, others))
    compare(
        given,
        [fair_score(result, digit) for _, result, digit in cases],
        {
            "only the taught digit": (taught, "A network that calls everything by that digit would score 1."),
            "only what was kept": (others, "A network that learned nothing would score best."),
            "the smaller of the two": ([min(a, b) for a, b in both], "Near, but it does not see the other one move at all."),
            "accuracy": (
                [result.accuracy for _, result, _ in cases],
                "Accuracy counts the taught digit as one in ten: hardly learning it would cost almost nothing.",
            ),
            "a plain mean": ([(a + b) / 2 for a, b in both], "A network that calls everything by that digit would still score 0.5."),
            "the product": ([a * b for a, b in both], "Two recalls of one half would give a quarter. A mean lies between the two: 2ab/(a + b)."),
            "the geometric mean": ([(a * b) ** 0.5 for a, b in both], "A mean that sees both, but asked is the harmonic one, 2ab/(a + b)."),
            "the 2 forgotten": ([a * b / (a + b) for a, b in both], "Two recalls of 1 would score one half: there is a 2 on top."),
            "brackets forgotten": ([3 * b for _, b in both], "`/ a + b` divides by a and then adds b: put `(a + b)` in brackets."),
            "a sum for the mean of nine": ([18 * a * b / (a + 9 * b) for a, b in both], "The others' nine recalls are added up; divide by 9."),
            "divided by ten, not nine": ([1.8 * a * b / (a + 0.9 * b) for a, b in both], "The others are nine, so their mean is a ninth of their sum."),
            "percent, not a share": ([200 * a * b / (a + b) for a, b in both], "Right in percent; a score from 0 to 1 is asked for."),
            "precision for recall": (
                [result.precision[digit].item() for _, result, digit in cases], "That is the precision of the digit; the others are missing."
            ),
            "the others left out": (
                [2 * a * p / (a + p) for a, p in ((r.recall[d].item(), r.precision[d].item()) for _, r, d in cases)],
                "Recall with precision judges that digit alone; what became of the other nine?",
            ),
            "all ten recalled alike": ([result.recall.mean() for _, result, _ in cases], "Here the taught digit counts no more than any other."),
            "the digit counted among the others": (
                [2 * a * r.recall.mean() / (a + r.recall.mean()) for a, (_, r, _) in zip(taught, cases)],
                "The mean of the *other nine* must leave the digit out.",
            ),
        },
        "For two networks the harmonic mean of the digit's recall and the others' mean recall is asked for.",
    )  # fmt: skip
    return "It is 0 for a network that says one digit to everything, and falls with the worse of the two."


@exercise(
    hints=(
        "(B₁B₂ side by side) times (A₁ above A₂): what does the product come to?",
        "`torch.cat` along the rank: A has it as its rows (dim 0), B as its columns (dim 1).",
    ),
    solution="""
        def add_adapters(A1, B1, A2, B2):
            return torch.cat([A1, A2], dim=0), torch.cat([B1, B2], dim=1)
    """,
    reason="The product of the two stacks is B₁A₁ + B₂A₂. Its rank is up to r₁ + r₂, so no A and B of the old rank could hold it.",
)
def add_adapters(combine):
    """One A and one B whose product is the sum of two adapters' products."""
    A1, A2, B1, B2 = torch.randn(3, 9), torch.randn(3, 9), torch.randn(8, 3), torch.randn(8, 3)
    wanted = B1 @ A1 + B2 @ A2
    try:
        given = call(combine, A1.clone(), B1.clone(), A2.clone(), B2.clone())
    except LearnerError as error:
        if "Sizes of tensors must match" in str(error.error):
            raise Wrong("stacked along the wrong side", "The rank is A's rows and B's columns: stack along those.") from None
        raise
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        summed = isinstance(given, torch.Tensor) and given.shape == wanted.shape and same(given, wanted)
        more = " You return the sum of the updates itself: which A and B have it as their product?" if summed else ""
        raise Uncheckable(f"Two tensors are asked for: A, B.{more}")
    A, B = (need_tensor(part, name) for part, name in zip(given, "AB"))
    if A.ndim != 2 or B.ndim != 2:
        raise Uncheckable("A and B should be matrices; `torch.cat` joins two of them, `torch.stack` makes a third dimension.")
    if A.shape == (3, 18) or B.shape == (16, 3):
        raise Wrong("stacked along the wrong side", "The rank is A's rows and B's columns: stack along those.")
    if B.shape[1] != A.shape[0]:
        swapped = A.shape[1] == B.shape[0]
        raise Wrong("A and B swapped" if swapped else None, f"B has {B.shape[1]} columns and A {A.shape[0]} rows; they must agree.")
    compare(
        B @ A,
        wanted,
        {
            "A and B added apart": (
                (B1 + B2) @ (A1 + A2),
                "(B₁ + B₂)(A₁ + A₂) has two products too many, B₁A₂ and B₂A₁: adding the parts is not adding the updates.",
            ),
            "A and B averaged apart": (
                (B1 + B2) / 2 @ ((A1 + A2) / 2), "Averaging the parts mixes each A with the other's B: that is neither adapter."
            ),
            "stacked in two orders": (
                B2 @ A1 + B1 @ A2, "Each A met the other's B: stack both in the same order."
            ),
            "only one of them": (B1 @ A1, "The second adapter is missing."),
            "halved": (wanted / 2, "That is the mean of the two; the sum is asked for."),
        },
        "B @ A should be B₁A₁ + B₂A₂.",
    )  # fmt: skip
    if len(A) > 6:
        raise Wrong("a larger rank than needed", f"The product is right, but A has {len(A)} rows: that is a rank of {len(A)}, where 3 + 3 are enough.")
    return "Two adapters of rank 3 need rank 6: that is the price of an exact sum."


@exercise(
    hints=(
        "How many numbers does the adapter of rank r hold on the three layers?",
        "A float32 takes four bytes.",
    ),
    solution="""
        def adapter_bytes(rank):
            return 4 * 6_794 * rank
    """,
    reason="6,794 numbers for each rank, four bytes for each number. The network itself takes 11,228,040 bytes, once for all tasks.",
)
def adapter_bytes(size):
    """How many bytes the numbers of a rank-r adapter take on disk, in float32."""
    for rank in (7, 3):  # at rank 8, r² would look like bits
        held = PARAMETERS_PER_RANK * rank
        compare(
            call(size, rank),
            4 * held,
            {
                "numbers, not bytes": (held, "That is how many numbers; a float32 takes four bytes."),
                "bits": (32 * held, "That is in bits; eight bits are a byte."),
                "the whole network": (4 * (2_807_010 + held), "The base is not stored again for each adapter: that is the point."),
                "rank squared": (4 * held * rank, "Each rank adds as many bytes as the one before: multiply by the rank once."),
                "rank forgotten": (4 * PARAMETERS_PER_RANK, f"Right at rank 1; at rank {rank}?"),
                "the base instead": (4 * 2_807_010, "That is the base. Count only A and B."),
                "one layer of three": (4 * rank * 1_784, "That is `linear1` alone; linear2 and linear3 have A and B too."),
                "kilobytes": (4 * held / 1024, "That is in units of 1,024 bytes; asked are bytes."),
                "double precision": (8 * held, "Eight bytes would be float64; these tensors are float32."),
                "half precision": (2 * held, "Two bytes would be float16; these tensors are float32."),
            },
            f"At rank {rank}: count the numbers of A and B on all three layers, then the bytes of each.",
        )
    return "Some 27 kB for each task at rank 1, beside 11 MB for a whole network."


def quiz() -> Quiz:
    """The recall quiz of notebook 5."""
    return Quiz((
        Question(
            "Two adapters of rank 4 are added exactly. The sum has a rank of at most…",
            "8",
            {
                "4": "Only if both happen to use the same directions.",
                "8": "The columns of both B's are needed, and the rows of both A's.",
                "16": "Ranks add; they do not multiply.",
            },
        ),
        Question(
            "Which best undoes forgetting at its root?",
            "a share of the other digits among the training images",
            {
                "a share of the other digits among the training images": "Then answering the taught digit too readily is punished.",
                "a larger α": "It makes the update larger, and the forgetting with it.",
                "more batches of the same digit": "They push further the same way.",
            },
        ),
        Question(
            "What must be stored for ten tasks on one base?",
            "one base and ten adapters",
            {
                "ten networks": "That is full fine-tuning.",
                "ten adapters": "An adapter is an update *to* something: without the base it says nothing.",
                "one base and ten adapters": "And each adapter is small.",
            },
        ),
        Question(
            "You merged an adapter and now subtract it again. Are the base's bits back?",
            "Not surely: adding and subtracting rounds",
            {
                "Not surely: adding and subtracting rounds": "Keep the base, or switch instead of merging.",
                "Yes, always": "In float32 a few of the weights differ by rounding.",
            },
        ),
    ))  # fmt: skip
