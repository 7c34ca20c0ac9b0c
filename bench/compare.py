"""Says whether results keep what is claimed: every floor that is missed is one line.

The floors are a JSON file; a floor that is not in it is not asked for. Only cells of dgls_torch
are judged. A measurement that a floor needs and that is missing is a miss too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.engines import PEERS
from bench.results import turns_beside

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bench.results import Results

Cells = dict[str, dict[str, Any]]

FLOORS = Path(__file__).with_name("floors.json")
"""What is claimed."""
HOST_DECIDES = 0.1
"""Above this share of launches in a pass the host is what limits it."""


def load_floors(path: Path = FLOORS) -> dict[str, Any]:
    """Reads what is claimed, by the name of each check."""
    floors: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return floors


class Judge:
    """Holds one place's cells against the floors."""

    def __init__(self, results: Results, cells: Cells, floors: dict[str, Any]) -> None:
        """Takes the cells of one bed, budget and point, by engine."""
        self._results, self._cells, self._floors = results, cells, floors
        self._ours = cells["dgls"]
        self._limit = results.limit(self._ours)
        self._optimum_s = results.optimum_s(cells)
        self._on_cuda = "gpu" in results.value["machine"]

    def misses(self) -> Iterator[str]:
        """One text for each floor that is missed."""
        ours = self._ours
        if ours["status"] != "ok":
            yield f"{ours['status']}: {ours.get('reason', '')}"
            return
        if not ours["exact"]:
            yield "the output differs from the resident run's"
        checks: dict[str, Callable[[Any], Iterator[str]]] = {
            "efficiency": self._efficiency,
            "above_limit": self._above,
            "no_slower_than_best_peer": self._best_peer,
            "times_faster": self._times_faster,
            "over_resident": self._over_resident,
            "hooks_us": self._hooks,
            "driver_calls": self._driver_calls,
            "allocations_beyond_resident": self._allocations,
            "overhead_bytes": self._overhead,
            "account_off": self._account,
        }
        for name, check in checks.items():
            if name in self._floors:
                yield from check(self._floors[name])

    def _efficiency(self, floors: dict[str, float]) -> Iterator[str]:
        found = self._limit.seconds / self._ours["pass_s"]
        floor = floors[self._limit.regime]
        if (
            found < floor
            and self._is_asked_for
            and self._optimum_s / self._ours["pass_s"] < (self._floors["of_optimum"])
        ):
            best = self._limit.seconds / self._optimum_s
            text = f"efficiency {found:.3f}, needs {floor} ({self._limit.regime})"
            text += f"; no policy reaches more than {best:.3f}"
            passes = [1e3 * seconds for seconds in self._ours["passes_s"]]
            text += f"; passes took {min(passes):.1f} to {max(passes):.1f} ms"
            yield text + self._turns()

    def _turns(self) -> str:
        """What the turns of the resident run and of the link varied by meanwhile."""
        turns = turns_beside(self._ours)
        if not turns:
            return ""
        passes = [1e3 * seconds for turn in turns for seconds in turn["passes_s"]]
        rates = [turn["link_bytes_per_s"] / 1e9 for turn in turns]
        text = f", the resident run's {min(passes):.1f} to {max(passes):.1f} ms"
        return f"{text}, and the link had {min(rates):.1f} to {max(rates):.1f} GB/s"

    @property
    def _is_asked_for(self) -> bool:
        """Whether something has to be streamed, and the budget is not too small to be fair."""
        share = self._results.share(self._ours)
        return self._limit.copy_s > 0 and share >= self._floors.get("least_share", 0.0)

    def _above(self, most: float) -> Iterator[str]:
        found = self._limit.seconds / self._ours["pass_s"]
        if found > most:
            yield f"efficiency {found:.3f} is above {most}: the limit was measured wrong"

    def _best_peer(self, most: float) -> Iterator[str]:
        for name, cell in rivals(self._cells):
            times = self._results.times(self._ours, cell)
            if times > most:
                yield f"{times:.3f} of the time of {name}, may be {most}"

    def _times_faster(self, wanted: dict[str, Any]) -> Iterator[str]:
        for name, times, room in self._races(wanted):
            if times < wanted["times"] <= room:
                yield f"{times:.3f} times faster than {name}, needs {wanted['times']}"

    def _races(self, wanted: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
        """Peers, how many times faster we are, and how many any policy could be."""
        if self._limit.regime != wanted["regime"]:
            return
        for name, cell in rivals(self._cells):
            if name in wanted["engines"]:
                faster = 1 / self._results.times(self._ours, cell)
                yield name, faster, faster * self._ours["pass_s"] / self._optimum_s

    def notes(self) -> Iterator[str]:
        """What a floor asks for and no policy could do."""
        wanted = self._floors.get("times_faster")
        if wanted is None or self._ours["status"] != "ok":
            return
        floor = self._floors.get("efficiency", {}).get(self._limit.regime, 0.0)
        found, best = (
            self._limit.seconds / seconds for seconds in (self._ours["pass_s"], self._optimum_s)
        )
        if best < floor and self._is_asked_for:
            text = f"no policy reaches more than {best:.3f}, so {floor} is void"
            yield f"efficiency {found:.3f}; {text}"
        for name, times, room in self._races(wanted):
            if room < wanted["times"]:
                most = f"no policy could be more than {room:.2f}"
                yield f"{times:.2f} times faster than {name}; {most}, so {wanted['times']} is void"

    def _over_resident(self, most: float) -> Iterator[str]:
        beside = self._ours.get("beside")
        if self._limit.copy_s > 0:
            return
        if not beside or "pass_s" not in beside:
            yield f"all fits, but it was not measured beside the resident run: {beside}"
        elif beside["pass_s"] > most * beside["resident_s"]:
            times = beside["pass_s"] / beside["resident_s"]
            yield f"{times:.4f} of the resident run's time where all fits, may be {most}"

    def _hooks(self, most: float) -> Iterator[str]:
        hooks = self._ours.get("hooks")
        if hooks is None:
            return  # measured in the first cell of each budget, on a GPU
        found = hooks.get("call_s")
        if found is None:
            yield f"the host's time in hooks was not measured: {hooks.get('failed')}"
        elif 1e6 * found > most:
            spent = f"{1e6 * found:.1f} us of hooks for each block call, may be {most}"
            if "needed_s" in hooks:  # what no engine with hooks could save
                idle, needed = 1e6 * hooks["idle_hooks_s"], 1e6 * hooks["needed_s"]
                spent += f"; hooks that do nothing add {idle:.1f}, with the driver's calls that "
                spent += f"streaming a block needs {needed:.1f}"
            yield spent

    def _driver_calls(self, most: int) -> Iterator[str]:
        found = self._ours.get("driver_calls")
        if not self._on_cuda or found is None:
            return
        if "failed" in found:
            return  # one subscriber to CUPTI: it can be watched before the first profile only
        if not found["control"]:
            yield "the watch on driver calls sees nothing, not even a wait on purpose"
        for kind in ("synchronising", "allocating"):
            if found[kind] > most:
                yield f"{found[kind]} {kind} driver calls in {found['passes']} passes"

    def _allocations(self, most: float) -> Iterator[str]:
        """Torch's allocations of a steady pass, beyond those of the resident run."""
        points = self._results.value["beds"][self._ours["bed"]]["points"]
        resident = points[self._ours["point"]].get("allocations", {})
        for name, count in self._ours.get("allocations", {}).items():
            more = count - resident.get(name, 0.0)
            if more > most:
                yield f"{more:g} more {name} in a pass than the resident run"

    def _overhead(self, most: int) -> Iterator[str]:
        found = overhead_bytes(self._results, self._ours)
        if found is None:
            if self._on_cuda:
                yield "the driver's peak was not measured"
            return
        gaps = gaps_beyond_resident(self._results, self._ours) or 0
        if found - gaps > most:
            yield (
                f"{found / 2**20:.0f} MiB over the budget, {gaps / 2**20:.0f} of them gaps of "
                f"torch's allocator; may be {most / 2**20:.0f} MiB beside those"
            )

    def _account(self, most: float) -> Iterator[str]:
        account = self._ours.get("account") or {}
        if "off" not in account:
            yield f"no account of the time: {account.get('failed', 'not measured')}"
        elif account["launch"] > HOST_DECIDES * account["total"]:
            return  # a profile slows the host down: where that decides nothing can add up
        elif abs(account["off"]) > most:
            yield f"the account is {100 * account['off']:+.1f} % off the time measured"


def rivals(cells: Cells) -> Iterator[tuple[str, dict[str, Any]]]:
    """The other engines at a place that kept to the budget and gave the right output."""
    for name, cell in cells.items():
        if name not in PEERS or cell["status"] != "ok":
            continue
        if cell["exact"] and cell.get("capped", True):
            yield name, cell


def overhead_bytes(results: Results, cell: dict[str, Any]) -> int | None:
    """The driver's peak beyond the budget and what the resident run needs beside its weights."""
    bed = results.value["beds"][cell["bed"]]
    point = bed["points"][cell["point"]]
    values = [cell.get("peak_bytes"), point.get("peak_bytes")]
    bases = [cell.get("base_bytes"), point.get("base_bytes")]
    if None in values or None in bases:
        return None
    own, resident = (peak - base for peak, base in zip(values, bases, strict=True))
    budget = min(cell["budget_bytes"], bed["weight_bytes"])
    return int(own - budget - (resident - bed["weight_bytes"]))


def gaps_beyond_resident(results: Results, cell: dict[str, Any]) -> int | None:
    """How much more torch's allocator held unused at the peak than in the resident run.

    Its gaps depend on which segments happen to have room for a small tensor when it comes, which
    another one of the weights' changes: no engine decides them.
    """
    point = results.value["beds"][cell["bed"]]["points"][cell["point"]]
    own, resident = cell.get("gaps_bytes"), point.get("gaps_bytes")
    return None if own is None or resident is None else int(own - resident)


def _judges(results: Results, floors: dict[str, Any]) -> Iterator[tuple[str, Judge]]:
    """A judge for each place where dgls_torch ran or failed, with the place's name."""
    for (bed, _, point), cells in results.by_place():
        if "dgls" in cells and cells["dgls"]["status"] != "skipped":
            share = 100 * results.share(cells["dgls"])
            place = f"{bed}, budget {share:.0f} %, point {point}"
            yield place, Judge(results, cells, floors)


def misses(results: Results, floors: dict[str, Any]) -> list[str]:
    """Every floor that results miss."""
    found, judged = [], 0
    for place, judge in _judges(results, floors):
        judged += 1
        found += [f"{place}: {miss}" for miss in judge.misses()]
    if not judged:
        found.append("no cell of dgls_torch was measured")
    watched = any("control" in (c.get("driver_calls") or {}) for c in results.value["cells"])
    if "gpu" in results.value["machine"] and "driver_calls" in floors and not watched:
        found.append("the driver's calls were watched in no cell")
    return found


def notes(results: Results, floors: dict[str, Any]) -> list[str]:
    """What floors ask for although nobody could do it."""
    judges = _judges(results, floors)
    return [f"{place}: {note}" for place, judge in judges for note in judge.notes()]


def compare(loaded: list[Results], floors_path: Path) -> int:
    """Prints the misses; 1 if there are any."""
    floors = load_floors(floors_path)
    found = [miss for results in loaded for miss in misses(results, floors)]
    for note in (note for results in loaded for note in notes(results, floors)):
        print(f"note: {note}")
    for miss in found:
        print(miss)
    print(f"{len(found)} floors missed" if found else "all floors kept")
    return 1 if found else 0
