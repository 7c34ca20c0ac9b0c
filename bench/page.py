"""docs/benchmarks.md and its chart, made from the results of real runs."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Any

from bench import glance
from bench.compare import (
    HOST_DECIDES,
    gaps_beyond_resident,
    load_floors,
    misses,
    notes,
    overhead_bytes,
)
from bench.engines import ENGINES
from bench.plans import PLANS
from bench.table import account_rows, cell_text, engines_of, link_text, losers, ordered

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from bench.results import Results

EVEN = 1.01
"""How many times as fast an engine may be without being called faster: as in floors.json."""

_HOST_TIMES = (
    ("hooks us", "call_s"),
    ("alone", "hooks_s"),
    ("idle", "idle_hooks_s"),
    ("needed", "needed_s"),
)
"""Columns of the host's time at a block call: title and key."""

_HEAD = """# Benchmarks

Made by `python -m bench page` from the results in docs/runs. Efficiency is the physical limit over
the measured time, in percent. The limit of a pass is the larger of compute alone (the resident
model, measured) and the bytes beyond the budget over the measured rate of page-locked copies. Both
are measured beside each cell: another process with the resident model takes turns with the engine's
passes, and engines are compared by what each took of its own limit, unless one was 2 % faster than
that, which cannot be. Cells without such a limit, as those of older runs, have what was measured
once for each model, and are compared by their times. `limit ms` is that of dgls_torch's cell;
`ratio` is copy over compute: above 1 the link decides. One engine per process, the same blocks,
inputs and budget; the output is compared with the resident run's, bit for bit. Times are medians of
passes that are enqueued without a break. `best` is what no policy beats, whatever it keeps and
copies when: a buffer takes room that residents lack (a linear program with the blocks' bytes and
measured times, or as if all were equal where they were not timed; docs/plan-format.md). Layers are
as large and as many as the real models' (unless a width is named), weights random, positions (RoPE)
left out.

Favours to peers: accelerate and diffusers have no budget, so evenly spaced residents are put on the
device and hidden from them; accelerate's weights are page-locked. comfy-aimdo's layers other than
linear ones stay on the device.

`dgls-layer` is dgls_torch with `unit="layer"`, which streams layers one at a time, `dgls-compress`
with `compress="auto"`, which sends fewer bytes than the limit is made of, `dgls-compress-all` with
`"on"`. They count as no peers; `best` is of blocks and of bytes as they are, so they may pass it.

`beside processes that copy`: a slower link, which others share the time of (bench/eaters.py). It
goes round in turns of about a millisecond, and a copy queue that is empty for a moment waits for
those of all others, as on no real link; docs/measurements.md says what that takes.

`over`: ran out of memory under the cap (the budget, what the resident run needs beside its
weights, and a sixteenth of the budget but at least 256 MiB) and was measured without it.
`differs`: another output than the resident run's. `failed`: see the reasons below. `-`: not run.
`lost`: an engine was more than 1 % faster than dgls_torch; `even`: one was faster by less. `host`:
launches were more than a tenth of the pass, so the host limits; the resident run then is as noisy
as the rest, and values pass 100. `launch us`: what the host took to launch a kernel, from the best
cell to the worst; where it is empty, the profiler of earlier cells had stayed attached and made
each launch up to twice as slow. `torch's gaps`: what torch's allocator held at the peak and nobody
had of it, beyond the same in the resident run; which segments have room for a small tensor when it
comes is chance. `hooks us`: what streaming adds to the host's time at each call of a block, of
narrow blocks whose launches decide, by the span of eight of them; `alone`: what the hooks take by
themselves (bench/host_time.py). Where it was measured, `idle` is what two hooks add that do
nothing, and `needed` what two hooks add that only make the driver's calls that streaming a block
needs, whoever makes them: two marks, two waits and one copy (bench/needed_calls.py).
"""


_FIRST = """Of an engine that learns, the passes after the two whose output is checked and before
those that are timed: the mean of all of them, with the changes of plan that they had.
"""

_ACCOUNT = """Milliseconds, from a profile of a few passes more: `profiled` is what those took by
events, `sum` the parts together, `alone` compute alone. An engine that was faster has a line of its
own.
"""


def _markdown(rows: list[tuple[str, ...]]) -> list[str]:
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return lines + ["| " + " | ".join(row) + " |" for row in rows[1:]]


def _machine(results: Results) -> list[str]:
    facts = results.value["machine"]
    where = facts.get("gpu", "no GPU: paced blocks, a link held to a rate")
    lines = [f"{where}; {facts.get('cpu')}, {facts.get('cores')} cores; {facts.get('system')}"]
    versions = {name: facts.get(name) for name in ("driver", "python", "torch", "dgls_torch")}
    versions |= facts.get("packages", {})
    lines.append(", ".join(f"{name} {value}" for name, value in versions.items() if value))
    lines += [f"`{entry['command']}` ({entry['date']})" for entry in results.value["commands"]]
    return [line for text in lines for line in (text, "")]


