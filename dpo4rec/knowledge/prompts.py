"""The question put to the language model: who the user is, what was watched and rated, what to write about."""

from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from dpo4rec.errors import InputError
from dpo4rec.knowledge.config import PromptConfig
from dpo4rec.knowledge.facts import Catalogue, Item, clean

PROMPTS = pa.schema([("user_id", pa.string()), ("split", pa.string()), ("prompt", pa.string()), ("prompt_ids", pa.list_(pa.int32()))])


def compose(config: PromptConfig, catalogue: Catalogue, profile: str, item_ids: list[str], ratings: list[float]) -> str:
    """The prompt's text, for instance:

    The user rated:
    - rated 5: Heat, 1990s Crime Thriller with Al Pacino
    Preferences:

    Without ratings: "The user chose:", "- Heat, 1990s ...".
    """
    lines = [config.role] if config.role else []
    if config.profile and profile:
        lines.append(f"The user is {clean(profile)}.")
    lines.append("The user rated:" if catalogue.rated else "The user chose:")
    for item_id, rating in zip(*shown(config, item_ids, ratings), strict=True):
        lines.append(f"- {f'rated {rating:g}: ' if catalogue.rated else ''}{describe(catalogue.items[item_id])}")
    return "\n".join([*lines, config.request])


def shown(config: PromptConfig, item_ids: list[str], ratings: list[float]) -> tuple[list[str], list[float]]:
    """The part of a history that the prompt shows, items and ratings in the prompt's order; a history is in the order of time."""
    items, ratings = item_ids[-config.history_items :], ratings[-config.history_items :]
    order = sorted(range(len(items)), key=lambda place: -ratings[place]) if config.order == "rating" else range(len(items))
    return [items[place] for place in order], [ratings[place] for place in order]


def describe(item: Item) -> str:
    """An item in its line of the history. Text from data was made one clean line by the catalogue, so it cannot break the frame."""
    attributes = " ".join(([item.era] if item.era else []) + list(item.genres))
    people = f" with {', '.join(item.people)}" if item.people else ""
    return f"{item.title}{',' if attributes else ''} {attributes}{people}".rstrip()


def encode_prompts(config: PromptConfig, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> tuple[list[str], list[list[int]]]:
    """The prompts as the model gets them (in its chat frame where the tokenizer has one) and their token ids.

    Raises:
        InputError: the chat template is to be told something, and the tokenizer has none or does not read it.
    """
    told: dict[str, Any] = dict(config.chat_template_arguments)
    if unread := sorted(name for name in told if name not in str(tokenizer.chat_template or "")):
        template = "the tokenizer's chat template" if tokenizer.chat_template else "the tokenizer, which has no chat template,"
        cause = f"{template} does not read {', '.join(unread)}"
        raise InputError("prompt.chat_template_arguments", cause, "Leave it out, or see the model's page for what its template reads")
    if tokenizer.chat_template:
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        prompts = [str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, **told)) for turn in turns]
        return prompts, tokenizer(prompts, add_special_tokens=False)["input_ids"]
    return prompts, tokenizer(prompts)["input_ids"]


def item_prompt_table(config: PromptConfig, items: pa.Table, tokenizer: PreTrainedTokenizerBase) -> pa.Table:
    """Columns user_id (the item's id: the sampler's key) and prompt_ids; one row an item."""
    request = config.item_request or ""
    titles = [clean(title) for title in items["title"].to_pylist()]
    _, ids = encode_prompts(config, tokenizer, [request.replace("{title}", title) for title in titles])
    return pa.table({"user_id": items["item_id"], "prompt_ids": pa.array(ids, pa.list_(pa.int32()))})


def prompt_table(
    config: PromptConfig, catalogue: Catalogue, users: pa.Table, histories: pa.Table, tokenizer: PreTrainedTokenizerBase
) -> pa.Table:
    """Columns `PROMPTS`; one row a user in the order of `users`, of each of whom `histories` has a row."""
    by_user = {row["user_id"]: row for row in histories.to_pylist()}
    rows = [user | by_user[user["user_id"]] for user in users.to_pylist()]
    texts = [compose(config, catalogue, row["profile"], row["item_ids"], row["ratings"]) for row in rows]
    prompts, ids = encode_prompts(config, tokenizer, texts) if texts else ([], [])
    return pa.table([users["user_id"], users["split"], prompts, ids], schema=PROMPTS)
