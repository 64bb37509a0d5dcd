"""Text encoders: TF-IDF with truncated SVD (offline), sentence-transformers, or the frozen language model's own hidden states.

Only the answer is encoded, never the prompt in front of it. A text longer than the encoder reads is counted as cut.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.utils.extmath import randomized_svd

from dpo4rec import files
from dpo4rec.errors import InputError
from dpo4rec.knowledge.config import EncoderConfig, LanguageModelConfig
from dpo4rec.settings import Settings


class TfidfEncoder:
    """TF-IDF over words and pairs of words, projected on the leading singular vectors of the texts it was fitted on, unit length."""

    def __init__(self, folder: Path) -> None:
        vocabulary = files.read_json(folder / "vocabulary.json")
        tensors = files.read_tensors(folder / "tfidf.safetensors")
        self.vectorizer = _vectorizer(vocabulary=vocabulary)
        self.vectorizer.idf_ = tensors["idf"].numpy()
        self.components = tensors["components"].numpy()  # [dimensions, vocabulary]

    @staticmethod
    def fit(texts: list[str], dimensions: int, folder: Path) -> None:
        """Fits on `texts` and writes vocabulary and projection to `folder`; fewer dimensions where the vocabulary is small."""
        vectorizer = _vectorizer(min_df=2)
        try:
            matrix = vectorizer.fit_transform(texts)
        except ValueError as error:
            raise InputError(
                "encoder", f"TF-IDF finds no word that two texts share ({error})", "Give items texts, or another encoder.kind"
            ) from error
        _, _, components = randomized_svd(matrix, min(dimensions, *matrix.shape), random_state=0)
        files.write_json({term: int(index) for term, index in sorted(vectorizer.vocabulary_.items())}, folder / "vocabulary.json")
        tensors = {"idf": torch.from_numpy(vectorizer.idf_), "components": torch.from_numpy(components.astype(np.float32))}
        files.write_tensors(tensors, folder / "tfidf.safetensors")

    def __call__(self, texts: list[str]) -> tuple[np.ndarray, list[bool]]:
        vectors = np.asarray(self.vectorizer.transform(texts) @ self.components.T, dtype=np.float32)
        return _unit(vectors), [False] * len(texts)


class SentenceEncoder:
    """Any sentence-transformers model (an optional extra of the package)."""

    def __init__(self, name: str) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise InputError(
                "encoder.kind", "sentence-transformers is not installed", "Run: pip install 'dpo4rec[sentence-transformers]'"
            ) from error
        try:
            self.model = SentenceTransformer(name)
        except (OSError, ValueError) as error:
            raise InputError(
                f"encoder.name {name!r}", f"cannot be loaded ({error})", "Give a folder, or a hub name this machine reaches"
            ) from error

    def __call__(self, texts: list[str]) -> tuple[np.ndarray, list[bool]]:
        longest = self.model.max_seq_length
        cut = [longest is not None and len(ids) > longest for ids in self.model.tokenizer(texts)["input_ids"]]
        return _unit(self.model.encode(texts, batch_size=64, show_progress_bar=False)), cut


class HiddenStateEncoder:
    """The frozen base language model's last hidden states, averaged over the text's tokens."""

    def __init__(self, language_model: LanguageModelConfig, source: str, max_tokens: int) -> None:
        from dpo4rec.knowledge.language_model import load_model, load_tokenizer  # slow to import, and not every encoder's need

        self.tokenizer = load_tokenizer(language_model, source)
        self.model = load_model(language_model, source, None)
        self.max_tokens = max_tokens

    @torch.inference_mode()
    def __call__(self, texts: list[str]) -> tuple[np.ndarray, list[bool]]:
        ids = [self.tokenizer(f" {text}")["input_ids"] or [self.tokenizer.eos_token_id] for text in texts]
        vectors = []
        for start in range(0, len(ids), 64):
            batch = [row[: self.max_tokens] for row in ids[start : start + 64]]
            longest = max(map(len, batch))
            mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in batch], device=self.model.device)
            padded = torch.tensor([row + [self.tokenizer.pad_token_id] * (longest - len(row)) for row in batch], device=self.model.device)
            hidden = self.model(padded, attention_mask=mask, output_hidden_states=True, logits_to_keep=1).hidden_states[-1].float()
            vectors.append(((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).cpu().numpy())
        return _unit(np.concatenate(vectors)), [len(row) > self.max_tokens for row in ids]


class EncoderWorkerConfig(Settings):
    """What a worker needs to load an encoder: its settings, the fitted TF-IDF's folder, the base language model."""

    encoder: EncoderConfig
    folder: str
    language_model: LanguageModelConfig
    source: str


class Encoder:
    """Worker: table with a `text` column in; the other columns, `vector` (list of float32) and `cut` (bool) out."""

    def __init__(self, config: EncoderWorkerConfig) -> None:
        kind = config.encoder.kind
        if kind == "tfidf":
            self.encode: Any = TfidfEncoder(Path(config.folder))
        elif kind == "sentence-transformers":
            self.encode = SentenceEncoder(str(config.encoder.name))
        else:
            self.encode = HiddenStateEncoder(config.language_model, config.source, config.encoder.max_tokens)

    def __call__(self, unit: pa.Table) -> pa.Table:
        vectors, cut = self.encode(unit["text"].to_pylist())
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
        return unit.drop_columns(["text"]).append_column("vector", column).append_column("cut", pa.array(cut))


def _vectorizer(**arguments: Any) -> TfidfVectorizer:
    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w[\w'’-]*\b", dtype=np.float32, **arguments)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-8)).astype(np.float32)
