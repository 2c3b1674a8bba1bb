"""DQN, DDPG and SAC, and what they run on."""
