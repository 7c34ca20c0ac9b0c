"""Decides how much host memory a stream takes for what, and refuses what a machine cannot give."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dgls_torch.encoding import may_encode, promised_bytes
from dgls_torch.memory import (
    encoded_budget,
    host_memory,
    pin_limits,
    pinned_budget,
    preflight_host,
)
from dgls_torch.units import MIB, format_bytes

if TYPE_CHECKING:
    import torch

    from dgls_torch.config import StreamConfig
    from dgls_torch.memory import HostMemory
    from dgls_torch.weights import Part

# The engine makes no more chunks.
_MOST_STAGING = 256 * MIB

Locks = Literal["driver", "system", "none"]


@dataclass(frozen=True, kw_only=True, slots=True)
class HostBudget:
    """Bytes of host memory, none of which is ever exceeded.

    Attributes:
        pinned_bytes: Most that is page-locked beside the staging chunks, in whole pages.
        copies_bytes: Most that holds copies of what the files hold, page-locked or not.
        staging_bytes: Most that the staging chunks take.
        encoded_bytes: Most that holds encoded weights, page-locked beside the others.
        locked_bytes: Most that is page-locked, encoded weights and those in place together, beside
            the staging chunks; 0 where no one locks.
        page_cache_bytes: What the system's page cache has room for beside them; no budget of ours.
    """

    pinned_bytes: int
    copies_bytes: int
    staging_bytes: int
    encoded_bytes: int
    locked_bytes: int
    page_cache_bytes: int


def host_budget(
    config: StreamConfig,
    host: HostMemory,
    *,
    memory_bytes: int,
    filed_bytes: int,
    locks: Locks,
    may_encode: bool = True,
    promised_bytes: int = 0,
) -> HostBudget:
    """Splits the host memory that a configuration allows, and checks that it is there.

    ``ram`` is for the staging chunks and for copies of what the files hold. ``"auto"`` allows as
    many copies as may be page-locked: one that is not comes no faster than from the page cache,
    which the system can take back.

    Args:
        config: What was asked for.
        host: The machine.
        memory_bytes: Bytes of the blocks' weights that are in memory.
        filed_bytes: Bytes of those that are in files, in whole pages.
        locks: Who locks pages: a GPU's driver, the system, or no one, because the device copies
            from any memory.
        may_encode: Whether there are weights that ``compress`` is for.
        promised_bytes: What other streams may still take for theirs.

    Raises:
        MemoryError: What was ordered is more than some limit leaves; the message names it.
    """
    staging = config.staging_bytes
    pinned = _pinned(config, host, locks)
    copies = pinned
    if config.ram_bytes is not None:
        staging = min(staging, config.ram_bytes)
        copies = config.ram_bytes - staging
    copies = min(copies, filed_bytes)
    # What "auto" chooses was chosen from what is left.
    if config.pinned_bytes is not None and locks != "none":
        _check_pins(pinned, min(pinned, memory_bytes + copies), host, locks)
    if config.ram_bytes is not None:
        parts = f"{format_bytes(copies)} of copies and {format_bytes(staging)} of staging chunks"
        preflight_host(
            copies + min(staging, _MOST_STAGING), f"ram={config.ram!r}, which is {parts},", host
        )
    taken = copies + min(staging, _MOST_STAGING)
    encoded = 0
    if may_encode and config.compress != "off":
        encoded = encoded_budget(host, taken + promised_bytes)
    return HostBudget(
        pinned_bytes=pinned,
        copies_bytes=copies,
        staging_bytes=staging,
        encoded_bytes=encoded,
        locked_bytes=_locked(config, host, locks, pinned),
        page_cache_bytes=max(0, host.available_bytes - pinned - copies - staging - encoded),
    )


def budget_of(config: StreamConfig, device: torch.device, parts: list[Part]) -> HostBudget:
    """The budget of a stream with these weights on this machine, now; see `host_budget`.

    Raises:
        MemoryError: As `host_budget`.
    """
    locks: Locks = "driver"
    if device.type == "cpu" and os.environ.get("DGLS_TEST_DRIVER", "auto") != "cuda":
        # The CPU copies from any memory; a link that is modelled only from what is locked.
        locks = "none" if config.copy_bytes_per_s is None else "system"
    filed = [part.bytes for part in parts if part.file is not None]
    return host_budget(
        config,
        host_memory(),
        memory_bytes=sum(part.bytes for part in parts) - sum(filed),
        filed_bytes=sum(-(-size // mmap.PAGESIZE) * mmap.PAGESIZE for size in filed),
        locks=locks,
        may_encode=any(may_encode(part) for part in parts),
        promised_bytes=promised_bytes(),
    )


def _pinned(config: StreamConfig, host: HostMemory, locks: Locks) -> int:
    if locks == "none":
        return 0
    chosen = pinned_budget(config.pinned, host)
    if config.pinned_bytes is None:
        chosen = min(chosen, *(left for left, _ in pin_limits(host, by_driver=locks == "driver")))
    return chosen


def _locked(config: StreamConfig, host: HostMemory, locks: Locks, pinned: int) -> int:
    """What an order for page-locks allows, or, where there is none, the system."""
    if locks == "none":
        return 0
    if config.pinned_bytes is not None:
        return max(1, pinned)
    return max(1, min(left for left, _ in pin_limits(host, by_driver=locks == "driver")))


def _check_pins(pinned: int, need: int, host: HostMemory, locks: Locks) -> None:
    left, reason = min(pin_limits(host, by_driver=locks == "driver"))
    if need > left:
        raise MemoryError(
            f"pinned is {format_bytes(pinned)}, of which this model would page-lock "
            f"{format_bytes(need)}, found room for {format_bytes(left)}: {reason}"
        )
