"""The chores behind the LoRA notebooks.

cache → data → model → lora → training → plots → explorer: each module imports only from those before it.
"""

from lora_helpers.cache import cache_folder
from lora_helpers.data import Mnist, load_mnist, only_digit
from lora_helpers.explorer import FineTuning, LoRAExplorer, fine_tune
from lora_helpers.lora import (
    LoRAParametrization,
    ParameterCount,
    add_lora,
    count_parameters,
    freeze_base,
    lora_disabled,
    lora_layers,
    merge_lora,
    remove_lora,
    set_lora_enabled,
)
from lora_helpers.model import RichBoyNet
from lora_helpers.plots import plot_confusion, plot_losses, plot_wrong_counts, show_digits
from lora_helpers.training import Evaluation, evaluate, pretrained_base, train

__all__ = [
    "Evaluation",
    "FineTuning",
    "LoRAExplorer",
    "LoRAParametrization",
    "Mnist",
    "ParameterCount",
    "RichBoyNet",
    "add_lora",
    "cache_folder",
    "count_parameters",
    "evaluate",
    "fine_tune",
    "freeze_base",
    "load_mnist",
    "lora_disabled",
    "lora_layers",
    "merge_lora",
    "only_digit",
    "plot_confusion",
    "plot_losses",
    "plot_wrong_counts",
    "pretrained_base",
    "remove_lora",
    "set_lora_enabled",
    "show_digits",
    "train",
]
