"""Adapters as files in the format of Hugging Face PEFT: each opens what the other saves."""

import json
import os
import re
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lora_helpers.checks import all_finite, check_network
from lora_helpers.lora import LoRAParametrization, adapter_names, add_lora, lora_layers

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

# What fixes the scale is in the config, and once more in the metadata of the tensors, where PEFT ignores it:
# load_adapter compares both, and so notices a config that was edited or belongs to other tensors.
SCALING, SCALING_KEY = ("r", "lora_alpha", "use_rslora"), "lora_helpers.scaling"

# PEFT's options that do not change what a saved adapter computes; and what others may be in plain LoRA
# besides None, False and empty. (With another init_lora_weights, such as "pissa", PEFT changes the base too.)
_HARMLESS = {"target_modules", "exclude_modules", "lora_dropout", "inference_mode", "peft_version"}
_HARMLESS |= {"task_type", "auto_mapping", "base_model_name_or_path", "revision"}
_PLAIN = {"peft_type": ["LORA"], "bias": ["none"], "init_lora_weights": [True, "gaussian", "orthogonal"]}
_PLAIN |= {"megatron_core": ["megatron.core"], "qalora_group_size": [16]}


def save_adapter(net: nn.Module, folder: str | os.PathLike, name: str | None = None) -> Path:
    """Saves the adapter `name`, by default the one in use, as two files that PEFT opens too.

    They are `adapter_config.json` and `adapter_model.safetensors`. A and B keep their dtype. A missing folder
    is created; an adapter that is already in it is replaced.

    Returns:
        The folder.

    Raises:
        ValueError: `net` has no such adapter; its layers differ in rank, alpha or scaling; a layer has no
            name or is compiled alone; or A or B holds a value that is not finite.
        TypeError: `net` is not a network, or `folder` not a path.
        OSError: the folder cannot be written to.

    Source: https://huggingface.co/docs/peft/developer_guides/checkpoint
    """
    net, folder = _unwrapped(net), Path(folder).expanduser()
    adapters = _adapters(net, name)
    if "" in adapters:
        raise ValueError("A file needs a name for the layer; adapt nn.Sequential(layer) instead.")
    if compiled := [layer for layer in adapters if "_orig_mod" in layer]:
        raise ValueError(f"{compiled[0]} is compiled; save the network as it was before torch.compile.")
    scalings = {(adapter.rank, adapter.alpha, adapter.rank_stabilised) for adapter in adapters.values()}
    if len(scalings) > 1:
        raise ValueError(f"The layers differ in (rank, alpha, rank_stabilised): {scalings}; a file has one.")
    tensors = {}
    for layer, adapter in adapters.items():
        if not all_finite(adapter.parameters()):
            raise ValueError(f"{layer}: A or B is not finite. Train again, with a smaller learning rate.")
        tensors[_key(layer, "A")] = adapter.lora_A.detach().cpu().contiguous()
        tensors[_key(layer, "B")] = adapter.lora_B.detach().cpu().contiguous()
    scaling = dict(zip(SCALING, scalings.pop(), strict=True))
    config = {"peft_type": "LORA", **scaling, "target_modules": _targets(net, adapters)}
    metadata = {"format": "pt", SCALING_KEY: json.dumps(scaling)}
    _write(folder, json.dumps(config, indent=2) + "\n", save(tensors, metadata))
    return folder


@torch.inference_mode(False)
def load_adapter(net: nn.Module, folder: str | os.PathLike, name: str = "default") -> nn.Module:
    """Adds the adapter saved in `folder` to `net` under `name`, beside any others, and puts it in use.

    Opens what `save_adapter` saves, and what PEFT saves for plain LoRA on Linear layers. A and B take the
    device and dtype of each weight. Nothing is unpickled, and no regular expression from a file is run.

    Returns:
        `net` itself, changed.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a file is damaged; the two do not match; an option is not supported; `name` is taken; or
            layers, shapes or values do not fit `net`. Nothing is changed then.
        TypeError: `net` is not a network, `folder` not a path, or `use_rslora` in the file not true or false.
    """
    inner, folder = _unwrapped(net), Path(folder).expanduser()
    config, tensors, saved_with = _read(folder)
    _check_options(config)
    scaling = {option: config.get(option) for option in SCALING}
    if saved_with not in (None, scaling):  # None: saved by PEFT
        raise ValueError(f"{CONFIG} has {scaling}, but {TENSORS} has {saved_with}. Save the adapter again.")
    rank, alpha, rank_stabilised = config.get("r"), config.get("lora_alpha"), config.get("use_rslora", False)
    linear = {layer: module for layer, module in inner.named_modules() if isinstance(module, nn.Linear)}
    layers = _check_tensors(tensors, linear, rank)
    _check_targets(config, layers, linear)
    unused = torch.Generator()  # A is drawn and then overwritten; PyTorch's global stream stays as it is
    add_lora(inner, rank, alpha, layers, generator=unused, name=name, rank_stabilised=rank_stabilised)
    with torch.no_grad():
        for layer, adapter in _adapters(inner, name).items():
            adapter.lora_A.copy_(tensors[_key(layer, "A")])
            adapter.lora_B.copy_(tensors[_key(layer, "B")])
    return net


def _key(layer: str, matrix: str) -> str:
    return f"base_model.model.{layer}.lora_{matrix}.weight"  # as PEFT names it


