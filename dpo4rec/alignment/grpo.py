"""Group-relative policy optimization (Shao et al. 2024, arXiv 2402.03300): TRL's GRPOTrainer with a reward from outside.

Every step samples anew from the policy that it trains, so the probability ratio is 1 and there is nothing to clip. The advantage of a text
is its reward, standardised over the texts of its prompt; the loss is TRL's default, the mean over the tokens of the step (Yu et al. 2025,
arXiv 2503.14476).
"""

from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from dpo4rec.alignment.answers import Prompt
from dpo4rec.alignment.checkpoints import Checkpointing
from dpo4rec.alignment.config import AlignmentConfig
from dpo4rec.alignment.online import Online
from dpo4rec.alignment.policy import Policy, needs_reentrant
from dpo4rec.alignment.policy_trainer import PolicyTrainer, score_answers_alone, unrounded
from dpo4rec.alignment.schedule import schedule
from dpo4rec.knowledge.config import Decoding

LOGGED = {
    "loss": "loss",
    "reward": "reward",
    "reward_std": "reward_deviation",
    "frac_reward_zero_std": "tied",
    "kl": "kl",
    "entropy": "entropy",
    "completions/mean_length": "mean_tokens",
    "completions/clipped_ratio": "unfinished",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
}
"""Of TRL's figures those that the log keeps, with their names there."""


def rows_of_a_pass(config: AlignmentConfig, longest: int) -> int:
    """Texts of one forward and backward pass of one process: as many as `tokens_per_batch` allows and divide the step evenly.

    Args:
        longest: tokens of the longest prompt and answer.
    """
    rows = config.pairs_per_step * config.grpo.samples // config.workers
    return max(size for size in range(1, rows + 1) if rows % size == 0 and (size == 1 or size * longest <= config.tokens_per_batch))


def grpo_arguments(config: AlignmentConfig, decoding: Decoding, rows: int) -> dict[str, Any]:
    """Arguments of GRPOConfig beyond the Trainer's.

    Args:
        rows: texts of one pass of one process.
    """
    return {
        "per_device_train_batch_size": rows,
        "num_generations": config.grpo.samples,
        "beta": config.grpo.kl_weight,
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
        "top_k": decoding.top_k,
        "max_completion_length": decoding.max_new_tokens,
        "shuffle_dataset": False,  # the prompts already lie in the order of training
        "gradient_checkpointing": False,  # `load_policy` has seen to it
        # TRL switches it off to sample, and with these on again
        **({"gradient_checkpointing_kwargs": {"use_reentrant": needs_reentrant(config)}} if config.gradient_checkpointing else {}),
    }


class RewardTrainer(PolicyTrainer, GRPOTrainer):
    """Trains a policy on the reward of its own samples.

    A step has `pairs_per_step` prompts with `grpo.samples` texts each. It writes a line to `training_log.jsonl` in the checkpoints' folder:
    averages of what `LOGGED` names, `tied` being the share of prompts whose texts all have the same reward.

    Args:
        config: the settings.
        policy: from `load_policy`.
        arguments: of the Trainer; `output_dir` holds the checkpoints.
        prompts: to sample from.
        online: how texts are drawn, and what judges them.
        seed: of the order of the prompts.
        tokenizer: of the model.

    Raises:
        RuntimeError: training went wrong, see `check_step`.
    """

    def __init__(
        self,
        config: AlignmentConfig,
        policy: Policy,
        arguments: GRPOConfig,
        prompts: list[Prompt],
        online: Online,
        seed: int,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.settings, self.policy, self.folder, self.online = config, policy, Path(str(arguments.output_dir)), online
        order = schedule(range(len(prompts)), config.pairs_per_step, config.epochs, seed)
        self.steps_per_epoch = order.shape[1] // config.pairs_per_step
        self.ids_of = {prompt.text: prompt.ids for prompt in prompts}
        chosen = [prompts[number] for number in order.flatten().tolist()]
        rows = Dataset.from_dict({"prompt": [prompt.text for prompt in chosen], "user_id": [prompt.user_id for prompt in chosen]})
        score_answers_alone()
        with unrounded(policy):
            super().__init__(
                model=policy,
                reward_funcs=self.reward,
                args=arguments,
                train_dataset=rows,
                processing_class=tokenizer,
                callbacks=[Checkpointing()],
            )
        self.remove_callback(PrinterCallback)

    def reward(self, completion_ids: list[list[int]], user_id: list[str], **_: Any) -> list[float | None]:
        """The rewards of sampled tokens, as texts: the end token is no part of a text, and a text without one is unfinished."""
        finished = [ids[-1] in self.eos_token_ids for ids in completion_ids]
        answers = [ids[:-1] if done else ids for ids, done in zip(completion_ids, finished, strict=True)]
        texts = [str(self._tokenizer.decode(ids, skip_special_tokens=False)).strip() for ids in answers]
        return [*self.online.reward(user_id, texts, finished)]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Writes the step's line, with TRL's figures; the Trainer's closing summary is not a step."""
        if "grad_norm" not in logs:
            return
        super().log(logs, start_time)  # adds TRL's figures to `logs`
        step = self.state.global_step
        place = {"step": step, "epoch": round(step / self.steps_per_epoch, 4)}
        self.write_step({**place, **{ours: float(logs[theirs]) for theirs, ours in LOGGED.items() if theirs in logs}})

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """The ids that the rest of the run samples from: TRL would put a second start token before a prompt in a chat frame."""
        return [self.ids_of[prompt] for prompt in prompts], None, {}
