"""`cap-hf prune` for `accelerate launch`: the same arguments, one process or many."""

from cap_hf.commands.launch import launch

if __name__ == "__main__":
    launch("prune")
