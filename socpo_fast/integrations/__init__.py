"""For trainers of others: an episode with any generator, rollouts as padded tensors and their
advantages.
"""
