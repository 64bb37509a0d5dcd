"""What a study has found: the tables, made of every test user's values in the `evaluation` folders of the arms.

Beside the settings nothing else of the run folders is read, so those alone can be kept, and brought together from several machines.
"""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from dpo4rec import files
from dpo4rec.conditions import BEST_OF, POLICIES
from dpo4rec.errors import InputError
from dpo4rec.evaluation.significance import correct, paired_bootstrap
from dpo4rec.files import read_parquet, stable_seed
from dpo4rec.report.study import tables
from dpo4rec.run_folder import CONFIG
from dpo4rec.stages import Report
from dpo4rec.study import ABLATED, CONTROLS, RESULTS, TITLES, Study, history

METRICS = ("ndcg@5", "ndcg@10", "map@5")
SHARED = ", shared recommender"
PER_USER = "evaluation/per_user.parquet"
OF_TITLES = "evaluation/frozen/per_user.parquet"
OF_POLICIES = [label for policy in POLICIES for label in (f"{policy} text", f"history + {policy} text", f"{policy} text{SHARED}")]
"""The conditions that are read of every arm and ablation; of the first arm the controls, too."""
Values = dict[str, dict[str, Tensor]]
"""Condition -> metric -> [seeds, users], users in the order of their ids."""


def study_results(study: Study) -> Report:
    """The tables of what is done, over the finished seeds: of every condition metrics and texts, comparisons, ablations, figures.

    Raises:
        InputError: no seed is finished, or seeds have other users or lists.
    """
    seeds = study.finished()
    if not seeds:
        raise InputError(str(study.folder), "no seed has all its arms", "Run the study for one first")
    values = _values(study, seeds)
    compared = (study.config.aligned, *study.config.ablations)
    found: Report = {
        "seeds": len(seeds),
        "of_seeds": len(study.seeds),
        "quick": study.quick,
        "test_users": int((~values["none"]["ndcg@5"][0].isnan()).sum()),
        "lists_hash": _common(study, seeds, "lists_hash"),
        "conditions": {label: _row(study, seeds, label, of) for label, of in values.items()},
        "comparisons": _comparisons(study, values),
        "one recommender": {arm: _with_one_recommender(study, seeds, arm) for arm in study.config.arms},
        "ablations": {label: _ablation(study, label) for label in compared if study.done(label, ABLATED)},
    }
    found["figures"] = _figures(study, found)
    found["unexpected"] = _unexpected(study, found["figures"]) if study.comparable() else {}
    return found


def write_study_results(study: Study) -> Report:
    """`study_results`, also written to `results.json` and `results.md` of the study's folder."""
    found = study_results(study)
    files.write_json(found, study.folder / "results.json")
    (study.folder / "results.md").write_text(tables(found), encoding="utf-8")
    return found


def keep_evaluations(study: Study, folder: Path) -> None:
    """Copies what the tables are made of, of every arm and ablation that is done, to the same places below `folder`.

    A `Study` there makes the same tables, also of seeds that several machines have brought together, and skips what they have done.
    """
    for seed in study.seeds:
        for label in study.variants_of(seed):
            if not study.done(label, seed):
                continue
            source = study.path(label, seed)
            target = folder / source.relative_to(study.folder)
            conditions = [*CONTROLS, *OF_POLICIES] if label == study.first else OF_POLICIES
            if label == study.first:
                _keep_rows(source / OF_TITLES, ["titles"], target / OF_TITLES)
            _keep_rows(source / PER_USER, conditions, target / PER_USER)
            shutil.copyfile(source / CONFIG, target / CONFIG)
            files.write_json(_of(study, label, seed), target / RESULTS)  # last: with it the arm counts as done


def _keep_rows(source: Path, conditions: list[str], target: Path) -> None:
    table = read_parquet(source)
    kept = table.filter(pc.is_in(table["condition"], pa.array(conditions)))
    files.write_parquet(kept.select(["user_id", "condition", *METRICS]), target)


def _values(study: Study, seeds: list[int]) -> Values:
    of_seeds: dict[str, dict[str, list[Tensor]]] = {}
    for seed in seeds:
        for label, of in _values_of(study, seed).items():
            for metric, value in of.items():
                of_seeds.setdefault(label, {}).setdefault(metric, []).append(value)
    return {label: {metric: torch.stack(of) for metric, of in table.items()} for label, table in of_seeds.items()}


def _values_of(study: Study, seed: int) -> dict[str, dict[str, Tensor]]:
    found = {}
    own = _per_user(study.path(study.first, seed) / PER_USER)
    for label in CONTROLS:
        found[label] = own[label]
        if label == "history + item text":
            found[TITLES] = _per_user(study.path(study.first, seed) / OF_TITLES)["titles"]
    for arm in study.config.arms:
        of_arm = _per_user(study.path(arm, seed) / PER_USER)
        found |= {arm: of_arm["tuned text"], history(arm): of_arm["history + tuned text"]}
    return found


def _of(study: Study, arm: str, seed: int) -> Report:
    return files.read_json(study.path(arm, seed) / RESULTS)