def _unwrapped(net: nn.Module) -> nn.Module:
    """The network inside torch.compile or DataParallel, which put a prefix before the name of each layer."""
    check_network(net)
    while True:
        if isinstance(net, (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)):
            net = net.module
        elif hasattr(net, "_orig_mod"):
            net = net._orig_mod
        else:
            return net


def _adapters(net: nn.Module, name: str | None) -> dict[str, LoRAParametrization]:
    """Layer by layer, the adapter `name`, or the one in use."""
    chosen = {}
    for layer, adapters in lora_layers(net).items():
        found = [one for one in adapters if (one.active if name is None else one.name == name)]
        if len(found) > 1:
            raise ValueError(f"{layer} has {len(found)} adapters named {found[0].name!r}; a file holds one.")
        if found:
            chosen[layer] = found[0]
    if not chosen:
        wanted = "adapter in use" if name is None else f"adapter {name!r}"
        there = ", ".join(map(repr, adapter_names(net))) or "no LoRA; call add_lora(net) first"
        raise ValueError(f"There is no {wanted}; this {type(net).__name__} has {there}.")
    return chosen


def _targets(net: nn.Module, layers: dict) -> list[str] | str:
    """What makes PEFT adapt just `layers`: a list, or a pattern if another module's name ends like one."""
    modules = [name for name, _ in net.named_modules() if ".parametrizations." not in name]
    is_exact = all(name in layers or not _is_listed(name, layers) for name in modules)
    return list(layers) if is_exact else "|".join(map(re.escape, layers))


def _is_listed(layer: str, targets: list[str]) -> bool:
    return any(layer == target or layer.endswith(f".{target}") for target in targets)  # as PEFT reads a list


def _write(folder: Path, config: str, tensors: bytes) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as new:  # so an error while writing leaves the old files
            Path(new, CONFIG).write_text(config, encoding="utf-8")
            Path(new, TENSORS).write_bytes(tensors)
            for file in (CONFIG, TENSORS):
                Path(new, file).replace(folder / file)
    except OSError as error:
        problem = f"The adapter cannot be saved in {folder}: {error.strerror}."
        raise type(error)(f"{problem} Make room there, or give a folder that you may write to.") from error


def _read(folder: Path) -> tuple[dict, dict[str, torch.Tensor], dict | None]:
    """The config, the tensors, and the scaling that they were saved with (None if PEFT saved them)."""
    for file in (CONFIG, TENSORS):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file} is missing; an adapter is both {CONFIG} and {TENSORS}.")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        with safe_open(folder / TENSORS, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            saved_with = json.loads((file.metadata() or {}).get(SCALING_KEY, "null"))
        if not isinstance(config, dict):
            raise ValueError(f"{CONFIG} does not hold a JSON object")
    except (ValueError, RecursionError, SafetensorError) as error:
        raise ValueError(f"The adapter in {folder} cannot be read: {error}. Save it again.") from error
    return config, tensors, saved_with


def _check_options(config: dict) -> None:
    """Raises ValueError if an option asks for more than plain LoRA."""
    for option in ("peft_type", *sorted(config.keys() - _HARMLESS - set(SCALING))):
        value = config.get(option)
        if value is not False and value not in (None, "", [], {}, *_PLAIN.get(option, [])):  # 0 is a value
            raise ValueError(f"{CONFIG} has {option} = {value!r}: not plain LoRA. Load it with PEFT.")


def _check_tensors(tensors: dict[str, torch.Tensor], linear: dict[str, nn.Linear], rank: int) -> list[str]:
    """The layers in the file. Raises ValueError unless it has a fitting A and B of each, and nothing else."""
    layers = [layer for layer in linear if _key(layer, "A") in tensors or _key(layer, "B") in tensors]
    for key in sorted(tensors.keys() - {_key(layer, matrix) for layer in layers for matrix in "AB"}):
        prefix = next((f"{part}." for part in key.split(".") if part in ("_orig_mod", "module")), None)
        hint = f" A wrapper added {prefix!r}: save the network inside it again." if prefix else ""
        raise ValueError(f"{TENSORS} has {key!r}; the Linear layers here are: {', '.join(linear)}.{hint}")
    for layer in layers:
        weight = linear[layer].weight
        for matrix, shape in (("A", (rank, weight.shape[1])), ("B", (weight.shape[0], rank))):
            tensor = tensors.get(_key(layer, matrix))
            if tensor is None or tuple(tensor.shape) != shape:
                found = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
                raise ValueError(f"{layer}: {matrix} is {found}; at rank {rank}, this network needs {shape}.")
            if not tensor.to(weight.dtype).isfinite().all():
                raise ValueError(f"{layer}: {matrix} has values that are not finite in {weight.dtype}.")
    return layers


def _check_targets(config: dict, layers: list[str], linear: dict[str, nn.Linear]) -> None:
    """Raises ValueError if `target_modules` lists other layers than the file of tensors has."""
    targets = config.get("target_modules")
    if not isinstance(targets, list) or config.get("exclude_modules"):
        return  # these may be regular expressions; the tensors alone say which layers are meant
    if [layer for layer in linear if _is_listed(layer, targets)] != layers:
        raise ValueError(f"target_modules is {targets}, but {TENSORS} has {layers}. Save the adapter again.")
