"""A study: the method and its rivals over several seeds of the whole loop, and the table that says whether the alignment helps.

Of every seed each arm has a run folder `seed-<k>/<arm>`; the first arm runs whole, the others begin as forks of it and make anew what
differs. Ablations change one thing of the arm that the study is about, and begin as forks of that, of one seed. Test users are the same in
all of them, and are read when an arm is evaluated.
"""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from dpo4rec import files
from dpo4rec.conditions import BEST_OF
from dpo4rec.config import FREE, Config, config_of, plain, recommender_of, resolve
from dpo4rec.driver import Run
from dpo4rec.errors import InputError
from dpo4rec.experiment import Experiment
from dpo4rec.files import read_parquet
from dpo4rec.knowledge.prompts import shown
from dpo4rec.measure import Measurement
from dpo4rec.recommend import Recommenders
from dpo4rec.run_folder import CONFIG, check_config, fork, read_yaml
from dpo4rec.settings import Settings
from dpo4rec.stages import Announce

STUDIES = Path(__file__).parent / "studies"
CONTROLS = (
    "random",
    "popularity",
    "none",
    "item text only",
    "history",
    "history + item text",
    "shuffled text",
    "untuned text",
    BEST_OF,
    "history + untuned text",
)
"""Conditions that no arm has a part in, in the order of the table."""
TITLES = "raw titles as text"
RESULTS = "evaluation/results.json"
"""What an arm's run folder has once it is done."""
ABLATED = 0
"""The seed of which ablations are made."""
FIGURES = (
    "delta_ndcg5_tuned_vs_untuned",
    "p_tuned_vs_untuned",
    "delta_ndcg5_history_plus_tuned_vs_history_plus_untuned",
    "p_history_plus_tuned_vs_history_plus_untuned",
    "delta_ndcg5_best_of_n_vs_untuned",
    "captured_share_of_best_of_n",
    "well_formed_rate",
    "seeds",
    "test_users",
)
"""What `expected` may give a range for; p-values are corrected over all comparisons."""


class StudyConfig(Settings):
    """What a study compares, and what it is expected to find."""

    preset: str
    settings: list[str] = Field([], description="over the preset, for every arm")
    quick: list[str] = Field(description="over the settings, for a look at a part of it")
    seeds: PositiveInt = 5
    minutes_per_seed: PositiveFloat = Field(description="about, on one core, without ablations")
    minutes_per_ablation: PositiveFloat = Field(10, description="about, on one core")
    quick_share: float = Field(gt=0, description="about: time of a quick look / time of a seed")
    arms: dict[str, list[str]] = Field(description="label of an arm: what it changes; the first runs whole, the others start from it")
    aligned: str = Field(description="the arm that the study is about")
    ablations: dict[str, list[str]] = Field({}, description="label: what it changes of that arm")
    comparisons: list[tuple[str, str]] = Field(description="pairs of conditions: one family of tests")
    exploratory: list[tuple[str, str]] = Field([], description="pairs thought of after test users were read: no part of the family")
    expected: dict[str, tuple[float, float]] = Field({}, description="figure: range that a repetition must find it in")

    @model_validator(mode="after")
    def _arms_exist(self) -> "StudyConfig":
        known = {*CONTROLS, TITLES, *self.arms, *(history(arm) for arm in self.arms)}
        named = {self.aligned, *(name for pair in (*self.comparisons, *self.exploratory) for name in pair)}
        if unknown := sorted(named - known):
            raise ValueError(f"{unknown} are no conditions of this study; known: {sorted(known)}")
        if twice := sorted(self.arms.keys() & self.ablations):
            raise ValueError(f"{twice} are both arms and ablations")
        if unknown := sorted(self.expected.keys() - set(FIGURES)):
            raise ValueError(f"{unknown} are no figures of a study; known: {list(FIGURES)}")
        return self

    @property
    def variants(self) -> dict[str, list[str]]:
        """Every arm and ablation: what it changes of the preset."""
        return self.arms | {label: [*self.arms[self.aligned], *changes] for label, changes in self.ablations.items()}


def studies() -> list[str]:
    return sorted(path.stem for path in STUDIES.glob("*.yaml"))


def load_study(name: str) -> StudyConfig:
    """Raises `InputError` when there is no such study."""
    if name not in studies():
        raise InputError(name, "there is no such study", f"Known: {', '.join(studies())}")
    return StudyConfig.model_validate(read_yaml(STUDIES / f"{name}.yaml"))


def history(arm: str) -> str:
    """Label of the condition that has the ID history beside the text of an arm."""
    return f"history + {arm}"


