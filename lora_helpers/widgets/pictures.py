"""Pictures that are drawn again at every move of a slider, in tens of milliseconds."""

import io
from collections.abc import Iterable
from functools import lru_cache
from itertools import accumulate

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path
from matplotlib.text import Text
from matplotlib.textpath import TextPath, text_to_path
from matplotlib.transforms import Affine2D

from lora_helpers import plots
from lora_helpers.plots import Picture

DPI = 100


class LivePicture(Picture):
    """A picture whose artists are made once and then only given new values, over a background that is drawn once.

    A subclass puts what changes into `self._moving`, and sets `self._background` to None when the rest has changed.
    Sizes and places are in inches from the lower left.

    Args:
        caption: leaves room for the summary above, for places where no text stands beside the picture.
    """

    def __init__(self, width: float, height: float, caption: bool):
        self._width, self._height = width, height + (0.5 if caption else 0)
        super().__init__("", figsize=(self._width, self._height), dpi=DPI)
        self.set_layout_engine("none")
        self._canvas, self._background = FigureCanvasAgg(self), None
        self._caption = self._write(0.1, self._height - 0.06, va="top", fontsize=10, linespacing=1.5)
        self._caption.set_visible(caption)
        self._moving = [self._caption]

    def describe(self, summary: str) -> None:
        """Sets the text alternative and, where there is room for it, the caption."""
        self.alt = summary
        lines, room = [""], self._width * 11  # characters that fit into a line
        for part in summary.split(" · "):
            if lines[-1] and len(lines[-1]) + len(part) > room:
                lines.append("")
            lines[-1] += (" · " if lines[-1] else "") + part
        self._caption.set_text("\n".join(lines))

    def fit(self) -> None:
        """Takes on the size that `projector_mode` asks for."""
        dpi = DPI * plots._type_scale  # all grows, for larger type alone would not fit: the places are fixed
        if self.dpi != dpi:
            self._background = None  # first: were it kept by an interrupt, it would be of the old size
            self.set_dpi(dpi)

    def png(self) -> bytes:
        self.fit()
        renderer = self._canvas.get_renderer()
        if self._background is None:
            for artist in self._moving:
                artist.set_animated(True)  # leaves them out of the background
            self._canvas.draw()
            self._background = self._canvas.copy_from_bbox(self.bbox)
        self._canvas.restore_region(self._background)
        for artist in self._moving:
            artist.draw(renderer)
        buffer = io.BytesIO()
        plots.pixels(self._canvas).save(buffer, "png", compress_level=1)
        return buffer.getvalue()

    def _place(self, left: float, bottom: float, width: float, height: float) -> Axes:
        axes = self.add_axes((left / self._width, bottom / self._height, width / self._width, height / self._height))
        axes.spines[["top", "right"]].set_visible(False)
        return axes

    def _write(self, left: float, bottom: float, **style) -> Text:
        return self.text(left / self._width, bottom / self._height, "", **style)


class Words(PathCollection):
    """Words in a picture, their outlines drawn together and kept: as `Text`s, each would take some milliseconds.

    Args:
        axes: whose data coordinates the places are in, unless `inches`, from the picture's lower left, are asked for.
        fontsize: in points.
        room: for how many characters there is room; longer words are written smaller.
        align: which part of a word stands at its place: "left", "center" or "right".

    Attributes:
        words: what is written, each as x, y of its middle line, the word, and its colour.
    """

    def __init__(self, axes: Axes, fontsize: float, room: int = 100, align: str = "center", inches: bool = False):
        to_inches = axes.figure.dpi_scale_trans
        super().__init__([], offset_transform=to_inches if inches else axes.transData, linewidths=0, clip_on=False)
        self.set_transform(Affine2D().scale(1 / 72) + to_inches)
        self._fontsize, self._room, self._align, self.words = fontsize, room, align, []
        axes.add_collection(self, autolim=False)

    def write(self, words: Iterable[tuple[float, float, str, str]]) -> None:
        """Replaces what is written."""
        self.words = words = [word for word in words if word[2].strip()]
        self.set_paths([_outline(word, self._fontsize * min(1, self._room / len(word)), self._align) for _, _, word, _ in words])
        self.set_offsets(np.reshape([(x, y) for x, y, _, _ in words], (-1, 2)))  # of none, too
        self.set_facecolor([color for *_, color in words])

    def width(self, word: str) -> float:
        """How wide `word` is written, in inches."""
        return sum(_glyph(character, self._fontsize)[1] for character in word) / 72


@lru_cache(maxsize=2048)
def _outline(word: str, fontsize: float, align: str) -> Path:
    """The word beside or around the origin, in points; its middle line is that of a digit, so that all words stand on one line."""
    glyphs, advances = zip(*(_glyph(character, fontsize) for character in word))
    *starts, width = accumulate(advances, initial=0)
    left = {"left": 0, "center": width / 2, "right": width}[align]
    down = _half_digit(fontsize)
    inked = [(glyph.vertices + (start - left, -down), glyph.codes) for glyph, start in zip(glyphs, starts) if len(glyph.vertices)]
    return Path(*map(np.concatenate, zip(*inked)))


@lru_cache(maxsize=1024)
def _glyph(character: str, fontsize: float) -> tuple[Path, float]:
    """The outline of a character, and how far on the next one begins, both in points."""
    advance, *_ = text_to_path.get_text_width_height_descent(character, FontProperties(size=fontsize), ismath=False)
    return Path(np.empty((0, 2))) if character.isspace() else TextPath((0, 0), character, size=fontsize), advance


@lru_cache
def _half_digit(fontsize: float) -> float:
    return TextPath((0, 0), "0", size=fontsize).get_extents().intervaly.mean()


def signed(change: int) -> str:
    """A change with its sign: +3, −3 or ±0."""
    return "±0" if change == 0 else f"{change:+d}".replace("-", "−")
