"""Adapters as files, in the format of Hugging Face PEFT: what is saved here opens there, and the other way round."""

import json
import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import nn

from lora_helpers.cache import parse_safetensors
from lora_helpers.checks import check_network, check_positive, check_whole
from lora_helpers.lora import add_lora, adapter_names, all_or_nothing, lora_layers

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's wrapper round the network, which its names include

# What turns A and B into the change of a weight. It is saved a second time beside the tensors, in their file's metadata,
# where PEFT passes over it: so the two files of two savings are told apart. (Of an unknown option in the config PEFT would warn.)
SCALING_OPTIONS = ("r", "lora_alpha", "use_rslora")
SCALING_KEY = "lora_helpers.scaling"

# Options of PEFT that say nothing about what a saved adapter computes.
_HARMLESS = {
    "peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "layers_pattern", "lora_dropout",
    "inference_mode", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "init_lora_weights",
    "megatron_core", "qalora_group_size",
}  # fmt: skip


def save_adapter(net: nn.Module, folder: str | os.PathLike, name: str | None = None) -> Path:
    """Saves the adapter `name`, by default the one in use, as `adapter_config.json` and `adapter_model.safetensors`.

    A and B keep their dtype. `folder` is made if it is missing. An error while the files are written leaves the old
    adapter there; one between the two last moves leaves none that could be loaded. Where two kernels save into one folder
    at the same moment, one of the adapters is there at the end, or `load_adapter` says that the two files do not belong together.

    Returns:
        The folder.

    Raises:
        ValueError: `net` has no such adapter, it holds values that are not finite, or its layers differ in rank,
            alpha or scaling or have no names.
        TypeError: `net` is no network, or `folder` no path.
        OSError: `folder` is a file, one of the two files is a folder, or the folder cannot be written to.

    Source: https://huggingface.co/docs/peft/developer_guides/checkpoint
    """
    adapters = _chosen(net, name)
    folder = _as_path(folder)
    if "" in adapters:
        raise ValueError("This network is itself the adapted layer, so the layer has no name to be saved under; adapt nn.Sequential(layer) instead.")
    kinds = {(a.rank, a.alpha, a.rank_stabilised) for a in adapters.values()}
    if len(kinds) > 1:
        raise ValueError(f"The layers differ in (rank, alpha, rank_stabilised): {sorted(kinds)}; one file holds one of each.")
    ((rank, alpha, rank_stabilised),) = kinds
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "use_rslora": rank_stabilised, "target_modules": list(adapters),
        "bias": "none", "lora_dropout": 0.0, "fan_in_fan_out": False, "modules_to_save": None, "init_lora_weights": True,
        "inference_mode": True, "base_model_name_or_path": None, "task_type": None, "exclude_modules": _excluding(net, list(adapters)),
    }  # fmt: skip
    tensors = {}
    for layer, adapter in adapters.items():
        for kind, matrix in (("lora_A", adapter.lora_A), ("lora_B", adapter.lora_B)):
            if not matrix.isfinite().all():
                raise ValueError(f"{layer}: {kind} holds values that are not finite numbers. Train it again, with a smaller learning rate.")
            tensors[f"{PREFIX}{layer}.{kind}.weight"] = matrix.detach().cpu().contiguous()
    if os.path.exists(folder) and not os.path.isdir(folder):  # of os, since Path's raise where nothing may be looked up
        raise NotADirectoryError(f"{folder} is a file; an adapter is saved in a folder: give another name.")
    for file in (TENSORS, CONFIG):
        if os.path.isdir(folder / file):
            raise IsADirectoryError(f"{folder / file} is a folder; a file of that name is to be saved: move it away, or give another folder.")
    scaling = json.dumps({option: config[option] for option in SCALING_OPTIONS})
    # Not save_file, which makes a file that only its owner may read.
    contents = {TENSORS: save(tensors, {"format": "pt", SCALING_KEY: scaling}), CONFIG: (json.dumps(config, indent=2) + "\n").encode()}
    try:
        _write(folder, contents)
    except OSError as error:  # it names a temporary file
        reason = f"The adapter cannot be saved in {folder}: {error.strerror or error}."
        raise type(error)(f"{reason} Make room there, or give a folder in which you may write and replace files.") from error
    return folder


