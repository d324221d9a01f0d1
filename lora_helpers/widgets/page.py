"""The explorer as one HTML file, opened by a double click: no Python, no network.

Run `python -m lora_helpers.widgets.page explorer.html`, or call `explorer.save_page("explorer.html")`. What
is trained and tested here is packed into page.html, a template, with page.js, which counts and draws.
"""

import argparse
import base64
import json
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from lora_helpers.data import MEAN, STD, load_mnist
from lora_helpers.experiments import RULES, STOPS, Adapters, FineTuner, FineTuning, Setting
from lora_helpers.model import LAYERS, pretrained_base
from lora_helpers.training import progress_bar

# All combinations of these, and of RULES, are trained and tested; all their adapters fit into 20 MB.
RANKS = (1, 2, 4, 8, 16, 32, 64)
BATCHES = (0, 10, 30, 100)
BATCHES_WITH_OTHERS = (0, 30, 100)  # from all digits more of A and B moves, which packs less well
STRENGTHS = (0.0, 0.3, 0.5, 1.0, 1.5)
FOLDER = Path(__file__).parent


def save_page(
    path: str | os.PathLike,
    tuner: FineTuner,
    setting: Setting,
    *,
    ranks: Sequence[int] = RANKS,
    batches: Sequence[int] | None = None,
    strengths: Sequence[float] = STRENGTHS,
    progress: bool = True,
) -> Path:
    """Trains and tests every state, which takes a minute or two, and saves the page: whole, or not at all.

    Args:
        path: of the file; one that is there is replaced.
        setting: α, digit, share and seed of all states. Its rank, rule, batches and strength do not matter.
        ranks, batches, strengths: what the sliders of the page offer, in this order. By default, what fits
            into 20 MB.

    Returns:
        The path.

    Raises:
        FileNotFoundError: there is no such folder. IsADirectoryError: `path` is a folder.
        OSError: the folder cannot be written to.
        ValueError: a training diverged, or weights are too large for half precision.
    """
    path = Path(path).expanduser()
    with _whole_file(path) as new:
        if batches is None:
            batches = BATCHES_WITH_OTHERS if setting.share else BATCHES
        options = {"rank": list(ranks), "batches": list(batches), "strength": list(strengths)}
        new.write_text(_page(tuner, setting, options, progress), encoding="utf-8", newline="\n")
    return path


