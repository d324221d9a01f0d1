"""The chores behind the LoRA notebooks.

data → model → lora → training → (plots, explorer): each module imports only from those before it.
"""

from lora_helpers.cache import cache_folder
from lora_helpers.data import Mnist, load_mnist, only_digit
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
from lora_helpers.training import Evaluation, evaluate, pretrained_base, train

__all__ = [
    "Evaluation",
    "LoRAParametrization",
    "Mnist",
    "ParameterCount",
    "RichBoyNet",
    "add_lora",
    "cache_folder",
    "count_parameters",
    "evaluate",
    "freeze_base",
    "load_mnist",
    "lora_disabled",
    "lora_layers",
    "merge_lora",
    "only_digit",
    "pretrained_base",
    "remove_lora",
    "set_lora_enabled",
    "train",
]
