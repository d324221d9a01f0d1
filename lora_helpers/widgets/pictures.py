"""Pictures that are drawn again at every move of a slider, in tens of milliseconds."""

import io
from functools import lru_cache

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.image import AxesImage
from PIL import Image, ImageDraw, ImageFont

from lora_helpers import plots
from lora_helpers.plots import AFTER, BEFORE, in_plain_style, ink

DPI = 100
COLORS = (BEFORE, "#D55E00", "#009E73")  # Okabe and Ito's palette


class LivePicture(Figure):
    """A picture of which only the values are drawn again.

    `build` draws once what never changes (axes, headings), whatever matplotlib style the session has set.
    A subclass gives the artists in `moving` new values. They are drawn over it, then Pillow writes the words:
    matplotlib takes a millisecond for each. Sizes and places are in inches from the lower left.
    """

    @in_plain_style
    def __init__(self, width: float, height: float):
        super().__init__(figsize=(width, height), dpi=DPI)
        self.moving, self._words, self._canvas = [], [], FigureCanvasAgg(self)
        self.build()
        for x, y, word, axes, size, color, *_ in self._words:  # written by `build`, so they stay
            axes.text(x, y, word, fontsize=size, color=color, ha="center", va="center")
        self._draw_background()

    def build(self) -> None:
        """Makes the axes and the artists that move; words that it writes stay."""
        raise NotImplementedError

    def place(self, left: float, bottom: float, width: float, height: float, title: str = "") -> Axes:
        """New axes at a place in inches."""
        across, up = self.get_size_inches()
        axes = self.add_axes((left / across, bottom / up, width / across, height / up))
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9, length=2, pad=2)
        axes.set_title(title, loc="left", fontsize=11)
        return axes

    def bars(self, axes: Axes) -> list:
        """Two times ten bars, of the base and of the network as it is switched. They move."""
        line = {"edgecolor": "white", "linewidth": 0.5}
        both = [
            axes.bar(np.arange(10) - 0.2, 1, 0.4, color=BEFORE, **line),
            axes.bar(np.arange(10) + 0.2, 1, 0.4, color=AFTER, hatch="///", **line),
        ]
        axes.set(xticks=range(10), xlim=(-0.6, 9.6))
        names = ["base", " " * 16]  # the second says how the switch stands, so it is written at each move
        axes.legend(
            both, names, loc="lower right", ncols=2, frameon=False, borderpad=0, bbox_to_anchor=(1, 1.01)
        )
        self.moving += [*both[0], *both[1]]
        return both

    def erase(self) -> None:
        """Takes all words away."""
        self._words = []

    def write(self, x, y, word: str, axes: Axes | None = None, size=9, color="black", anchor="mm", halo=0):
        """Writes `word` at (x, y), in the data coordinates of `axes`, else in inches.

        Args:
            size: in points.
            anchor: which part of the word stands there, as in Pillow: "lm" is left and middle.
            halo: how many pixels around it are white.
        """
        self._words.append((x, y, word, axes, size, color, anchor, halo))

    def write_key(self, x: float, y: float, sign: str, color: str, word: str) -> None:
        """Writes what `sign`, in its colour, stands for."""
        self.write(x, y, sign, size=11, color=color)
        self.write(x + 0.13, y, word, size=10, anchor="lm")

    def fill(self, image: AxesImage, values: np.ndarray, words: list[str], size: float = 8) -> None:
        """Gives a heat map new values, and writes a word into each cell."""
        image.set_data(values)
        paper = 1 - image.get_alpha() if image.get_alpha() else 0
        grounds = image.to_rgba(values)[..., :3].reshape(-1, 3) * (1 - paper) + paper
        for (y, x), ground, word in zip(np.ndindex(values.shape), grounds, words):
            if word:
                self.write(x, y, word, axes=image.axes, size=size, color=ink(ground))

    def pixels(self) -> Image.Image:
        """The picture as it is now, in the size that `projector_mode` asks for."""
        if self.dpi != DPI * plots._type_scale:
            self.set_dpi(DPI * plots._type_scale)  # everything grows: larger type alone would not fit
            self._draw_background()
        self._canvas.restore_region(self._background)
        for artist in self.moving:
            artist.draw(self._canvas.get_renderer())
        image = plots.pixels(self._canvas)
        pen = ImageDraw.Draw(image)
        for x, y, word, axes, size, color, anchor, halo in self._words:
            across, up = (axes.transData if axes else self.dpi_scale_trans).transform((x, y))
            place, font = (across, image.height - up), _font(size * self.dpi / 72)
            pen.text(place, word, color, font, anchor=anchor, stroke_width=halo, stroke_fill="white")
        return image

    @in_plain_style
    def _draw_background(self) -> None:
        for artist in self.moving:
            artist.set_animated(True)  # leaves them out
        self._canvas.draw()
        self._background = self._canvas.copy_from_bbox(self.bbox)


@lru_cache
def _font(pixels: float) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(findfont("DejaVu Sans"), pixels, layout_engine=ImageFont.Layout.BASIC)


def with_caption(picture: Image.Image, text: str) -> Image.Image:
    """`picture`, and `text` above it, broken at its " · ": for places where no text stands beside it."""
    font, lines = _font(14 * plots._type_scale), [""]
    for part in text.split(" · "):
        longer = f"{lines[-1]} · {part}" if lines[-1] else part
        if font.getlength(longer) < picture.width - 20:
            lines[-1] = longer
        else:
            lines.append(part)
    room = round(1.5 * font.size * len(lines)) + 10
    sheet = Image.new("RGB", (picture.width, picture.height + room), "white")
    sheet.paste(picture, (0, room))
    ImageDraw.Draw(sheet).text((10, 6), "\n".join(lines), "black", font, spacing=0.3 * font.size)
    return sheet


def as_png(picture: Image.Image, **options) -> bytes:
    """`picture` as PNG; `options` are Pillow's."""
    buffer = io.BytesIO()
    picture.save(buffer, "png", **options)
    return buffer.getvalue()


def signed(change: int) -> str:
    """A change with its sign: +3, −3 or ±0."""
    return "±0" if change == 0 else f"{change:+d}".replace("-", "−")
