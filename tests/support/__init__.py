"""What the tests share: small models, checkpoints, a hub on this machine."""
