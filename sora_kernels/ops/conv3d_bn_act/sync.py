"""Batch statistics shared by the ranks of a process group, as ``nn.SyncBatchNorm`` shares them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def name_of(process_group: dist.ProcessGroup | None) -> str:
    """What the registered op takes: "" where there is nobody to share with."""
    if process_group is None or dist.get_world_size(process_group) == 1:
        return ""
    return process_group.group_name


def _group(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def merge(mean: Tensor, variance: Tensor, count: int, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and count over all ranks, whose counts may differ and be zero.

    One gather of ``2 K + 1`` numbers a rank, merged by Chan's formula in the ranks' order: the same bits on every rank.
    """
    own = torch.cat([mean, variance, mean.new_full((1,), count)])
    ranks = [torch.empty_like(own) for _ in range(dist.get_world_size(_group(group)))]
    dist.all_gather(ranks, own, group=_group(group))
    found = torch.stack(ranks)
    counts = found[:, -1:]
    # A rank without values may say NaN.
    means, variances = torch.where(counts > 0, found[:, :-1], 0.0).chunk(2, 1)
    total = counts.sum()
    origin = means[:1]  # a large common mean costs no digits
    merged = origin + ((means - origin) * counts).sum(0, keepdim=True) / total
    m2 = (counts * (variances + (means - merged).square())).sum(0)
    return merged[0], m2 / total, total


def mean_of_sums(sums: Tensor, count: int, group: str) -> Tensor:
    """The ranks' sums of a channel ``[..., K]``, added up and divided by the count of all ranks."""
    flat = torch.cat([sums.reshape(-1), sums.new_full((1,), count)])
    dist.all_reduce(flat, group=_group(group))
    return (flat[:-1] / flat[-1]).view_as(sums)
