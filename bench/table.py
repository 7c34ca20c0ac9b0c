"""The results as text: one line for each place, one column for each engine, and the accounts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.engines import ENGINES, OURS, PEERS

if TYPE_CHECKING:
    from bench.results import Results


def engines_of(results: Results) -> list[str]:
    """The engines that have cells, in the order of the tables."""
    found = {cell["engine"] for cell in results.value["cells"]}
    return [name for name in ENGINES if name in found]


def cell_text(results: Results, cell: dict[str, Any] | None) -> str:
    """A cell's efficiency in percent, with what is wrong about it."""
    if cell is None:
        return ""
    efficiency = results.efficiency(cell)
    if efficiency is None:
        return "failed" if cell["status"] == "failed" else "-"
    marks = "" if cell["exact"] else " differs"
    marks += "" if cell.get("capped", True) else " over"
    return f"{100 * efficiency:.1f}{marks}"


def ordered(results: Results) -> list[tuple[tuple[str, int, str], dict[str, dict[str, Any]]]]:
    """The places by bed, budget and ratio."""

    def key(place: tuple[tuple[str, int, str], dict[str, Any]]) -> tuple[str, float, float]:
        return place[0][0], place[0][1], results.limit_of_place(place[1]).ratio

    return sorted(results.by_place(), key=key)


def link_text(results: Results, bed: str) -> str:
    """The rate of a bed's link, and the range of those measured beside its cells."""
    text = f"{results.value['beds'][bed]['link_bytes_per_s'] / 1e9:.1f} GB/s"
    found = results.rates_beside(bed)
    if found is None:
        return text
    least, most = (f"{rate / 1e9:.1f}" for rate in found)
    return f"{text}, beside the cells {least} to {most} GB/s"


def print_table(results: Results) -> None:
    """Prints efficiencies, then failures, then where dgls_torch's time went."""
    names = engines_of(results)
    bed = None
    for (key, _, point), cells in ordered(results):
        if key != bed:
            bed = key
            value = results.value["beds"][key]
            size = value["weight_bytes"] / 1e9
            print(f"\n{value['title']}: {size:.2f} GB, {link_text(results, key)}")
            heads = "".join(f"{name[:11]:>13}" for name in names)
            print(f"{'budget':>7}{'point':>12}{'ratio':>7}{'limit ms':>10}{heads}")
        any_cell = next(iter(cells.values()))
        limit = results.limit_of_place(cells)
        row = "".join(f"{cell_text(results, cells.get(name)):>13}" for name in names)
        share = f"{100 * results.share(any_cell):.0f} %"
        print(f"{share:>7}{point:>12}{limit.ratio:>7.2f}{1e3 * limit.seconds:>10.1f}{row}")
    reasons: dict[tuple[str, str], int] = {}
    for cell in results.value["cells"]:
        if cell["status"] != "ok":
            place = (cell["engine"], cell.get("reason", ""))
            reasons[place] = reasons.get(place, 0) + 1
    for (engine, reason), count in reasons.items():
        print(f"{engine}, {count} cells: {reason}")
    for reason, count in results.without_beside().items():
        print(f"no limit beside {count} cells: {reason}")
    _print_accounts(results)


def losers(results: Results, cells: dict[str, dict[str, Any]], least: float = 1.0) -> list[str]:
    """The peers that are more than ``least`` times as fast as dgls_torch at one place."""
    ours = cells.get("dgls")
    if ours is None or ours["status"] != "ok":
        return []
    return [
        name
        for name, cell in cells.items()
        if name in PEERS
        and cell["status"] == "ok"
        and cell["exact"]
        and results.times(ours, cell) > least
    ]


def account_rows(results: Results) -> list[tuple[str, ...]]:
    """Where the time went, of dgls_torch everywhere and of each peer where it is faster."""
    head = ("bed", "budget", "ratio", "engine", "measured", "profiled", "sum", "compute", "alone")
    rows: list[tuple[str, ...]] = [(*head, "exposed", "inline", "launch", "device", "hooks us")]
    for (key, _, _), cells in ordered(results):
        for name in (*OURS, *losers(results, cells)):
            cell = cells.get(name)
            account = (cell or {}).get("account")
            if cell is None or not account or "total" not in account:
                continue
            limit = results.limit(cell)
            parts = (account[part] for part in ("exposed_copy", "copy_inline", "launch", "device"))
            hooks = (cell.get("hooks") or {}).get("call_s")
            if hooks is None and account.get("hooks"):
                hooks = account["hooks"] / account["kernels"]  # without a GPU: calls of blocks
            profiled = account["total"] / (1 + account.get("off", 0.0))
            times = (cell["pass_s"], profiled, account["total"])
            values = (*times, account["compute"], limit.compute_s, *parts)
            rows.append(
                (
                    key,
                    f"{100 * results.share(cell):.0f} %",
                    f"{limit.ratio:.2f}",
                    name,
                    *(f"{1e3 * value:.2f}" for value in values),
                    "" if hooks is None else f"{1e6 * hooks:.1f}",
                )
            )
    return rows


def _print_accounts(results: Results) -> None:
    rows = account_rows(results)
    if len(rows) < 2:
        return
    print("\nwhere a pass went, ms")
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)))