@contextmanager
def _whole_file(path: Path) -> Iterator[Path]:
    """A new file to write, which takes the place of `path` at the end, if nothing failed."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give a file's name, such as {path / 'explorer.html'}.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {path.parent}; make it first, or save elsewhere.")
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # tried before anything is trained
            yield Path(folder, "page.html")
            Path(folder, "page.html").replace(path)
    except OSError as error:
        problem = f"The page cannot be saved as {path}: {error.strerror}."
        raise type(error)(f"{problem} Choose a folder that you may write to, with room for 20 MB.") from error


def _page(tuner: FineTuner, setting: Setting, options: dict[str, list], progress: bool) -> str:
    """The text of the page."""
    images, labels = tuner.mnist.test.tensors
    blocks = {"base": _halves(_base_in_order(tuner))}
    blocks["images"] = ((images * STD + MEAN) * 255).round().to(torch.uint8).cpu().numpy().tobytes()
    states, rows = [], []
    for result in _results(tuner, setting, options, progress):
        now = result.setting
        states.append(f"{now.rank}_{now.rule}_{now.batches}_{now.strength:g}")
        # Most answers are the base's. As changes, which are mostly 0, they pack into a tenth.
        rows.append((result.on.predictions - result.off.predictions) % 10)
        # A has hardly moved where the digit has no ink, and B not at all: changes pack well here too.
        start, end = _in_order(result.earlier[0]), _in_order(result.adapters)
        name = f"{now.rank}_{now.rule}_{now.batches}"
        if name not in blocks:  # all strengths share it
            blocks[f"start_{now.rank}"] = _halves(start)
            blocks[name] = _halves([after - before for before, after in zip(start, end)])
    blocks["answers"] = torch.stack([labels, result.off.predictions, *rows]).to(torch.uint8).cpu().numpy()
    facts = {"digit": setting.digit, "share": setting.share, "seed": setting.seed, "alpha": setting.alpha}
    facts |= {"options": options, "rules": RULES, "states": states, "mean": MEAN, "std": STD}
    facts["sizes"] = [images[0].numel(), *(len(tuner.base_weights[f"{name}.bias"]) for name in LAYERS)]
    return _filled(facts, blocks)


def _results(
    tuner: FineTuner, setting: Setting, options: dict[str, list], progress: bool
) -> Iterator[FineTuning]:
    """Every state in which the adapter changes something, tested; a rank's rules are trained together."""
    batches, strengths = ([value for value in options[name] if value] for name in ("batches", "strength"))
    # The explorer's stops too: the tuner remembers these trainings in the place of the explorer's own.
    stops = {stop for stop in STOPS if stop <= max(batches)} | set(batches)
    trainings = sum(1 if rank == 1 else len(RULES) for rank in options["rank"])
    total = trainings * len(batches) * len(strengths)
    with progress_bar(total, progress, "state", "training and testing") as bar:
        for rank in options["rank"]:
            rules = RULES[:1] if rank == 1 else RULES  # at rank 1 all rules are one
            longest = [replace(setting, rank=rank, rule=rule, batches=max(batches)) for rule in rules]
            tuner.run_all(longest, stops=stops)
            for each in longest:
                for stop in batches:
                    for strength in strengths:
                        yield tuner.run(replace(each, batches=stop, strength=strength))[0]
                        bar.update()


def _base_in_order(tuner: FineTuner) -> list[torch.Tensor]:
    # Wᵀ, in × out: page.js adds up the rows of the units that are awake.
    return [
        t
        for name in LAYERS
        for t in (tuner.base_weights[f"{name}.weight"].T, tuner.base_weights[f"{name}.bias"])
    ]


def _in_order(adapters: Adapters) -> list[torch.Tensor]:
    return [tensor for name in LAYERS for tensor in (adapters[name][0], adapters[name][1].T)]


def _halves(tensors: Iterable[torch.Tensor]) -> bytes:
    """All numbers in half precision: the low bytes of all, then the high bytes, which are alike."""
    with np.errstate(over="ignore"):
        halves = np.concatenate([t.detach().flatten().cpu().numpy() for t in tensors]).astype("<f2")
    if not np.isfinite(halves).all():
        raise ValueError("Some weights are larger than 65,504, too large for the page's half precision.")
    return halves.view(np.uint8).reshape(-1, 2).T.tobytes()


def _filled(facts: dict, blocks: dict[str, bytes]) -> str:
    """The template with its script and its data. Base64, and JSON without "<", cannot end a script early."""
    data = [f'<script type="application/json" id="facts">{_json(facts)}</script>']
    for name, block in blocks.items():
        packed = base64.b64encode(zlib.compress(block)).decode()
        data.append(f'<script type="text/plain" id="{name}">{packed}</script>')
    page = (FOLDER / "page.html").read_text(encoding="utf-8")
    script = (FOLDER / "page.js").read_text(encoding="utf-8")
    return page.replace("{{script}}", script).replace("{{data}}", "\n".join(data))


def _json(value) -> str:
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")


def main() -> None:
    """Makes the page of the stored base, with the seed of notebook 4."""
    parser = argparse.ArgumentParser(description="Makes the explorer as one HTML file, in a minute or two.")
    parser.add_argument("path", nargs="?", default="explorer.html", help="the file to write")
    try:
        path = save_page(
            parser.parse_args().path, FineTuner(pretrained_base(), load_mnist()), Setting(seed=2)
        )
    except OSError as error:
        parser.exit(1, f"{error}\n")
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB) is ready: open it with a double click.")


if __name__ == "__main__":
    main()
