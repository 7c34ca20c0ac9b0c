"""What torch.compile must not look into: it breaks its graph there, and says nothing.

Dynamo warns of builtins, and the hooks are builtins. `torch.compiler.disable` around one costs 0.4
us at each call, as much as setting ``data`` four times: it takes dynamo's callback off the thread
and puts it back. A function whose code is marked as skipped costs its call, 0.03 us, and nothing
else; but what it calls is looked at. So the hooks are such functions, and the Python that hooks run
now and then is disabled besides, once there is something to disable.

Dynamo takes three seconds to import, so nothing here needs it: code is marked where torch's C++
keeps the marks, and what is disabled is so from the first call on that finds dynamo there.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from dgls_torch._C import Hook

_Function = TypeVar("_Function", bound=Any)


def hooks(before: Hook, after: Hook) -> tuple[Hook, Hook]:
    """The native hooks as torch should know them."""

    def before_forward(module: Any, args: Any) -> Any:
        return before(module, args)

    def after_forward(module: Any, args: Any, output: Any) -> Any:
        return after(module, args, output)

    return _skipped(before_forward), _skipped(after_forward)


def rarely(called: Callable[..., None]) -> Callable[..., None]:
    """What hooks call, and then it may cost something."""
    disabled: Callable[..., None] | None = None

    def call(*given: Any) -> None:
        nonlocal disabled
        if disabled is None and "torch._dynamo" in sys.modules:
            disabled = torch.compiler.disable(called)
        (disabled or called)(*given)

    return _skipped(call)


def _skipped(function: _Function) -> _Function:
    """The function, marked as `torch._dynamo.decorators.skip` would."""
    try:
        from torch._C._dynamo.eval_frame import (
            _FrameAction,
            _FrameExecStrategy,
            set_code_exec_strategy,
        )
    except ImportError:  # they are no public names
        return torch.compiler.disable(function)  # type: ignore[no-any-return]
    strategy = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.DEFAULT)
    set_code_exec_strategy(function.__code__, strategy)
    function._torchdynamo_disable = True
    return function
