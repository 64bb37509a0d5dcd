"""The runtime environment of a job: what travels to the cluster's nodes, and what may not.

Ray keeps it, and the job's command line, in the clear, where everybody who may see the cluster's jobs can read them.
"""

import re
from pathlib import Path
from typing import Any

import yaml

DEFAULT = Path(__file__).with_name("runtime_env.yaml")
ROOT = DEFAULT.resolve().parents[1]
ALLOWED = ("env_vars", "excludes", "pip", "py_modules", "working_dir")
SECRET_NAME = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|KEY)S?(_|$)", re.IGNORECASE)
SECRET_IN_URL = re.compile(r"://[^/\s]*@")


def read_environment(file: Path = DEFAULT) -> dict[str, Any]:
    """The runtime environment in a YAML file; without a working folder of its own the checkout is it, without data, runs and caches.

    Raises:
        ValueError: not a mapping, a key that is not allowed, or something that looks like a secret.
    """
    try:
        given = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: cannot be read ({error})") from error
    if not isinstance(given, dict):
        raise ValueError(f"{file}: holds no settings. Write `key: value` lines with {', '.join(ALLOWED)}")
    if unknown := sorted(set(given) - set(ALLOWED)):
        raise ValueError(f"{file}: {', '.join(unknown)} may not be set for a job. Allowed: {', '.join(ALLOWED)}")
    refuse_secrets(given, str(file))
    kept = yaml.safe_load(DEFAULT.read_text(encoding="utf-8"))["excludes"]
    return {"working_dir": str(ROOT), "excludes": kept, **given}


def refuse_secrets(value: Any, where: str) -> None:
    """Raises `ValueError` for a variable named like a secret, and for a user or password in a URL; their values are not repeated."""
    if isinstance(value, str) and SECRET_IN_URL.search(value):
        raise ValueError(f"{where}: a URL holds a user or password, which all who see the job could read. Set it in the nodes' environment")
    for name in value.get("env_vars") or {} if isinstance(value, dict) else ():
        if SECRET_NAME.search(name):
            raise ValueError(f"{where}: {name} looks like a secret, which all who see the job could read. Set it in the nodes' environment")
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        refuse_secrets(part, where)
