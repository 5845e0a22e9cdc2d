"""WebDataset shards: written, indexed, and read in any order or one after another."""
