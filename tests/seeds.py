"""The story over many seeds: is it true, or luck? The README quotes what this prints.

    uv run python tests/seeds.py [--seeds 20] [--full] [--root FOLDER]

Each seed pre-trains a base of its own and fine-tunes it on the digit 9 with rank 1, α = 1 and 100 batches of 10.
"""

import argparse
import os
import tempfile

from tqdm import tqdm

from lora_helpers import fine_tune, load_mnist, pretrained_base


def story(mnist, seed):
    """Accuracy, nines wrong and all others wrong, each before and after."""
    result = fine_tune(pretrained_base(mnist, seed=seed, progress=False), mnist, seed=seed)
    before, after = result.off, result.on
    nines = before.wrong_counts[9], after.wrong_counts[9]
    others = sum(before.wrong_counts) - nines[0], sum(after.wrong_counts) - nines[1]
    return (before.accuracy, after.accuracy), nines, others


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--full", action="store_true", help="the full MNIST instead of the bundled sample")
    parser.add_argument("--root", help="folder that holds MNIST/raw")
    options = parser.parse_args()
    mnist = load_mnist("full" if options.full else "sample", root=options.root)
    rows = []
    for seed in tqdm(range(options.seeds)):
        with tempfile.TemporaryDirectory() as cache:  # bases of other seeds are needed nowhere else
            os.environ["LORA_CACHE"] = cache
            rows.append(story(mnist, seed))
    for seed, (accuracy, nines, others) in enumerate(rows):
        print(f"seed {seed:2} · accuracy {accuracy[0]:.3f} → {accuracy[1]:.3f} · nines wrong {nines[0]} → {nines[1]} · others wrong {others[0]} → {others[1]}")
    ranges = [[(min(side), max(side)) for side in zip(*(row[part] for row in rows))] for part in range(3)]
    spelled = [" → ".join(f"{low:{form}}–{high:{form}}" for low, high in sides) for sides, form in zip(ranges, (".3f", "d", "d"))]
    halved = sum(2 * nines[1] <= nines[0] for _, nines, _ in rows)
    print("lowest–highest · accuracy {} · nines wrong {} · others wrong {}".format(*spelled))
    print(f"nines wrong at least halved: {halved} of {len(rows)}")


if __name__ == "__main__":
    main()
