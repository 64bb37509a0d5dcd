"""What must hold in a run that trains what it says; a run where it does not is stopped with the reason."""

import math

from dpo4rec.alignment.config import AlignmentConfig

Record = dict[str, float]


def check_step(record: Record, config: AlignmentConfig, zero_stage: int, starts_at_reference: bool) -> None:
    """Checks one step's averages (the method's trainer says which).

    Args:
        zero_stage: of the engine that really trains.
        starts_at_reference: whether the policy of the first step is the reference.

    Raises:
        RuntimeError: another ZeRO stage than configured, a loss or gradient that is not finite, a gradient of zero in the first two steps,
            or a first step whose texts have other log-probabilities than under the reference.
    """
    if zero_stage != config.zero_stage:
        raise RuntimeError(f"the model is trained under ZeRO-{zero_stage} instead of ZeRO-{config.zero_stage}")
    step, loss, norm = record["step"], record["loss"], record["grad_norm"]
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise RuntimeError(f"step {step}: loss {loss}, gradient norm {norm}: not finite. Lower the learning rate")
    if step <= 2 and norm == 0 and record.get("tied") != 1:  # GRPO: where all rewards are the same there is nothing to learn
        raise RuntimeError(f"step {step}: the gradient is zero: no trained weight takes part in the loss")
    if step == 1 and starts_at_reference:
        _check_start(record, 0.01 if config.precision == "fp32" else 0.5)


def _check_start(record: Record, tolerance_nats: float) -> None:
    change = max(abs(record["chosen_change"]), abs(record["rejected_change"]))
    if change > tolerance_nats:
        raise RuntimeError(
            f"in the first step a text's log-probability is {change:.3g} nats from the reference's instead of 0: the policy is not its own "
            "reference (dropout, rounded inputs or mixed-up rows)"
        )
