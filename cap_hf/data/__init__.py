"""Images, labels and what a model makes of them."""
