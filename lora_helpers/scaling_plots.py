"""Pictures for the experiments of `scaling`: one function for each claim of notebook 2.

Three rules, told apart by colour, marker and line: none (1), rsLoRA's (1/√r), LoRA's (1/r).
"""

import math
from collections.abc import Callable, Sequence
from statistics import mean

import torch
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, ScalarFormatter

from lora_helpers.experiments import FineTuning
from lora_helpers.model import LAYERS
from lora_helpers.plots import AFTER, BEFORE, Picture, in_plain_style, ink
from lora_helpers.scaling import Cost, Curve, FirstStep, end, norm_slopes

THIRD = "#009E73"
_STYLE = {"α": (THIRD, "^", ":"), "α/√r": (AFTER, "s", "--"), "α/r": (BEFORE, "o", "-")}
_NAMES = {"α": "no scale: s = α", "α/√r": "α/√r", "α/r": "α/r"}


@in_plain_style
def plot_spectra(spectra: dict[str, dict[str, torch.Tensor]]) -> Picture:
    """Singular values, divided by the largest, layer by layer; as `scaling.spectra` returns them."""
    figure = Picture("", figsize=(9, 3))
    said = []
    for axes, (name, kinds) in zip(figure.subplots(1, len(spectra), sharey=True), spectra.items()):
        for (kind, values), (color, _, line) in zip(kinds.items(), reversed(_STYLE.values())):
            axes.semilogy(
                range(1, len(values) + 1), values / values[0], line, color=color, label=kind, linewidth=2
            )
            share = (values[:4].square().sum() / values.square().sum()).item()
            said.append(f"{name}, {kind}: the four largest hold {share:.0%} of the squares")
        axes.set(title=name, xlabel="number of the singular value", xscale="log", ylim=(1e-4, 1.5))
    axes.legend(frameon=False, fontsize=8)
    figure.axes[0].set_ylabel("singular value / largest")
    figure.alt = "; ".join(said)
    return figure


@in_plain_style
def plot_first_steps(table: Sequence[FirstStep], quantity: str) -> Picture:
    """One step: ‖ΔW‖ ("norm") or ⟨−ΔW, G⟩ ("useful") by rank, relative to rank 1; a panel an optimizer."""
    label = {"norm": "‖ΔW‖ after one step", "useful": "⟨−ΔW, G⟩ after one step"}[quantity]
    figure = Picture("", figsize=(8.5, 3))
    said = []
    optimizers = list(dict.fromkeys(row.optimizer for row in table))
    ranks = sorted({row.rank for row in table})
    for axes, optimizer in zip(figure.subplots(1, len(optimizers), sharey=True), optimizers):
        for rule in _STYLE:
            cells = {
                r: [
                    getattr(x, quantity)
                    for x in table
                    if (x.optimizer, x.rule, x.rank) == (optimizer, rule, r)
                ]
                for r in ranks
            }
            first = mean(cells[ranks[0]])
            _band(axes, rule, {r: [v / first for v in values] for r, values in cells.items()})
            said.append(
                f"{optimizer}, {_NAMES[rule]}: rank {ranks[-1]} has {mean(cells[ranks[-1]]) / first:.2g} "
                f"times the value of rank {ranks[0]}"
            )
        axes.set(title=optimizer, yscale="log")
        _rank_axis(axes, ranks, "")
    figure.axes[0].set_ylabel(f"{label}\n(rank {ranks[0]} = 1)")
    axes.legend(frameon=False, fontsize=8)
    figure.alt = f"{label}: " + "; ".join(said)
    return figure


@in_plain_style
def plot_exponents(groups: dict[str, Sequence[FineTuning]], rule: str = "α/r") -> Picture:
    """The exponent of r in ‖ΔW‖ as training goes on, for each layer; one line for each group of runs."""
    figure = Picture("", figsize=(9, 3))
    said = []
    for axes, layer in zip(figure.subplots(1, 3, sharey=True), LAYERS):
        for (name, runs), (color, marker, line) in zip(groups.items(), reversed(_STYLE.values())):
            batches = sorted([*runs[0].earlier, runs[0].setting.batches])
            cells = {n: norm_slopes(runs, layer, n)[rule] for n in batches}
            _draw_band(axes, cells, color, marker, line, name)
            said.append(f"{layer}, {name}: " + ", ".join(f"{mean(cells[n]):+.2f} after {n}" for n in batches))
        axes.axhline(0, color="0.4", linewidth=1)
        axes.set(title=layer, xlabel="batches", xscale="log", xticks=batches, xticklabels=batches)
        axes.minorticks_off()
    figure.axes[0].set_ylabel(f"exponent of r in ‖ΔW‖\n({_NAMES[rule]})")
    axes.legend(frameon=False, fontsize=8)
    figure.alt = f"Exponent of r in the norm of ΔW, {_NAMES[rule]}: " + "; ".join(said)
    return figure


