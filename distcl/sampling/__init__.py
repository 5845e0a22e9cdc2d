"""From weights to batches."""
