"""What every method's trainer shares: its policy as checkpoints, its log, and the checks that it trains at all."""

import contextlib
import importlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from transformers import Trainer

from dpo4rec.alignment.checkpoints import LOG
from dpo4rec.alignment.config import AlignmentConfig
from dpo4rec.alignment.health import Record, check_step
from dpo4rec.alignment.policy import Policy, whole_weights, write_policy
from dpo4rec.alignment.speed import peaks

logger = logging.getLogger(__name__)


class PolicyTrainer(Trainer):
    """A Trainer of a policy in a folder of checkpoints; stands before TRL's trainers where there is one."""

    settings: AlignmentConfig
    policy: Policy
    folder: Path

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Weights of a checkpoint. DeepSpeed's own checkpoint already has them."""
        if not self.is_deepspeed_enabled:
            weights = whole_weights(self.policy)
            if self.is_world_process_zero():
                write_policy(self.policy, weights, Path(str(output_dir)))

    def zero_stage(self) -> int:
        """The ZeRO stage of the DeepSpeed engine that really trains; 0 without one."""
        return int(cast(Any, self.model_wrapped).zero_optimization_stage()) if self.is_deepspeed_enabled else 0

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: it walks through all parameters at every batch."""
        return 0

    def facts(self) -> dict[str, Any]:
        """What this trainer adds to `summary.json`."""
        return {"speed": peaks()}

    def write_step(self, record: Record, starts_at_reference: bool = False) -> None:
        """Writes a step's line to the log, tells it to a tracker, and stops a run that has gone wrong, see `check_step`."""
        self.state.log_history = [record]  # the last step: all of them are in the file
        if record["step"] == 1:  # said at once: whoever runs out of memory later wants to know
            logger.info("step 1: %s", ", ".join(f"{name} {value}" for name, value in peaks().items()))
        if self.is_world_process_zero():
            with (self.folder / LOG).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(record) + "\n")
        self.callback_handler.on_log(self.args, self.state, self.control, dict(record))
        check_step(record, self.settings, self.zero_stage(), starts_at_reference)

    def create_model_card(self, *arguments: Any, **named: Any) -> None:
        """None: TRL would write one into every checkpoint."""

    def _send_telemetry(self) -> None:
        """Nothing leaves the machine: TRL would report every run to the hub."""


@contextlib.contextmanager
def unrounded(policy: Policy) -> Iterator[None]:
    """Inside, TRL's trainers may be made: they round a 4-bit model's adapter to bfloat16, in which small steps would be lost."""
    kept = [(parameter, parameter.data) for parameter in policy.parameters() if parameter.requires_grad]
    yield
    for parameter, data in kept:
        if parameter.dtype != data.dtype:
            parameter.data = data.to(parameter.device)


def score_answers_alone() -> None:
    """Has TRL's fused output layer leave out a prompt's positions on CPU, too: where Triton is not, it scores them for nothing.

    It does so to keep its tensors' shapes, which some compilers want and a CPU does not. Of a TRL without that choice nothing is changed.
    """
    from trl.trainer import utils

    if hasattr(utils, "_use_triton"):
        has_triton = importlib.import_module("trl.kernels.chunked_logprob")._use_triton
        utils._use_triton = lambda device: device.type == "cpu" or has_triton(device)