def _beds(results: Results) -> list[str]:
    names, lines = engines_of(results), []
    bed = None
    for (key, _, point), cells in ordered(results):
        value = results.value["beds"][key]
        if key != bed:
            bed = key
            size = value["weight_bytes"] / 1e9
            lines += ["", f"### {value['title']}", ""]
            link = link_text(results, key)
            lines += [f"{size:.2f} GB in {value['blocks']} blocks; link {link}", ""]
            head = ("budget", "tokens", "ratio", "limit ms", "ours ms", "best", *names)
            lines += _markdown([head])
        one = next(iter(cells.values()))
        limit, ours = results.limit_of_place(cells), cells.get("dgls")
        took = f"{1e3 * ours['pass_s']:.1f}" if ours and ours["status"] == "ok" else ""
        texts = [cell_text(results, cells.get(name)) for name in names]
        marks = [_standing(results, cells), " host" * _is_host_bound(ours)]
        best = f"{100 * limit.seconds / results.optimum_s(cells):.1f}"
        first = (f"{100 * results.share(one):.0f} %", point, f"{limit.ratio:.2f}")
        row = (*first, f"{1e3 * limit.seconds:.1f}", took + "".join(marks), best, *texts)
        lines.append("| " + " | ".join(row) + " |")
    return lines


def _first_passes(results: Results) -> list[str]:
    """What an engine that learns took for the passes before the timed ones."""
    rows: list[tuple[str, ...]] = []
    for (key, _, point), cells in ordered(results):
        cell = cells.get("dgls")
        if cell is None or "settling" not in cell:
            continue
        first_s = cell["settling_pass_s"]
        first = results.limit(cell).seconds / first_s
        place = (key, f"{100 * results.share(cell):.0f} %", point, f"{cell['settling']}")
        then = cell_text(results, cell)
        rows.append((*place, f"{1e3 * first_s:.1f}", f"{100 * first:.1f}", then))
    if not rows:
        return []
    head = ("bed", "budget", "tokens", "passes", "mean ms", "efficiency", "then")
    return ["", "### The first passes", "", _FIRST, *_markdown([head, *rows])]


def _standing(results: Results, cells: dict[str, dict[str, Any]]) -> str:
    if losers(results, cells, EVEN):
        return " lost"
    return " even" if losers(results, cells) else ""


def _is_host_bound(cell: dict[str, Any] | None) -> bool:
    """Whether launches decide, by the account."""
    account = (cell or {}).get("account") or {}
    return "total" in account and account["launch"] > HOST_DECIDES * account["total"]


def _memory(results: Results) -> list[str]:
    """The most bytes over the budget of each engine, as the driver sees it."""
    head = ("column", "engine", "most over the budget", "of it torch's gaps")
    hooks = [cell["hooks"] for cell in results.value["cells"] if cell.get("hooks")]
    times = [one for i, one in enumerate(_HOST_TIMES) if i < 2 or any(one[1] in h for h in hooks)]
    titles = [title for title, _ in times]
    rows: list[tuple[str, ...]] = [(*head, *titles, "host CPU ms", "launch us")]
    for name in engines_of(results):
        cells = [c for c in results.value["cells"] if c["engine"] == name and c["status"] == "ok"]
        over = [
            (found, gaps_beyond_resident(results, c))
            for c in cells
            if (found := overhead_bytes(results, c)) is not None
        ]
        most, gaps = max(over, key=lambda pair: pair[0], default=(None, None))
        host = [c["host_cpu_s"] for c in cells]
        launches = [1e6 * c["launch_s"] for c in cells if c.get("launch_s")]
        rows.append(
            (
                name,
                ENGINES[name].title,
                "" if most is None else f"{most / 2**20:.0f} MiB",
                "" if gaps is None else f"{gaps / 2**20:.0f} MiB",
                *(_median_us(cells, key) for _, key in times),
                f"{1e3 * statistics.median(host):.1f}" if host else "",
                f"{min(launches):.1f} to {max(launches):.1f}" if launches else "",
            )
        )
    return _markdown(rows)


def _median_us(cells: list[dict[str, Any]], key: str) -> str:
    """The median of the host's time that cells found; empty where none was looked at."""
    found = [c["hooks"][key] for c in cells if key in (c.get("hooks") or {})]
    return f"{1e6 * statistics.median(found):.1f}" if found else ""


def _reasons(results: Results) -> list[str]:
    reasons: dict[tuple[str, str], int] = {}
    for cell in results.value["cells"]:
        if cell["status"] == "failed":
            place = (cell["engine"], cell.get("reason", "").replace("|", "/"))
            reasons[place] = reasons.get(place, 0) + 1
    rows = [(ENGINES[name].title, str(n), why) for (name, why), n in reasons.items()]
    return _markdown([("engine", "cells", "reason"), *rows]) if rows else ["None failed."]


