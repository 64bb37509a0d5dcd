"""Preference pairs: the text of a user that made the recommender rank best against the one that made it rank worst."""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa

from dpo4rec.preference.config import PairConfig

Row = dict[str, Any]

PAIRS = pa.schema(
    [
        ("prompt", pa.string()),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("chosen_ids", pa.list_(pa.int32())),
        ("rejected_ids", pa.list_(pa.int32())),
        ("reward_chosen", pa.float32()),
        ("reward_rejected", pa.float32()),
        ("gap", pa.float32()),
        ("user_id", pa.string()),
        ("chosen_sample", pa.int32()),
        ("rejected_sample", pa.int32()),
    ]
)
"""Any TRL trainer reads prompt, chosen and rejected; the token ids are what was sampled and what is trained on."""


def make_pairs(config: PairConfig, prompts: pa.Table, samples: pa.Table, scores: pa.Table, seed: int) -> tuple[pa.Table, dict[str, Any]]:
    """Pairs in the order of `prompts`, and counts of what was left out and why.

    Args:
        prompts: user_id, prompt, prompt_ids.
        samples: user_id, sample, text, completion, token_ids, well_formed.
        scores: user_id, sample, reward, standardised.
    """
    judged = {(row["user_id"], row["sample"]): row for row in scores.to_pylist()}
    by_user: dict[str, list[Row]] = {}
    for row in samples.to_pylist():
        if (row["user_id"], row["sample"]) in judged:
            by_user.setdefault(row["user_id"], []).append(row | judged[row["user_id"], row["sample"]])
    rows, left_out = [], Counter[str]()
    for prompt in prompts.to_pylist():
        found, of_user = pairs_of_user(config, by_user[prompt["user_id"]])
        left_out.update(of_user)
        rows += [{**_pair(chosen, rejected), "prompt": prompt["prompt"], "prompt_ids": prompt["prompt_ids"]} for chosen, rejected in found]
    made = len(rows)
    least = np.sort([row["gap"] for row in rows])[::-1][max(1, round(config.keep_share * made)) - 1] if rows else 0.0
    rows = [row for row in rows if row["gap"] >= least]
    if config.orientation == "random":
        coins = np.random.default_rng(seed).random(len(rows)) < 0.5
        rows = [_turned(row) if coin else row for row, coin in zip(rows, coins, strict=True)]
    elif config.orientation == "length":
        rows = [_turned(row) if len(row["chosen_ids"]) < len(row["rejected_ids"]) else row for row in rows]
    report = {"pairs": len(rows), "pairs_below_gap": made - len(rows), **left_out}
    return pa.Table.from_pylist(rows, schema=PAIRS), report


def pairs_of_user(config: PairConfig, samples: list[Row]) -> tuple[list[tuple[Row, Row]], Counter[str]]:
    """Up to `pairs_per_user` (chosen, rejected) of distinct texts, best against worst first; and how much was left out for which reason.

    With the format gate these are well-formed texts: however well the recommender likes it, a text out of form must not win. With
    `malformed_pair` one more pair sets the best of them against the best of the others.
    """
    distinct: dict[str, Row] = {}
    for row in sorted(samples, key=lambda row: (-row["standardised"], row["sample"])):
        distinct.setdefault(row["text"], row)
    ranked = [row for row in distinct.values() if row["well_formed"] or not config.format_gate]
    pairs = [
        (chosen, rejected)
        for chosen, rejected in zip(ranked, reversed(ranked), strict=False)
        if chosen["standardised"] > rejected["standardised"]  # past the middle of the ranking the worst is no longer worse
    ][: config.pairs_per_user]
    malformed = [row for row in distinct.values() if not row["well_formed"]] if config.format_gate and config.malformed_pair else []
    if ranked:
        pairs += [(ranked[0], row) for row in malformed[:1]]
    kept = [pair for pair in pairs if _like_lengths(config.max_length_ratio, *pair)]
    left_out = Counter(
        duplicate_texts=len(samples) - len(distinct),
        users_none_well_formed=int(not ranked),
        users_tied=int(bool(ranked) and not pairs),
        pairs_unequal_length=len(pairs) - len(kept),
    )
    return kept, left_out


def _like_lengths(most: float | None, chosen: Row, rejected: Row) -> bool:
    lengths = sorted(len(row["token_ids"]) for row in (chosen, rejected))
    return most is None or lengths[1] <= most * lengths[0]


def _pair(chosen: Row, rejected: Row) -> Row:
    ends = {"chosen": chosen, "rejected": rejected}
    return {
        **{name: end["completion"] for name, end in ends.items()},
        **{f"{name}_ids": end["token_ids"] for name, end in ends.items()},
        **{f"{name}_sample": end["sample"] for name, end in ends.items()},
        **{f"reward_{name}": end["reward"] for name, end in ends.items()},
        "gap": chosen["reward"] - rejected["reward"],
        "user_id": chosen["user_id"],
    }


def _turned(row: Row) -> Row:
    swap = {"chosen": "rejected", "rejected": "chosen"}
    ends = {f"{new}{tail}": row[f"{old}{tail}"] for old, new in swap.items() for tail in ("", "_ids", "_sample")}
    rewards = {f"reward_{new}": row[f"reward_{old}"] for old, new in swap.items()}
    return {**row, **ends, **rewards, "gap": -row["gap"]}
