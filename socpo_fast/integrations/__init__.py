"""For trainers of others: rollouts as padded tensors, and their advantages."""
