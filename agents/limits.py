"""What values the fields of a configuration may have."""

import dataclasses
import math
from typing import Any

# field: (smallest, largest), both allowed
LIMITS: dict[str, tuple[float, float]] = {
    "learning_rate": (1e-12, 1.0),
    "batch_size": (1, math.inf),
    "buffer_size": (1, 2**31),
    "learning_starts": (0, math.inf),
    "gamma": (0.0, 1.0),
    "tau": (0.0, 1.0),
    "tau_end": (0.0, 1.0),
    "target_update_every": (1, math.inf),
    "train_every": (1, math.inf),
    "gradient_steps": (0, math.inf),
    "epsilon_start": (0.0, 1.0),
    "epsilon_end": (0.0, 1.0),
    "exploration_fraction": (0.0, 1.0),
    "max_grad_norm": (1e-12, math.inf),
    "noise_std": (0.0, 10.0),
    "target_noise_std": (0.0, 10.0),
    "target_noise_clip": (0.0, 10.0),
    "policy_delay": (1, math.inf),
    "alpha_init": (1e-12, 1e12),
    "hidden": (1, 2**20),
    "total_steps": (1, math.inf),
    "n_envs": (1, 2**16),
    "eval_every": (1, math.inf),
    "eval_episodes": (1, 2**20),
    "log_every": (1, math.inf),
    "lr_decay_until": (1e-12, 1.0),
    "lr_floor": (0.0, 1.0),
}


def check(config: Any) -> None:
    """Raise a ValueError naming the first field of a dataclass that lies outside its limits.

    None passes (it means "choose for me" where a field allows it); a tuple is checked item by item.
    """
    for field in dataclasses.fields(config):
        low, high = LIMITS.get(field.name, (-math.inf, math.inf))
        value = getattr(config, field.name)
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, int | float) and not low <= item <= high:
                allowed = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
                raise ValueError(f"{field.name} must be {allowed}, got {value}")