@in_plain_style
def plot_by_rank(
    runs: Sequence[FineTuning], layer: str = "linear2", before: tuple[int, float] | None = None
) -> Picture:
    """By rank and rule: the norm of ΔW, the wrong answers, the accuracy. The band runs from the least to
    the most of the seeds."""
    panels: list[tuple[str, Callable[[FineTuning], float]]] = [
        (f"‖ΔW‖ of {layer}", lambda r: r.norms[layer]),
        ("nines wrong", lambda r: r.wrong),
        ("accuracy", lambda r: r.on.accuracy),
    ]
    figure = _panels(runs, panels)
    _plain_log(figure.axes[0])
    figure.axes[2].set_ylim(0, 1)
    for axes, value in zip(figure.axes[1:], before or ()):
        axes.axhline(value, color="0.4", linestyle="-.", linewidth=1, label="base")
    figure.axes[-1].legend(frameon=False, fontsize=8)
    return figure


@in_plain_style
def plot_terms(norms: Sequence[float], along: Sequence[float]) -> Picture:
    """Partial sums of an adapter's rank-one terms: norm and part along a direction, each relative to the
    last value, log-log."""
    count = range(1, len(norms) + 1)
    alt = (
        f"From 1 to {len(norms)} terms the norm grows {norms[-1] / norms[0]:.1f} times, "
        f"the part along the direction {along[-1] / along[0]:.1f} times"
    )
    figure = Picture(alt, figsize=(5.5, 3.2))
    axes = figure.subplots()
    axes.loglog(
        count,
        [v / norms[-1] for v in norms],
        "--",
        color=AFTER,
        marker="s",
        markevery=0.1,
        label="norm of the sum",
    )
    axes.loglog(
        count,
        [v / along[-1] for v in along],
        "-",
        color=BEFORE,
        marker="o",
        markevery=0.1,
        label="its part along full fine-tuning",
    )
    axes.loglog(count, [(k / len(norms)) ** 0.5 for k in count], ":", color="0.4", label="√k")
    axes.loglog(count, [k / len(norms) for k in count], "-.", color="0.4", label="k")
    axes.set(xlabel="rank-one terms added, k", ylabel="share of the whole")
    axes.legend(frameon=False, fontsize=8)
    return figure


@in_plain_style
def plot_grids(groups: dict[str, Sequence[FineTuning]]) -> Picture:
    """Heat maps of α (rows) by learning rate (columns): wrong nines above, accuracy below, one column for
    each group. ✗: diverged."""
    figure = Picture("", figsize=(4.6 * len(groups), 5.4))
    said = []
    grid_of_axes = figure.subplots(2, len(groups), squeeze=False)
    for column, (name, runs) in enumerate(groups.items()):
        alphas, lrs = sorted({r.setting.alpha for r in runs}), sorted({r.setting.lr for r in runs})
        found = {(r.setting.alpha, r.setting.lr): r for r in runs}
        for row, (label, value, form) in enumerate(
            (("nines wrong", lambda r: r.wrong, "d"), ("accuracy", lambda r: r.on.accuracy, ".2f"))
        ):  # bright is good in both
            axes = grid_of_axes[row, column]
            table = [
                [value(found[a, lr]) if not found[a, lr].diverged else math.nan for lr in lrs] for a in alphas
            ]
            image = axes.imshow(table, cmap="cividis" if row else "cividis_r", origin="lower", aspect="auto")
            for i, line in enumerate(table):
                for j, v in enumerate(line):
                    words, color = (
                        ("✗", "black") if math.isnan(v) else (format(v, form), ink(image.to_rgba(v)))
                    )
                    axes.text(j, i, words, ha="center", va="center", color=color, fontsize=9)
                said.append(
                    f"{name}, {label}, α = {alphas[i]:g}: "
                    + ", ".join("diverged" if math.isnan(v) else format(v, form) for v in line)
                )
            axes.set(
                xticks=range(len(lrs)),
                xticklabels=[f"{lr:.3g}" for lr in lrs],
                yticks=range(len(alphas)),
                yticklabels=[f"{a:g}" for a in alphas],
            )
            axes.set(title=f"{name}: {label}", xlabel="learning rate", ylabel="α")
    figure.alt = "; ".join(said)
    return figure


