"""Rounds: the trainer, its steps, evaluation, and what is recorded."""