def load_adapter(net: nn.Module, folder: str | os.PathLike, name: str = "default") -> nn.Module:
    """Adds the adapter saved in `folder` to `net` under `name`, beside those that are there, and puts it in use.

    A and B take each weight's device and dtype. Only the two files named by `save_adapter` are read; nothing is unpickled.
    An error or an interrupt leaves `net` as it was.

    Returns:
        `net` itself, changed.

    Raises:
        FileNotFoundError: one of the two files is missing. Another OSError: it cannot be read.
        ValueError: a file is damaged, the two were not saved together, an option is not supported, or layers, shapes or
            values do not fit `net`; or `name` is taken. TypeError: `net` is no network, or `folder` no path. Nothing is changed then.
    """
    check_network(net)
    config, tensors, scaling = _read(_as_path(folder))
    rank, alpha, rank_stabilised = _check_config(config)
    found = dict(zip(SCALING_OPTIONS, (rank, alpha, rank_stabilised)))
    if scaling not in (None, found):  # None: saved by PEFT, which writes no such thing
        raise ValueError(
            f"{CONFIG} in {folder} has {found}, but {TENSORS} was saved with {scaling}: the two are not of one adapter, "
            "or the first was edited. Save the adapter again."
        )
    pairs = _pair_up(tensors)
    modules = dict(net.named_modules())
    _check_targets(config, list(pairs), [layer for layer, module in modules.items() if isinstance(module, nn.Linear)])
    for layer, (a, b) in pairs.items():
        weight = getattr(modules.get(layer), "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.ndim != 2:
            continue  # add_lora says which layers there are
        expected = ((rank, weight.shape[1]), (weight.shape[0], rank))
        if (tuple(a.shape), tuple(b.shape)) != expected:
            raise ValueError(
                f"{layer}: the file has A {tuple(a.shape)} and B {tuple(b.shape)}; this network needs "
                f"A {expected[0]} and B {expected[1]} at rank {rank}. Load it on the network that it was trained on."
            )
        for kind, tensor in (("lora_A", a), ("lora_B", b)):
            if not tensor.to(weight.dtype).isfinite().all():
                raise ValueError(f"{layer}: {kind} has values that are not all finite numbers in {weight.dtype}, which the network computes in.")
    own_stream = torch.Generator()  # A is drawn and overwritten; PyTorch's global stream is not touched
    with all_or_nothing(net), torch.no_grad():
        add_lora(net, rank=rank, alpha=alpha, layers=list(pairs), generator=own_stream, name=name, rank_stabilised=rank_stabilised)
        for layer, adapter in _chosen(net, name).items():
            adapter.lora_A.copy_(pairs[layer][0])
            adapter.lora_B.copy_(pairs[layer][1])
    return net


def _chosen(net: nn.Module, name: str | None):
    names = adapter_names(net)
    if not names:
        raise ValueError(f"This {type(net).__name__} has no LoRA; call add_lora(net) first.")
    if name is not None and name not in names:
        raise ValueError(f"There is no adapter {name!r}; this network has: {', '.join(map(repr, names))}.")
    found = {}
    for layer, adapters in lora_layers(net).items():
        fitting = [a for a in adapters if (a.active if name is None else a.name == name)]
        if len(fitting) > 1:
            raise ValueError(f"{layer} carries {len(fitting)} adapters that would be saved as one; give each a name of its own.")
        found.update({layer: adapter for adapter in fitting})
    if not found:
        raise ValueError(f"No adapter is in use; call use_adapter(net, name) with one of: {', '.join(map(repr, names))}.")
    return found


def _as_path(folder: str | os.PathLike) -> Path:
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"folder is {folder!r}; it must be a path, such as 'adapters/nine'.")
    return Path(folder)


