"""The chores behind the LoRA notebooks.

checks → cache → data → model → lora → adapters → factorisation → backpropagation → training → scaling → finetuning → plots → scaling_plots → widgets:
each module imports only from those before it.
"""

import importlib
import os

__version__ = "0.1.0"

if _device := os.environ.get("LORA_DEVICE"):  # where tensors are made from now on, the notebooks' own too
    import torch

    try:
        torch.zeros(1, device=_device)
    except (RuntimeError, AssertionError) as error:
        raise RuntimeError(f"LORA_DEVICE is {_device!r}, which PyTorch cannot use here: {error}\nUnset it to work on the CPU, or set it to 'cuda'.") from None
    torch.set_default_device(_device)

# Looked up on first use: pictures and widgets take a second to import, which a script that only trains need not wait.
_MODULE_OF = {
    "cache_folder": "cache",
    "clear_cache": "cache",
    "Mnist": "data",
    "load_mnist": "data",
    "only_digit": "data",
    "RichBoyNet": "model",
    "LoRAParametrization": "lora",
    "ParameterCount": "lora",
    "adapter_names": "lora",
    "add_lora": "lora",
    "count_parameters": "lora",
    "freeze_base": "lora",
    "lora_disabled": "lora",
    "lora_layers": "lora",
    "merge_lora": "lora",
    "remove_lora": "lora",
    "set_lora_enabled": "lora",
    "use_adapter": "lora",
    "load_adapter": "adapters",
    "save_adapter": "adapters",
    "factorised": "factorisation",
    "Evaluation": "training",
    "evaluate": "training",
    "pretrained_base": "training",
    "train": "training",
    "train_side_by_side": "training",
    "plot_confusion": "plots",
    "plot_losses": "plots",
    "plot_wrong_counts": "plots",
    "show_digits": "plots",
    "FineTuning": "finetuning",
    "LoRAExplorer": "widgets.explorer",
    "ScalingLab": "widgets.scaling_lab",
    "ParametrizationInspector": "widgets.inspector",
    "DigitPad": "widgets.drawing",
    "as_mnist": "widgets.drawing",
    "fine_tune": "finetuning",
    "PredictChoice": "course.predict",
    "PredictNumber": "course.predict",
    "PredictRanking": "course.predict",
    "Question": "course.quiz",
    "Quiz": "course.quiz",
    "preflight": "course.preflight",
    "projector_mode": "course.projector",
}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
