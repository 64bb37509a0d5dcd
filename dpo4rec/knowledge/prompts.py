"""The question put to the language model: who the user is, what was watched and rated, what to write about."""

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from dpo4rec.knowledge.config import PromptConfig
from dpo4rec.knowledge.facts import Catalogue, Item, clean


def compose(config: PromptConfig, catalogue: Catalogue, profile: str, item_ids: list[str], ratings: list[float]) -> str:
    """The prompt's text, for instance:

    The user rated:
    - rated 5: Heat, 1990s Crime Thriller with Al Pacino
    Preferences:
    """
    lines = [config.role] if config.role else []
    if config.profile and profile:
        lines.append(f"The user is {clean(profile)}.")
    shown = zip(item_ids[-config.history_items :], ratings[-config.history_items :], strict=True)
    lines.append("The user rated:")
    lines += [describe(catalogue.items[item_id], rating) for item_id, rating in shown]
    return "\n".join([*lines, config.request])


def describe(item: Item, rating: float) -> str:
    """One line of the history. Text from data was made one clean line by the catalogue, so it cannot break the frame."""
    attributes = " ".join(([item.era] if item.era else []) + list(item.genres))
    people = f" with {', '.join(item.people)}" if item.people else ""
    return f"- rated {rating:g}: {item.title}{',' if attributes else ''} {attributes}{people}".rstrip()


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> tuple[str, list[int]]:
    """The prompt as the model gets it (in its chat frame where the tokenizer has one) and its token ids."""
    if tokenizer.chat_template:
        prompt = str(tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True))
        return prompt, tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return prompt, tokenizer(prompt)["input_ids"]


def item_prompt_table(request: str, items: pa.Table, tokenizer: PreTrainedTokenizerBase) -> pa.Table:
    """Columns user_id (the item's id: the sampler's key) and prompt_ids; one row an item. `request` holds {title}."""
    titles = [clean(title) for title in items["title"].to_pylist()]
    ids = [encode_prompt(tokenizer, request.replace("{title}", title))[1] for title in titles]
    return pa.table({"user_id": items["item_id"], "prompt_ids": pa.array(ids, pa.list_(pa.int32()))})


def prompt_table(
    config: PromptConfig, catalogue: Catalogue, users: pa.Table, histories: pa.Table, tokenizer: PreTrainedTokenizerBase
) -> pa.Table:
    """Columns user_id, split, prompt, prompt_ids; one row a user in the order of `users`."""
    by_user = {row["user_id"]: row for row in histories.to_pylist()}
    rows = []
    for user in users.to_pylist():
        history = by_user[user["user_id"]]
        prompt, ids = encode_prompt(tokenizer, compose(config, catalogue, user["profile"], history["item_ids"], history["ratings"]))
        rows.append({"user_id": user["user_id"], "split": user["split"], "prompt": prompt, "prompt_ids": ids})
    schema = pa.schema([("user_id", pa.string()), ("split", pa.string()), ("prompt", pa.string()), ("prompt_ids", pa.list_(pa.int32()))])
    return pa.Table.from_pylist(rows, schema=schema)
