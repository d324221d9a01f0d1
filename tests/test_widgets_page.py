"""The explorer's page, made without a browser: written whole or not at all, and nothing in it is made up."""

import base64
import json
import sys
import zlib
from html.parser import HTMLParser
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from test_widgets_panel import some  # noqa: F401  (fixture)

from lora_helpers import FineTuner, LoRAExplorer, Setting, evaluate, pretrained_base
from lora_helpers.experiments import adapters_of, set_adapters
from lora_helpers.model import LAYERS
from lora_helpers.widgets import page
from lora_helpers.widgets.page import save_page

FEW = {"ranks": (1, 4), "batches": (0, 20), "strengths": (0.0, 0.5, 1.0), "progress": False}


class Scripts(HTMLParser):
    """The scripts of a page by id, as a browser finds them; `tags` are all elements with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.found, self.tags, self._id = {}, [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._id = dict(attributes).get("id", "") if tag == "script" else None

    def handle_endtag(self, tag):
        self._id = None

    def handle_data(self, data):
        if self._id is not None:
            self.found[self._id] = self.found.get(self._id, "") + data


def unpacked(scripts, name):
    return np.frombuffer(zlib.decompress(base64.b64decode(scripts[name])), dtype=np.uint8)


def halves(scripts, name):
    return torch.from_numpy(unpacked(scripts, name).reshape(2, -1).T.copy().view("<f2").astype("float32"))[
        :, 0
    ]


def network_of(scripts, setting):
    """The base with the adapter of `setting`, with the numbers that the page holds."""
    net, values = pretrained_base(), halves(scripts, "base")
    start, name = halves(scripts, f"start_{setting.rank}"), f"{setting.rank}_{setting.rule}_{setting.batches}"
    change, sizes = start + halves(scripts, name), [784, 1000, 2000, 10]
    pairs, at, now = {}, 0, 0
    for layer, n, m in zip(LAYERS, sizes, sizes[1:]):
        weight, bias = values[at : at + n * m], values[at + n * m : at + n * m + m]
        net.get_submodule(layer).load_state_dict({"weight": weight.view(n, m).T, "bias": bias})
        A, B = change[now:][: setting.rank * n], change[now + setting.rank * n :][: setting.rank * m]
        pairs[layer] = A.view(-1, n), B.view(-1, m).T
        at, now = at + (n + 1) * m, now + setting.rank * (n + m)
    setting.add_to(net)
    set_adapters(net, pairs)
    for adapter in adapters_of(net).values():
        adapter.alpha *= setting.strength
    return net


def changed_answers(text, tuner, ranks, batches, strengths, seed=0):
    """Of each state that changes something, how many test images half precision lets answer differently."""
    scripts, counts = Scripts(text).found, {}
    for rank, rule, stop, strength in product(
        ranks, page.RULES, filter(None, batches), filter(None, strengths)
    ):
        if rank > 1 or rule == "α/r":
            setting = Setting(rank=rank, rule=rule, batches=stop, strength=strength, seed=seed)
            answers = evaluate(network_of(scripts, setting), tuner.mnist.test).predictions
            counts[setting] = (answers != tuner.run(setting)[0].on.predictions).sum().item()
    return counts


@pytest.fixture(scope="module")
def explorer(some):  # noqa: F811
    return LoRAExplorer(pretrained_base(), some, seed=3)


@pytest.fixture(scope="module")
def text(explorer, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "explorer.html"
    return save_page(path, explorer.tuner, explorer.setting, **FEW).read_text(encoding="utf-8")


def test_one_file_holds_all_and_asks_for_nothing(text):
    scripts = Scripts(text)
    names = {"base", "images", "answers", "start_1", "start_4", "1_α/r_20", "4_α/r_20", "4_α/√r_20", "4_α_20"}
    assert scripts.found.keys() == {"facts", "", *names}
    assert "{{" not in text and "http:" not in text and "https:" not in text
    assert not [
        tag for tag, attributes in scripts.tags if {"src", "href"} & attributes.keys() or tag == "link"
    ]
    policy = next(a["content"] for tag, a in scripts.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert scripts.found[""].strip() == (Path(page.FOLDER) / "page.js").read_text(encoding="utf-8").strip()


def test_data_cannot_end_a_script(monkeypatch):
    found = Scripts(page._filled({"x": "</script><b>"}, {"block": b"</script>"})).found
    assert (
        json.loads(found["facts"]) == {"x": "</script><b>"}
        and unpacked(found, "block").tobytes() == b"</script>"
    )


def test_the_page_holds_the_answers_and_the_settings_of_the_explorer(text, explorer):
    scripts = Scripts(text).found
    facts, answers = json.loads(scripts["facts"]), unpacked(scripts, "answers").reshape(-1, 1000)
    assert [facts[name] for name in ("digit", "seed", "alpha", "share")] == [9, 3, 1, 0]
    assert len(facts["states"]) == len(answers) - 2 == 2 + 3 * 2
    place = 2 + facts["states"].index("4_α/√r_20_0.5")
    result = explorer.tuner.run(Setting(rank=4, rule="α/√r", batches=20, strength=0.5, seed=3))[0]
    assert np.array_equal((answers[1] + answers[place]) % 10, result.on.predictions)
    assert np.array_equal(answers[0], explorer.tuner.mnist.test.tensors[1])


def test_half_precision_changes_next_to_no_answer(explorer, tmp_path):
    path = save_page(tmp_path / "x.html", explorer.tuner, Setting(), **FEW)
    counts = changed_answers(path.read_text(encoding="utf-8"), explorer.tuner, *list(FEW.values())[:3])
    assert len(counts) == 8 and max(counts.values()) <= 1


@pytest.mark.slow
def test_half_precision_changes_a_handful_of_all_answers(mnist, tmp_path):
    """Of the two larger strengths, on 10,000 images; and the page stays under 20 MB."""
    tuner = FineTuner(pretrained_base(), mnist)
    path = save_page(tmp_path / "x.html", tuner, Setting(seed=2), progress=False)
    text, size = path.read_text(encoding="utf-8"), path.stat().st_size
    counts = changed_answers(text, tuner, page.RANKS, page.BATCHES, (1.0, 1.5), 2)
    print(f"\n{size / 1e6:.1f} MB; most answers that differ: {max(counts.values())}")
    assert size < 20_000_000 and len(counts) == 19 * 3 * 2 and max(counts.values()) <= 10


def test_a_page_that_fails_leaves_the_old_one_and_no_scraps(explorer, tmp_path, monkeypatch):
    old = tmp_path / "explorer.html"
    old.write_text("old", encoding="utf-8")
    monkeypatch.setattr(page, "_page", lambda *_: "new page")
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):

        def write_half(path, text, error=error, **_):
            path.write_bytes(text[:3].encode())
            raise error

        with monkeypatch.context() as patch, pytest.raises(type(error)):
            patch.setattr(Path, "write_text", write_half)
            explorer.save_page(old)
        assert [file.name for file in tmp_path.iterdir()] == ["explorer.html"] and old.read_bytes() == b"old"
    assert explorer.save_page(old).read_text(encoding="utf-8") == "new page"


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_trained(
    explorer, tmp_path, monkeypatch
):
    monkeypatch.setattr(page, "_page", lambda *_: pytest.fail("trained"))
    with pytest.raises(IsADirectoryError, match="is a folder; give a file's name, such as .*explorer.html"):
        explorer.save_page(tmp_path)
    with pytest.raises(FileNotFoundError, match="There is no folder .*nowhere; make it first"):
        explorer.save_page(tmp_path / "nowhere" / "x.html")

    def full(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page.tempfile, "TemporaryDirectory", full)
    with pytest.raises(OSError, match="cannot be saved as .*x.html: No space left .* with room for 20 MB"):
        explorer.save_page(tmp_path / "x.html")


def test_a_tilde_is_the_home_folder_and_the_explorer_says_what_it_stands_at(explorer, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setattr(page, "_page", lambda tuner, setting, *_: asked.append((tuner, setting)) or "new")
    assert (
        explorer.save_page("~/x.html") == tmp_path / "x.html"
        and (tmp_path / "x.html").read_text(encoding="utf-8") == "new"
    )
    assert asked == [(explorer.tuner, explorer.setting)]


def test_a_training_that_diverged_makes_no_page(explorer, tmp_path):
    with pytest.raises(ValueError, match="diverged. Choose a smaller α"):
        save_page(tmp_path / "x.html", explorer.tuner, Setting(alpha=1e30), **FEW)
    assert not list(tmp_path.iterdir())


def test_the_command_makes_the_page_or_says_in_a_line_what_is_wrong(explorer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(page, "FineTuner", lambda *_: explorer.tuner)
    monkeypatch.setattr(page, "_page", lambda *_: "new")
    monkeypatch.setattr(sys, "argv", ["page", str(tmp_path / "x.html")])
    page.main()
    assert (tmp_path / "x.html").read_text(
        encoding="utf-8"
    ) == "new" and "open it with a double click" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["page", str(tmp_path / "nowhere" / "x.html")])
    with pytest.raises(SystemExit) as stopped:
        page.main()
    assert stopped.value.code == 1 and capsys.readouterr().err.startswith("There is no folder ")
