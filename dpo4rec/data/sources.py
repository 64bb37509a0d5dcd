"""The one place that knows every source."""

import dataclasses
from pathlib import Path

from dpo4rec.data.amazon import read_amazon
from dpo4rec.data.atomic import atomic_files, read_atomic
from dpo4rec.data.config import DataConfig
from dpo4rec.data.filters import filtered
from dpo4rec.data.item_texts import read_item_texts, with_texts
from dpo4rec.data.movielens import FILES, read_movielens
from dpo4rec.data.schema import Tables, validate
from dpo4rec.data.simulation import simulate
from dpo4rec.data.steam import read_steam
from dpo4rec.data.table import read_table


def read_source(config: DataConfig, seed: int) -> Tables:
    """The validated and filtered tables of the configured source.

    Items have one more column, `text`; `report` has `reading`, `filtered` and `item_texts`, each if there was something to count.

    Raises:
        InputError: names file and line (or row) of what is wrong.
    """
    tables = validate(_read(config, seed))
    if config.min_rating is not None or config.k_core > 1:
        tables, dropped = filtered(tables, config)
        tables = dataclasses.replace(tables, report=tables.report | {"filtered": dropped})
    if config.item_texts is None:
        return dataclasses.replace(tables, items=with_texts(tables.items, {}))
    knowledge, counts = read_item_texts(config.path(config.item_texts.file), config.item_texts, tables.items["item_id"].to_pylist())
    return dataclasses.replace(tables, items=with_texts(tables.items, knowledge), report=tables.report | {"item_texts": counts})


def source_files(config: DataConfig) -> list[Path]:
    """The files that `read_source` reads, there or not; none for the simulation."""
    names: tuple[str | None, ...] = FILES.get(config.source, ())
    if config.table:
        names = (config.table.interactions, config.table.items, config.table.users)
    elif config.amazon:
        names = (config.amazon.reviews, config.amazon.metadata)
    elif config.steam:
        names = (config.steam.reviews, config.steam.games)
    files = list(atomic_files(config.atomic, config.source_folder)) if config.atomic else [config.path(name) for name in names if name]
    return [*files, config.path(config.item_texts.file)] if config.item_texts else files


def _read(config: DataConfig, seed: int) -> Tables:
    if config.simulation:
        return simulate(config.simulation, seed)
    if config.table:
        return read_table(config.table, config.source_folder)
    if config.amazon:
        return read_amazon(config.path(config.amazon.reviews), config.path(config.amazon.metadata))
    if config.steam:
        return read_steam(config.path(config.steam.reviews), config.path(config.steam.games))
    if config.atomic:
        return read_atomic(config.atomic, config.source_folder)
    return read_movielens(config.source, config.source_folder)
