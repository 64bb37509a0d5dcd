"""What a run asks of the machines it will run on, taken from its settings."""

from pathlib import Path

from dpo4rec.cluster.doctor import Asked
from dpo4rec.config import Config


def asked(config: Config, folder: Path) -> Asked:
    """What `dpo4rec doctor` looks for, and what is checked before a Ray job starts.

    Args:
        folder: the run folder, which need not be there yet.
    """
    folders = {"data folder": config.data.source_folder.resolve()} if config.data.folder else {}
    model = Path(config.llm.name).expanduser()
    if model.is_absolute() or model.is_dir():  # anything else is a name of the hub, which each node asks for itself
        folders["model folder"] = model.resolve()
    return Asked(config.cluster, config.alignment.workers, folder.resolve(), folders)
