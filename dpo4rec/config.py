"""The whole configuration: preset < file < command line, strict, resolved before anything runs."""

import difflib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from dpo4rec.alignment.config import AGAINST_ALL, AlignmentConfig, Tracking
from dpo4rec.cluster.config import ClusterConfig
from dpo4rec.data.config import DataConfig
from dpo4rec.data.retrieved import RetrievedConfig
from dpo4rec.data.sequences import SequenceConfig
from dpo4rec.errors import InputError
from dpo4rec.fits import FitOptions, Protocol
from dpo4rec.knowledge.config import Decoding, EncoderConfig, LanguageModelConfig, PromptConfig
from dpo4rec.knowledge.vllm_limits import refuse
from dpo4rec.preference.config import PairConfig, RewardConfig
from dpo4rec.recommenders.config import RecommenderConfig
from dpo4rec.recommenders.sequential import SEQUENTIAL, SequentialConfig
from dpo4rec.run_folder import read_yaml
from dpo4rec.settings import Settings

PRESETS = Path(__file__).parent / "presets"
FREE = (
    "cluster.kind",
    "cluster.workers",
    "cluster.gpus_per_worker",
    "cluster.memory_per_worker_gib",
    "cluster.wait_timeout_seconds",
    "tracking",
    "sampling.skip_failed_rows",
)
"""Keys that say where work runs, who watches, or whether it goes on without those it fails on: a run may be continued with other values."""


class SamplingConfig(Settings):
    """How many texts, and how they are drawn."""

    samples: int = Field(default=8, ge=2)
    """Texts a user and round."""
    engine: Literal["builtin", "vllm"] = "builtin"
    """What draws the texts: a transformers model in the worker's process, or vLLM (an extra; GPU)."""
    users_per_unit: PositiveInt = 128
    """Users whose texts are drawn in one call of the engine: the unit of work, the same for any number of workers."""
    rows_at_once: PositiveInt = 512
    """About so many texts of a unit are drawn at the same time, others take the place of those that end: speed against memory."""
    decoding: Decoding = Decoding()
    skip_failed_rows: bool = False
    """Users that sampler, encoder or scorer fail on are left out and listed (`<unit>.failed.json` beside the results), or the run stops."""


class EvaluationConfig(Settings):
    """What is measured at the end."""

    temperatures: list[PositiveFloat] = Field(default=[0.5, 0.7, 1.0], min_length=1)
    """Each policy is measured at that of these which is best for it on the validation users."""
    texts_per_user: PositiveInt = 4
    best_of: int | None = Field(default=None, ge=2)
    """Measure also what choosing among so many untuned texts by the reward gives [no]: each user's text is chosen on half of the user's
    lists and measured on the other half."""
    seeds: PositiveInt = 5
    """Recommenders a condition; metrics are averaged over them."""
    bootstrap_samples: PositiveInt = 10_000
    more_cutoffs: list[PositiveInt] = []
    """Values of k for every metric, beside the usual ones of a table."""

    def cutoffs(self, usual: tuple[int, ...]) -> list[int]:
        """The usual values of k and those asked for, ascending."""
        return sorted({*usual, *self.more_cutoffs})


class Config(Settings):
    """A run."""

    seed: int = 0
    rounds: PositiveInt = 2
    tracking: Tracking = "none"
    """A tracker that is told every line of the training logs, beside them; it never stops a run."""
    data: DataConfig
    llm: LanguageModelConfig = LanguageModelConfig()
    prompt: PromptConfig = PromptConfig()
    sampling: SamplingConfig = SamplingConfig()
    encoder: EncoderConfig = EncoderConfig()
    recommender: RecommenderConfig = RecommenderConfig()
    sequences: SequenceConfig = SequenceConfig()
    sequential: SequentialConfig = SequentialConfig()
    retrieved: RetrievedConfig = RetrievedConfig()
    reward: RewardConfig = RewardConfig()
    pairs: PairConfig = PairConfig()
    alignment: AlignmentConfig = AlignmentConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _parts_agree(self) -> "Config":
        if not self.recommender.reads_user_text:
            raise ValueError("recommender.user_signal must hold text (text or history+text): it is what rewards texts")
        if self.prompt.item_request is not None and self.llm.built_in:
            raise ValueError(
                "prompt.item_request asks for item texts, and the built-in model has learned to write users' alone: use another llm.name, "
                "or give texts by data.item_texts"
            )
        if self.reward.kind == "log_likelihood" and self.recommender.loss == "softmax":
            raise ValueError(
                "reward.kind=log_likelihood needs recommender.loss=bce: a softmax over a list leaves the level of its logits free"
            )
        if self.alignment.noise in ("epsilon_column", "margin_column"):
            instead = "epsilon" if self.alignment.noise == "epsilon_column" else "none"
            raise ValueError(f"alignment.noise={self.alignment.noise} reads a column of the pairs that a run does not write: use {instead}")
        if self.alignment.objective in AGAINST_ALL and not self.pairs.malformed_pair:
            raise ValueError(
                f"alignment.objective={self.alignment.objective} sets a text against several rejected ones, and without "
                "pairs.malformed_pair a run's texts have one each, for which it is sigmoid: use that"
            )
        if self.alignment.method != "preference":
            unread = self.pairs.model_dump(exclude_defaults=True).keys() - {"format_gate"}
            if unread:
                raise ValueError(f"pairs.{min(unread)} would be ignored: alignment.method={self.alignment.method} trains on no pairs")
        if self.sampling.engine == "vllm":
            if self.sampling.rows_at_once != SamplingConfig.model_fields["rows_at_once"].default:
                raise ValueError("sampling.rows_at_once is for sampling.engine=builtin: vLLM finds its own, leave it out")
            temperatures = [self.sampling.decoding.temperature, *self.evaluation.temperatures]
            rank = self.alignment.lora_rank if self.alignment.weights == "lora" else None
            if (why_not := refuse(self.llm, temperatures, rank)) is not None:
                raise ValueError(why_not)
        if self.llm.quantization != self.alignment.quantization:
            raise ValueError("llm.quantization and alignment.quantization must be the same: texts come from the model that is trained")
        return self

    @property
    def data_seed(self) -> int:
        return self.seed if self.data.split_seed is None else self.data.split_seed