@in_plain_style
def plot_curves(curves: Sequence[Curve], window: int = 20) -> Picture:
    """Loss and gradient norm over a long training, running means; one column for each optimizer and rule,
    one line for each rank."""
    kinds = list(dict.fromkeys((c.setting.optimizer, c.setting.rule) for c in curves))
    looks = dict(zip(sorted({c.setting.rank for c in curves}), reversed(_STYLE.values())))
    figure = Picture("", figsize=(1.5 + 2.4 * len(kinds), 4.6))
    said = []
    axes = figure.subplots(2, len(kinds), sharex=True, sharey="row", squeeze=False)
    for column, (optimizer, rule) in enumerate(kinds):
        for curve in [c for c in curves if (c.setting.optimizer, c.setting.rule) == (optimizer, rule)]:
            color, marker, line = looks[curve.setting.rank]
            for row, values in enumerate((curve.losses, curve.gradients)):
                smooth = torch.tensor(values, dtype=torch.float32).unfold(0, window, 1).mean(dim=1)
                axes[row, column].plot(
                    range(window, len(values) + 1),
                    smooth,
                    line,
                    color=color,
                    marker=marker,
                    markevery=0.2,
                    label=f"r = {curve.setting.rank}",
                )
            said.append(
                f"{optimizer}, {_NAMES[rule]}, rank {curve.setting.rank}: "
                f"loss at the end {end(curve.losses, window):.2f}, "
                f"gradient {end(curve.gradients, window):.2g}"
            )
        axes[0, column].set_title(f"{optimizer}, {_NAMES[rule]}")
        axes[1, column].set(xlabel="batch", yscale="log")
    axes[0, 0].set_ylabel("loss")
    axes[1, 0].set_ylabel("norm of the gradient in A and B")
    axes[0, 0].legend(frameon=False)
    figure.alt = "; ".join(said)
    return figure


@in_plain_style
def plot_rates(runs: Sequence[FineTuning], full: dict[float, list[float]]) -> Picture:
    """Accuracy over the learning rate, one panel for each rule, one line for each rank.

    A band runs from the least to the most of the seeds.

    Args:
        full: of full fine-tuning, for each learning rate the accuracies of all seeds. Drawn in each panel.
    """
    rules = list(dict.fromkeys(run.setting.rule for run in runs))
    looks = zip((*(look[0] for look in _STYLE.values()), "0.4"), "^sov", (":", "--", "-", "-."))
    looks = dict(zip(sorted({run.setting.rank for run in runs}), looks))
    figure = Picture("", figsize=(9.5, 3.4))
    said = []
    for axes, rule in zip(figure.subplots(1, len(rules), sharey=True, squeeze=False)[0], rules):
        for rank, look in looks.items():
            cells: dict[float, list[float]] = {}
            for run in runs:
                if (run.setting.rule, run.setting.rank) == (rule, rank):
                    cells.setdefault(run.setting.lr, []).append(run.on.accuracy)
            if cells:
                _draw_band(axes, cells, *look, f"rank {rank}")
                best = max(cells, key=lambda lr: mean(cells[lr]))
                said.append(f"{_NAMES[rule]}, rank {rank}: the best rate is {best:g}")
        _draw_band(axes, full, "black", "D", (0, (1, 1)), "full fine-tuning")
        axes.set(title=_NAMES[rule], xscale="log", xlabel="learning rate", ylim=(0, 1))
    figure.axes[0].set_ylabel("accuracy")
    figure.axes[0].legend(frameon=False, fontsize=8, loc="lower left")
    figure.alt = "; ".join(said) + f"; full fine-tuning: {max(full, key=lambda lr: mean(full[lr])):g}"
    return figure