class Study:
    """A study in a folder; whatever is done is skipped, so running again is resuming.

    Args:
        config: arms, comparisons, expectations.
        folder: gets `seed-<k>/<arm>/`.
        settings: `key=value` over those of the study, for instance the data's folder. Its expectations apply where they say no more than
            where the data are and what computes.
        quick: one seed with the study's settings for a quick look; its expectations do not apply.
        announce: as a run's.

    Raises:
        InputError: an arm's settings cannot be used, or `settings` hold what makes seeds or arms differ.
    """

    def __init__(
        self, config: StudyConfig, folder: Path, settings: list[str], quick: bool = False, announce: Announce = lambda *_: None
    ) -> None:
        self.config, self.folder, self.quick, self.announce = config, folder, quick, announce
        self.settings = [*config.settings, *(config.quick if quick else []), *settings]
        self._compared: set[Path] = set()
        self.seeds = list(range(1 if quick else config.seeds))
        self.as_shipped = not quick and all(setting.startswith(("data.folder=", "cluster.")) for setting in settings)
        own = {"seed", *(setting.partition("=")[0] for changes in config.variants.values() for setting in changes)}
        if taken := sorted(own & {setting.partition("=")[0] for setting in settings}):
            raise InputError(f"--set {taken[0]}", "the study sets it itself, for seeds and arms to differ", "Leave it out")
        for label in config.variants:  # a wrong setting is said before anything runs
            if self.settings_of(label, 0).evaluation.best_of is None:
                raise InputError("evaluation.best_of", "a study has a row for it", "Set how many texts to choose among")

    @property
    def first(self) -> str:
        """The arm that the others start from."""
        return next(iter(self.config.arms))

    def run(self, seeds: list[int], started: Callable[[str], None] = lambda _: None) -> None:
        """All arms of these seeds, and then the ablations, that are not done. `started` is told what of which seed begins."""
        variants = [(label, seed) for seed in seeds for label in self.config.arms]
        variants += [(label, ABLATED) for label in self.config.ablations if ABLATED in seeds]
        for label, seed in variants:
            if not self.done(label, seed):
                started(f"seed {seed}: {label}")
                self._run_variant(label, seed)

    def variants_of(self, seed: int) -> list[str]:
        """What is run of a seed."""
        return list(self.config.variants if seed == ABLATED else self.config.arms)

    def _run_variant(self, label: str, seed: int) -> None:
        folder = self.path(label, seed)
        if label != self.first:
            origin = self.first if label in self.config.arms else self.config.aligned
            fork(self.path(origin, seed), folder, without=(RESULTS,))
        run = Run(self.settings_of(label, seed), folder, self.announce)
        run.rounds()
        if label == self.first:
            self._measure_titles(run)
        Experiment(run).evaluate()  # last: with its results it counts as done
        run.folder.release()

    def _measure_titles(self, run: Run) -> None:
        """The control that needs no language model: the titles of the history as the user's text, with an encoder fitted on them."""
        recommenders, texts = Recommenders(run), run.folder / "titles.parquet"
        if not texts.exists():
            rows = read_parquet(run.folder / "data" / "histories.parquet").to_pylist()
            items = [shown(run.config.prompt, row["item_ids"], row["ratings"])[0] for row in rows]
            titles = ["; ".join(run.catalogue.items[item].title for item in of) for of in items]
            files.write_parquet(pa.table({"user_id": [row["user_id"] for row in rows], "text": titles}), texts)
        recommenders.fit(recommender_of(run.config, run.config.recommender.model, "titles", None, [str(texts)], []))
        measurement = Measurement(recommenders)
        measurement.measure("frozen", measurement.protocols()["frozen"])

    def path(self, label: str, seed: int) -> Path:
        """Run folder of an arm or ablation."""
        return self.folder / f"seed-{seed}" / "-".join("".join(c if c.isalnum() else " " for c in label).split())

    def settings_of(self, label: str, seed: int) -> Config:
        """The resolved configuration of an arm's or ablation's run."""
        return resolve(self.config.preset, None, [*self.settings, *self.config.variants[label], f"seed={seed}"])

    def done(self, label: str, seed: int) -> bool:
        """Whether an arm or ablation of this seed is evaluated.

        Raises:
            InputError: it was made with other settings than the study's.
        """
        folder = self.path(label, seed)
        if not (folder / RESULTS).exists():
            return False
        if (file := folder / CONFIG) not in self._compared:
            check_config(plain(config_of(read_yaml(file))), plain(self.settings_of(label, seed)), (*FREE, "data.folder"), file)
            self._compared.add(file)
        return True

    def unfinished(self) -> list[int]:
        """Seeds of which some arm or ablation is not yet evaluated."""
        return [k for k in self.seeds if not all(self.done(label, k) for label in self.variants_of(k))]

    def finished(self) -> list[int]:
        """Seeds of which every arm is evaluated, which have a part in the tables."""
        return [k for k in self.seeds if all(self.done(label, k) for label in self.config.arms)]

    def comparable(self) -> bool:
        """Whether it must find what is expected of it: all is done, with no setting that changes what is computed."""
        return self.as_shipped and not self.unfinished()

    def minutes(self, seeds: list[int]) -> float:
        """About how long these seeds take on one core."""
        whole = len(seeds) * self.config.minutes_per_seed
        whole += len(self.config.ablations) * self.config.minutes_per_ablation if ABLATED in seeds else 0
        return whole * (self.config.quick_share if self.quick else 1)