def _common(study: Study, seeds: list[int], key: str) -> Any:
    found = {_of(study, arm, seed)[key] for arm in study.config.arms for seed in seeds}
    if len(found) > 1:
        raise InputError(str(study.folder), f"its runs have several values of {key}: {sorted(found)}", "Set data.split_seed")
    return found.pop()


def _row(study: Study, seeds: list[int], label: str, of: dict[str, Tensor]) -> Report:
    means = {metric: of[metric].nanmean(1) for metric in METRICS}
    row: Report = {metric: float(mean.mean()) for metric, mean in means.items()}
    row |= {f"{metric} deviation": float(mean.std()) for metric, mean in means.items() if len(mean) > 1}
    policy = {label: (label, "tuned") for label in study.config.arms}
    policy |= {"untuned text": (study.first, "untuned"), BEST_OF: (study.first, BEST_OF)}
    if label in policy:
        arm, which = policy[label]
        runs = [_of(study, arm, seed) for seed in seeds]
        texts = [run["texts"][which] for run in runs]
        row["texts"] = {name: sum(text[name] for text in texts) / len(texts) for name in texts[0]}
        row["temperatures"] = [run["temperatures"]["chosen"][which] for run in runs]
    return row


def _comparisons(study: Study, values: Values) -> list[Report]:
    def compared(a: str, b: str) -> Report:
        return {"a": a, "b": b, **_compared(values[a]["ndcg@5"], values[b]["ndcg@5"])}

    family, others = ([compared(*pair) for pair in pairs] for pairs in (study.config.comparisons, study.config.exploratory))
    correct(family, "p_value")
    return [*family, *others]


def _with_one_recommender(study: Study, seeds: list[int], arm: str) -> Report:
    """An arm's tuned and untuned text, both ranked by recommenders that were fitted on the texts of both."""
    own = [_per_user(study.path(arm, seed) / PER_USER) for seed in seeds]
    tuned, untuned = (torch.stack([of[f"{policy} text{SHARED}"]["ndcg@5"] for of in own]) for policy in ("tuned", "untuned"))
    return _means_and_difference(tuned, untuned)


def _ablation(study: Study, label: str) -> Report:
    """NDCG@5 of a variant's tuned and untuned text, of one seed, and their difference over users; the same beside a history."""
    own = _per_user(study.path(label, ABLATED) / PER_USER)

    def compared(before: str) -> Report:
        return _means_and_difference(*(own[f"{before}{policy} text"]["ndcg@5"] for policy in ("tuned", "untuned")))

    return compared("") | {"beside a history": compared("history + ")}


def _figures(study: Study, found: Report) -> dict[str, float]:
    aligned, conditions = study.config.aligned, found["conditions"]
    p_values = {(row["a"], row["b"]): row["p_value_holm"] for row in found["comparisons"] if "p_value_holm" in row}

    def gain(label: str, over: str) -> float:
        return conditions[label]["ndcg@5"] - conditions[over]["ndcg@5"]

    gained, best = gain(aligned, "untuned text"), gain(BEST_OF, "untuned text")
    return {
        "delta_ndcg5_tuned_vs_untuned": round(gained, 4),
        "p_tuned_vs_untuned": round(p_values[aligned, "untuned text"], 5),
        "delta_ndcg5_history_plus_tuned_vs_history_plus_untuned": round(gain(history(aligned), "history + untuned text"), 4),
        "p_history_plus_tuned_vs_history_plus_untuned": round(p_values[history(aligned), "history + untuned text"], 5),
        "delta_ndcg5_best_of_n_vs_untuned": round(best, 4),
        "captured_share_of_best_of_n": round(gained / best, 3) if best else 0.0,
        "well_formed_rate": round(conditions[aligned]["texts"]["well_formed"], 4),
        "seeds": found["seeds"],
        "test_users": found["test_users"],
    }


def _unexpected(study: Study, figures: dict[str, float]) -> dict[str, Report]:
    ranges = study.config.expected
    return {name: {"found": figures[name], "expected": list(of)} for name, of in ranges.items() if not of[0] <= figures[name] <= of[1]}


def _means_and_difference(tuned: Tensor, untuned: Tensor) -> Report:
    return {"tuned": float(tuned.nanmean()), "untuned": float(untuned.nanmean()), **_compared(tuned, untuned)}


def _compared(a: Tensor, b: Tensor) -> Report:
    return asdict(paired_bootstrap(a, b, stable_seed("study"), samples=10_000))


def _per_user(file: Path) -> dict[str, dict[str, Tensor]]:
    """Condition -> metric -> values, users in the order of their ids."""
    table = read_parquet(file).sort_by("user_id")
    found = {}
    for label in table["condition"].unique().to_pylist():
        rows = table.filter(pa.array([condition == label for condition in table["condition"].to_pylist()]))
        found[label] = {metric: torch.from_numpy(rows[metric].to_numpy().copy()) for metric in METRICS if metric in rows.column_names}
    return found
