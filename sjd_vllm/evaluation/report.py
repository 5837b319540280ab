"""The report: what a run shows, as one page with plots."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from sjd_vllm.config import GUMBEL, ConfigError
from sjd_vllm.demo.captions import ATTRIBUTES
from sjd_vllm.evaluation import accuracy, lossless, scores, two_sample
from sjd_vllm.evaluation.methods import BIASED, PLAIN, Method
from sjd_vllm.evaluation.page import Card, Figure, Page, Section, Table, Text
from sjd_vllm.evaluation.run_folder import Record, RunFolder
from sjd_vllm.evaluation.side_by_side import side_by_side
from sjd_vllm.evaluation.speed import acceptance_map, speed_results, step_of_code
from sjd_vllm.models.family import ImageFamily
from sjd_vllm.models.grammar import ImageGrammar
from sjd_vllm.models.registry import load_family

_NUM_ROWS = 6  # prompts in the grid of pictures
_HORIZON = " The dip in the middle is the horizon, with its mountains and houses."
_KEPT_DRAFTS = (
    " Plain SJD (`resample`) stops gaining at short windows, since it draws its drafts anew; `gumbel` and `coupled` "
    "keep most of them and go on gaining."
)
_NUM_TRACES = 12  # pictures in the plot of single forwards
_OUTLINE = {
    PLAIN: "one token a forward",
    "resample": "plain SJD: every draft drawn anew ([2410.01699](https://arxiv.org/abs/2410.01699))",
    "coupled": "maximal coupling ([2510.24211](https://arxiv.org/abs/2510.24211))",
    GUMBEL: "fixed noise, the default ([2002.09928](https://arxiv.org/abs/2002.09928))",
    "reuse": "SJD++'s rule in an exact form ([2512.07503](https://arxiv.org/abs/2512.07503))",
    BIASED: "SJD++'s rule as the paper reads: the control that must fail",
}
# What the authors report, on their models and GPUs: steps and latency, times plain decoding's.
_PUBLISHED = (
    (
        "SJD, Lumina-mGPT 7B",
        "[2410.01699](https://arxiv.org/abs/2410.01699)",
        "2.2-2.3x",
        "2.1-2.3x",
        "yes, at batch 1",
    ),
    ("SJD, Emu3", "[2410.01699](https://arxiv.org/abs/2410.01699)", "2.32x", "2.01x", "yes, at batch 1"),
    ("SJD++, over its models", "[2512.07503](https://arxiv.org/abs/2512.07503)", "2-7x", "2-3x", "no visible loss"),
    ("MC-SJD, Lumina-mGPT 7B", "[2510.24211](https://arxiv.org/abs/2510.24211)", "4.21x", "4.2x", "yes, at batch 1"),
)


@dataclass
class _Material:
    """The main run and what is read from it once."""

    run: RunFolder
    others: list[RunFolder]
    family: ImageFamily
    grammar: ImageGrammar
    records: dict[str, list[Record]]
    speed: dict[str, Any]
    load_curve: list[dict[str, str]]

    @property
    def methods(self) -> list[Method]:
        """Those with pictures, in the order asked for."""
        return [method for method in self.run.methods if self.records[method.label]]

    @property
    def names(self) -> dict[str, str]:
        """Method of each label."""
        return {method.label: method.name for method in self.run.methods}

    def label_of(self, name: str) -> str | None:
        """The first label of a method, if it is in the run."""
        return next((method.label for method in self.methods if method.name == name), None)


def write_report(
    runs: Sequence[str | Path], output: str | Path | None, load_curve: str | None = None, note: str = ""
) -> list[Path]:
    """Write report.html and report.md.

    Args:
        runs: folders of `sjd-vllm eval`; the first is the main one, the others add windows to the plot of windows.
        output: folder; None is the first run's.
        load_curve: CSV file of benchmarks/load_curve.py.
        note: said at the top, for what the numbers do not tell.

    Raises ConfigError for a folder without a run or without pictures, or a model that is gone.
    """
    if find_spec("matplotlib") is None:
        raise ConfigError("report", "the report needs matplotlib; pip install 'sjd-vllm[eval]' brings it.")
    material = _read(runs, load_curve)
    sections = [section for build in _SECTIONS if (section := build(material)) is not None]
    page = Page(
        f"Speculative Jacobi decoding on {_model_name(material)}", " ".join([_lead(material), note]).strip(), sections
    )
    folder = material.run.path if output is None else Path(output)
    try:
        return page.write(folder)
    except OSError as error:
        raise ConfigError("output", f"cannot write to {str(folder)!r}: {error.strerror}.") from error


def _read(runs: Sequence[str | Path], load_curve: str | None) -> _Material:
    main, *others = [RunFolder.open(run) for run in runs]
    records = main.by_method()
    if not any(records.values()):
        raise ConfigError("run", f"{main.path} has no pictures yet; `sjd-vllm eval` makes them.")
    family = load_family(main.settings["model"])
    if family is None:
        raise ConfigError("run", f"the model {main.settings['model']} of {main.path} is not there any more.")
    try:
        rows = list(csv.DictReader(Path(load_curve).read_text().splitlines())) if load_curve else []
    except OSError as error:
        raise ConfigError("load_curve", f"cannot read {load_curve!r}: {error.strerror}.") from error
    grammar = family.grammar(family.size(main.settings["size"]))
    return _Material(main, others, family, grammar, records, speed_results(main), rows)


def _model_name(material: _Material) -> str:
    return "the demo model" if material.run.settings["suite"] == "demo" else Path(material.run.settings["model"]).name


def _lead(material: _Material) -> str:
    settings = material.run.settings
    where = settings["provenance"]
    return (
        f"{len(material.run.prompts)} prompts of the suite `{settings['suite']}`, {settings['images_per_prompt']} a "
        f"prompt, every method on the same prompts and seeds, in turns, {settings['batch_size']} at once. "
        f"{settings['size']} pixels, guidance {settings['guidance_scale']:g}, temperature {settings['temperature']:g}, "
        f"top-k {settings['top_k']}, top-p {settings['top_p']:g}. {where['hardware']}, {where['date']} UTC, commit "
        f"{where['commit'] or 'unknown'}; {where['versions']}."
    )


def _glance(material: _Material) -> Section | None:
    label = material.label_of(GUMBEL)
    if label is None or PLAIN not in material.speed:
        return None
    row = material.speed[label]
    cards = [
        Card(f"{row['compression']:.2f}x", "fewer forwards than plain decoding, with the default strategy"),
        Card(f"{row['speedup']:.2f}x", "faster, median over pictures of the same prompt and seed"),
    ]
    results = material.run.read(lossless.RESULTS) or {"methods": {}}
    if label in results["methods"]:
        same = results["methods"][label]["identical"]
        cards.append(Card(f"{same['pictures']} / {same['of']}", "pictures are plain decoding's, token for token"))
        statistics = results["methods"][label]["statistics"]
        if statistics:
            worst = max(abs(value["z"]) for value in statistics.values())
            cards.append(
                Card(f"|z| ≤ {worst:.1f}", f"against the model's own law; the limit is {results['limit']:.1f}")
            )
    return Section("At a glance", [cards])


def _table(material: _Material) -> Section:
    results = material.run.read(lossless.RESULTS)
    scored = material.run.read(scores.RESULTS) or {}
    read_back = (material.run.read(accuracy.RESULTS) or {"methods": {}})["methods"]
    names = sorted({name for values in scored.values() for name in values})
    heads = ["", "method", "forwards", "steps", "seconds p50", "latency", "lossless"]
    heads += ["attributes right"] * bool(read_back) + [name.upper() for name in names]
    width = len(heads)
    rows = [
        [name, source, "", steps, "", latency, quality, *[""] * (width - 7)]
        for name, source, steps, latency, quality in _PUBLISHED
    ]
    for method in material.methods:
        row = material.speed[method.label]
        cells = [
            f"**{method.label}**, window {method.window}" if method.window else f"**{method.label}**",
            _OUTLINE[method.name],
            f"{row['forwards_mean']:.1f} ± {row['forwards_se']:.1f} of {row['num_tokens']}",
            f"{row['compression']:.2f}x",
            f"{row['seconds_p50']:.2f}",
            "" if row["speedup"] is None else f"{row['speedup']:.2f}x",
            lossless.verdict(results, method.label) if results else "not tested",
        ]
        if read_back:
            cells.append(f"{read_back[method.label]['accuracy']['mean']:.3f}")
        cells += [f"{scored.get(method.label, {}).get(name, math.nan):.2f}" for name in names]
        rows.append(cells)
    missing = [f"{name.upper()} needs {scores.NEEDS[name]}" for name in ("clip", "fid") if name not in names]
    blocks: list[Any] = [
        Text(
            "The first rows are what the authors report, on their models and GPUs; ours are this run's. Steps and "
            "latency are times fewer and times faster than plain decoding."
        ),
        Table(heads, rows),
    ]
    if missing:
        blocks.append(Text("Not scored here: " + "; ".join(missing) + "."))
    return Section("The paper's table, with our rows", blocks)


def _pictures(material: _Material) -> Section:
    methods = material.methods
    keys = [{record.key for record in material.records[method.label]} for method in methods]
    common = sorted(set.intersection(*keys))
    chosen = [key for key in common if key[1] == 0][:_NUM_ROWS]
    by_key = {method.label: {record.key: record for record in material.records[method.label]} for method in methods}
    rows = []
    for key in chosen:
        plain = by_key[PLAIN][key].token_ids if PLAIN in by_key else None
        cells = []
        for method in methods:
            record = by_key[method.label][key]
            is_same = method.name != PLAIN and record.token_ids == plain
            note = f"{record.num_steps} forwards" + (", identical" if is_same else "")
            cells.append((material.run.path / record.path, note, is_same))
        rows.append((material.run.prompts[key[0]].text, cells))
    content = side_by_side([method.label for method in methods], rows)
    caption = (
        "Each row is one prompt and one seed. Identical: the tokens are plain decoding's, one by one. `gumbel` and "
        "`none` share their noise; the other methods spend random numbers differently and paint other pictures of "
        "the same law."
    )
    return Section("The same prompts and seeds", [Figure("pictures", "webp", content, caption)])


def _windows(material: _Material) -> Section | None:
    from sjd_vllm.evaluation import plots

    cells: dict[str, dict[int, tuple[float, float]]] = {}
    num_tokens = 0
    for run in [material.run, *material.others]:
        for row in speed_results(run).values():
            num_tokens = row["num_tokens"]
            if row["window"]:
                cells.setdefault(row["name"], {})[row["window"]] = (row["forwards_mean"], row["forwards_se"])
    if not any(len(by_window) > 1 for by_window in cells.values()):
        return None
    content = plots.compression_by_window(cells, num_tokens)
    caption = f"Tokens per forward of pictures of {num_tokens} tokens, with 95 % bands."
    if material.run.settings["suite"] == "demo":
        caption += _KEPT_DRAFTS
    return Section("Compression by window", [Figure("windows", "svg", content, caption)])


def _traces(material: _Material) -> Section:
    from sjd_vllm.evaluation import plots

    traces = {
        method.name: [record.tokens_per_step for record in material.records[method.label][:_NUM_TRACES]]
        for method in material.methods
    }
    num_tokens = material.grammar.num_tokens
    caption = (
        f"Tokens done after each forward, {_NUM_TRACES} pictures a method at most; plain decoding is the diagonal."
    )
    return Section(
        "Forward by forward", [Figure("traces", "svg", plots.tokens_over_forwards(traces, num_tokens), caption)]
    )


def _acceptance(material: _Material) -> Section | None:
    from sjd_vllm.evaluation import plots

    drafting = [method for method in material.methods if not method.is_plain]
    if not drafting:
        return None
    rows = []
    shares = {}
    for method in drafting:
        records = material.records[method.label]
        shares[method.label] = acceptance_map(material.grammar, records)
        with Image.open(material.run.path / records[0].path) as picture:
            rows.append(
                (method.label, picture.convert("RGB"), step_of_code(material.grammar, records[0]), shares[method.label])
            )
    return Section(
        "Where drafts are accepted",
        [
            Figure(
                "maps",
                "svg",
                plots.maps(rows),
                "Top: a picture. Middle: which forward gave each code of it; wide bands of one colour came at once. "
                "Bottom: over all pictures, how often a code came as an accepted draft.",
            ),
            Figure(
                "rows-and-columns",
                "svg",
                plots.acceptance_by_row_and_column(shares, material.names),
                "The same by row and by column. Over the first row there is nothing to guess from."
                + _HORIZON * (material.run.settings["suite"] == "demo"),
            ),
        ],
    )


def _lossless(material: _Material) -> Section | None:
    from sjd_vllm.evaluation import plots

    results = material.run.read(lossless.RESULTS)
    tested = {
        label: method for label, method in (results or {"methods": {}})["methods"].items() if method["statistics"]
    }
    if results is None or not tested:
        return None
    z = {label: {name: value["z"] for name, value in method["statistics"].items()} for label, method in tested.items()}
    statistics = list(next(iter(z.values())))
    rows = []
    for label, method in tested.items():
        same = method["identical"]
        identical = f"{same['pictures']} of {same['of']}" if same["of"] and label != PLAIN else ""
        cells = [f"{method['statistics'][name]['z']:+.2f}" for name in statistics]
        rows.append([f"**{label}**", str(method["num_pictures"]), *cells, identical, lossless.verdict(results, label)])
    exact = next(method for method in tested.values() if method["is_exact"])
    power = ", ".join(f"{name} {value['visible_bias']:.4f}" for name, value in exact["statistics"].items())
    num_tokens = exact["statistics"][statistics[0]]["num_tokens"]
    return Section(
        "Losslessness",
        [
            Text(
                "Every token is set against the distribution that the model gives it, computed by vLLM without SJD "
                "over the finished picture. If each token was drawn from its distribution, these sums are standard "
                f"normal. The band is |z| ≤ {results['limit']:.2f}: exact methods all stay in it with probability "
                f"{1 - results['false_alarm']:g}. `{BIASED}` is there to show that the test can fail."
            ),
            Figure(
                "z-scores",
                "svg",
                plots.z_scores(z, material.names, results["limit"]),
                "A mark a statistic; the band is where exact methods stay.",
            ),
            Table(["method", "pictures", *statistics, "identical to none", "verdict"], rows),
            Text(
                f"What it would have seen: over {num_tokens} free tokens, a bias of the mean of a token's statistic "
                f"of at least this much passes the limit with probability {results['power']:g}: {power} (surprisal "
                "in nats, the others as shares)."
            ),
        ],
    )


def _two_sample(material: _Material) -> Section | None:
    results = material.run.read(two_sample.RESULTS)
    if not results or not results["methods"]:
        return None
    statistics = list(next(iter(results["methods"].values()))["statistics"])
    rows = [
        [f"**{label}**", str(method["num_pairs"]), *[_p_cell(method["statistics"][name]) for name in statistics]]
        for label, method in results["methods"].items()
    ]
    return Section(
        "Pictures of two methods",
        [
            Text(
                f"Statistics of the pictures' codes against `{results['against']}`, by exchanging the two pictures "
                "of a prompt at random: mean of the method, and the p-value of there being no difference. It needs "
                "no model, and sees less than the test above."
            ),
            Table(["method", "pairs", *[name.replace("_", " ") for name in statistics]], rows),
        ],
    )


def _p_cell(value: dict[str, float]) -> str:
    p = f"p = {value['p']:.2g}"
    return f"{value['mean']:.3f}, {p}" if "mean" in value else p


def _accuracy(material: _Material) -> Section | None:
    from sjd_vllm.evaluation import plots

    results = material.run.read(accuracy.RESULTS)
    if not results or not results["methods"]:
        return None
    methods = results["methods"]
    attributes = list(ATTRIBUTES)
    rows = [
        [
            f"**{label}**",
            *[f"{values['accuracy'][name]:.3f}" for name in attributes],
            f"{values['accuracy']['mean']:.3f}",
        ]
        for label, values in methods.items()
    ]
    differences = {label: values["difference"] for label, values in methods.items() if "difference" in values}
    blocks: list[Any] = [Table(["method", *[name.replace("_", " ") for name in attributes], "mean"], rows)]
    if differences:
        content = plots.attribute_differences(differences, material.names, attributes)
        caption = (
            "Difference from plain decoding on the same captions, with "
            f"{100 * results['confidence']:g} % paired intervals. Identical pictures differ by zero."
        )
        blocks.append(Figure("accuracy", "svg", content, caption))
    return Section(
        "What the pictures show",
        [Text("Share of attributes that a small classifier reads back as the caption asked for them."), *blocks],
    )


def _load(material: _Material) -> Section | None:
    from sjd_vllm.evaluation import plots

    if not material.load_curve:
        return None
    newest = [row for row in material.load_curve if row["date"] == material.load_curve[-1]["date"]]
    caption = (
        f"A point a concurrency (the numbers); windows follow the load. {newest[0]['hardware']}, "
        f"{newest[0]['date']} UTC, commit {newest[0]['commit']}."
    )
    return Section("Latency and throughput", [Figure("load", "svg", plots.load_curve(newest), caption)])


_SECTIONS: tuple[Callable[[_Material], Section | None], ...] = (
    _glance,
    _table,
    _pictures,
    _windows,
    _traces,
    _acceptance,
    _lossless,
    _two_sample,
    _accuracy,
    _load,
)
