"""Trains bases by notebook 1's recipe: `python lora_helpers/stored/make_base.py SEED [SEED …]`.

For each seed it prints the figures that stored/README.md lists. It stores the first base that keeps the
rule: 9 is its
weakest digit, its accuracy is 0.95 to 0.965, and an adapter of rank 1 repairs at least two thirds of the
nines.
"""

import sys

import torch
from safetensors.torch import save_file

from lora_helpers import RichBoyNet, evaluate, fine_tune, load_mnist, train
from lora_helpers.model import BASE

mnist, stored = load_mnist(), False
for seed in map(int, sys.argv[1:]):
    torch.manual_seed(seed)
    net = RichBoyNet()
    train(net, mnist.train, seed=seed)
    result = evaluate(net, mnist.test)
    wrong, after = result.wrong_counts, fine_tune(net, mnist, rank=1).on.wrong_counts[9]
    keeps = max(wrong) == wrong[9] and 0.95 <= result.accuracy <= 0.965 and 3 * after <= wrong[9]
    print(
        f"| {seed} | {result.accuracy:.4f} | {wrong} | {wrong[9]} → {after} | {'yes' if keeps else 'no'} |",
        flush=True,
    )
    if keeps and not stored:
        save_file(net.state_dict(), BASE)
        stored = True
