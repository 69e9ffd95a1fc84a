"""What runs are: hardware, how their configs differ, how each is made again."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from factorlm.records import RunRecord

ABSENT = "–"
"""Of a field that a config does not have."""
DATA_FIELDS = ("data.path", "data.context_length", "data.tokenizer")


def hardware_label(environment: Mapping[str, Any]) -> str:
    """``AMD EPYC AVX512, 1 thread``, ``8 x NVIDIA H100``, or nothing where nothing is recorded."""
    if environment.get("gpu"):
        count = int(environment.get("num_processes") or 1)
        return f"{count} x {environment['gpu']}" if count > 1 else str(environment["gpu"])
    parts = [str(environment[key]) for key in ("cpu", "cpu_capability") if environment.get(key)]
    label = " ".join(parts)
    for key, word in (("num_threads", "thread"), ("num_processes", "process")):
        count = int(environment.get(key) or 0)
        if count > (key == "num_processes"):
            ending = "" if count == 1 else "es" if word.endswith("s") else "s"
            label += f", {count} {word}{ending}"
    return label


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names to values; lists are values, and an empty section is none."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The dotted fields in which ``configs`` differ, each with a text for every config."""
    flats = [flat(config) for config in configs]
    texts = {
        name: [_text(values[name]) if name in values else ABSENT for values in flats]
        for name in dict.fromkeys(name for values in flats for name in values)
    }
    return {name: values for name, values in texts.items() if len(set(values)) > 1}


def data_notes(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each field of the data in which runs differ, so that losses cannot be
    compared."""
    flats = [flat(config) for config in configs]
    values = {field: sorted({str(f.get(field)) for f in flats}) for field in DATA_FIELDS}
    return [
        f"{field} differs, so losses cannot be compared between all runs: {', '.join(found)}"
        for field, found in values.items()
        if len(found) > 1
    ]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def recipe_yaml(run: RunRecord) -> str:
    """The resolved recipe, as ``factorlm train`` reads it."""
    text: str = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
    return text


def reproduce_commands(run: RunRecord) -> list[str]:
    """Shell lines that train the run again once ``recipe_yaml`` is saved under the file's name."""
    commit = str(run.environment.get("commit") or "")
    lines = [f"git checkout {shlex.quote(commit.removesuffix('-dirty'))}"] if commit else []
    processes = int(run.environment.get("num_processes") or 1)
    start = f"torchrun --nproc-per-node {processes} -m factorlm" if processes > 1 else "factorlm"
    return [*lines, f"{start} train {recipe_file(run)}"]


def recipe_file(run: RunRecord) -> str:
    """A file name for the recipe that every shell and system takes as it is."""
    return re.sub(r"[^\w.-]+", "_", run.name, flags=re.ASCII).lstrip(".-") + ".yaml"
