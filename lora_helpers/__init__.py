"""The chores behind the LoRA notebooks, on one small real network.

Read from top to bottom; each module imports only from those above it:
checks → data → model → lora → adapter_files → fast → training → experiments → scaling → plots → widgets →
course.
"""

import importlib
import io
import sys

import torch

__version__ = "0.2.0"

# One thread: a batch of ten gains nothing from a second one, and beside other work two wait for each other
# for minutes.
# It also makes every sum run in one order, so a figure is the same on every machine. To undo:
# torch.set_num_threads(n).
torch.set_num_threads(1)

# A notebook exported as a script prints α, ΔW and ‖BA‖. A console that does not have them, as many on
# Windows, shows "?" in their place; else Python would stop there.
if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
    sys.stdout.reconfigure(errors="replace")

# Looked up on first use: pictures and widgets take a second to import, which a script that only trains
# need not wait for.
_NAMES = {
    "data": ("Mnist", "load_mnist", "only_digit"),
    "model": ("RichBoyNet", "pretrained_base"),
    "lora": (
        *(
            "LoRAParametrization",
            "ParameterCount",
            "adapter_names",
            "add_lora",
            "count_parameters",
            "freeze_base",
        ),
        *("lora_disabled", "lora_layers", "merge_lora", "remove_lora", "set_lora_enabled", "use_adapter"),
    ),
    "adapter_files": ("load_adapter", "save_adapter"),
    "training": ("Evaluation", "evaluate", "train"),
    "experiments": ("FineTuner", "FineTuning", "Setting", "fine_tune"),
    "plots": ("plot_confusion", "plot_losses", "plot_wrong_counts", "show_digits"),
    "widgets.explorer": ("LoRAExplorer",),
    "widgets.lab": ("ScalingLab",),
    "widgets.inspector": ("ParametrizationInspector",),
    "widgets.digit_pad": ("DigitPad", "as_mnist"),
    "course.predict": ("PredictChoice", "PredictNumber", "PredictRanking"),
    "course.quiz": ("Question", "Quiz"),
    "course.preflight": ("preflight",),
    "course.projector": ("projector_mode",),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
