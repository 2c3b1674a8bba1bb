"""What decides the bits of a run besides its seed and its settings."""

import functools
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "numpy", "gymnasium", "mujoco", "ale-py")


def versions(device: torch.device | str = "cpu") -> dict[str, str]:
    """The packages that compute, where and how they do, and this program, by name."""
    found = {name: _version(name) for name in PACKAGES}
    on_gpu = torch.device(device).type == "cuda"
    return found | {
        "device": f"{device} ({torch.cuda.get_device_name(device)})" if on_gpu else str(device),
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "this program": commit() or _version("polyak-rl"),
    }


@functools.cache
def commit() -> str:
    """The commit of the code that runs, with a + where files have changed since; "" without git."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    here = Path(__file__).parent
    try:
        return subprocess.run(
            command, cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
