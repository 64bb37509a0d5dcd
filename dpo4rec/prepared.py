"""What is made before the rounds: data, the built-in language model, prompts, and who fits the reward's recommenders."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpo4rec import files
from dpo4rec.data.prepare import prepare
from dpo4rec.data.sources import source_files
from dpo4rec.data.user_rows import UserRows, of_split
from dpo4rec.errors import InputError
from dpo4rec.files import ROWS_A_GROUP, batches, read_parquet
from dpo4rec.knowledge.facts import Catalogue
from dpo4rec.knowledge.language_model import load_tokenizer
from dpo4rec.knowledge.prompts import prompt_table
from dpo4rec.preference.folds import fold_table
from dpo4rec.stages import Report, Stages


@dataclass(frozen=True)
class Policy:
    """A language model: base model (folder or hub name), adapter folder, and the folders on whose content its texts depend."""

    source: str
    adapter: Path | None
    files: list[Path]


class Prepared(Stages):
    """The stages before the rounds, and what later ones read of them."""

    def policy(self, round_: int) -> Policy:
        """The policy that round `round_` samples from: the base model in round 0, then what the round before has aligned."""
        base = str(self.folder / "language_model") if self.config.llm.built_in else self.config.llm.name
        of_base = [Path(base)] if self.config.llm.built_in or self._is_folder(base) else []
        if round_ == 0:
            return Policy(base, None, of_base)
        aligned = self.folder / f"round-{round_ - 1}" / "adapter"
        if self.config.alignment.weights == "full":
            return Policy(str(aligned), None, [aligned])
        return Policy(base, aligned, [*of_base, aligned])

    def _is_folder(self, name: str) -> bool:
        """Else it is a name on the hub. What was a folder when prompts were made is one: if it is gone, texts are no other model's."""
        made_with = self.folder.manifest["stages"].get("prompts", {}).get("inputs", [])
        return Path(name).is_dir() or Path(name).name in made_with

    # -- data ---------------------------------------------------------------------------------------------------------------------

    def prepare_data(self) -> Report:
        """The source's files, brought into one schema, split and cut into lists."""
        config, data = self.config.data, self.folder / "data"
        work, read = partial(prepare, config, self.config.data_seed), self.source_files("prepare")
        if inside := [str(file) for file in read if file.resolve().is_relative_to(data.resolve())]:
            raise InputError(inside[0], "the run would replace it: its own data go there", "Move it out of the run folder's data/")
        return self.stage("prepare", config, read, [data], lambda: into(data, work))

    def source_files(self, stage: str) -> list[Path]:
        """What the stage reads, or has read: before that its reader has the better words for a file that is missing."""
        was_read = self.folder.manifest["stages"].get(stage, {}).get("inputs", [])
        return [file for file in source_files(self.config.data) if file.is_file() or file.name in was_read]

    def warm_up(self) -> Report:
        """The built-in language model."""
        config, tiny, data, out = self.config, self.config.llm.tiny, self.folder / "data", self.folder / "language_model"
        settings = {"tiny": tiny, "prompt": config.prompt, "threads": config.cluster.training_threads}

        def work() -> Report:
            from dpo4rec.knowledge.tiny import warm_up  # the Trainer takes seconds to import

            histories, threshold = pa.concat_tables(self.training_histories()), config.data.like_threshold
            return warm_up(tiny, config.prompt, self.catalogue, histories, self.profiles, threshold, config.seed, out)

        return self.stage("warm-up", settings, [data], [out], work)

    @cached_property
    def profiles(self) -> dict[str, str]:
        users = read_parquet(self.folder / "data" / "users.parquet")
        return dict(zip(users["user_id"].to_pylist(), users["profile"].to_pylist(), strict=True))

    @cached_property
    def folds(self) -> Path:
        """Table of the training users' folds, and of the users on whose texts recommenders are fitted; see `fold_table`."""
        reward, users, out = self.config.reward, self.folder / "data" / "users.parquet", self.folder / "folds.parquet"

        def work() -> Report:
            table = fold_table(read_parquet(users, ["user_id", "split"]), reward.folds, reward.fit_users, self.config.seed)
            files.write_parquet(table, out, ROWS_A_GROUP)
            return {"users": len(table), "fit": pc.sum(table["fits"]).as_py()}

        self.stage("folds", {"folds": reward.folds, "fit_users": reward.fit_users}, [users], [out], work)
        return out

    @property
    def draws_fitting_users(self) -> bool:
        return self.config.reward.fit_users is not None

    @cached_property
    def catalogue(self) -> Catalogue:
        items = read_parquet(self.folder / "data" / "items.parquet")
        histories = (history for part in self.training_histories() for history in part["item_ids"].to_pylist())
        return Catalogue(items, histories, self.config.data.rated)

    def training_histories(self) -> Iterator[pa.Table]:
        """Part by part."""
        users = UserRows(self.folder / "data" / "users.parquet")
        for part in batches(self.folder / "data" / "histories.parquet"):
            yield of_split(part, users, "train")

    # -- prompts ----------------------------------------------------------------------------------------------------------------

    @property
    def prompts(self) -> Path:
        return self.folder / "prompts" / "prompts.parquet"

    def write_prompts(self) -> Report:
        """Every user's prompt, written part by part; where some users are drawn for fitting, the column `fits` says who."""
        settings = {"prompt": self.config.prompt, "llm": self.config.llm.name}
        inputs = [self.folder / "data", *self.policy(0).files, *([self.folds] if self.draws_fitting_users else [])]

        def work() -> Report:
            count = tokens = 0
            with files.atomic(self.prompts) as partial:
                writer = None
                for table in self._prompt_tables():
                    writer = writer or pq.ParquetWriter(partial, table.schema)
                    writer.write_table(table)
                    count, tokens = count + len(table), tokens + pc.sum(pc.list_value_length(table["prompt_ids"])).as_py()
                assert writer is not None  # prepared data have users
                writer.close()
            return {"prompts": count, "mean_prompt_tokens": round(tokens / count, 1)}

        return self.stage("prompts", settings, inputs, [self.prompts.parent], work)

    def _prompt_tables(self) -> Iterator[pa.Table]:
        folds = UserRows(self.folds) if self.draws_fitting_users else None
        data, histories = self.folder / "data", UserRows(self.folder / "data" / "histories.parquet")
        tokenizer = load_tokenizer(self.config.llm, self.policy(0).source)
        for users in batches(data / "users.parquet"):
            ids = users["user_id"].to_pylist()
            table = prompt_table(self.config.prompt, self.catalogue, users, histories.read(ids), tokenizer)
            yield table.append_column("fits", folds.read(ids)["fits"]) if folds else table


def into(folder: Path, work: Callable[[Path], Report]) -> Report:
    with files.atomic(folder) as partial:
        partial.mkdir()
        return work(partial)
