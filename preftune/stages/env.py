"""`preftune env`: versions and hardware to paste into an issue. No host names, users or paths; works where torch does not import.

Touches installed package metadata, /proc where there is one, and torch last.
"""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

from .. import __version__
from ..config import Env

LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "peft", "datasets", "numpy", "scipy", "matplotlib", "PyYAML",
             "rich", "Jinja2")  # fmt: skip


def run(options: Env) -> int:
    """Print one 'name value' line each. Returns 0 even where torch is broken: that is what one wants to paste."""
    rows = [("preftune", __version__), ("python", f"{platform.python_version()} ({platform.python_implementation()})")]
    rows += [("system", f"{platform.system()} {platform.release()} {platform.machine()}"), *_hardware()]
    rows += [(name, _version(name)) for name in LIBRARIES]
    rows += _torch()
    for name, value in rows:
        print(f"{name:<14}{value}")
    return 0


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _hardware() -> list[tuple[str, str]]:
    """Processor, usable cores, memory."""
    text = _read("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    usable = len(os.sched_getaffinity(0)) if "sched_getaffinity" in dir(os) else os.cpu_count()
    rows = [("processor", f"{models[0] if models else platform.processor() or 'unknown'}, {usable} cores usable")]
    kilobytes = [int(line.split()[1]) for line in _read("/proc/meminfo").splitlines() if line.startswith("MemTotal:")]
    return rows + [("memory", f"{kilobytes[0] / 2**20:.1f} GiB")] if kilobytes else rows


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _torch() -> list[tuple[str, str]]:
    """What torch says of itself, or why it does not import."""
    try:
        import torch
    except Exception as error:  # noqa: BLE001 (a broken torch fails in many ways, and the reason is the answer)
        reason = (str(error).splitlines() or [""])[0]
        return [("torch import", f"failed: {type(error).__name__}: {reason}")]
    rows = [("torch threads", f"{torch.get_num_threads()}, between operations {torch.get_num_interop_threads()}")]
    rows += [("cpu kernels", torch.backends.cpu.get_cpu_capability())]
    rows += [("cuda", torch.version.cuda or "not in this build")]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        rows += [(f"gpu {index}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, capability {gpu.major}.{gpu.minor}")]
    return rows
