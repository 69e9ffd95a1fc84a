"""Whether a call has to go through PyTorch's own operators."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether PyTorch makes something else of the operators that it meets: ``torch.jit``,
    ``torch.func``, forward-mode derivatives, which are no matter of ``torch.no_grad``."""
    return (
        torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def is_observed() -> bool:
    """Whether someone follows PyTorch's operators, who would not see a kernel of another kind:
    ``is_transformed``, or a mode such as ``FlopCounterMode``."""
    return is_transformed() or torch._C._len_torch_dispatch_stack() > 0
