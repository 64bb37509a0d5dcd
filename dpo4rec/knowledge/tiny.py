"""The built-in tiny model: a small Llama and its tokenizer, made from the data set itself and taught by the noisy writer.

It exists so that the whole system runs, is tested and is measured anywhere. Its texts are not those of a large model.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from dpo4rec import files
from dpo4rec.files import stable_seed
from dpo4rec.knowledge.checkpoints import Completing, newest_checkpoint, train
from dpo4rec.knowledge.claims import OPENINGS
from dpo4rec.knowledge.config import PromptConfig, TinyConfig
from dpo4rec.knowledge.facts import Catalogue, facts
from dpo4rec.knowledge.prompts import compose, shown
from dpo4rec.knowledge.writer import Writer

END, PADDING = "<|end|>", "<|padding|>"
IGNORED = -100
"""Label of positions that do not count in the loss."""


def build_tokenizer(config: TinyConfig, catalogue: Catalogue, corpus: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE that can spell anything, with one token for each name and opening, so that copying and counting are easy."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=max(config.vocabulary, 300),
        special_tokens=[END, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    names = sorted({name for kind in catalogue.names.values() for name in kind})
    whole = [f" {name}" for name in names] + [f" {opening}" for opening in OPENINGS.values()]
    whole += [f"\n- rated {stars}:" for stars in range(1, 6)] if catalogue.rated else ["\n-"]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in whole])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PADDING)


def build_model(config: TinyConfig, longest: int, tokenizer: PreTrainedTokenizerFast, names: dict[str, set[str]]) -> LlamaForCausalLM:
    """A model that has learned nothing but is close to copying from its prompt: so small a one, taught so briefly, would not find out how.

    The names of a kind begin alike, so that attention can look for any of them, the rarest too; what attention reads it adds as it is
    (output projection = transposed value projection), but the last head subtracts it, so that the model need not repeat itself; and the
    last norm is loud enough for one name of thousands to stand out. With `list_heads` two heads know how a list of titles goes on.
    """
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.hidden_size * 8 // 3,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.key_value_heads,
            max_position_embeddings=longest,
            tie_word_embeddings=True,
            initializer_range=config.hidden_size**-0.5,  # unit variance through every layer
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    with torch.no_grad():
        vectors, groups = model.model.embed_tokens.weight, config.heads // config.key_value_heads
        for of_kind in dict.fromkeys(frozenset(of) for of in names.values() if of):  # liked and avoided genres are the same
            tokens = tokenizer.convert_tokens_to_ids([f" {name}" for name in sorted(of_kind)])
            vectors[tokens] = (vectors[tokens] + torch.randn(config.hidden_size) * config.hidden_size**-0.5) / 2**0.5
        for layer in model.model.layers:
            values = nn.init.orthogonal_(layer.self_attn.v_proj.weight)
            by_head = values.unflatten(0, (config.key_value_heads, -1)).repeat_interleave(groups, 0).clone()
            by_head[-1] *= -1  # what is said already
            layer.self_attn.o_proj.weight.copy_(by_head.flatten(0, 1).T)
        model.model.norm.weight.fill_(2.0)
        if config.list_heads:
            _begin_list_heads(model, tokenizer, names["title"], config.list_line_tokens)
    return model


def _begin_list_heads(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, titles: set[str], line: float) -> None:
    """Two heads that find the title after the one just said (an induction head, Olsson et al. 2022), and quiet feed-forward nets around.

    In the first layer a title of the prompt reads the title before it, a line above, and "Loved" the title just said, two places back,
    both into directions of their own. In the second "Loved" looks for the title that has read the same, and copies it.
    """
    width = model.config.hidden_size
    half = width // model.config.num_attention_heads // 2
    size, turns = 2 * half, model.model.rotary_emb.inv_freq  # of each pair of a head's numbers, radians a place: rotary positions
    vectors, (first, second) = model.model.embed_tokens.weight, (layer.self_attn for layer in model.model.layers[:2])
    title = F.normalize(vectors[tokenizer.convert_tokens_to_ids([f" {name}" for name in sorted(titles)])].mean(0), dim=0)
    opening = F.normalize(vectors[tokenizer.convert_tokens_to_ids(f" {OPENINGS['title']}")], dim=0)
    read_title, read_opening = title * (2 / width) ** 0.5, opening * width**-0.5  # 1 for the normalised vector of a title, of the opening

    def aimed(places: float, pairs: Tensor) -> Tensor:
        """A query that a key of ones at `pairs` answers most so many places back."""
        return torch.cat([(places * turns).cos() * pairs, -(places * turns).sin() * pairs])

    # fast enough to tell a place from the next, slow enough not to come round within some lines
    lines, words = (line * turns > 0.52) & (line * turns < 2.6), (turns > 0.08) & (turns < 0.6)
    queries = torch.outer(aimed(line, lines), read_title) + torch.outer(aimed(2, words), read_opening)
    keys = torch.outer(torch.cat([(lines | words).float(), torch.zeros(half)]), read_title)
    slow = turns < 1.5e-2  # the pairs that tell alike from unlike however far apart
    slow[-1] = False  # in the last a title answers to "Loved" whatever it has read
    compared = torch.cat([slow, slow])
    own = nn.init.orthogonal_(torch.empty(width, size))  # where what is read is written to
    identity = nn.init.orthogonal_(torch.empty(int(compared.sum()), width)) @ (torch.eye(width) - torch.outer(title, title))
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.mul_(0.1)
    first.q_proj.weight[:size], first.k_proj.weight[:size] = 5 * queries, 5 * keys  # loud enough for one place to get all attention
    first.v_proj.weight[:size] = F.pad(identity, (0, 0, 0, size - len(identity)))
    first.o_proj.weight[:, :size] = own
    for projection, of in ((second.q_proj, opening), (second.k_proj, title)):
        projection.weight[:size] = 0
        projection.weight[:size][compared] = 2 * own[:, : len(identity)].T
        projection.weight[half - 1] = 2 * of


def warm_up(
    config: TinyConfig,
    prompt: PromptConfig,
    catalogue: Catalogue,
    histories: pa.Table,
    profiles: dict[str, str],
    like_threshold: float,
    seed: int,
    out: Path,
) -> dict[str, float]:
    """Makes tokenizer and model and trains the model on the writer's texts; continues an interrupted warm-up.

    Args:
        histories: the training users' visible histories (user_id, item_ids, ratings).
        out: folder to write model and tokenizer to, in the hub's layout.

    Returns:
        The last training loss (nats a token) and the number of parameters.
    """
    lessons = Lessons(config, prompt, catalogue, histories, profiles, like_threshold, seed)
    corpus = [text for i in range(min(2000, len(lessons))) for text in (lessons.text(i)[0], *lessons.text(i)[1])]
    tokenizer = build_tokenizer(config, catalogue, corpus)
    torch.manual_seed(stable_seed(seed, "tiny"))
    model = build_model(config, 1024, tokenizer, catalogue.names)
    lessons.tokenizer = tokenizer
    checkpoints = files.checkpoints_of(out)
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=config.prompts_per_step,
        num_train_epochs=1,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        adam_beta2=0.98,
        weight_decay=0.05,
        save_steps=config.checkpoint_every_steps,
        save_total_limit=2,  # the older goes before the newer is known to be whole
        logging_steps=50,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=seed % 2**31,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # of several that one process sees each would get a part of a batch
    collator = SharedPromptCollator(tokenizer.pad_token_id)
    trainer = WarmUpTrainer(model=model, args=arguments, train_dataset=lessons, data_collator=collator, callbacks=[Completing()])
    train(trainer, newest_checkpoint(checkpoints))
    with files.atomic(out) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    files.remove(checkpoints)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"loss_nats_per_token": losses[-1] if losses else float("nan"), "parameters": float(model.num_parameters())}


class Lessons(torch.utils.data.Dataset[dict[str, Any]]):
    """Warm-up examples: example i is a stretch of some training user's history and several of the writer's texts about it."""

    def __init__(
        self,
        config: TinyConfig,
        prompt: PromptConfig,
        catalogue: Catalogue,
        histories: pa.Table,
        profiles: dict[str, str],
        like_threshold: float,
        seed: int,
    ) -> None:
        self.config, self.prompt, self.catalogue = config, prompt, catalogue
        self.rows, self.profiles, self.like_threshold, self.seed = histories.to_pylist(), profiles, like_threshold, seed
        self.writers = [Writer(writer, catalogue.names) for writer in config.writers]
        weights = np.array([writer.weight for writer in config.writers])
        self.shares = weights / weights.sum()
        self.tokenizer: PreTrainedTokenizerFast | None = None

    def __len__(self) -> int:
        return self.config.prompts

    def text(self, index: int) -> tuple[str, list[str]]:
        rng = np.random.default_rng(stable_seed(self.seed, "lesson", index))
        row = self.rows[rng.integers(len(self.rows))]
        end = int(rng.integers(min(self.prompt.history_items, len(row["item_ids"])), len(row["item_ids"]) + 1))
        items, ratings = shown(self.prompt, row["item_ids"][:end], row["ratings"][:end])
        true = facts(self.catalogue, items, ratings, self.like_threshold)
        writers = rng.choice(len(self.writers), self.config.texts_per_prompt, p=self.shares)
        texts = [self.writers[k].write(true, rng) for k in writers]
        return compose(self.prompt, self.catalogue, self.profiles[row["user_id"]], items, ratings), texts

    def __getitem__(self, index: int) -> dict[str, Any]:
        assert self.tokenizer is not None
        prompt, texts = self.text(index)
        answers = [self.tokenizer(f" {text}")["input_ids"] + [self.tokenizer.eos_token_id] for text in texts]
        return {"prompt": self.tokenizer(prompt)["input_ids"], "answers": answers}


class SharedPromptCollator:
    """One row a prompt: the prompt once, then its answers, each of which sees the prompt and itself alone.

    With prompt `p p` and answers `a a`, `b`: positions `0 1 2 3 2`, and `b` does not see `a a`.
    """

    def __init__(self, padding: int) -> None:
        self.padding = padding

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(row["prompt"]) + sum(map(len, row["answers"])) for row in rows)
        ids = torch.full((len(rows), longest), self.padding)
        labels, positions = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
        # part 0 is the prompt, part k > 0 the k-th answer, -1 padding
        parts = torch.full_like(ids, -1)
        for i, row in enumerate(rows):
            size, at = len(row["prompt"]), len(row["prompt"])
            ids[i, :size], positions[i, :size], parts[i, :size] = torch.tensor(row["prompt"]), torch.arange(size), 0
            for k, answer in enumerate(row["answers"], start=1):
                span = slice(at, at + len(answer))
                ids[i, span] = labels[i, span] = torch.tensor(answer)
                positions[i, span], parts[i, span] = size + torch.arange(len(answer)), k
                at += len(answer)
        same = parts[:, :, None] == parts[:, None, :]
        visible = (same | (parts[:, None, :] == 0)) & torch.ones(longest, longest, dtype=torch.bool).tril()
        return {"input_ids": ids, "position_ids": positions, "attention_mask": visible[:, None], "labels": labels, "parts": parts}


class WarmUpTrainer(Trainer):
    """Cross-entropy on the answers' tokens. The first token of every answer is predicted from the prompt's last position."""

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        labels, parts = inputs.pop("labels"), inputs.pop("parts")
        hidden = model.model(**inputs).last_hidden_state  # [B, T, H]
        rows, columns = (labels != IGNORED).nonzero(as_tuple=True)
        last = (parts == 0).sum(1) - 1
        first = parts[rows, columns] != parts[rows, columns - 1]
        sources = torch.where(first, last[rows], columns - 1)
        # index_select, because the gradient of `hidden[rows, sources]` adds in another order each time when there are several threads
        picked = hidden.flatten(0, 1).index_select(0, rows * hidden.shape[1] + sources)
        loss = torch.nn.functional.cross_entropy(model.lm_head(picked).float(), labels[rows, columns])
        return (loss, None) if return_outputs else loss
