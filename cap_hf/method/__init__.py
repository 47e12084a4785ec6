"""The paper (arXiv 2210.09223) and its baselines, on tensors alone."""
