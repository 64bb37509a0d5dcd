"""The vLLM engine's calls against the signatures of a real vLLM, and what is refused without running it.

The signatures are parsed, not imported: vLLM needs a GPU, its source does not. DPO4REC_VLLM_SOURCE names a folder that holds the package
`vllm` (an unpacked source distribution); without it the installed one is read.
"""

import ast
import importlib.util
import os
import sys
from pathlib import Path

import pytest

from dpo4rec.errors import InputError
from dpo4rec.knowledge import vllm_engine
from dpo4rec.knowledge.config import LanguageModelConfig
from dpo4rec.knowledge.vllm_limits import RANKS, TEMPERATURES, refuse

BF16 = LanguageModelConfig(name="some/model", precision="bf16")


@pytest.fixture(scope="module")
def vllm() -> Path:
    """The folder of the package."""
    if given := os.environ.get("DPO4REC_VLLM_SOURCE"):
        return Path(given) / "vllm"
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        pytest.skip("vllm is not installed, and DPO4REC_VLLM_SOURCE names no source of it")
    return Path(found.origin).parent


def class_of(package: Path, file: str, name: str) -> ast.ClassDef:
    tree = ast.parse((package / file).read_text(encoding="utf-8"))
    return next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name)


def fields(node: ast.ClassDef) -> set[str]:
    """Annotated fields: the keywords of a struct, data class or typed dictionary."""
    return {item.target.id for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)}


def parameters(node: ast.ClassDef, method: str) -> list[str]:
    """Names of a method's parameters, without self."""
    found = next(item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == method)
    return [argument.arg for argument in [*found.args.args, *found.args.kwonlyargs]][1:]


def keywords(function: str) -> set[str]:
    """The keywords that our engine calls `function` with."""
    tree = ast.parse(Path(vllm_engine.__file__).read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == function]
    assert len(calls) == 1, function
    return {str(keyword.arg) for keyword in calls[0].keywords}


def literal(package: Path, file: str, name: str) -> list[object]:
    """Members of a tuple or `Literal[...]` that a module assigns to a name."""
    tree = ast.parse((package / file).read_text(encoding="utf-8"))
    values = [n.value for n in ast.walk(tree) if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == name]
    return [node.value for node in ast.walk(values[0]) if isinstance(node, ast.Constant)]


def test_every_keyword_exists(vllm: Path) -> None:
    llm = class_of(vllm, "entrypoints/llm.py", "LLM")
    engine = fields(class_of(vllm, "engine/arg_utils.py", "EngineArgs"))  # what LLM passes on
    assert keywords("vllm.LLM") <= set(parameters(llm, "__init__")) | engine
    assert keywords("self.params_type") <= fields(class_of(vllm, "sampling_params.py", "SamplingParams"))
    assert keywords("LoRARequest") <= fields(class_of(vllm, "lora/request.py", "LoRARequest"))
    assert keywords("self.prompt_type") <= fields(class_of(vllm, "inputs/llm.py", "TokensPrompt"))
    generate = parameters(llm, "generate")
    assert generate[:2] == ["prompts", "sampling_params"]
    assert keywords("self.llm.generate") <= set(generate)


def test_every_name_is_exported(vllm: Path) -> None:
    assert {"LLM", "SamplingParams"} <= set(literal(vllm, "__init__.py", "MODULE_ATTRS"))
    assert "TokensPrompt" in literal(vllm, "inputs/__init__.py", "__all__")


def test_outputs_say_how_they_ended(vllm: Path) -> None:
    assert {"token_ids", "finish_reason"} <= fields(class_of(vllm, "outputs.py", "CompletionOutput"))
    assert {"stop", "length"} <= set(literal(vllm, "v1/engine/__init__.py", "FINISH_REASON_STRINGS"))


def test_limits_are_those_of_vllm(vllm: Path) -> None:
    assert tuple(literal(vllm, "config/lora.py", "MaxLoRARanks")) == RANKS
    assert literal(vllm, "sampling_params.py", "_MAX_TEMP") == [TEMPERATURES[0]]
    kernel = (vllm / "lora" / "ops" / "triton_ops" / "lora_shrink_op.py").read_text(encoding="utf-8")
    assert "assert inputs.dtype in [torch.float16, torch.bfloat16]" in kernel


@pytest.mark.parametrize(
    ("model", "temperatures", "rank", "cause"),
    [
        (LanguageModelConfig(name="some/model"), [1.0], 16, "llm.precision=bf16"),
        (LanguageModelConfig(name="some/model", precision="bf16", quantization="nf4"), [1.0], 16, "nf4"),
        (BF16, [1.0, 2.5], 16, "2.5"),
        (BF16, [0.001], None, "0.001"),
        (BF16, [1.0], 1024, "1024"),
    ],
)
def test_what_it_cannot_do_is_refused(model: LanguageModelConfig, temperatures: list[float], rank: int, cause: str) -> None:
    assert cause in str(refuse(model, temperatures, rank))


def test_what_it_can_do_is_not_refused() -> None:
    assert refuse(BF16, [0.3, 2.0], 512) is None
    assert refuse(BF16, [1.0], None) is None


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputError, match=r"dpo4rec\[vllm\]"):
        vllm_engine.VllmEngine(BF16, "some/model", None)
