"""A round of the method as the obvious script has it, against which benchmarks/round.py measures ours.

transformers' `generate` for one user at a time; our encoder and re-ranker for one text at a time (all lists of its user at once); the best
and the worst text of each user; TRL's `DPOTrainer`, with the reference computed before training.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset  # noqa: F401  imported here, so that no timed part has to
from peft import LoraConfig  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer  # noqa: F401

from benchmarks.dpo import run_trl
from dpo4rec.config import Config
from dpo4rec.files import read_parquet, read_tensors, stable_seed, write_parquet
from dpo4rec.knowledge.encoders import TfidfEncoder
from dpo4rec.preference.folds import fold_users
from dpo4rec.preference.reward import reward_of
from dpo4rec.recommenders.lists import RankingData
from dpo4rec.recommenders.model import Reranker
from dpo4rec.recommenders.scoring import logits_of

Texts = dict[str, list[str]]


def sample(config: Config, prompts: dict[str, str]) -> Texts:
    """`samples` texts of each user, by user."""
    tokenizer = AutoTokenizer.from_pretrained(config.llm.name)
    model = AutoModelForCausalLM.from_pretrained(config.llm.name, dtype=torch.float32).eval()
    decoding, texts = config.sampling.decoding, {}
    for user, prompt in prompts.items():
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        drawn = model.generate(
            **inputs, do_sample=True, num_return_sequences=config.sampling.samples, max_new_tokens=decoding.max_new_tokens,
            temperature=decoding.temperature, top_p=decoding.top_p, top_k=decoding.top_k,
        )  # fmt: skip
        texts[user] = tokenizer.batch_decode(drawn[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


class Judge:
    """The run's encoder and fitted recommenders, asked about one text at a time."""

    def __init__(self, config: Config, run: Path) -> None:
        self.reward, self.encoder, self.data = config.reward, TfidfEncoder(run / "encoder"), RankingData.load(run / "data")
        item_vectors = read_tensors(run / "encoder" / "item_vectors.safetensors")["item_vectors"]
        users = read_parquet(run / "data" / "users.parquet").to_pylist()
        training = [user["user_id"] for user in users if user["split"] == "train"]
        folds = fold_users(len(training), config.reward.folds, stable_seed(config.seed, "folds"))
        self.folds = dict(zip(training, folds.tolist(), strict=True))
        fits = run / "round-0" / "recommender"
        self.models = [
            [Reranker.load(fits / f"fold-{fold}-seed-{seed}").bind(self.data, item_vectors) for seed in range(config.reward.seeds)]
            for fold in range(config.reward.folds)
        ]
        owners = self.data.list_users.numpy()
        self.lists = {user: torch.from_numpy(np.flatnonzero(owners == i)) for i, user in enumerate(self.data.user_ids)}

    def __call__(self, user: str, text: str) -> float:
        """The mean reward over the user's lists and the recommenders of its fold."""
        lists = self.lists[user]
        vectors = torch.from_numpy(self.encoder([text])[0]).expand(len(lists), -1)
        logits = [logits_of(model, self.data, lists, vectors) for model in self.models[self.folds[user]]]
        return float(torch.stack([reward_of(self.reward, of, self.data.labels[lists]).nanmean() for of in logits]).mean())


def pairs_of(prompts: dict[str, str], texts: Texts, rewards: dict[str, list[float]]) -> list[dict[str, str]]:
    """Best against worst text of each user; the space keeps prompt and answer apart."""
    ends = {user: (texts[user][int(np.argmax(of))], texts[user][int(np.argmin(of))]) for user, of in rewards.items()}
    return [{"prompt": prompts[user], "chosen": f" {best}", "rejected": f" {worst}"} for user, (best, worst) in ends.items()]


def run_script(config: Config, run: Path, folder: Path, trl_batch: int) -> dict[str, Any]:
    """One round with the data, prompts, encoder and recommenders of the folder `run`; seconds of its parts, and what they made.

    `folder` is for what it writes and holds `model`.
    """
    rows = read_parquet(run / "prompts" / "prompts.parquet").to_pylist()
    prompts = {row["user_id"]: row["prompt"] for row in rows if row["split"] != "test"}  # as our stage samples
    ends = [time.perf_counter()]
    texts = sample(config, prompts)
    ends.append(time.perf_counter())
    judge = Judge(config, run)
    rewards = {user: [judge(user, text) for text in of] for user, of in texts.items() if user in judge.folds}
    ends.append(time.perf_counter())
    pairs = pairs_of(prompts, texts, rewards)
    write_parquet(pa.Table.from_pylist(pairs), folder / "pairs.parquet")
    trained = run_trl(folder, "lora", trl_batch)
    ends.append(time.perf_counter())
    seconds = dict(zip(("sampling", "encoding and scoring", "pairs and alignment"), np.diff(ends).tolist(), strict=True))
    values = [value for of in rewards.values() for value in of]
    counts = {"texts": sum(map(len, texts.values())), "scored_texts": len(values), "pairs": len(pairs)}
    words = float(np.mean([len(text.split()) for of in texts.values() for text in of]))
    return {"seconds": seconds, **counts, "words_per_text": words, "mean_reward": float(np.mean(values)), "trl": trained}


def difference(config: Config, run: Path, users: int) -> float:
    """Largest difference between this judge's rewards and those of the run's own stage, over all texts of some users."""
    judge = Judge(config, run)
    texts = {(row["user_id"], row["sample"]): row["text"] for row in read_parquet(run / "round-0" / "samples").to_pylist()}
    asked = set(sorted(judge.folds)[:users])
    rows = [row for row in read_parquet(run / "round-0" / "scores").to_pylist() if row["user_id"] in asked]
    return max(abs(judge(row["user_id"], texts[row["user_id"], row["sample"]]) - row["reward"]) for row in rows)
