"""Which interactions count: a rating threshold, then the k-core."""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo4rec.data.config import DataConfig
from dpo4rec.data.schema import Tables, codes_of
from dpo4rec.errors import InputError


def filtered(tables: Tables, config: DataConfig) -> tuple[Tables, dict[str, int]]:
    """Drops interactions rated below `min_rating`, and then what is outside the k-core: users and items too.

    Without a k-core items that nobody touched stay.

    Returns:
        The tables that are left, in their order, and how many interactions, users and items each filter dropped.

    Raises:
        InputError: nothing is left.
    """
    rated = tables.interactions
    if config.min_rating is not None:
        rated = rated.filter(pc.greater_equal(rated["rating"], config.min_rating))
    report = {"interactions_below_min_rating": tables.interactions.num_rows - rated.num_rows}
    kept = dataclasses.replace(tables, interactions=rated)
    if config.k_core > 1:
        kept = _inside(kept, config.k_core)
        report |= {
            "interactions_outside_core": rated.num_rows - kept.interactions.num_rows,
            "users_outside_core": tables.users.num_rows - kept.users.num_rows,
            "items_outside_core": tables.items.num_rows - kept.items.num_rows,
        }
    if not kept.interactions.num_rows:
        cause = f"min_rating={config.min_rating} and k_core={config.k_core} leave none of {tables.interactions.num_rows} interactions"
        raise InputError("data", cause, "Lower data.min_rating or data.k_core")
    return kept, report


def core_rows(users: np.ndarray, items: np.ndarray, k: int) -> np.ndarray:
    """Mask [N] of the rows of the k-core, the largest part in which every user and every item has k rows or more.

    Args:
        users, items: the codes of each row, from 0 [N].
    """
    kept = np.ones(len(users), bool)
    while True:
        few_users = np.bincount(users[kept], minlength=len(users) and users.max() + 1) < k
        few_items = np.bincount(items[kept], minlength=len(items) and items.max() + 1) < k
        weak = kept & (few_users[users] | few_items[items])
        if not weak.any():
            return kept
        kept &= ~weak


def _inside(tables: Tables, k: int) -> Tables:
    log = tables.interactions
    users = codes_of(log["user_id"], tables.users["user_id"].combine_chunks())
    items = codes_of(log["item_id"], tables.items["item_id"].combine_chunks())
    rows = core_rows(users, items, k)
    return dataclasses.replace(
        tables,
        interactions=log.filter(pa.array(rows)),
        users=tables.users.take(pa.array(np.unique(users[rows]))),
        items=tables.items.take(pa.array(np.unique(items[rows]))),
    )
