"""One page of what was run into a folder: its figures, its charts, the HTML."""
