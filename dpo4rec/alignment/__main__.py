"""`python -m dpo4rec.alignment ROUND_FOLDER`: one process of a run that the DeepSpeed launcher (or torchrun) started."""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import get_args

import torch

from dpo4rec.alignment.config import Tracking
from dpo4rec.alignment.job import read_job
from dpo4rec.errors import InputError
from dpo4rec.files import lock


def main() -> int:
    """Aligns what `ROUND_FOLDER/alignment.json` says. Returns 0, or 2 when the input is to blame."""
    parser = argparse.ArgumentParser(prog="python -m dpo4rec.alignment", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="a round's folder, with alignment.json")
    parser.add_argument("--zero", type=int, choices=(0, 1, 2, 3), help="ZeRO stage instead of the configured one")
    parser.add_argument("--out", type=Path, help="folder to write instead of ROUND_FOLDER/adapter; it must not exist")
    parser.add_argument("--tracking", choices=get_args(Tracking), default="none", help="tracker beside the log")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    changes = {"workers": int(os.environ.get("WORLD_SIZE", "1"))} | ({} if options.zero is None else {"zero_stage": options.zero})
    out = options.out or options.folder / "adapter"
    try:
        job = read_job(options.folder, **changes)
        # a driver and a launcher would take each other's checkpoints; the first process holds the run folder for all
        held = lock(options.folder.resolve().parent) if os.environ.get("RANK", "0") == "0" else None
        if out.exists():  # never replaced by hand: a finished round's scores and texts came from it
            raise InputError(str(out), "it is there already", "Give another folder with --out, or remove it")
        job.run(out, options.tracking)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if held:
        held.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