def presets() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def plain(config: Config) -> dict[str, Any]:
    """As `config.yaml` of a run folder has it."""
    return config.model_dump(mode="json")


def resolve(preset: str | None, file: Path | None, settings: list[str]) -> Config:
    """The configuration from preset, YAML file and `key=value` settings, later ones winning.

    Raises:
        InputError: unknown preset or key (names the nearest), wrong value, or a combination that is not supported.
    """
    values: dict[str, Any] = {}
    if preset is not None:
        if preset not in presets():
            raise InputError("--preset", f"there is no preset {preset!r}{_nearest(preset, presets())}", f"Known: {', '.join(presets())}")
        values = read_yaml(PRESETS / f"{preset}.yaml")
    if file is not None:
        values = _merged(values, read_yaml(file))
    for setting in settings:
        values = _merged(values, _parsed(setting))
    return config_of(values)


def config_of(values: dict[str, Any]) -> Config:
    """The configuration with these values, and defaults for the others.

    Raises:
        InputError: as `resolve`.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise _explained(error) from error


def recommender_of(config: Config, model: str, name: str, lists: str | None, texts: list[str], settings: list[str]) -> FitOptions:
    """What a fit for its own sake is told: the run's part for the model's kind, with `settings` ("recommender.KEY=" or "sequential.KEY=").

    A run rewards texts, so its own `user_signal` holds text. Unless `settings` have another, a re-ranker without `texts` reads the history
    instead, and MIR, which is made for it, reads both.

    Raises:
        InputError: an unknown model, a setting of the other kind of model, a wrong value, or texts that are not read.
    """
    part = "sequential" if model in SEQUENTIAL else "recommender"
    values: dict[str, Any] = {part: getattr(config, part).model_dump()}
    if part == "recommender":
        values[part]["user_signal"] = "history" if not texts else "history+text" if model == "mir" else config.recommender.user_signal
    for setting in settings:
        if not setting.startswith(f"{part}."):
            raise InputError(f"--set {setting}", f"{model} does not read it", f"Its settings begin with {part}.")
        if setting.startswith("recommender.model="):
            raise InputError(f"--set {setting}", f"the fit's model is {model}", "Name another by --model")
        values = _merged(values, _parsed(setting))
    if part == "recommender":
        values[part]["model"] = model
    try:
        options = {"name": name, "model": model, "protocol": _protocol(model, lists), "texts": texts}
        return FitOptions.model_validate({**options, **values})
    except ValidationError as error:
        raise _explained(error, FitOptions) from error


def _protocol(model: str, lists: str | None) -> Protocol:
    if lists is not None and model in SEQUENTIAL:
        raise InputError("--lists", f"{model} ranks the whole catalogue, not lists", "Leave --lists out")
    if lists not in (None, "frozen", "retrieved"):
        raise InputError("--lists", f"there are no {lists!r} lists", "Give frozen or retrieved")
    return "catalogue" if model in SEQUENTIAL else "retrieved" if lists == "retrieved" else "frozen"


def _parsed(setting: str) -> dict[str, Any]:
    key, equals, text = setting.partition("=")
    if not equals or not key:
        raise InputError(f"--set {setting}", "is not of the form key=value", "Write for instance --set alignment.beta=0.05")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: what looks like a date and is none
        raise InputError(f"--set {setting}", "the value is not valid YAML", "Quote it") from error
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = dict(base)
    for key, value in over.items():
        old = both.get(key)
        both[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return both


def _explained(error: ValidationError, root: type[Settings] = Config) -> InputError:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        known = _fields(root, path[:-1])
        return InputError(".".join(path), f"there is no such setting{_nearest(path[-1], known)}", f"Known here: {', '.join(known)}")
    cause = first["msg"].removeprefix("Value error, ").rstrip(".")
    of_keys_together = isinstance(first["input"], dict)
    return InputError(
        ".".join(path) or "config", cause, "See docs/configuration.md" if of_keys_together else f"It was {first['input']!r:.200}"
    )


def _fields(root: type[Settings], path: list[str]) -> list[str]:
    model: Any = root
    for part in path:
        if part.isdigit():  # of a list, whose items' kind is already found
            continue
        model = model.model_fields[part].annotation
        model = next((arm for arm in getattr(model, "__args__", ()) if isinstance(arm, type) and issubclass(arm, Settings)), model)
    return sorted(model.model_fields)


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; the nearest is {close[0]!r}" if close else ""
