"""Full-parameter training."""
