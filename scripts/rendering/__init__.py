"""The pages of docs/ that are rendered from the code: one module per page."""
