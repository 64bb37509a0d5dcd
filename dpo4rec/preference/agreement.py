"""Simulated users only: how far a text agrees with what the user truly prefers, and whether rewards follow it."""

from collections.abc import Iterable

import numpy as np
import pandas as pd
import pyarrow as pa
from scipy.stats import spearmanr

from dpo4rec.knowledge.claims import parse

SIGNED = {"liked_genre": ("genre", 1), "avoided_genre": ("genre", -1), "era": ("era", 1), "person": ("person", 1)}
"""What kind of true preference each kind of claim is about, and with which sign. Titles state no preference of their own."""


def agreement(text: str, preferences: dict[tuple[str, str], float]) -> float:
    """Sum over the text's claims of the user's true weight for what is claimed, negative for "Avoids"; 0 when it does not parse."""
    claims = [claim for claim in parse(text) or [] if claim.kind in SIGNED]
    return sum(sign * preferences.get((kind, claim.name), 0.0) for claim in claims for kind, sign in [SIGNED[claim.kind]])


def rank_correlation(parts: Iterable[tuple[pa.Table, pa.Table, pa.Table]]) -> dict[str, float]:
    """Mean over users of Spearman's correlation between the rewards of a user's texts and their agreement with the truth.

    `parts` are samples, scores and true preferences, of other users each.
    """
    users, values = zip(*(_correlations(*part) for part in parts), strict=True)
    of_all = np.concatenate(values)[np.argsort(np.concatenate(users), kind="stable")]
    known = of_all[~np.isnan(of_all)]
    if len(known) < 2:  # too few users whose texts differ in agreement and reward
        return {"users": len(known)}
    return {"mean": float(known.mean()), "standard_error": float(known.std(ddof=1) / np.sqrt(len(known))), "users": len(known)}


def _correlations(samples: pa.Table, scores: pa.Table, true_preferences: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Users, ascending, and the correlation of each; NaN where its texts do not differ."""
    truth: dict[str, dict[tuple[str, str], float]] = {}
    for row in true_preferences.to_pylist():
        truth.setdefault(row["user_id"], {})[row["kind"], row["name"]] = row["weight"]
    table = samples.select(["user_id", "sample", "text"]).to_pandas().merge(scores.to_pandas(), on=["user_id", "sample"])
    table["agreement"] = [agreement(text, truth[user]) for user, text in zip(table["user_id"], table["text"], strict=True)]
    found = {user: _spearman(of_user) for user, of_user in table.groupby("user_id")}
    return np.array(list(found), dtype=np.str_), np.array(list(found.values()), dtype=np.float64)


def _spearman(user: pd.DataFrame) -> float:
    if user["agreement"].nunique() < 2 or user["standardised"].nunique() < 2:
        return float("nan")
    return float(spearmanr(user["agreement"], user["standardised"]).statistic)
