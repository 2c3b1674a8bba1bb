"""DQN, DDPG, SAC and TD3, and what they run on."""
