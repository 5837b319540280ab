"""The report's plots, each a function from results to the bytes of an SVG file."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.ticker

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot
from matplotlib.figure import Figure

# One colour a method, in all plots; safe for the common colour blindnesses (Okabe and Ito).
COLOURS = {
    "none": "#777777",
    "gumbel": "#0072b2",
    "coupled": "#009e73",
    "reuse": "#e69f00",
    "resample": "#cc79a7",
    "reuse_biased": "#d55e00",
    "stock": "#bbbbbb",
    "plain": "#777777",
    "sjd": "#0072b2",
}
_WIDTH = 9.0  # inches
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a94a0",
    "axes.labelcolor": "#1c2430",
    "xtick.color": "#5b6675",
    "ytick.color": "#5b6675",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e9ecf0",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "sjd-vllm",  # the same ids each time, so that files change only with their content
}


def compression_by_window(cells: Mapping[str, Mapping[int, tuple[float, float]]], num_tokens: int) -> bytes:
    """Tokens per forward against the window; cells: method -> window -> (mean, standard error) of the forwards."""
    with pyplot.rc_context(_STYLE):
        figure, axes = pyplot.subplots(figsize=(_WIDTH, 4.4), layout="constrained")
        for name, by_window in cells.items():
            windows = sorted(by_window)
            means = np.array([by_window[window][0] for window in windows])
            errors = np.array([by_window[window][1] for window in windows])
            axes.plot(windows, num_tokens / means, "o-", color=COLOURS[name], label=name)
            axes.fill_between(
                windows,
                num_tokens / (means + 1.96 * errors),
                num_tokens / (means - 1.96 * errors),
                color=COLOURS[name],
                alpha=0.15,
                linewidth=0,
            )
        axes.axhline(1, color=COLOURS["none"], linewidth=1, linestyle="--", label="none")
        axes.set_xscale("log", base=2)
        ticks = sorted({window for by_window in cells.values() for window in by_window})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set(xlabel="window: draft tokens a forward", ylabel="tokens per forward", ylim=(0, None))
        axes.legend(loc="upper left")
        return _svg(figure)


def tokens_over_forwards(traces: Mapping[str, Sequence[Sequence[int]]], num_tokens: int) -> bytes:
    """Tokens done after each forward; traces: method -> tokens of each forward, picture by picture."""
    with pyplot.rc_context(_STYLE):
        figure, axes = pyplot.subplots(figsize=(_WIDTH, 4.4), layout="constrained")
        for name, pictures in traces.items():
            for index, tokens_per_step in enumerate(pictures):
                done = np.concatenate([[0], np.cumsum(tokens_per_step)])
                axes.plot(
                    done,
                    color=COLOURS[name],
                    alpha=0.28 if len(pictures) > 1 else 1,
                    linewidth=1,
                    label=name if not index else None,
                )
        axes.set(xlabel="forwards", ylabel="tokens done", xlim=(0, None), ylim=(0, 1.02 * num_tokens))
        for handle in axes.legend(loc="lower right").legend_handles:
            if handle is not None:
                handle.set_alpha(1)
        return _svg(figure)


def z_scores(methods: Mapping[str, Mapping[str, float]], names: Mapping[str, str], limit: float) -> bytes:
    """A dot for each statistic of each method, in the band that exact methods stay in.

    methods: label -> statistic -> z; names: label -> method, for the colours.
    """
    with pyplot.rc_context(_STYLE):
        figure, axes = pyplot.subplots(figsize=(_WIDTH, 0.55 * len(methods) + 0.9), layout="constrained")
        axes.axvspan(-limit, limit, color="#eaf3ea", zorder=0)
        markers = "osD^v"
        statistics = list(next(iter(methods.values())))
        for row, (label, values) in enumerate(methods.items()):
            for column, statistic in enumerate(statistics):
                axes.plot(
                    values[statistic],
                    row + (column - (len(statistics) - 1) / 2) * 0.13,
                    markers[column % len(markers)],
                    color=COLOURS[names[label]],
                    markersize=6,
                )
        for column, statistic in enumerate(statistics):
            axes.plot([], [], markers[column % len(markers)], color="#5b6675", label=statistic, linestyle="none")
        reach = max(limit * 1.25, *(abs(z) * 1.08 for values in methods.values() for z in values.values()))
        axes.set(xlim=(-reach, reach), ylim=(len(methods) - 0.5, -0.5), xlabel="z-score (standard normal if exact)")
        axes.set_yticks(range(len(methods)), list(methods))
        axes.grid(axis="y", visible=False)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
        return _svg(figure)


def attribute_differences(
    methods: Mapping[str, Mapping[str, Sequence[float]]], names: Mapping[str, str], attributes: Sequence[str]
) -> bytes:
    """Accuracy minus plain decoding's by attribute, with confidence intervals, in percentage points."""
    with pyplot.rc_context(_STYLE):
        figure, axes = pyplot.subplots(figsize=(_WIDTH, 3.9), layout="constrained")
        axes.axhline(0, color="#8a94a0", linewidth=1)
        spread = 0.7 / max(len(methods), 1)
        for index, (label, differences) in enumerate(methods.items()):
            shown = [name for name in attributes if name in differences]
            values = 100 * np.array([differences[name] for name in shown])
            places = np.array([attributes.index(name) for name in shown]) + (index - (len(methods) - 1) / 2) * spread
            axes.vlines(places, values[:, 1], values[:, 2], color=COLOURS[names[label]], linewidth=2, alpha=0.7)
            axes.plot(places, values[:, 0], "o", color=COLOURS[names[label]], markersize=5, label=label)
        axes.set_xticks(range(len(attributes)), [name.replace("_", " ") for name in attributes])
        axes.set(ylabel="accuracy over plain decoding,\npercentage points")
        axes.grid(axis="x", visible=False)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=5, fontsize=9)
        return _svg(figure)


