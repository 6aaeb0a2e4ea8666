"""Data sets and the pipeline from records to batches."""
