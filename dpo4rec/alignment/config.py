"""What an alignment run may be told, and which combinations cannot work."""

import importlib.util
from typing import Literal, Self

from pydantic import Field, model_validator

from dpo4rec.errors import InputError
from dpo4rec.settings import Settings

Objective = Literal["sigmoid", "smoothed", "robust", "margin", "hinge", "ipo", "simpo", "softmax", "dmpo"]
Noise = Literal["none", "epsilon", "epsilon_column", "margin_column"]
Method = Literal["preference", "rejection_sampling", "reward_weighted", "grpo"]
Tracking = Literal["none", "tensorboard", "mlflow", "wandb"]
NOISE_OF: dict[str, tuple[str, ...]] = {
    "sigmoid": ("none",),
    "smoothed": ("epsilon", "epsilon_column"),
    "robust": ("epsilon", "epsilon_column"),
    "margin": ("none", "margin_column"),
    "hinge": ("none", "margin_column"),
    "ipo": ("none",),
    "simpo": ("none", "margin_column"),
    "softmax": ("none",),
    "dmpo": ("none",),
}
"""The noise models that each objective has a formula for (`objectives.py`)."""
AGAINST_ALL = ("softmax", "dmpo")
"""Objectives that set a chosen text against all rejected texts of its prompt at once."""

OF_PAIRS = ("objective", "noise", "epsilon", "margin", "beta", "nll_weight", "reference", "packing")
NOT_READ: dict[str, tuple[str, ...]] = {
    "preference": ("reward_temperature", "grpo"),
    "rejection_sampling": (*OF_PAIRS, "reward_temperature", "grpo"),
    "reward_weighted": (*OF_PAIRS, "grpo"),
    "grpo": (*OF_PAIRS, "reward_temperature"),
}
"""The settings that each method has no use for."""


class GrpoConfig(Settings):
    """Settings of GRPO alone."""

    samples: int = Field(default=8, ge=2, description="texts of a prompt in a step, which are compared with each other")
    kl_weight: float = Field(default=0.0, ge=0, description="weight of the KL divergence from the policy as it starts")


class AlignmentConfig(Settings):
    """Settings of one alignment run.

    The optimizer is AdamW without weight decay; the learning rate rises linearly over `warmup_share` of the steps and then falls
    linearly to zero.
    """

    method: Method = Field(default="preference", description="pairs; or a control: imitate good texts, or reinforce the policy's own")
    reward_temperature: float = Field(
        default=1.0, gt=0, description="reward_weighted: a text's weight is softmax(reward in standard deviations / this)"
    )
    grpo: GrpoConfig = GrpoConfig()
    objective: Objective = Field(default="sigmoid", description="the loss: a function of objectives.py")
    noise: Noise = Field(default="none", description="what is known of wrong pairs, or of how far apart they are")
    epsilon: float = Field(default=0.1, ge=0, lt=0.5, description="noise epsilon: the probability that a pair is the wrong way round")
    margin: float = Field(default=1.0, ge=0, description="objectives margin, hinge and simpo: by how much a chosen text must win")
    beta: float = Field(default=0.1, gt=0, description="strength of the pull towards the reference (DPO, eq. 7)")
    nll_weight: float = Field(default=0.0, ge=0, description="weight of the chosen text's mean negative log-likelihood per token")
    reference: Literal["initial_adapter", "base", "round_0"] = Field(
        default="initial_adapter", description="the policy as it starts, the model without adapter, or the policy of round 0"
    )
    learning_rate: float = Field(default=2e-4, gt=0)
    epochs: int = Field(default=1, ge=1)
    pairs_per_step: int = Field(
        default=32,
        ge=1,
        description="pairs (softmax, dmpo: chosen texts with all they beat; the other methods: prompts) of an optimizer step, over all "
        "processes",
    )
    tokens_per_batch: int = Field(
        default=4096, ge=2, description="tokens of one forward pass of one process, at most; a pair that alone is longer goes alone"
    )
    packing: Literal["shared_prefix", "none"] = Field(
        default="shared_prefix", description="a prompt once for all its answers and no padding, where the model allows it; or padded rows"
    )
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

    @model_validator(mode="after")
    def _combinations_work(self) -> Self:
        self._refuse_given(NOT_READ[self.method], f"method: {self.method}")
        self._check_objective()
        if self.method == "grpo" and self.pairs_per_step % self.workers:
            raise ValueError(f"grpo: workers = {self.workers} must divide pairs_per_step: a process compares all texts of its prompts")
        if self.pairs_per_step < self.workers:
            raise ValueError(f"pairs_per_step = {self.pairs_per_step} is less than workers = {self.workers}: some would have nothing to do")
        if self.offload and self.zero_stage < 2:
            raise ValueError("offload needs zero_stage 2 or 3: only these keep the optimizer apart from the model")
        if self.weights == "full":
            self._check_full_weights()
        elif not self.lora_targets:
            raise ValueError("lora_targets is empty: nothing would be trained")
        return self

    def _check_objective(self) -> None:
        known = NOISE_OF[self.objective]
        if self.noise not in known:
            hint = "" if "epsilon" in known else "; smoothed and robust are the sigmoid objective under epsilon, margin is it with margins"
            raise ValueError(f"objective {self.objective} has no formula with noise {self.noise}, only with {' or '.join(known)}{hint}")
        if self.noise != "epsilon":
            self._refuse_given(("epsilon",), f"noise: {self.noise}")
        if "margin_column" not in known or self.noise == "margin_column":
            self._refuse_given(("margin",), f"objective: {self.objective}, noise: {self.noise}")
        if self.objective == "simpo":
            self._refuse_given(("reference",), "objective: simpo, which has no reference")

    def _check_full_weights(self) -> None:
        if self.quantization != "none":
            raise ValueError("quantization nf4 cannot train full weights: 4-bit numbers take no gradient. Use weights: lora")
        self._refuse_given(("lora_rank", "lora_alpha", "lora_targets"), "weights: full")
        if self.reference != "initial_adapter":
            raise ValueError(
                f"reference {self.reference} needs weights: lora. Full weights start from their own reference: initial_adapter"
            )

    def _refuse_given(self, names: tuple[str, ...], with_: str) -> None:
        fields = type(self).model_fields
        given = [name for name in names if getattr(self, name) != fields[name].default]
        if given:
            raise ValueError(f"{', '.join(given)} would be ignored with {with_}. Leave out (or set to the default), or change the other")


def check_tracking(name: Tracking) -> None:
    """Raises `InputError` when the tracker's package is not installed."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise InputError("tracking", f"it is {name}, and that package is not installed", f"Run: pip install {name}, or set tracking=none")