def maps(rows: Sequence[tuple[str, Any, Sequence[Sequence[float]], Sequence[Sequence[float]]]]) -> bytes:
    """For each method: a picture, which forward gave each of its codes, and how often a code was an accepted draft.

    rows: label, RGB array of the picture, step of each code, share accepted of each code.
    """
    with pyplot.rc_context({**_STYLE, "axes.grid": False}):
        figure, grid = pyplot.subplots(
            3, len(rows), figsize=(2.1 * len(rows) + 0.9, 6.6), layout="constrained", squeeze=False
        )
        last = int(max(max(map(max, steps)) for _, _, steps, _ in rows))
        for column, (label, picture, steps, share) in enumerate(rows):
            grid[0, column].imshow(picture, interpolation="bicubic")
            grid[0, column].set_title(label, fontsize=10)
            of_step = grid[1, column].imshow(steps, cmap="viridis", vmin=0, vmax=last)
            grid[1, column].contour(steps, levels=range(0, int(last), 8), colors="white", linewidths=0.4)
            of_share = grid[2, column].imshow(share, cmap="magma", vmin=0, vmax=1)
            for axes in grid[:, column]:
                axes.set_xticks([])
                axes.set_yticks([])
                for spine in axes.spines.values():
                    spine.set_visible(False)
        figure.colorbar(of_step, ax=grid[1, :].tolist(), label="forward", shrink=0.85, pad=0.01)
        figure.colorbar(of_share, ax=grid[2, :].tolist(), label="share accepted", shrink=0.85, pad=0.01)
        return _svg(figure)


def acceptance_by_row_and_column(methods: Mapping[str, Sequence[Sequence[float]]], names: Mapping[str, str]) -> bytes:
    """Mean share of accepted drafts by row and by column of the picture."""
    with pyplot.rc_context(_STYLE):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(_WIDTH, 3.3), layout="constrained", sharey=True)
        for label, share in methods.items():
            left.plot(np.mean(share, axis=1), "o-", markersize=3, color=COLOURS[names[label]], label=label)
            right.plot(np.mean(share, axis=0), "o-", markersize=3, color=COLOURS[names[label]])
        left.set(xlabel="row, from the top", ylabel="share accepted", ylim=(0, 1))
        for axes in (left, right):
            axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        right.set(xlabel="column, from the left")
        left.legend(fontsize=9, ncols=2, loc="lower right")
        return _svg(figure)


def load_curve(rows: Sequence[Mapping[str, str]]) -> bytes:
    """Seconds of a picture against pictures a minute, a point a concurrency; rows of benchmarks/load_curve.py."""
    with pyplot.rc_context(_STYLE):
        figure, axes = pyplot.subplots(figsize=(_WIDTH, 4.4), layout="constrained")
        labels = {"stock": "vLLM as it comes, no guidance", "plain": "plain decoding", "sjd": "SJD, windows by load"}
        for method, label in labels.items():
            own = [row for row in rows if row["method"] == method]
            if not own:
                continue
            rates = [float(row["pictures_per_minute"]) for row in own]
            seconds = [float(row["latency_p50"]) for row in own]
            axes.plot(rates, seconds, "o-", color=COLOURS[method], label=label)
            for row, rate, second in zip(own, rates, seconds, strict=True):
                if method == "sjd":
                    axes.annotate(
                        row["concurrency"], (rate, second), (-3, -13), textcoords="offset points", color=COLOURS[method]
                    )
        axes.set(xlabel="pictures a minute", ylabel="seconds a picture, median", yscale="log", xlim=(0, None))
        axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axes.legend(loc="upper left")
        return _svg(figure)


def _svg(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return stream.getvalue()
