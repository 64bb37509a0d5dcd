"""Log-probabilities of the reference: the policy as it is before the first step, so no second model is ever needed.

They are computed once, with the batches of the first epoch, by the wrapped model itself (DDP or DeepSpeed, any ZeRO stage, adapter on):
a fresh adapter is the base model, last round's adapter is last round's policy, and full weights need no copy.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from dpo4rec.alignment.batches import Batch, ScheduledPairs, collate
from dpo4rec.files import read_tensors, write_tensors

NAME = "reference.safetensors"


@torch.no_grad()
def compute_reference(
    log_probs: Callable[[Batch], Tensor], rows: ScheduledPairs, pairs_per_device: int, accelerator: Accelerator, folder: Path
) -> Tensor:
    """Log-probabilities of every pair's completions (chosen, rejected) under the policy of now, [pairs, 2] float32.

    All processes work on their share and get the whole; the first writes it to `folder`, because a resumed run no longer has that policy.

    Args:
        log_probs: gives [2B] of a batch.
        rows: the pairs in the order of the first epoch.
    """
    table = torch.full((len(rows.pairs), 2), float("nan"), device=accelerator.device)
    for batch in _shares(rows, pairs_per_device, accelerator):
        values = log_probs(batch).view(2, -1).T.contiguous()
        table[accelerator.gather(batch["index"])] = accelerator.gather(values)
    if not table.isfinite().all():
        raise RuntimeError(
            "the model's log-probabilities of some pairs are not finite before the first step: its weights or its precision are broken"
        )
    if accelerator.is_main_process:
        write_tensors({"log_probs": table.cpu()}, folder / NAME)
    return table


def read_reference(folder: Path) -> Tensor | None:
    """The table that an interrupted run computed, or None."""
    return read_tensors(folder / NAME)["log_probs"] if (folder / NAME).exists() else None


def _shares(rows: ScheduledPairs, pairs_per_device: int, accelerator: Accelerator) -> Iterator[Batch]:
    """The batches of this process, as Accelerate deals them out in training: batch k goes to process k modulo their number."""
    for start in range(accelerator.process_index * pairs_per_device, len(rows), accelerator.num_processes * pairs_per_device):
        batch = collate([rows[place] for place in range(start, start + pairs_per_device)])
        yield {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
