"""What an encoder reads of an item: its attributes, and knowledge from a file (KAR's item facts, arXiv 2306.10933; plots)."""

from pathlib import Path

import pyarrow as pa

from dpo4rec.data.config import ItemTextsConfig
from dpo4rec.data.lines import Record, each_record
from dpo4rec.data.schema import item_text
from dpo4rec.data.table import TableFile
from dpo4rec.errors import InputError

LINES = (".jsonl", ".json", ".gz")


def with_texts(items: pa.Table, knowledge: dict[str, str]) -> pa.Table:
    """Appends the column `text`: title, genres, era and people, and then what is known about the item, by its id."""
    texts = []
    for row in items.to_pylist():
        attributes = item_text(row["title"], row["genres"], row["year"], row["people"])
        texts.append(f"{attributes} {knowledge.get(row['item_id'], '')}".rstrip())
    return items.append_column("text", pa.array(texts, pa.string()))


def read_item_texts(path: Path, config: ItemTextsConfig, ids: list[str]) -> tuple[dict[str, str], dict[str, int]]:
    """The texts by item id.

    Args:
        ids: of the items that there are.

    Returns:
        The texts that are not empty, and counts: items with and without a text, and ids of the file that are no items.

    Raises:
        InputError: the file cannot be read, lacks a field, has an item twice, or has a text for not one item.
    """
    texts: dict[str, str] = {}
    if path.suffix in LINES:
        each_record(path, lambda record: _add(record, config, texts))
    else:
        _add_rows(TableFile(path, key="data.item_texts"), config, texts)
    told = sum(bool(texts.get(item)) for item in ids)
    if not told:
        raise InputError(str(path), "it has a text for not one item", "Check data.item_texts.id_field and the ids")
    counts = {"items_with": told, "items_without": len(ids) - told, "unknown_items": len(texts.keys() - set(ids))}
    return {item: text for item, text in texts.items() if text}, counts


def _add_rows(file: TableFile, config: ItemTextsConfig, texts: dict[str, str]) -> None:
    columns = (file.ids(config.id_field).to_pylist(), file.text(config.text_field).to_pylist())
    for row, (item, text) in enumerate(zip(*columns, strict=True), start=1):
        try:
            _add({config.id_field: item, config.text_field: text}, config, texts)
        except ValueError as error:
            raise InputError(f"{file.place} {row}", str(error), "Keep one text for each item") from error


def _add(record: Record, config: ItemTextsConfig, texts: dict[str, str]) -> None:
    item, text = record[config.id_field], record[config.text_field]
    if not isinstance(item, str | int) or item == "":
        raise ValueError(f"{item!r} is no item id")
    if not isinstance(text, str | None):
        raise ValueError(f"the text of item {str(item)!r} is {text!r}")
    if str(item) in texts:
        raise ValueError(f"item {str(item)!r} was there before")
    texts[str(item)] = (text or "").strip()
