"""What several processes own, tell each other, and do when one is gone."""
