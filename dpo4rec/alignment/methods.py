"""What each method trains with: its data, the Trainer's arguments, the policy, and the trainer of them."""

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, TrainingArguments

from dpo4rec.alignment.answers import read_answers, read_prompts
from dpo4rec.alignment.arguments import training_arguments
from dpo4rec.alignment.checkpoints import prepare_folder
from dpo4rec.alignment.config import AlignmentConfig
from dpo4rec.alignment.online import Online
from dpo4rec.alignment.pairs import read_preferences
from dpo4rec.alignment.policy import Policy, add_reference_adapter, load_policy
from dpo4rec.alignment.policy_trainer import PolicyTrainer
from dpo4rec.alignment.reference import reference_key
from dpo4rec.alignment.schedule import training_steps
from dpo4rec.alignment.trainer import PreferenceTrainer
from dpo4rec.errors import InputError
from dpo4rec.files import checkpoints_of, content_hash, stable_seed

logger = logging.getLogger(__name__)
Built = tuple[PolicyTrainer, Path | None, dict[str, Any]]
"""A trainer, the checkpoint to resume from, and what the summary says of the data."""


@dataclass(frozen=True)
class Start:
    """What a run of any method begins with; the fields are the arguments of `align`."""

    config: AlignmentConfig
    model: str
    table: Path
    initial_adapter: Path | None
    seed: int
    out: Path

    @property
    def folder(self) -> Path:
        """Of the checkpoints."""
        return checkpoints_of(self.out)

    @cached_property
    def model_settings(self) -> PreTrainedConfig:
        return model_settings(self.model)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        return _tokenizer(self.model)

    @property
    def needed_tokenizer(self) -> PreTrainedTokenizerBase:
        """For TRL's trainers."""
        if self.tokenizer is None:
            raise InputError(f"model {self.model}", "it has no tokenizer", f"alignment.method={self.config.method} needs one beside it")
        return self.tokenizer

    @property
    def longest(self) -> int:
        """Tokens of the longest text that is trained on."""
        return min(self.config.max_tokens, getattr(self.model_settings, "max_position_embeddings", self.config.max_tokens))

    def load(self, arguments: TrainingArguments, reference_adapter: Path | None = None, **more: Any) -> tuple[Policy, Path | None]:
        """The policy, and the checkpoint to resume from if there is one of the same job (`more` belongs to what makes a job)."""
        job: dict[str, Any] = {"config": _identity(self.config), "model": self.model, "seed": self.seed}
        adapters = {"initial": self.initial_adapter, "reference": reference_adapter}
        job |= {"pairs": content_hash(self.table), **{name: content_hash(path) if path else None for name, path in adapters.items()}}
        checkpoint = prepare_folder(self.folder, job | more, arguments)
        torch.manual_seed(stable_seed(self.seed, "adapter"))
        return load_policy(self.config, self.model, self.initial_adapter, arguments.device), checkpoint


def build(start: Start, round_0_adapter: Path | None, online: Online | None) -> Built:
    """The trainer of the configured method.

    Raises:
        InputError: the table, the model or the adapter cannot be used, or `online` is not what the method needs.
    """
    method = start.config.method
    if (method == "grpo") != (online is not None):
        raise InputError("alignment.method", f"{method} was given {'a' if online else 'no'} reward", "GRPO needs one, the others have none")
    if online is not None:
        return _reinforcement(start, online)
    return _preference(start, round_0_adapter) if method == "preference" else _likelihood(start)


