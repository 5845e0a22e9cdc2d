"""Sources, drift schedules, experiences and history."""
