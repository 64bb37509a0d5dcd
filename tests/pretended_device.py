"""A device of its own for tests: its tensors lie in the CPU's memory, but nothing may mix them with the CPU's, as on a GPU.

Run in a process of its own (`python tests/pretended_device.py FOLDER`): it registers a device with PyTorch, for good. It samples and aligns
on both devices and writes what came out to FOLDER/results.json.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

torch.inference_mode = torch.no_grad  # before anything decorates with it: a tensor of inference mode cannot be wrapped
_setup_privateuseone_for_python_backend("pretended")
DEVICE = torch.device("pretended:0")
aten = torch.ops.aten
MAY_MIX = {aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}
"""Copies between devices, and indices on the CPU: a GPU allows them, too."""


class OnDevice(Tensor):
    """A tensor that says it is on `DEVICE`."""

    @staticmethod
    def __new__(cls, own: Tensor) -> "OnDevice":
        kept = {"strides": own.stride(), "storage_offset": own.storage_offset(), "dtype": own.dtype, "requires_grad": own.requires_grad}
        wrapped: Any = Tensor._make_wrapper_subclass(cls, own.size(), device=DEVICE, **kept)
        wrapped.own = own
        return wrapped

    def tolist(self) -> Any:
        return self.own.tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        return compute(function, arguments, named or {})


class Dispatched(TorchDispatchMode):
    """Tensors that are made on `DEVICE` or copied to it."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        return compute(function, arguments, named or {})


class Constructed(TorchFunctionMode):
    """`torch.tensor(..., device=DEVICE)`, which no dispatch sees."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        named = dict(named or {})
        if function is Tensor.new_tensor:
            device = named.pop("device", arguments[0].device)
            return torch.tensor(arguments[1], **{"dtype": arguments[0].dtype, **named}).to(device)
        if function in (torch.tensor, torch.as_tensor) and (device := named.pop("device", None)) is not None:
            return function(*arguments, **named).to(device)
        return function(*arguments, **named)


def compute(function: Any, arguments: Any, named: dict[str, Any]) -> Any:
    """Raises `RuntimeError` where a GPU would: tensors of both devices in one operation, unless the CPU's is a single number."""
    if torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd"):
        with Dispatched():
            return function.decompose(*arguments, **named)
    tensors = [part for part in tree_leaves((arguments, named)) if isinstance(part, Tensor)]
    ours = [part for part in tensors if isinstance(part, OnDevice)]
    on_cpu = [part for part in tensors if not isinstance(part, OnDevice) and part.dim()]
    of_cpu_by_ours = function is aten.index.Tensor and not isinstance(arguments[0], OnDevice)
    if ours and on_cpu and (function not in MAY_MIX or of_cpu_by_ours):
        raise RuntimeError(f"{function}: tensors on {DEVICE} and on the CPU, {[tuple(part.shape) for part in on_cpu]}")
    asked = torch.device(named["device"]).type if named.get("device") is not None else None
    plain, plain_named = tree_map_only(OnDevice, lambda part: part.own, (arguments, named))
    found = function(*plain, **plain_named | ({"device": "cpu"} if asked == DEVICE.type else {}))
    if function is aten.copy_.default:
        return arguments[0]
    if asked != DEVICE.type and (asked is not None or not ours):
        return found.clone() if function is aten._to_copy.default and ours else found
    wrapped = tree_map_only(Tensor, OnDevice, found)
    return return_and_correct_aliasing(function, arguments, named, wrapped) if ours else wrapped


@contextlib.contextmanager
def pretended_device() -> Iterator[torch.device]:
    torch.__future__.set_swap_module_params_on_conversion(True)  # else module.to(DEVICE) would put tensors of a class into others
    with Constructed(), Dispatched():
        yield DEVICE


def sampled(device: torch.device) -> dict[str, Any]:
    """Texts of the built-in engine, through shared prompts and apart from each other."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from dpo4rec.knowledge.config import Decoding
    from dpo4rec.knowledge.generation import BuiltinEngine

    torch.manual_seed(0)
    shape = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model: Any = LlamaForCausalLM(LlamaConfig(**shape, pad_token_id=0)).eval().to(device)
    engine = BuiltinEngine(model, {7, 11}, 0, rows=8)
    prompts = [list(range(5, 5 + length)) for length in (4, 9, 7)]
    seeds = [[10 * user + sample for sample in range(3)] for user in range(3)]
    texts = {}
    for way in ("shared", "apart"):
        if way == "apart":
            engine.shared = None
            model.set_attn_implementation("sdpa")
        for name, told in {"plain": {}, "top-k": {"top_k": 20}, "top-p": {"temperature": 0.5, "top_p": 0.8}}.items():
            found = engine.generate(prompts, seeds, Decoding(max_new_tokens=6, **told))
            texts[f"{way}, {name}"] = [text.token_ids for user in found for text in user]
    return {"warning": engine.warning, "texts": texts}


def aligned(device: torch.device, folder: Path) -> dict[str, Any]:
    """The log of a DPO run in rows with shared prefixes and in padded ones, and of one that trains all weights with a NLL term."""
    from accelerate.state import AcceleratorState, PartialState
    from test_alignment import SETTINGS
    from transformers import TrainingArguments

    from dpo4rec.alignment.align import align
    from dpo4rec.alignment.config import AlignmentConfig

    def place(arguments: Any) -> torch.device:
        PartialState(cpu=True)
        PartialState._shared_state["device"] = device
        arguments.distributed_state, arguments._n_gpu = PartialState(), 1
        return device

    AcceleratorState._reset_state(True)
    TrainingArguments._setup_devices = property(place)
    logs = {}
    kinds = {"packed": {}, "padded": {"packing": "none"}, "full": {"weights": "full", "learning_rate": 5e-4, "nll_weight": 0.5}}
    for name, changes in kinds.items():
        out = folder / device.type / name / "adapter"
        align(AlignmentConfig(**SETTINGS | changes), str(folder / "model"), folder / "pairs.parquet", None, 0, out)
        logs[name] = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
    return logs


def main(folder: Path) -> None:
    import pyarrow as pa
    from test_alignment import make_model, make_rows

    from dpo4rec.files import write_parquet

    make_model(folder / "model")
    write_parquet(pa.table(make_rows(20)), folder / "pairs.parquet")
    cpu = torch.device("cpu")
    results: dict[str, Any] = {"cpu": {**sampled(cpu), "logs": aligned(cpu, folder)}}
    with pretended_device() as device:
        try:
            results["mixed"] = repr(torch.ones(2, device=device) + torch.ones(2))
        except RuntimeError as error:
            results["mixed"] = str(error)
        results["pretended"] = {**sampled(device), "logs": aligned(device, folder)}
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
