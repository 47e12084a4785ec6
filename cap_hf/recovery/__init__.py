"""Training with the zeros held: a Trainer that prunes on a schedule and learns from a teacher."""
