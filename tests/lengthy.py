"""Environments of which helpers import the module too: without torch, so that they begin soon."""

import os
import sys

import gymnasium as gym
import numpy as np
from gymnasium import spaces

HELPER = sys.argv[0] == "-c"


class Lengthy(gym.Env):
    """An episode lasts as many steps as its seed says, from 1 to 50; each is worth 1."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,))
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        self.length, self.time = 1 + seed % 50, 0
        return np.zeros(2, dtype=np.float32), {}

    def step(self, action):
        assert self.time < self.length, "stepped after its end"
        self.time += 1
        return np.zeros(2, dtype=np.float32), 1.0, self.time == self.length, False, {}


class Awkward(Lengthy):
    """Does in a helper what its seed says."""

    def step(self, action):
        values = super().step(action)
        print("not an answer")
        match self.length if HELPER and self.time == 2 else 0:
            case 41:
                raise OSError("port in use")
            case 42:
                os._exit(3)
        return values
