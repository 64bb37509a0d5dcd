"""Supervised fine-tuning on answers, each with a weight: TRL's SFTTrainer on our batches.

Rejection sampling has one answer a prompt, of weight 1; reward-weighted fine-tuning has several, whose weights sum to 1.
Shapes: A answers of a batch, L positions of the longest.
"""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from dpo4rec.alignment.answers import Answers
from dpo4rec.alignment.batches import Batch, padded
from dpo4rec.alignment.checkpoints import Checkpointing
from dpo4rec.alignment.config import AlignmentConfig
from dpo4rec.alignment.policy import Policy
from dpo4rec.alignment.policy_trainer import PolicyTrainer, score_answers_alone, unrounded
from dpo4rec.alignment.schedule import Bin, cut, longest_first, schedule

IGNORED = -100
"""Label of positions that do not count in the loss."""
ARGUMENTS: dict[str, Any] = {"dataset_kwargs": {"skip_prepare_dataset": True}, "gradient_checkpointing": False}
"""Of SFTConfig: the rows are ready, and `load_policy` has seen to the checkpointing of activations."""


def likelihood_steps(answers: Answers, config: AlignmentConfig, seed: int) -> list[list[Bin]]:
    """The bins (answers by number) of every step of a run; a step has `pairs_per_step` prompts with all their answers.

    The prompts come in the order in which the pairs of the same prompts would.
    """
    of_prompt: list[Bin] = [[] for _ in answers.prompts]
    for row, (prompt, _) in enumerate(answers.answers):
        of_prompt[prompt].append(row)
    order = schedule(range(len(of_prompt)), config.pairs_per_step, config.epochs, seed).reshape(-1, config.pairs_per_step)
    steps = [[row for prompt in step for row in of_prompt[prompt]] for step in order.tolist()]
    lengths = [len(answers.prompts[prompt]) + len(ids) for prompt, ids in answers.answers]
    dealt = cut(
        steps,
        [prompt for prompt, _ in answers.answers],
        lambda rows: len(rows) * max(lengths[row] for row in rows),
        config.tokens_per_batch,
        config.workers,
    )
    return longest_first(dealt, [sum(lengths[row] for row in step) for step in steps], config.epochs)


class LikelihoodTrainer(PolicyTrainer, SFTTrainer):
    """Trains a policy on the weighted log-likelihood of answers.

    The loss of a step is sum_i w_i sum_t -log p(token t of answer i) / sum_i w_i T_i over its answers i of T_i tokens, whatever batches and
    processes they are cut into. With weights of 1 it is SFTTrainer's own: the mean over the completion tokens of the step.

    Every step writes a line to `training_log.jsonl` in the checkpoints' folder: loss, answers, gradient norm, learning rate, and tokens
    computed without padding.

    Args:
        config: the settings.
        policy: from `load_policy`.
        arguments: of the Trainer; `output_dir` holds the checkpoints.
        answers: the data.
        steps: see `likelihood_steps`.
        tokenizer: of the model (TRL wants it; the rows hold token ids).

    Raises:
        RuntimeError: training went wrong, see `check_step`.
    """

    def __init__(
        self,
        config: AlignmentConfig,
        policy: Policy,
        arguments: SFTConfig,
        answers: Answers,
        steps: list[list[Bin]],
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.settings, self.policy, self.folder = config, policy, Path(str(arguments.output_dir))
        self.answers, self.steps_per_epoch, self.bins_per_step = answers, len(steps) // config.epochs, len(steps[0])
        self.bins = [bin_ for step in steps for bin_ in step]
        places = Dataset.from_dict({"place": list(range(len(self.bins)))})
        score_answers_alone()
        with unrounded(policy):
            super().__init__(
                model=policy,
                args=arguments,
                data_collator=self._collate,
                train_dataset=places,
                processing_class=tokenizer,
                callbacks=[Checkpointing()],
            )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False  # our loss is a share of a mean: the Trainer divides it by the accumulation
        self.weights = torch.tensor(answers.weights, device=arguments.device)
        weighted_tokens = [sum(answers.weights[row] * len(answers.answers[row][1]) for bin_ in step for row in bin_) for step in steps]
        self.weighted_tokens = torch.tensor(weighted_tokens, device=arguments.device)
        self.sums = torch.zeros(3, dtype=torch.float64, device=arguments.device)

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The batch's share of the step's loss, times the number of bins over which it will be averaged."""
        rows, step, tokens = inputs.pop("rows"), inputs.pop("step"), inputs.pop("tokens")
        log_probs = model(**inputs, use_cache=False, fused_lm_head=True).log_probs  # [A, L - 1], 0 outside the answers
        loss = -(self.weights[rows] * log_probs.float().sum(1)).sum() / self.weighted_tokens[step]
        self.sums += torch.stack([loss.detach().to(self.sums), self.sums.new_tensor(len(rows)), self.sums.new_tensor(tokens)])
        return loss * self.bins_per_step

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Writes the step's line; the Trainer's closing summary is not a step."""
        if "grad_norm" not in logs:
            return
        loss, answers, tokens = self.accelerator.reduce(self.sums, "sum").tolist()
        self.sums = torch.zeros_like(self.sums)
        step = self.state.global_step
        place = {"step": step, "epoch": round(step / self.steps_per_epoch, 4)}
        rates = {"grad_norm": float(logs["grad_norm"]), "learning_rate": logs["learning_rate"], "tokens": int(tokens)}
        self.write_step({**place, "loss": loss, "answers": int(answers), **rates})

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]  # the bins already lie in the order of training

    def _collate(self, places: list[dict[str, int]]) -> Batch:
        """The answers of one bin as padded rows; all tensors are integers, which no precision rounds."""
        (place,) = (row["place"] for row in places)
        rows = self.bins[place]
        batch = padded([(self.answers.prompts[prompt], [ids]) for prompt, ids in (self.answers.answers[row] for row in rows)])
        labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, IGNORED)
        return batch | {"labels": labels, "rows": torch.tensor(rows), "step": torch.tensor(place // self.bins_per_step)}
