"""Which users the reward's recommenders learn from: the folds of the training users, and those who are drawn for fitting."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo4rec.errors import InputError
from dpo4rec.files import stable_seed


def fold_table(users: pa.Table, folds: int, fit_users: int | None, seed: int) -> pa.Table:
    """Columns user_id, fold (int32; -1: not a training user) and fits (bool), in the order of `users` (user_id, split).

    `fits` says whose lists the recommenders are fitted with: everybody's, or those of the `fit_users` training users who are drawn here
    and of all validation users, who choose the epoch.

    Raises:
        InputError: there are no more training users than `fit_users`.
    """
    training = np.flatnonzero(pc.equal(users["split"], "train").to_numpy())
    fold = np.full(len(users), -1, np.int32)
    fold[training] = fold_users(len(training), folds, stable_seed(seed, "folds"))
    fits = np.ones(len(users), bool)
    if fit_users is not None:
        if fit_users >= len(training):
            cause = f"it is {fit_users}, and there are {len(training)} training users"
            raise InputError("reward.fit_users", cause, "Leave it out: then recommenders are fitted on all of them")
        fits = pc.equal(users["split"], "validation").to_numpy().copy()
        fits[np.random.default_rng(stable_seed(seed, "fit users")).permutation(training)[:fit_users]] = True
    return pa.table({"user_id": users["user_id"], "fold": fold, "fits": fits})


def fold_users(count: int, folds: int, seed: int) -> np.ndarray:
    """The fold of each of `count` users, at random, sizes equal within one."""
    assigned = np.empty(count, np.int32)
    assigned[np.random.default_rng(seed).permutation(count)] = np.arange(count) % folds
    return assigned
