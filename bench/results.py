"""The results file: beds with their points and limits, and cells; read, written, looked up."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from bench.cells import Bed, Limit, Point

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

FORMAT = 1
ABOVE_LIMIT = 1.02
"""How many times as fast as its limit a cell may be for the limit to count: as in floors.json."""


class Results:
    """What was measured on one machine."""

    def __init__(self, value: dict[str, Any] | None = None) -> None:
        """Starts empty, or from a file's value.

        Raises:
            ValueError: The value has another format.
        """
        empty = {"format": FORMAT, "machine": {}, "commands": [], "beds": {}, "cells": []}
        self.value: dict[str, Any] = empty if value is None else value
        if self.value.get("format") != FORMAT:
            raise ValueError(f"results need format {FORMAT}, found {self.value.get('format')!r}")

    @staticmethod
    def load(path: Path) -> Results:
        """Reads a file."""
        return Results(json.loads(path.read_text(encoding="utf-8")))

    def save(self, path: Path) -> None:
        """Writes a file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(self.value, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)

    # ---- beds

    def bed(self, bed: Bed) -> dict[str, Any] | None:
        """The measured bed, or None."""
        found: dict[str, Any] | None = self.value["beds"].get(bed.key)
        return found

    def has_points(self, bed: Bed) -> bool:
        """Whether the limits of a bed are known."""
        found = self.bed(bed)
        return bool(found and found["points"])

    def ratios_of(self, bed: Bed) -> set[float]:
        """The ratios for which points were found."""
        found = self.bed(bed)
        return {float(ratio) for ratio in found["ratios"]} if found else set()

    def points(self, bed: Bed) -> dict[str, Any]:
        """By key, what was measured of the resident run."""
        found = self.bed(bed)
        return {} if found is None else found["points"]

    def keys_of(self, bed: Bed, ratios: Iterable[float]) -> list[str]:
        """The keys of the points for some ratios."""
        found = self.bed(bed)
        known = {} if found is None else found["ratios"]
        keys = [known[f"{ratio:g}"] for ratio in ratios if f"{ratio:g}" in known]
        return list(dict.fromkeys(keys))

    def check_device(self, rows: list[dict[str, Any]]) -> None:
        """Refuses rows of another GPU than the one that the limits were measured on.

        Raises:
            ValueError: The GPUs differ; both are named.
        """
        known = self.value["machine"].get("gpu")
        for row in rows:
            if row.get("kind") == "device" and known not in (None, row["gpu"]):
                raise ValueError(
                    f"these results are of {known}, found {row['gpu']}: write to another file"
                )

    def add_limits(self, bed: Bed, rows: list[dict[str, Any]]) -> None:
        """Takes the rows of the process that measures limits."""
        entry = {"bed": bed.to_json(), "title": bed.title(), "points": {}, "ratios": {}}
        entry = self.value["beds"].setdefault(bed.key, entry)
        for row in rows:
            if row.get("kind") == "machine":
                self.value["machine"] = row["machine"]
            elif row.get("kind") == "bed":
                # A link measured earlier stays: cells have been set against it.
                fresh = {name: value for name, value in row.items() if name != "kind"}
                entry |= fresh | {name: entry[name] for name in fresh if name in entry}
            elif row.get("kind") == "blocks":
                entry["points"][row["point"]]["block_s"] = row["block_s"]
            elif row.get("kind") == "point":
                entry.pop("reason", None)
                entry["points"][row["point"]] = row
                entry["ratios"] |= {f"{ratio:g}": row["point"] for ratio in row["ratios"]}
            elif row.get("reason"):
                entry["reason"] = row["reason"]

    # ---- cells

    def is_done(self, bed: Bed, engine: str, budget: int, point: str) -> bool:
        """Whether a cell was measured, or failed for good."""
        return any(
            (cell["bed"], cell["engine"], cell["budget_bytes"], cell["point"])
            == (bed.key, engine, budget, point)
            and cell["status"] != "skipped"
            for cell in self.value["cells"]
        )

    def add_cells(
        self,
        bed: Bed,
        engine: str,
        wanted: list[tuple[int, dict[str, Any]]],
        rows: list[dict[str, Any]],
    ) -> None:
        """Takes the rows of an engine; cells without one get the reason of the whole process."""
        general = next((row for row in rows if "status" in row and "point" not in row), None)
        fallback = general or {"status": "skipped", "reason": "no time was left"}
        by_key = {(row["budget_bytes"], row["point"]): row for row in rows if "point" in row}
        for budget, fields in wanted:
            point = Point(**fields)
            row = by_key.get((budget, point.key)) or fallback
            cell = row | {
                "bed": bed.key,
                "engine": engine,
                "budget_bytes": budget,
                "point": point.key,
            }
            self._replace(cell)

    def _replace(self, cell: dict[str, Any]) -> None:
        names = ("bed", "engine", "budget_bytes", "point")
        key = [cell[name] for name in names]
        others = [c for c in self.value["cells"] if [c[name] for name in names] != key]
        self.value["cells"] = [*others, cell]

    def limit(self, cell: dict[str, Any]) -> Limit:
        """The physical limit of a cell: as measured beside it, else once for its bed."""
        bed = self.value["beds"][cell["bed"]]
        once = {
            "compute_s": bed["points"][cell["point"]]["compute_s"],
            "link_bytes_per_s": bed["link_bytes_per_s"],
        }
        found = cell.get("beside_limit") or once
        return Limit(
            weight_bytes=bed["weight_bytes"],
            budget_bytes=cell["budget_bytes"],
            compute_s=found["compute_s"],
            link_bytes_per_s=found["link_bytes_per_s"],
            blocks=bed["blocks"],
        )

    def limit_of_place(self, place: dict[str, dict[str, Any]]) -> Limit:
        """The limit of the cell of dgls_torch at a place, or of the first where it has none."""
        return self.limit(place.get("dgls") or next(iter(place.values())))

    def optimum_s(self, place: dict[str, dict[str, Any]]) -> float:
        """What no policy beats at a place: proved where it was, else as if blocks were equal."""
        proved = place.get("dgls", {}).get("optimum_s")
        return self.limit_of_place(place).optimum_s if proved is None else float(proved)

    def times(self, cell: dict[str, Any], other: dict[str, Any]) -> float:
        """How many times as long as ``other`` a cell took, at one place.

        Where a limit was measured beside each of them, both are taken against their own: what the
        machine was slower by in one of them is no engine's. A limit that its cell was faster than
        was measured wrong, so then their times are compared as they are.
        """
        times = float(cell["pass_s"]) / float(other["pass_s"])
        if all(each.get("beside_limit") and not self.beats_limit(each) for each in (cell, other)):
            times *= self.limit(other).seconds / self.limit(cell).seconds
        return times

    def beats_limit(self, cell: dict[str, Any]) -> bool:
        """Whether a measured cell was so much faster than its limit that this must be wrong."""
        efficiency = self.efficiency(cell)
        return efficiency is not None and efficiency > ABOVE_LIMIT

    def rates_beside(self, bed: str) -> tuple[float, float] | None:
        """The least and the greatest rate of the link beside a bed's cells, bytes per second."""
        cells = (cell for cell in self.value["cells"] if cell["bed"] == bed)
        found = [c["beside_limit"]["link_bytes_per_s"] for c in cells if c.get("beside_limit")]
        return (min(found), max(found)) if found else None

    def without_beside(self) -> dict[str, int]:
        """Why limits were not measured beside cells, with the number of cells."""
        counts: dict[str, int] = {}
        for cell in self.value["cells"]:
            if cell.get("beside_failed"):
                counts[cell["beside_failed"]] = counts.get(cell["beside_failed"], 0) + 1
        return counts

    def share(self, cell: dict[str, Any]) -> float:
        """The budget as a share of the weights."""
        weight_bytes: int = self.value["beds"][cell["bed"]]["weight_bytes"]
        return float(cell["budget_bytes"]) / weight_bytes

    def efficiency(self, cell: dict[str, Any]) -> float | None:
        """Limit over measured, or None where nothing was measured."""
        if cell["status"] != "ok":
            return None
        return self.limit(cell).seconds / float(cell["pass_s"])

    def by_place(self) -> Iterator[tuple[tuple[str, int, str], dict[str, dict[str, Any]]]]:
        """The cells of each bed, budget and point, by engine."""
        places: dict[tuple[str, int, str], dict[str, dict[str, Any]]] = {}
        for cell in self.value["cells"]:
            place = (cell["bed"], cell["budget_bytes"], cell["point"])
            places.setdefault(place, {})[cell["engine"]] = cell
        yield from places.items()


def turns_beside(cell: dict[str, Any]) -> list[dict[str, Any]]:
    """What the reference found in each of its turns beside a cell; none where it took none."""
    limit: dict[str, Any] = cell.get("beside_limit") or {}
    return list(limit.get("rounds", []))
