"""Scored answers: what imitates good texts, or samples anew from the same prompts, needs in place of pairs."""

import pyarrow as pa

from dpo4rec.preference.config import PairConfig

ANSWERS = pa.schema(
    [
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.int32())),
        ("reward", pa.float32()),
        ("standardised", pa.float32()),
        ("user_id", pa.string()),
        ("sample", pa.int32()),
    ]
)
"""Any TRL trainer reads prompt and completion; the token ids are what was sampled and what is trained on."""


def make_answers(config: PairConfig, prompts: pa.Table, samples: pa.Table, scores: pa.Table) -> pa.Table:
    """Every scored text with its reward, users in the order of `prompts`; with the format gate only well-formed ones.

    Args:
        prompts: user_id, prompt, prompt_ids.
        samples: user_id, sample, completion, token_ids, well_formed.
        scores: user_id, sample, reward, standardised.
    """
    judged = {(row["user_id"], row["sample"]): row for row in scores.to_pylist()}
    by_user: dict[str, list[dict[str, object]]] = {}
    for row in samples.to_pylist():
        score = judged.get((row["user_id"], row["sample"]))
        if score and (row["well_formed"] or not config.format_gate):
            by_user.setdefault(row["user_id"], []).append({**row, **score, "completion_ids": row["token_ids"]})
    rows = [row | prompt for prompt in prompts.to_pylist() for row in by_user.get(prompt["user_id"], [])]
    return pa.Table.from_pylist(rows, schema=ANSWERS)
