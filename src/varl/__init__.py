"""VARL: reinforcement-learning post-training for visual autoregressive image generators."""
