"""The scaling lab measures trained adapters, and its axes let one see how they grow with the rank."""

import numpy as np
import pytest
from test_widgets_panel import some  # noqa: F401  (fixture)
from traitlets import TraitError

from lora_helpers import RichBoyNet, ScalingLab
from lora_helpers.widgets.lab import RANKS, power


@pytest.fixture(scope="module")
def lab(some):  # noqa: F811
    from lora_helpers import pretrained_base

    return ScalingLab(pretrained_base(), some)


def test_each_rule_scales_as_it_says(lab):
    assert lab.summary.startswith("LoRA on · rank 4 · α 1 · scale α/r = 0.25 · linear2: ‖BA‖ ")
    norms = {}
    for rule, scales in (("α", [1] * 7), ("α/r", [1 / r for r in RANKS]), ("α/√r", [r**-0.5 for r in RANKS])):
        lab.fields["rule"].value = rule
        assert [lab.results[rank].scale for rank in RANKS] == pytest.approx(scales) and not lab.status
        norms[rule] = [lab.results[rank].norms["linear2"] for rank in RANKS]
        assert f"over the ranks ‖ΔW‖ ∝ {power(norms[rule])} · " in lab.summary
    assert len({values[0] for values in norms.values()}) == 1, "at rank 1 all rules are one"
    assert norms["α/r"][-1] < norms["α/r"][0] / 3 and norms["α"][-1] > norms["α"][0]


def test_the_power_is_the_slope_between_the_logarithms():
    assert power([3 * rank**-0.47 for rank in RANKS]) == "r^−0.47" and power(len(RANKS) * [2]) == "r^0.00"


def test_the_rank_only_points(lab):
    lab.rule = "α/r"
    before = lab.results
    lab.sliders["rank"].set_state({"index": RANKS.index(64)})
    assert {r: f.on.wrong_counts for r, f in lab.results.items()} == {
        r: f.on.wrong_counts for r, f in before.items()
    }
    assert " · rank 64 · " in lab.summary and lab.summary.endswith("seed 0, remembered")
    with pytest.raises(TraitError):
        lab.rule = "α·r"


@pytest.mark.parametrize("alpha, rule", [(1 / 16, "α/r"), (1, "α/r"), (64, "α")])
def test_every_curve_is_within_its_axes_and_fills_them(lab, alpha, rule):
    lab._drawn.clear()
    lab.move({"alpha": float(alpha), "rule": rule, "rank": 64 if lab.rank == 4 else 4})
    left = lab._picture._lines[:3]
    low, high = left[0].axes.get_ylim()
    heights = np.concatenate([line.get_ydata() for line in left])
    assert low < heights.min() < 2 * low and high / 2 < heights.max() < high
    for line, share in zip(lab._picture._lines[3:], ("wrong", "others_wrong")):
        assert [y > 0 for y in line.get_ydata()] == [getattr(lab.results[rank], share) > 0 for rank in RANKS]


def test_a_base_too_small_for_the_ranks_is_refused(some):  # noqa: F811
    with pytest.raises(ValueError, match="rank"):
        ScalingLab(RichBoyNet(30, 40), some)
