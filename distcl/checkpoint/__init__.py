"""Checkpoints: written, found again, read, and handed out as plain weights."""
