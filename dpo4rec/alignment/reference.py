"""Log-probabilities of the reference: computed once, by the model that is trained, so no second model is ever needed.

The wrapped model itself does it (DDP or DeepSpeed, any ZeRO stage), before the first step: as it starts, with its adapter off (a fresh one
adds nothing), or with round 0's adapter in place of its own. The result is a file whose name is a hash of all that it depends on.
"""

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from peft import PeftModel
from torch import Tensor

from dpo4rec.alignment.batches import Batch, Collator
from dpo4rec.alignment.config import AlignmentConfig
from dpo4rec.alignment.pairs import Preferences
from dpo4rec.alignment.schedule import Bin
from dpo4rec.files import content_hash, read_tensors, write_tensors

logger = logging.getLogger(__name__)
NAME = "log_probs"
ADAPTER = "reference"
"""PEFT's name for round 0's adapter, which stands frozen beside the one that is trained."""


def reference_key(config: AlignmentConfig, model: str, adapter: Path | None, preferences: Preferences) -> str:
    """Hash of data (as token ids, so tokenizer and template are in it), model, adapter and the numbers it is computed in.

    Args:
        model: folder or hub name; a folder counts by its content.
        adapter: the reference's adapter, None for the model alone.
    """
    parts: dict[str, Any] = {
        "model": content_hash(Path(model)) if Path(model).is_dir() else model,
        "adapter": content_hash(adapter) if adapter else None,
        "numbers": [config.precision, config.quantization, config.weights, config.packing, config.tokens_per_batch],
        "max_tokens": config.max_tokens,
    }
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    digest.update(json.dumps([preferences.prompts, preferences.answers]).encode())
    return digest.hexdigest()[:16]


def read_or_compute(path: Path, answers: int, compute: Callable[[], Tensor], accelerator: Accelerator) -> Tensor:
    """The log-probabilities of all answers under the reference, [answers] float32, from the file or computed and written to it.

    The first process reads or writes; the others are handed the values.
    """
    found = _read(path, answers) if accelerator.is_main_process else None
    if broadcast_object_list([found is not None])[0]:
        table = torch.empty(answers) if found is None else found
        return broadcast(table.to(accelerator.device))
    table = compute()
    if accelerator.is_main_process:
        write_tensors({NAME: table.cpu()}, path)
    return table


@torch.no_grad()
def compute_reference(score: Callable[[Batch], Tensor], bins: list[Bin], collator: Collator, accelerator: Accelerator) -> Tensor:
    """Scores the bins of an epoch, each process its share, and gives all of them the whole, [answers] float32.

    Raises:
        RuntimeError: a log-probability is not finite, or an answer is in no bin.
    """
    table = torch.zeros(len(collator.preferences.answers), device=accelerator.device)
    times = torch.zeros_like(table)
    for bin_ in bins[accelerator.process_index :: accelerator.num_processes]:
        batch = {name: value.to(accelerator.device) if isinstance(value, Tensor) else value for name, value in collator([bin_]).items()}
        table[batch["answers"]], times[batch["answers"]] = score(batch).float(), 1.0
    table, times = accelerator.reduce(table), accelerator.reduce(times)
    if not (table / times).isfinite().all():
        raise RuntimeError(
            "the model's log-probabilities of some answers are not finite before the first step: its weights or its precision are broken"
        )
    return table / times


@contextlib.contextmanager
def as_reference(policy: torch.nn.Module, as_it_starts: bool) -> Iterator[None]:
    """Makes the policy its own reference inside the block: as it is, without adapter, or with the adapter `ADAPTER`."""
    if as_it_starts or not isinstance(policy, PeftModel):
        yield
    elif ADAPTER not in policy.peft_config:
        with policy.disable_adapter():
            yield
    else:
        trained = [parameter.requires_grad for parameter in policy.parameters()]
        policy.set_adapter(ADAPTER)
        try:
            yield
        finally:
            policy.set_adapter("default")
            for parameter, was in zip(policy.parameters(), trained, strict=True):
                parameter.requires_grad_(was)


def _read(path: Path, answers: int) -> Tensor | None:
    """What an earlier run left, if it is whole."""
    if not path.exists():
        return None
    table = read_tensors(path).get(NAME)
    if table is None or table.shape != (answers,) or not table.isfinite().all():
        logger.warning("%s is not the reference of %d answers and is computed again", path, answers)
        return None
    logger.info("reference log-probabilities from %s", path)
    return table
