"""Settings of language model, prompt, sampling and encoder. Free of heavy imports, so that every actor and command may read them."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from dpo4rec.knowledge.claims import OPENINGS
from dpo4rec.settings import Settings

Share = Annotated[float, Field(ge=0, le=1)]


class WriterConfig(Settings):
    """Habits of a writer."""

    weight: PositiveFloat = 1.0
    """How often a text is by this writer, against the others."""
    spurious_share: Share = 0.25
    """Share of claims whose name is drawn at random from the whole catalogue."""
    length_weights: list[float] = [0.1, 0.3, 0.25, 0.2, 0.1, 0.05]
    """Weight of writing 1, 2, 3, ... claims."""
    kind_weights: dict[str, float] = {"liked_genre": 0.3, "avoided_genre": 0.2, "era": 0.2, "person": 0.15, "title": 0.15}

    @model_validator(mode="after")
    def _kinds_exist(self) -> "WriterConfig":
        if unknown := set(self.kind_weights) - set(OPENINGS):
            raise ValueError(f"unknown kinds of claim {sorted(unknown)}; known: {sorted(OPENINGS)}")
        for name, weights in (("length_weights", self.length_weights), ("kind_weights", list(self.kind_weights.values()))):
            if min(weights, default=0) < 0 or not sum(weights):
                raise ValueError(f"{name} must be numbers from 0, and one of them above: they are {weights}")
        return self


class TinyConfig(Settings):
    """Shape and warm-up of the built-in model."""

    hidden_size: PositiveInt = 128
    layers: PositiveInt = 3
    heads: PositiveInt = 4
    key_value_heads: PositiveInt = 2
    vocabulary: PositiveInt = 600
    """Byte-level BPE tokens, beside one token for each name (genre, era, person, title) and opening."""
    prompts: PositiveInt = 14_400
    """Prompts seen in warm-up: random stretches of the training users' histories."""
    texts_per_prompt: PositiveInt = 8
    prompts_per_step: PositiveInt = 32
    learning_rate: PositiveFloat = 3e-3
    checkpoint_every_steps: PositiveInt = 100
    writers: list[WriterConfig] = Field([WriterConfig()], min_length=1)
    """Each text is by one of them."""
    list_heads: bool = False
    """Begin with attention that finds the title after the one just said, which writers of lists of titles need; so small a model takes
    several times the prompts to come by it."""
    list_line_tokens: Annotated[float, Field(ge=2)] = 6.5
    """About how many tokens lie between the titles of two lines of the prompt, for `list_heads`: mark, title, comma, era and genres are 6
    or 7; 2 where items have titles alone."""

    @model_validator(mode="after")
    def _list_heads_fit(self) -> "TinyConfig":
        if not self.list_heads:
            if "list_line_tokens" in self.model_fields_set and self.list_line_tokens != TinyConfig.model_fields["list_line_tokens"].default:
                raise ValueError("list_line_tokens is read by list_heads alone: leave it out, or set list_heads=true")
            return self
        if min(self.layers, self.heads) < 2 or self.key_value_heads != self.heads or self.hidden_size // self.heads < 16:
            raise ValueError("list_heads needs 2 layers and 2 heads or more, key_value_heads = heads, and 16 numbers or more a head")
        return self

    @model_validator(mode="after")
    def _heads_divide(self) -> "TinyConfig":
        if self.hidden_size % self.heads or self.heads % self.key_value_heads:
            raise ValueError(f"hidden_size {self.hidden_size} / heads {self.heads} / key_value_heads {self.key_value_heads} must divide")
        return self


BUILT_IN = "tiny"


class LanguageModelConfig(Settings):
    """Which language model writes the texts."""

    name: str = BUILT_IN
    """Hub name or folder of any causal language model, or "tiny": the built-in model, trained in place."""
    precision: Literal["fp32", "bf16"] = "fp32"
    quantization: Literal["none", "nf4"] = "none"
    trust_remote_code: bool = False
    """Run code that a hub repository brings. Only for repositories you have read."""
    tiny: TinyConfig = TinyConfig()

    @model_validator(mode="after")
    def _tiny_is_plain(self) -> "LanguageModelConfig":
        if self.name == BUILT_IN and self.quantization != "none":
            raise ValueError("quantization is for hub models: the built-in tiny model has no use for it, set llm.quantization=none")
        if self.name == BUILT_IN and self.trust_remote_code:
            raise ValueError("trust_remote_code is for hub models: the built-in tiny model brings no code")
        return self

    @property
    def built_in(self) -> bool:
        return self.name == BUILT_IN


class PromptConfig(Settings):
    """The three parts of the prompt (KAR, arXiv 2306.10933, section 3.2): role, history, scenario factors."""

    role: str = "You are a helpful assistant that summarises and extracts a user's preferences from what the user rated."
    request: str = (
        "Analyse this user's preferences. Consider genre, director and actors, period and country, characters, plot and theme, "
        "mood, acclaim, production quality and soundtrack. Say what the user likes and avoids, with details, in a few sentences."
    )
    history_items: PositiveInt = 15
    """The last so many items of the visible history are shown."""
    order: Literal["time", "rating"] = "time"
    """Oldest first, or best rated first and of like ratings the oldest."""
    profile: bool = True
    """Show the user's profile where the data has one."""
    chat_template_arguments: dict[str, bool | int | float | str] = {}
    """What the tokenizer's chat template is told, by its own names: `{enable_thinking: false}` for a model that would think first."""
    item_request: str | None = None
    """What to ask about each item ({title} is its title), once, before the rounds; the answer joins the item's text. KAR asks: "Introduce
    movie {title} and describe its attributes including but not limited to genre, director, cast, country, character, plot/theme, mood/tone,
    critical acclaim/award, production quality and soundtrack." (section 3.2.2)"""

    @model_validator(mode="after")
    def _request_names_the_item(self) -> "PromptConfig":
        if self.item_request is not None and "{title}" not in self.item_request:
            raise ValueError("item_request must hold {title}, or it would ask the same about every item")
        return self


class Decoding(Settings):
    """How a token is drawn; every parameter is explicit, nothing comes from a model's own generation config."""

    temperature: PositiveFloat = 1.0
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: NonNegativeInt = 0
    """Keep the k most probable tokens; 0 keeps all."""
    max_new_tokens: PositiveInt = 48


class EncoderConfig(Settings):
    """Which encoder turns user and item texts into vectors of one space."""

    kind: Literal["tfidf", "sentence-transformers", "language-model"] = "tfidf"
    name: str | None = None
    """Folder or hub name of a sentence-transformers model."""
    dimensions: PositiveInt = 128
    """Of TF-IDF + SVD; the other kinds have their own width."""
    max_tokens: PositiveInt = 256
    """Longest text that the language-model encoder reads."""

    @model_validator(mode="after")
    def _keys_belong(self) -> "EncoderConfig":
        if (self.kind == "sentence-transformers") != (self.name is not None):
            raise ValueError("encoder.name goes with encoder.kind=sentence-transformers, and that kind needs it")
        for key, kind in (("dimensions", "tfidf"), ("max_tokens", "language-model")):
            if self.kind != kind and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"encoder.{key} is for encoder.kind={kind} alone: leave it out")
        return self
