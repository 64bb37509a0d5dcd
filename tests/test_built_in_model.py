import numpy as np
import pyarrow as pa
import pytest
import torch

from dpo4rec.knowledge.config import PromptConfig, TinyConfig
from dpo4rec.knowledge.facts import Catalogue
from dpo4rec.knowledge.prompts import compose
from dpo4rec.knowledge.tiny import build_model, build_tokenizer

TITLES = [f"Film {number}" for number in range(40)]


@pytest.mark.parametrize("described", [True, False])
def test_list_heads_find_the_title_just_said_and_the_one_that_follows_it(described: bool) -> None:
    genres = ["Comedy", "Drama", "War"] if described else []
    rows = [
        {"item_id": title, "title": title, "genres": genres[: 1 + i % 3], "year": 1950 + i if described else None, "people": []}
        for i, title in enumerate(TITLES)
    ]
    catalogue = Catalogue(pa.Table.from_pylist(rows), [TITLES], rated=described)
    config = TinyConfig(key_value_heads=4, list_heads=True, list_line_tokens=6.5 if described else 2)
    shown = np.random.default_rng(0).permutation(TITLES)[:12].tolist()
    prompt = compose(PromptConfig(role="", request="Preferences:"), catalogue, "", shown, [5.0] * len(shown))
    tokenizer = build_tokenizer(config, catalogue, [prompt])
    torch.manual_seed(0)
    model = build_model(config, 1024, tokenizer, catalogue.names).eval()
    model.set_attn_implementation("eager")
    followed = 0
    for last in range(1, len(shown) - 1):
        ids = tokenizer(f"{prompt} Loved {shown[last - 1]}. Loved {shown[last]}. Loved", return_tensors="pt")["input_ids"]
        tokens = [token.strip() for token in tokenizer.convert_ids_to_tokens(ids[0])]
        reading, following = (layer[0, 0] for layer in model(ids, output_attentions=True).attentions[:2])
        assert reading[-1].argmax() == len(tokens) - 3  # "Loved <title> . Loved"
        place = tokens.index(shown[last])
        assert tokens[int(reading[place].argmax())] == shown[last - 1]
        titles = torch.tensor([token in TITLES for token in tokens])
        followed += tokens[int((following[-1] * titles).argmax())] == shown[last + 1]
    assert followed >= 8  # of ten, by a model that has learned nothing


def test_list_heads_need_room() -> None:
    two = {"heads": 2, "key_value_heads": 2}
    for lacking in (two | {"layers": 1}, {"heads": 1, "key_value_heads": 1}, {"key_value_heads": 2}, two | {"hidden_size": 16}):
        with pytest.raises(ValueError, match="list_heads needs"):
            TinyConfig(list_heads=True, **lacking)
    with pytest.raises(ValueError, match="list_line_tokens is read by list_heads alone"):
        TinyConfig(list_line_tokens=2)
