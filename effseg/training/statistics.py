"""Running statistics of norms, which a forward changes before it is known whether its step counts."""

import torch
import torch.distributed as dist
from torch import Tensor, nn


class RunningStatistics:
    """Buffers of the norms in `network` as they are now, before a step's forward: a few numbers a channel.

    What one forward puts into them stays: a mean or variance that is not finite never becomes finite again,
    and evaluation divides by it.
    """

    def __init__(self, network: nn.Module) -> None:
        norms = [dict(module.named_buffers(recurse=False)) for module in network.modules()]
        self.buffers = [buffer for norm in norms if "running_mean" in norm for buffer in norm.values()]
        self.before = [buffer.clone() for buffer in self.buffers]

    def keep_if_finite(self, gradient_norm: Tensor, several: bool) -> bool:
        """Whether the norm of a step's gradient is finite and the statistics are, too; if not, these become
        again what they were.

        several: whether all processes of torch.distributed's group do the step together, each with statistics
        of its own; then all return the same.
        """
        finite = gradient_norm.detach().isfinite()
        if self.buffers:
            numbers = [buffer.flatten() for buffer in self.buffers if buffer.is_floating_point()]
            finite = finite & torch.cat(numbers).isfinite().all()
            if several:
                everywhere = finite.to(torch.int32)
                dist.all_reduce(everywhere, dist.ReduceOp.MIN)
                finite = everywhere.bool()
        found = bool(finite)
        if not found:
            with torch.no_grad():
                for buffer, before in zip(self.buffers, self.before, strict=True):
                    buffer.copy_(before)
        return found
