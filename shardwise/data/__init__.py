"""Sharded, resumable batches: sources, tokenising, packing, sample order, the loader."""