def _write(folder: Path, contents: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        new, old_config = Path(work), Path(work) / "old"
        for file, content in contents.items():
            (new / file).write_bytes(content)
        try:
            with suppress(FileNotFoundError):  # there is none, or another kernel was quicker
                (folder / CONFIG).replace(old_config)  # first, so that new tensors never stand beside an old alpha
            (new / TENSORS).replace(folder / TENSORS)
        except BaseException:  # an interrupt too
            tensors_moved = not (new / TENSORS).exists()
            replaced_by_another_kernel = os.path.lexists(folder / CONFIG)
            if os.path.lexists(old_config) and not tensors_moved and not replaced_by_another_kernel:
                old_config.replace(folder / CONFIG)
            raise
        (new / CONFIG).replace(folder / CONFIG)


def _excluding(net: nn.Module, layers: list[str]) -> str | None:
    """A pattern of the modules that PEFT would take for one of `layers`, because their names end alike, or None."""
    # PyTorch's parametrizations, in which LoRA is here, are no modules of the network that is loaded on.
    others = [name for name, _ in net.named_modules() if name not in layers and ".parametrizations." not in name]
    # A pattern, since a list would be read by endings again.
    return "|".join(re.escape(name) for name in others if _named(layers, name)) or None


def _read_file(folder: Path, file: str) -> bytes:
    try:
        if (folder / file).is_file():  # opening a named pipe would wait for ever
            return (folder / file).read_bytes()
        others = ", ".join(sorted(p.name for p in folder.iterdir())[:10]) if folder.is_dir() else "no such folder"
    except FileNotFoundError:
        others = "it was there a moment ago; another program may be saving, so try again"
    except OSError as error:
        advice = "Save the adapter again, in another folder, or have the owner of the file let you read it."
        raise type(error)(f"{folder / file} cannot be read: {error.strerror or error}. {advice}") from error
    raise FileNotFoundError(f"{folder} must hold {CONFIG} and {TENSORS}; {file} is missing (found: {others or 'nothing'}).")


def _read(folder: Path) -> tuple[dict, dict[str, torch.Tensor], dict | None]:
    """The options, the tensors, and what SCALING_KEY was saved with, or None."""
    contents = {file: _read_file(folder, file) for file in (CONFIG, TENSORS)}
    try:
        config = json.loads(contents[CONFIG].decode("utf-8"))
        tensors, metadata = parse_safetensors(contents[TENSORS])
        scaling = json.loads(metadata.get(SCALING_KEY, "null"))
    except (ValueError, RecursionError, SafetensorError) as error:
        raise ValueError(f"The adapter in {folder} cannot be read: {error}. Save it again, or use a copy.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder / CONFIG} holds a {type(config).__name__}; it must be an object of options.")
    return config, tensors, scaling


def _check_config(config: dict) -> tuple[int, float, bool]:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"peft_type is {config.get('peft_type')!r}; only 'LORA' can be opened here.")
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal"):
        raise ValueError(
            f"init_lora_weights is {config['init_lora_weights']!r}; supported are true, false, 'gaussian' and 'orthogonal': "
            "others may change the base too."
        )
    unknown = {k: v for k, v in config.items() if k not in _HARMLESS and v not in (None, False, "none") and v != {} and v != []}
    if unknown:
        raise ValueError(f"Not supported here: {', '.join(f'{k} = {v!r}' for k, v in sorted(unknown.items()))}.")
    rank, alpha, rank_stabilised = config.get("r"), config.get("lora_alpha"), config.get("use_rslora", False)
    check_whole("r", rank)
    check_positive("lora_alpha", alpha)
    if not isinstance(rank_stabilised, bool):
        raise ValueError(f"use_rslora is {rank_stabilised!r}; it must be true or false.")
    return rank, alpha, rank_stabilised


def _check_targets(config: dict, saved: list[str], linear: list[str]) -> None:
    """Raises ValueError unless the layers `saved` are those of the `linear` layers that the options name, as PEFT reads them."""
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    lacking = [layer for layer in linear if _targeted(targets, layer) and not _named(excluded, layer) and layer not in saved]
    if isinstance(targets, list):  # PEFT lists excluded layers among the targets too
        lacking += [target for target in targets if not any(_named([target], layer) for layer in saved + linear)]
    if lacking:
        raise ValueError(f"target_modules is {targets!r}, but the file has nothing for: {', '.join(map(repr, lacking))}. Use a whole copy.")
    extra = [layer for layer in saved if not _targeted(targets, layer)]
    if extra:
        raise ValueError(f"target_modules is {targets!r}, but the file also has: {', '.join(map(repr, extra))}. Use a whole copy.")
    left_out = [layer for layer in saved if _named(excluded, layer)]
    if left_out:
        raise ValueError(f"exclude_modules is {excluded!r}, but the file has: {', '.join(map(repr, left_out))}. Use a whole copy.")


def _targeted(targets: list[str] | str | None, layer: str) -> bool:
    return (isinstance(targets, str) and targets.lower() == "all-linear") or _named(targets, layer)


def _named(pattern: list[str] | str | None, layer: str) -> bool:
    if isinstance(pattern, str):
        try:
            return re.fullmatch(pattern, layer) is not None
        except re.error as error:
            raise ValueError(f"The pattern {pattern!r} cannot be read: {error}.") from error
    if pattern is not None and not (isinstance(pattern, list) and all(isinstance(name, str) for name in pattern)):
        raise ValueError(f"target_modules or exclude_modules is {pattern!r}; it must be a list of layer names or a pattern.")
    return any(layer == name or layer.endswith(f".{name}") for name in pattern or [])


def _pair_up(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        layer, _, kind = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if not key.startswith(PREFIX) or not key.endswith(".weight") or kind not in ("lora_A", "lora_B") or not layer:
            raise ValueError(f"The file has a tensor {key!r}, which is no lora_A or lora_B of a layer.")
        if not tensor.is_floating_point():
            raise ValueError(f"{key} is {tensor.dtype}; it must be floating-point.")
        layers.setdefault(layer, {})[kind] = tensor
    for layer, found in layers.items():
        if len(found) < 2:
            raise ValueError(f"{layer} has only {next(iter(found))} in the file; both lora_A and lora_B are needed.")
    if not layers:
        raise ValueError("The file holds no adapter: there is no tensor in it.")
    return {layer: (found["lora_A"], found["lora_B"]) for layer, found in layers.items()}
