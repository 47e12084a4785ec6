"""Checkpoints on the disk: whole or not there, plain or compressed."""
