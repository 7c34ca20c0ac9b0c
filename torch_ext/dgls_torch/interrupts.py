"""Holds signals back while a stream is half made or half taken off."""

from __future__ import annotations

import contextlib
import signal
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

# Those whose handlers are known to raise: Ctrl-C, the end of a service, a time limit.
_NAMES = ("SIGINT", "SIGTERM", "SIGALRM")


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Runs its body to the end; what signals would have raised is raised afterwards.

    Python runs signal handlers in the main thread only, so in any other one this does nothing, and
    neither does it where a signal has no handler of Python's. Also a decorator.
    """
    held: list[int] = []
    handlers = _handlers()
    replaced: dict[int, Any] = {}
    try:
        for number, handler in handlers.items():
            replaced[number] = handler
            signal.signal(number, lambda which, _: held.append(which))
        yield
    finally:
        _restore(replaced)
        for number in held:
            handlers[number](number, None)


def _handlers() -> dict[int, Any]:
    if threading.get_ident() != threading.main_thread().ident:
        return {}
    numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    found = {number: signal.getsignal(number) for number in numbers}
    return {number: handler for number, handler in found.items() if callable(handler)}


def _restore(replaced: dict[int, Any]) -> None:
    """Puts every handler back, although one that is back may raise at once."""
    raised: BaseException | None = None
    while replaced:
        error = _restore_one(replaced)
        raised = raised or error
    if raised is not None:
        raise raised


def _restore_one(replaced: dict[int, Any]) -> BaseException | None:
    try:
        number = next(iter(replaced))
        signal.signal(number, replaced[number])
        del replaced[number]
    except BaseException as error:
        return error
    return None
