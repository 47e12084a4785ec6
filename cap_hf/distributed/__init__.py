"""What the processes of a run own, what they tell each other, and how all of them end when one does."""
