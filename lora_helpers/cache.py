"""Trained weights and downloads, kept in one folder so that each notebook starts in seconds."""

import os
import tempfile
import warnings
from pathlib import Path

import torch
from platformdirs import user_cache_path
from safetensors.torch import load_file, save_file


def cache_folder() -> Path:
    """The folder of the cache: the environment variable LORA_CACHE, else the system's own place."""
    return Path(os.environ.get("LORA_CACHE") or user_cache_path("lora-notebooks", appauthor=False))


def load_tensors(name: str) -> dict[str, torch.Tensor] | None:
    """The tensors saved under `name`, or None where there are none.

    A file that cannot be read is set aside as NAME.damaged with a warning. Nothing is unpickled.
    """
    path = cache_folder() / f"{name}.safetensors"
    if not path.is_file():
        return None
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises its own types as well as OSError
        warnings.warn(f"The cached file {path} cannot be read ({error}); it is set aside and made anew.", stacklevel=3)
        try:
            path.replace(path.with_suffix(".damaged"))
        except OSError:
            pass  # a read-only folder: the file stays and is passed over again
        return None


def save_tensors(name: str, tensors: dict[str, torch.Tensor]) -> None:
    """Saves `tensors` under `name`: whole or not at all. A folder that cannot be written to is no error."""
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            path = Path(work) / "tensors"
            save_file(tensors, path)
            path.replace(folder / f"{name}.safetensors")
    except Exception as error:  # a full disk reaches us as safetensors' own error
        warnings.warn(f"Not cached ({error}); the next notebook will compute it again.", stacklevel=3)