@in_plain_style
def plot_costs(table: Sequence[Cost]) -> Picture:
    """Milliseconds a training step, and the bytes that Adam keeps and that are stored, by method and rank."""
    names = [c.method if c.rank is None else f"{c.method}\nr = {c.rank}" for c in table]
    times = [c.milliseconds for c in table]
    said = [
        f"{n.replace(chr(10), ', ')} {c.milliseconds:.1f} ms, "
        f"{c.optimizer_bytes:,} B, {c.checkpoint_bytes:,} B"
        for n, c in zip(names, table)
    ]
    figure = Picture(
        "A step's time, Adam's memory and what is stored: " + "; ".join(said), figsize=(9.5, 4.4)
    )
    axes, below = figure.subplots(2, 1, sharex=True)
    look = {"full": ("0.6", ""), "parametrization": (AFTER, "//"), "written out": (BEFORE, "")}
    for place, (cost, t) in enumerate(zip(table, times)):
        color, hatch = look[cost.method]
        axes.bar(place, t, color=color, hatch=hatch, edgecolor="white")
        axes.text(place, t, f"{t:.1f}", ha="center", va="bottom", fontsize=9)
    axes.set(xticks=range(len(names)), ylabel="ms a step", ylim=(0, 1.15 * max(times)))
    for shift, label, hatch, color, sizes in (
        (-0.2, "Adam's memory", "..", "#CC79A7", [c.optimizer_bytes for c in table]),
        (0.2, "stored", "", "#009E73", [c.checkpoint_bytes for c in table]),
    ):
        below.bar(
            [place + shift for place in range(len(table))],
            sizes,
            0.4,
            color=color,
            hatch=hatch,
            edgecolor="white",
            label=label,
        )
    below.set(yscale="log", ylabel="bytes", ylim=(1e4, 1e8))
    below.legend(frameon=False, fontsize=9, ncols=2)
    below.set_xticks(range(len(names)), names, fontsize=8)
    return figure


def _panels(
    runs: Sequence[FineTuning], panels: Sequence[tuple[str, Callable[[FineTuning], float]]]
) -> Picture:
    figure = Picture("", figsize=(9.5, 3))
    said = []
    ranks = sorted({r.setting.rank for r in runs})
    for axes, (label, value) in zip(figure.subplots(1, len(panels)), panels):
        for rule in _STYLE:
            cells = {
                rank: [value(r) for r in runs if (r.setting.rule, r.setting.rank) == (rule, rank)]
                for rank in ranks
            }
            if cells[ranks[0]]:
                _band(axes, rule, cells)
                said.append(
                    f"{label}, {_NAMES[rule]}: "
                    + ", ".join(f"{mean(v):.2g} at rank {r}" for r, v in cells.items())
                )
        _rank_axis(axes, ranks, label)
    figure.alt = "; ".join(said)
    return figure


def _band(axes, rule: str, cells: dict[int, list[float]]) -> None:
    color, marker, line = _STYLE[rule]
    _draw_band(axes, cells, color, marker, line, _NAMES[rule])


def _draw_band(axes, cells: dict[float, list[float]], color: str, marker: str, line: str, label: str) -> None:
    places = list(cells)
    means, look = [mean(cells[p]) for p in places], {"color": color, "marker": marker, "linestyle": line}
    axes.plot(places, means, label=label, **look)
    axes.fill_between(
        places,
        [min(cells[p]) for p in places],
        [max(cells[p]) for p in places],
        color=color,
        alpha=0.2,
        linewidth=0,
    )


def _plain_log(axes) -> None:
    axes.set_yscale("log")
    for axis_part in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis_part(ScalarFormatter())
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))


def _rank_axis(axes, ranks: Sequence[int], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set(xticks=ranks, xticklabels=ranks, xlabel="rank r", ylabel=label)
    axes.minorticks_off()


@in_plain_style
def plot_thin(out_features: int, in_features: int, ranks: Sequence[int]) -> Picture:
    """ΔW beside the thin B and A that make it, one panel for each rank, all sides to scale."""
    figure = Picture("", figsize=(9, 2.6))
    full, said = out_features * in_features, []
    for axes, rank in zip(figure.subplots(1, len(ranks)), ranks):
        numbers, gap = rank * (out_features + in_features), in_features / 4
        left_of_A = in_features + gap + rank + gap / 3
        for name, x, y, width, height, color in (
            ("ΔW", 0, 0, in_features, out_features, "0.85"),
            ("B", in_features + gap, 0, rank, out_features, AFTER),
            ("A", left_of_A, out_features - rank, in_features, rank, BEFORE),
        ):
            axes.add_patch(Rectangle((x, y), width, height, color=color, linewidth=0.8))
            above = (x + width / 2, y + height + out_features / 50)
            axes.annotate(name, above, ha="center", va="bottom")
        axes.annotate("=", (in_features + gap / 2, out_features / 2), ha="center", va="center", fontsize=14)
        axes.set(xlim=(-20, left_of_A + in_features + 20), ylim=(-20, out_features * 1.15), aspect="equal")
        axes.set_title(f"r = {rank}: {numbers:,} numbers", fontsize=10)
        axes.axis("off")
        said.append(f"at rank {rank} B and A hold {numbers:,}")
    figure.alt = f"ΔW, {out_features} × {in_features}, holds {full:,} numbers; {'; '.join(said)}"
    return figure
