"""Large type in pictures, widgets and text, for the last row of a classroom."""

from IPython.display import HTML, DisplayHandle

from lora_helpers import plots
from lora_helpers.checks import check_bool

PICTURES = 1.35  # times the usual type
_STYLE = """<style>
:root, body {
  --jp-content-font-size0: 16px !important; --jp-content-font-size1: 20px !important;
  --jp-code-font-size: 19px !important; --jp-widgets-font-size: 20px !important;
  --jp-widgets-inline-height: 38px !important; --jp-widgets-radio-item-height-adjustment: 6px !important;
}
.jp-RenderedHTMLCommon, .widget-html-content, .widget-label, .widget-dropdown select, .widget-text input,
.widget-radio-box label, .widget-readout, .widget-checkbox, .jupyter-button, .jp-OutputArea-output pre {
  font-size: 20px !important; line-height: 1.45 !important;
}
.jupyter-widgets input[type="checkbox"], .widget-radio-box input { transform: scale(1.4); }
</style>Large type is on; <code>projector_mode(False)</code> switches it off."""
_shown = []


def projector_mode(on: bool = True) -> None:
    """Switches pictures, widgets and text to large type, or back.

    New pictures have large type. A panel grows as a whole at its next move, up to the width of the page.
    Text and widgets in this browser tab change at once, until the tab is reloaded or the call is reversed.

    Raises:
        TypeError: `on` is not a bool.
    """
    check_bool("on", on)
    plots.set_type_scale(PICTURES if on else 1.0)
    while _shown:
        _shown.pop().update(HTML(""))
    if on:
        _shown.append(DisplayHandle())
        _shown[0].display(HTML(_STYLE))