def _skipped(results: Results) -> list[str]:
    counts: dict[str, int] = {}
    for cell in results.value["cells"]:
        if cell["status"] == "skipped":
            counts[cell["engine"]] = counts.get(cell["engine"], 0) + 1
    texts = [f"{name} {count}" for name, count in counts.items()]
    parts = [f"No time was left for these cells: {', '.join(texts)}."] if texts else []
    for reason, count in results.without_beside().items():
        parts.append(f"No limit was measured beside {count} cells: {reason}.")
    return ["\n\n".join(parts)] if parts else []


def _left(loaded: list[Results]) -> list[str]:
    """The models of each plan that no run has measured."""
    measured = {
        key for results in loaded for key, bed in results.value["beds"].items() if bed["points"]
    }
    lines = []
    for name, stages in PLANS.items():
        beds = {stage.bed.key: stage.bed.title() for stage in stages}
        left = [title for key, title in beds.items() if key not in measured]
        if left and name not in ("ci", "host"):
            lines.append(f"- of `{name}`: {', '.join(left)}")
    return ["## Not in these runs", "", *lines] if lines else []


def _missed(results: Results) -> list[str]:
    floors = load_floors()
    found = [f"- {miss}" for miss in misses(results, floors)]
    void = [f"- (void) {note}" for note in notes(results, floors)]
    return [*(found or ["None."]), *void]


def curve(results: Results, engine: str) -> list[tuple[float, float]]:
    """Ratio and efficiency, the median of the cells within each factor of two."""
    bins: dict[int, list[tuple[float, float]]] = {}
    for cell in results.value["cells"]:
        efficiency = results.efficiency(cell)
        ratio = results.limit(cell).ratio if efficiency is not None else 0.0
        if cell["engine"] == engine and efficiency is not None and ratio > 0:
            bins.setdefault(round(math.log2(ratio)), []).append((ratio, efficiency))
    return [
        (statistics.median(r for r, _ in pairs), statistics.median(e for _, e in pairs))
        for _, pairs in sorted(bins.items())
    ]


def draw(loaded: list[Results], path: Path) -> None:
    """The first run's efficiency over copy/compute, a line for each engine; SVG, PNG or PDF."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    mpl.rcParams["svg.hashsalt"] = "dgls_torch"
    figure, axes = pyplot.subplots(figsize=(11, 5.5))
    first = loaded[0]
    names = [name for name in engines_of(first) if name != "dgls"]
    styles = ["-", "--", ":", "-."]
    for number, name in enumerate(names):
        points = curve(first, name)
        if points:
            color = mpl.colormaps["tab20"](number % 20)
            style = styles[number % len(styles)]
            axes.plot(
                *zip(*points, strict=True),
                style,
                color=color,
                marker=".",
                label=ENGINES[name].title,
            )
    points = curve(first, "dgls")
    if points:
        x, y = zip(*points, strict=True)
        axes.plot(x, y, "o-", color="black", linewidth=2.5, label=ENGINES["dgls"].title)
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("copy / compute")
    axes.set_ylabel("efficiency: physical limit / measured")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def text(loaded: list[Results], chart: str, earlier: Sequence[str] = ()) -> str:
    """The page; ``earlier`` are the pages of other runs."""
    lines = [_HEAD, f"![efficiency over copy/compute]({chart})", ""]
    if earlier:
        pages = ", ".join(f"[{name}]({name})" for name in earlier)
        lines += [f"Earlier runs, with an older engine: {pages}.", ""]
    lines += ["## All runs", "", glance.TEXT, *_markdown(glance.rows(loaded)), ""]
    for number, results in enumerate(loaded, 1):
        lines += [f"## Run {number}", "", *_machine(results), *_beds(results)]
        lines += _first_passes(results)
        lines += ["", "### Where a pass went", ""]
        lines += [_ACCOUNT]
        lines += _markdown(account_rows(results))
        lines += ["", "### Memory and host", "", *_memory(results)]
        lines += ["", "### Floors that were missed", "", *_missed(results)]
        lines += ["", "### What failed", "", *_reasons(results), "", *_skipped(results), ""]
    lines += _left(loaded)
    return "\n".join(lines).rstrip() + "\n"


def write(loaded: list[Results], path: Path) -> None:
    """Writes the page and, beside it, the chart; names the pages of earlier runs beside it."""
    chart: Any = path.with_suffix(".svg")
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(loaded, chart)
    earlier = sorted(page.name for page in path.parent.glob(f"{path.stem}-*.md"))
    path.write_text(text(loaded, chart.name, earlier), encoding="utf-8")
