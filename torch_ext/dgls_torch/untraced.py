"""What torch.compile must not look into: it breaks its graph there, and says nothing.

Dynamo warns of builtins, and the hooks are builtins. `torch.compiler.disable` around one costs 0.4
us at each call, as much as setting ``data`` four times: it takes dynamo's callback off the thread
and puts it back. A function whose code is marked as skipped costs its call, 0.03 us, and nothing
else; but what it calls is looked at. So the hooks are such functions, and the Python that hooks run
now and then is disabled.

Dynamo takes seconds to import: both functions do so, when a model is streamed and not before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from dgls_torch._C import Hook


def hooks(before: Hook, after: Hook) -> tuple[Hook, Hook]:
    """The native hooks as torch should know them."""

    def before_forward(module: Any, args: Any) -> Any:
        return before(module, args)

    def after_forward(module: Any, args: Any, output: Any) -> Any:
        return after(module, args, output)

    return _skipped(before_forward), _skipped(after_forward)


def rarely(called: Callable[[], None]) -> Callable[[], None]:
    """What hooks call, and then it may cost something."""
    return torch.compiler.disable(called)  # type: ignore[no-any-return]


def _skipped(hook: Hook) -> Hook:
    try:
        from torch._dynamo.decorators import skip
    except ImportError:  # it is no public name, if an old one
        return torch.compiler.disable(hook)  # type: ignore[no-any-return]
    return skip(hook)
