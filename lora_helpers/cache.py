"""Trained weights and downloads, kept in one folder so that each notebook starts in seconds.

Whatever is read there is checked; whatever cannot be read or written is made anew, with a warning and never an error.
"""

import hashlib
import itertools
import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import torch
from platformdirs import user_cache_path
from safetensors.torch import load, save

from lora_helpers.checks import all_finite

_UNFINISHED = "lora-unfinished-"
_BASE, _RAW = f"base-*-{'[0-9a-f]' * 16}", "mnist/MNIST/raw"
_OWN = (f"{_BASE}.safetensors", f"{_BASE}.damaged*", f"{_RAW}/*-ubyte", f"{_RAW}/*-ubyte.damaged*", f"{_UNFINISHED}*", f"{_RAW}/{_UNFINISHED}*")


def cache_folder() -> Path:
    """The folder of trained networks and downloads: the environment variable LORA_CACHE, else the system's own place."""
    return Path(os.path.expanduser(os.environ.get("LORA_CACHE") or user_cache_path("lora-notebooks", appauthor=False)))


def clear_cache() -> None:
    """Deletes the trained networks and downloads in `cache_folder()`. Other files, and links out of it, are left alone.

    Nothing is lost but time: what is missing is trained or downloaded again. A file that cannot be deleted is named in a warning.
    """
    folder = cache_folder()
    if not os.path.isdir(folder):  # False, not an error, for a path that cannot be
        return
    for path in [path for pattern in _OWN for path in folder.glob(pattern) if path.resolve().is_relative_to(folder.resolve())]:
        try:
            if path.name.startswith(_UNFINISHED):
                shutil.rmtree(path)
            elif not path.is_dir():
                path.unlink()
        except FileNotFoundError:
            pass  # another kernel was quicker
        except OSError as error:
            warnings.warn(f"Not deleted: {path} ({error}).", stacklevel=2)
    for emptied in ("mnist/MNIST/raw", "mnist/MNIST", "mnist"):
        try:
            (folder / emptied).rmdir()
        except OSError:
            pass  # it is not there, or holds other files


def is_saved(name: str) -> bool:
    """Whether there is a file of that name; `load_tensors` finds out whether it is whole."""
    return os.path.isfile(cache_folder() / f"{name}.safetensors")


def load_tensors(name: str, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """The tensors saved under `name`, or None where there are none.

    A file is set aside where it cannot be read, its content is not what was saved, or its tensors have not the keys, shapes
    and dtypes of `like`, or values that are not finite. Nothing is unpickled.
    """
    path = cache_folder() / f"{name}.safetensors"
    if not os.path.lexists(path):
        return None
    read = None
    try:
        if not path.is_file():
            raise ValueError("it is no file")  # opening a named pipe would wait for ever
        read = path.stat()
        tensors, metadata = parse_safetensors(path.read_bytes())
        if metadata.get("digest") != _digest(name, tensors):
            raise ValueError("its content is not what was saved")
        if _outline(tensors) != _outline(like):
            raise ValueError("its tensors are those of another network")
        if not all_finite(tensors.values()):
            raise ValueError("it holds values that are NaN or infinite")
        return tensors
    except FileNotFoundError:  # deleted in this moment
        return None
    except Exception as error:  # safetensors raises its own types as well as OSError
        if read is None or _unchanged(path, read):  # else another kernel has put a new one there
            set_aside(path, error)
        return None


def parse_safetensors(content: bytes) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file, given its bytes.

    Not `safe_open` or `load_file`: they map the file into memory, and where another program shortens a mapped file, the
    system kills the kernel. They also call a file missing that may not be read.

    Raises:
        SafetensorError, ValueError: `content` is no safetensors file.
    """
    tensors = load(content)  # checks the header, which is read again here since `load` keeps the metadata to itself
    length = int.from_bytes(content[:8], "little")
    in_order = dict(sorted(tensors.items()))  # `load` gives them in an order that changes from run to run
    return in_order, json.loads(content[8 : 8 + length]).get("__metadata__") or {}


def save_tensors(name: str, tensors: dict[str, torch.Tensor]) -> None:
    """Saves `tensors` under `name`: whole or not at all. A folder that cannot be written to is no error."""
    _keep(cache_folder() / f"{name}.safetensors", lambda path: path.write_bytes(save(tensors, {"digest": _digest(name, tensors)})))


def keep_file(source: Path, target: Path) -> None:
    """Copies `source` to `target`: whole or not at all. A folder that cannot be written to is no error."""
    _keep(target, lambda path: shutil.copyfile(source, path))


def set_aside(path: Path, reason: object) -> None:
    """Renames a damaged file to NAME.damaged, with a warning, so that it can be made anew."""
    names = (path.with_suffix(f".damaged{number or ''}") for number in itertools.count())
    aside = next(name for name in names if not os.path.lexists(name))
    try:
        path.replace(aside)
        outcome = f"It is now {aside.name}, and is made anew"
    except FileNotFoundError:
        return  # another kernel was quicker
    except OSError as error:
        outcome = f"It cannot be set aside either ({error}), and is passed over"
    warnings.warn(f"The cached file {path} is damaged ({reason}). {outcome}; nothing is lost.", stacklevel=4)


def _keep(target: Path, write) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=_UNFINISHED) as work:
            path = Path(work) / target.name
            write(path)
            path.replace(target)
    except Exception as error:  # a full disk reaches us as safetensors' own error
        warnings.warn(f"Not cached: {target} ({error}). The next notebook will make it again.", stacklevel=4)


def _unchanged(path: Path, read: os.stat_result) -> bool:
    try:
        now = path.stat()
    except OSError:
        return False
    return (now.st_ino, now.st_mtime_ns, now.st_size) == (read.st_ino, read.st_mtime_ns, read.st_size)


def _outline(tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
    return {key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()}


def _digest(name: str, tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.blake2b(name.encode(), digest_size=16)
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()
