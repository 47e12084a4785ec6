"""Publishing: the folder as it will be on the Hub, its model card and picture."""