def _preference(start: Start, round_0_adapter: Path | None) -> Built:
    config = start.config
    preferences, dropped = read_preferences(start.table, start.tokenizer, start.model_settings.vocab_size, start.longest, config)
    steps = training_steps(preferences, config, start.seed)
    logger.info("%d comparisons, dropped %s, %d steps of %d passes", len(preferences.comparisons), dropped, len(steps), len(steps[0]))
    arguments = training_arguments(TrainingArguments, config, start.folder, len(steps), len(steps[0]) // config.workers, start.seed)
    reference_adapter = {"initial_adapter": start.initial_adapter, "base": None, "round_0": round_0_adapter}[config.reference]
    policy, checkpoint = start.load(arguments, reference_adapter)
    if reference_adapter and config.reference == "round_0":
        add_reference_adapter(policy, reference_adapter)
    reference = start.out.parent / ".reference" / f"{reference_key(config, start.model, reference_adapter, preferences)}.safetensors"
    hashes = [content_hash(path) if path else None for path in (start.initial_adapter, reference_adapter)]
    alike = config.objective != "simpo" and hashes[0] == hashes[1]
    trained = config.weights == "full" or (config.reference == "initial_adapter" and start.initial_adapter is not None)
    trainer = PreferenceTrainer(config, policy, arguments, preferences, steps, len(steps) // config.epochs, reference, alike, trained)
    return trainer, checkpoint, {"pairs": len(preferences.comparisons), "dropped": dropped}


def _likelihood(start: Start) -> Built:
    from trl import SFTConfig  # takes seconds to import, which a run on pairs need not spend

    from dpo4rec.alignment.likelihood import ARGUMENTS, LikelihoodTrainer, likelihood_steps

    config = start.config
    answers, dropped = read_answers(start.table, start.model_settings.vocab_size, start.longest, config)
    steps = likelihood_steps(answers, config, start.seed)
    logger.info("%d answers, dropped %s, %d steps of %d passes", len(answers.answers), dropped, len(steps), len(steps[0]))
    passes = len(steps[0]) // config.workers
    arguments = training_arguments(SFTConfig, config, start.folder, len(steps), passes, start.seed, **ARGUMENTS)
    policy, checkpoint = start.load(arguments)
    trainer = LikelihoodTrainer(config, policy, arguments, answers, steps, start.needed_tokenizer)
    return trainer, checkpoint, {"prompts": len(answers.prompts), "answers": len(answers.answers), "dropped": dropped}


def _reinforcement(start: Start, online: Online) -> Built:
    from trl import GRPOConfig

    from dpo4rec.alignment.grpo import RewardTrainer, grpo_arguments, rows_of_a_pass

    config, decoding = start.config, online.decoding
    prompts, dropped = read_prompts(start.table, start.model_settings.vocab_size, start.longest - decoding.max_new_tokens)
    rows = rows_of_a_pass(config, max(len(prompt.ids) for prompt in prompts) + decoding.max_new_tokens)
    passes = config.pairs_per_step * config.grpo.samples // (rows * config.workers)
    steps = -(-len(prompts) // config.pairs_per_step) * config.epochs
    logger.info("%d prompts, dropped %s, %d steps of %d passes of %d texts", len(prompts), dropped, steps, passes, rows)
    more = grpo_arguments(config, decoding, rows)
    arguments = training_arguments(GRPOConfig, config, start.folder, steps, passes, start.seed, **more)
    policy, checkpoint = start.load(arguments, decoding=decoding.model_dump(mode="json"))
    trainer = RewardTrainer(config, policy, arguments, prompts, online, start.seed, start.needed_tokenizer)
    return trainer, checkpoint, {"prompts": len(prompts), "dropped": dropped}


def _identity(config: AlignmentConfig) -> dict[str, Any]:
    """What a checkpoint depends on: everything but the number of processes, unless each of them samples with random numbers of its own."""
    return config.model_dump(mode="json", exclude=set() if config.method == "grpo" else {"workers"})


def model_settings(model: str) -> PreTrainedConfig:
    """The configuration of a folder or hub name. Raises `InputError` when it cannot be read."""
    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"model {model}", f"it cannot be read ({error})", "Give a folder or a hub name of a causal language model"
        ) from error


def _tokenizer(model: str) -> PreTrainedTokenizerBase | None:
    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError):  # a model without one can be trained on ids
        return None
