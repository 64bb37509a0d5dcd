"""The paths of models that are not built in, on a model folder made in place: chat frame, bf16, 4-bit, full weights, its own encoder."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from transformers import AutoConfig, LlamaForCausalLM

from dpo4rec.config import resolve
from dpo4rec.driver import Run
from dpo4rec.errors import InputError

CHAT = (
    "{% if think %}<think>{% endif %}{% for m in messages %}<user>{{ m.content }}</user>{% endfor %}"
    "{% if add_generation_prompt %}<answer>{% endif %}"
)


@pytest.fixture(scope="module")
def chat_model(micro_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "model"
    shutil.copytree(micro_run / "language_model", folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": CHAT}))
    return folder


def one_round(path: Path, micro: Path, *settings: str) -> Run:
    run = Run(resolve("quickstart", micro, list(settings)), path)
    run.rounds()
    run.folder.release()
    return run


def test_a_folder_in_bf16_with_full_weights_and_its_own_encoder(chat_model: Path, micro: Path, tmp_path: Path) -> None:
    settings = [
        f"llm.name={chat_model}",
        "llm.precision=bf16",
        "encoder.kind=language-model",
        "encoder.max_tokens=8",
        "encoder.dimensions=128",
    ]
    settings += ["prompt.item_request=Introduce {title} and describe its attributes.", "prompt.chat_template_arguments={think: true}"]
    run = one_round(tmp_path, micro, *settings, "alignment.weights=full", "alignment.lora_rank=16", "alignment.learning_rate=1.0e-4")
    items = pq.read_table(tmp_path / "data" / "items.parquet")["item_id"].to_pylist()
    assert pq.read_table(tmp_path / "item_texts")["user_id"].to_pylist() == items  # one text each, in their order
    assert run.folder.manifest["stages"]["item-texts"]["report"]["texts"] == len(items)
    prompt = pq.read_table(tmp_path / "prompts").to_pylist()[0]["prompt"]
    assert prompt.startswith("<think><user>The user rated:")
    assert prompt.endswith("</user><answer>")
    assert (tmp_path / "round-0" / "adapter" / "model.safetensors").exists()  # full weights: the next policy is a whole model
    assert run.policy(1).source == str(tmp_path / "round-0" / "adapter")
    report = run.folder.manifest["stages"]["round-0/sample"]["report"]
    assert "grounded" not in report  # other models do not write claims
    warnings = [line for line in (tmp_path / "log.jsonl").read_text().splitlines() if "were cut" in line]
    assert warnings  # texts longer than encoder.max_tokens


def test_a_4_bit_model_samples_and_trains(chat_model: Path, micro: Path, tmp_path: Path) -> None:
    wide = tmp_path / "wide"  # 4-bit layers come in blocks of 64 columns; an untrained model will do
    shutil.copytree(chat_model, wide)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    config = AutoConfig.from_pretrained(wide)
    config.update(shape)
    LlamaForCausalLM(config).save_pretrained(wide)
    settings = [f"llm.name={wide}", "llm.precision=bf16", "llm.quantization=nf4"]
    run = one_round(tmp_path / "run", micro, *settings, "alignment.quantization=nf4", "alignment.precision=bf16")
    assert (tmp_path / "run" / "round-0" / "adapter" / "adapter_model.safetensors").exists()
    assert run.folder.manifest["stages"]["round-1/sample"]["report"]["texts"] > 0


def test_what_the_model_cannot_be_told_or_adapted_by_is_refused(chat_model: Path, micro: Path, tmp_path: Path) -> None:
    for number, (setting, cause) in enumerate(
        [
            ("prompt.chat_template_arguments={thinking_budget: 9}", r"chat_template_arguments.*does not read thinking_budget"),
            ("alignment.lora_targets=[nope]", r"lora_targets.*no module 'nope'.*q_proj"),
        ]
    ):
        run = Run(resolve("quickstart", micro, [f"llm.name={chat_model}", setting]), tmp_path / str(number))
        with pytest.raises(InputError, match=cause):
            run.prepare()
        run.folder.release()


def test_texts_of_which_none_ends_stop_the_run_at_once(chat_model: Path, micro: Path, tmp_path: Path) -> None:
    settings = [f"llm.name={chat_model}", "pairs.format_gate=true", "sampling.decoding.max_new_tokens=1"]
    run = Run(resolve("quickstart", micro, settings), tmp_path)
    run.prepare()
    with pytest.raises(InputError, match=r"round-0/sample: none of \d+ texts is well-formed.*max_new_tokens=1 need more"):
        run.sample(0)
    run.folder.release()
    assert not (tmp_path / "encoder").exists()


def test_a_missing_model_is_an_error_that_names_it(micro: Path, tmp_path: Path) -> None:
    run = Run(resolve("quickstart", micro, [f"llm.name={tmp_path / 'nowhere'}"]), tmp_path / "run")
    with pytest.raises(InputError, match=r"nowhere.*cannot be loaded.*llm.name=tiny"):
        run.prepare()
    run.folder.release()
