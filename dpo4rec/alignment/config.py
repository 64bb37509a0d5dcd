"""What an alignment run may be told, and which combinations cannot work."""

from typing import Literal, Self

from pydantic import Field, model_validator

from dpo4rec.settings import Settings


class AlignmentConfig(Settings):
    """Settings of one DPO run.

    The optimizer is AdamW without weight decay; the learning rate rises linearly over `warmup_share` of the steps and then falls
    linearly to zero.
    """

    beta: float = Field(default=0.1, gt=0, description="strength of the pull towards the reference (DPO, eq. 7)")
    nll_weight: float = Field(default=0.0, ge=0, description="weight of the chosen text's mean negative log-likelihood per token")
    learning_rate: float = Field(default=2e-4, gt=0)
    epochs: int = Field(default=1, ge=1)
    pairs_per_step: int = Field(default=32, ge=1, description="pairs of one optimizer step, over all processes")
    pairs_per_device: int = Field(default=8, ge=1, description="pairs of one forward pass of one process")
    max_tokens: int = Field(default=1024, ge=2, description="longest prompt + completion; longer pairs are dropped and counted")
    warmup_share: float = Field(default=0.1, ge=0, le=0.5)
    max_grad_norm: float = Field(default=1.0, gt=0)
    weights: Literal["lora", "full"] = "lora"
    lora_rank: int = Field(default=16, ge=1)
    lora_alpha: int = Field(default=32, ge=1)
    lora_targets: Literal["all-linear"] | tuple[str, ...] = Field(default="all-linear", description="names of linear modules")
    quantization: Literal["none", "nf4"] = "none"
    precision: Literal["fp32", "bf16"] = "fp32"
    zero_stage: int = Field(default=0, ge=0, le=3, description="DeepSpeed ZeRO stage; 0 is plain data parallelism")
    offload: bool = Field(default=False, description="optimizer (and under ZeRO-3 weights) in CPU memory")
    gradient_checkpointing: bool = False
    workers: int = Field(default=1, ge=1, description="processes that train together")
    checkpoint_every_steps: int = Field(default=50, ge=1)

    @property
    def accumulation(self) -> int:
        """Forward passes of one process in one optimizer step."""
        return self.pairs_per_step // (self.pairs_per_device * self.workers)

    @model_validator(mode="after")
    def _combinations_work(self) -> Self:
        if self.pairs_per_step % (self.pairs_per_device * self.workers):
            raise ValueError(
                f"pairs_per_step = {self.pairs_per_step} is not a multiple of pairs_per_device x workers = "
                f"{self.pairs_per_device} x {self.workers}: processes would train on unequal shares"
            )
        if self.offload and self.zero_stage < 2:
            raise ValueError("offload needs zero_stage 2 or 3: only these keep the optimizer apart from the model")
        if self.weights == "full":
            self._refuse_adapter_settings()
        elif not self.lora_targets:
            raise ValueError("lora_targets is empty: nothing would be trained")
        return self

    def _refuse_adapter_settings(self) -> None:
        if self.quantization != "none":
            raise ValueError("quantization nf4 cannot train full weights: 4-bit numbers take no gradient. Use weights: lora")
        fields = type(self).model_fields
        given = [name for name in ("lora_rank", "lora_alpha", "lora_targets") if getattr(self, name) != fields[name].default]
        if given:
            raise ValueError(f"{', '.join(given)} would be ignored with weights: full. Leave out or use weights: lora")
