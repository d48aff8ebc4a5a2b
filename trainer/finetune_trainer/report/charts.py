"""Charts as SVG whose colours are the page's CSS variables, so that one picture serves light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from finetune_trainer.report.curves import PARTS, Curve, Curves

# Colours that nobody would choose stand for variables until the SVG is written.
_VARIABLES: Final = {
    "#000001": "--muted",
    "#000002": "--line",
    "#000003": "--accent",
    "#000004": "--faint",
    "#000005": "--base",
    "#000006": "--part-1",
    "#000007": "--part-2",
    "#000008": "--part-3",
    "#000009": "--part-4",
    "#00000a": "--bad",
}
_COLOUR: Final = {variable: colour for colour, variable in _VARIABLES.items()}
_STYLE: Final[Any] = {
    "svg.fonttype": "none",
    "font.size": 12,
    "axes.edgecolor": _COLOUR["--line"],
    "axes.labelcolor": _COLOUR["--muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _COLOUR["--line"],
    "grid.linewidth": 0.8,
    "xtick.color": _COLOUR["--muted"],
    "ytick.color": _COLOUR["--muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.color": _COLOUR["--muted"],
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
}
_SMALL: Final = (360, 210)  # CSS pixels at which a chart has its natural size
_WIDE: Final = (1040, 300)


def loss_chart(curves: Curves, wide: bool) -> str:
    """Training loss, smoothed where it is noisy, and evaluation loss."""

    def draw(axes: Axes) -> None:
        training = curves.loss.thinned()
        smooth = training.smoothed()
        if smooth:
            _line(axes, training, "--faint", linewidth=1)
        _line(axes, smooth or training, "--base", label="training, smoothed" if smooth else "training")
        if curves.evaluation_loss.steps:
            _line(axes, curves.evaluation_loss, "--accent", label="evaluation", marker="o", markersize=4.5)
        if curves.spikes.steps:
            _line(axes, curves.spikes, "--bad", label="jumps", linestyle="", marker="x", markersize=7)
        axes.legend(loc="upper right", ncols=3, borderaxespad=0, handlelength=1.2, columnspacing=1.2)
        axes.margins(y=0.12)

    return _svg("Loss over steps", draw, _WIDE if wide else (_SMALL[0], 250))


def learning_rate_chart(curves: Curves) -> str:
    def draw(axes: Axes) -> None:
        _from_zero(axes, curves.learning_rate.thinned())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.1e}".replace("e-0", "e-") if value else "0")

    return _svg("Learning rate over steps", draw)


def gradient_norm_chart(curves: Curves) -> str:
    def draw(axes: Axes) -> None:
        norm = curves.gradient_norm.thinned()
        smooth = norm.smoothed()
        if smooth:
            _line(axes, smooth, "--accent", zorder=3)
            _from_zero(axes, norm, "--faint", linewidth=1)
        else:
            _from_zero(axes, norm)

    return _svg("Gradient norm over steps", draw)


def throughput_chart(curves: Curves) -> str:
    def draw(axes: Axes) -> None:
        _from_zero(axes, curves.tokens_per_second.thinned())
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))

    return _svg("Tokens per second over steps", draw)


def parts_chart(curves: Curves) -> str:
    """Seconds of each step by part, stacked."""

    def draw(axes: Axes) -> None:
        parts = [curves.seconds[part].thinned() for part in PARTS]
        colours = [_COLOUR[f"--part-{i + 1}"] for i in range(len(parts))]
        axes.stackplot(parts[0].steps, *(p.values for p in parts), labels=PARTS, colors=colours, linewidth=0)
        axes.set_ylim(bottom=0, top=1.25 * max(map(sum, zip(*(p.values for p in parts), strict=True)), default=1))
        narrow = {"handlelength": 0.7, "columnspacing": 0.9, "handletextpad": 0.4, "fontsize": 10}
        axes.legend(loc="upper left", ncols=len(PARTS), borderaxespad=0, **narrow)

    return _svg("Seconds of a step by part", draw)


def length_chart(lengths: Sequence[dict[str, int]]) -> str:
    """Rows by their length in tokens: one bar for each doubling."""

    def draw(axes: Axes) -> None:
        axes.bar(range(len(lengths)), [b["rows"] for b in lengths], color=_COLOUR["--accent"], width=0.72)
        axes.set_xticks(range(len(lengths)), [f"{b['from']:,}" for b in lengths], rotation=0)
        if len(lengths) > 7:
            for label in axes.get_xticklabels()[1::2]:
                label.set_visible(False)
        axes.set_xlabel("tokens, from")

    return _svg("Rows by length in tokens", draw, over_steps=False)


def _line(axes: Axes, curve: Curve, colour: str, **style: Any) -> None:
    if len(curve.steps) == 1:  # a line needs two points
        style.setdefault("marker", "o")
    axes.plot(curve.steps, curve.values, color=_COLOUR[colour], **style)


def _from_zero(axes: Axes, curve: Curve, colour: str = "--accent", **style: Any) -> None:
    _line(axes, curve, colour, **style)
    axes.set_ylim(bottom=0, top=1.12 * max([v for v in curve.values if v == v], default=1) or 1)


def _svg(title: str, draw: Callable[[Axes], None], size: tuple[int, int] = _SMALL, *, over_steps: bool = True) -> str:
    with mpl.rc_context({**_STYLE, "svg.hashsalt": f"{title} {size}"}):
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.02, h_pad=0.04)  # type: ignore[union-attr, call-arg]
        axes = figure.add_subplot()
        draw(axes)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=not over_steps))
        if over_steps:
            axes.xaxis.set_major_locator(MaxNLocator(8 if size == _WIDE else 5, integer=True))
            axes.set_xlabel("step")
            axes.margins(x=0.01)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _themed(buffer.getvalue(), title)


def _themed(svg: str, title: str) -> str:
    """The <svg> element alone: scales with its container, wears the page's colours, and says what it shows."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg)  # not unique in a page with several charts
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
