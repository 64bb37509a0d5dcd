"""How texts look, read file by file: nothing but a number for each distinct text is kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from dpo4rec.data.user_rows import UserRows
from dpo4rec.files import batches
from dpo4rec.knowledge.config import PromptConfig
from dpo4rec.knowledge.facts import Catalogue, facts
from dpo4rec.knowledge.form import Form, grounded_share
from dpo4rec.knowledge.prompts import shown

Truth = Callable[[list[str]], dict[str, set[str]]]


def describe(samples: Path, form: Form, truth: Truth | None) -> dict[str, Any]:
    """Number of texts, well-formed share, distinct share, mean tokens and, with `truth`, the mean share of grounded claims.

    Args:
        samples: folder of texts, columns user_id, text, token_ids, finished.
        truth: for users their true claims, written out.
    """
    texts = well_formed = tokens = judged = 0
    grounded, distinct = 0.0, [np.zeros(0, np.uint64)]
    for part in batches(samples, ["user_id", "text", "token_ids", "finished"]):
        texts += len(part)
        well_formed += pc.sum(with_form(part, form)["well_formed"]).as_py()
        tokens += pc.sum(pc.list_value_length(part["token_ids"])).as_py()
        distinct.append(np.unique(pd.util.hash_array(part["text"].to_numpy(), categorize=False)))
        for share in _grounded_shares(part, truth) if truth else []:
            grounded, judged = grounded + share, judged + 1
    report = {"texts": texts, "well_formed": well_formed / texts, "distinct": len(np.unique(np.concatenate(distinct))) / texts}
    report["mean_tokens"] = tokens / texts
    return report | ({"grounded": grounded / max(1, judged)} if truth else {})


def with_form(samples: pa.Table, form: Form) -> pa.Table:
    """With the column well_formed."""
    pairs = zip(samples["text"].to_pylist(), samples["finished"].to_pylist(), strict=True)
    return samples.append_column("well_formed", pa.array([form(text, finished) for text, finished in pairs], pa.bool_()))


class TrueClaims:
    """For users the claims, written out, that the shown part of their history supports.

    Args:
        histories: table user_id, item_ids, ratings.
    """

    def __init__(self, catalogue: Catalogue, histories: Path, prompt: PromptConfig, like_threshold: float) -> None:
        self.catalogue, self.histories = catalogue, UserRows(histories)
        self.prompt, self.like_threshold = prompt, like_threshold

    def __call__(self, users: list[str]) -> dict[str, set[str]]:
        return {row["user_id"]: self._claims(row["item_ids"], row["ratings"]) for row in self.histories.read(users).to_pylist()}

    def _claims(self, item_ids: list[str], ratings: list[float]) -> set[str]:
        return set(map(str, facts(self.catalogue, *shown(self.prompt, item_ids, ratings), self.like_threshold)))


def _grounded_shares(samples: pa.Table, truth: Truth) -> list[float]:
    """Of the texts that parse."""
    users = samples["user_id"].to_pylist()
    true = truth(users)
    shares = (grounded_share(text, true[user]) for user, text in zip(users, samples["text"].to_pylist(), strict=True))
    return [share for share in shares if share is not None]
