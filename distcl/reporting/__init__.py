"""A run's folder: what a run leaves there, and what is made of it."""
