"""Processes: who they are, how they meet, and how one failure ends all."""
