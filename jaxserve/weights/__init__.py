"""Checkpoints: read slice by slice, shard by shard, and written back."""
