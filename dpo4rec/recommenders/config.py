"""What a re-ranker is made of and how it is fitted."""

from typing import Literal

from pydantic import Field, model_validator

from dpo4rec.settings import Settings


class RecommenderConfig(Settings):
    """Configuration of a knowledge-augmented re-ranker.

    Every model is fitted with binary cross-entropy unless told otherwise, SetRank too (KAR fits it list-wise): the log-likelihood reward
    needs a calibrated probability of each candidate, and a list-wise softmax leaves the level of the logits free.
    """

    model: Literal["prm", "dlcm", "setrank", "mir"] = "prm"
    user_signal: Literal["none", "history", "text", "history+text"] = Field(
        "text", description="what personalises the ranking: nothing, the ID-based history encoder, the user's text, or both"
    )
    item_text: bool = Field(True, description="give the candidates' texts, through the encoder of the user's text")
    embedding_dim: int = Field(32, ge=1, description="width of item, attribute, history and knowledge vectors each")
    hidden_dim: int = Field(64, ge=1)
    heads: int = Field(2, ge=1, description="attention heads of PRM, SetRank and MIR")
    shared_experts: int = Field(2, ge=1, description="experts shared by the user's and the item's tower (KAR: n_s)")
    dedicated_experts: int = Field(5, ge=1, description="experts of each tower alone (KAR: n_d)")
    expert_hidden_dim: int = Field(64, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1, description="of item features and hidden layers")
    text_dropout: float = Field(0.3, ge=0, lt=1, description="of text vectors before the experts, which else learn texts by heart")
    loss: Literal["bce", "softmax"] = Field(
        "bce", description="binary cross-entropy of each candidate, or cross-entropy of a softmax over each list that has a positive"
    )
    learning_rate: float = Field(5e-3, gt=0, description="of the first step; falls linearly to a twentieth")
    weight_decay: float = Field(0.01, ge=0)
    batch_size: int = Field(256, ge=1, description="lists a step")
    epochs: int = Field(5, ge=1, description="the epoch best on the validation users is kept")
    selection_cutoff: int = Field(5, ge=1, description="k of the NDCG@k that says which epoch is best")

    @model_validator(mode="after")
    def _heads_are_used(self) -> "RecommenderConfig":
        if self.model == "dlcm" and self.heads != type(self).model_fields["heads"].default:
            raise ValueError("recommender.heads would be ignored: dlcm has no attention")
        return self

    @model_validator(mode="after")
    def _heads_divide(self) -> "RecommenderConfig":
        if self.model != "dlcm" and self.hidden_dim % self.heads:
            raise ValueError(f"hidden_dim={self.hidden_dim} is not a multiple of heads={self.heads}")
        return self

    @property
    def text_sides(self) -> list[str]:
        """Whose texts are read: "user", "item", both or neither."""
        return ["user"] * self.reads_user_text + ["item"] * self.item_text

    @property
    def reads_history(self) -> bool:
        return "history" in self.user_signal

    @property
    def reads_user_text(self) -> bool:
        return "text" in self.user_signal
