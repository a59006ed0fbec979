"""Rewards: take a `Rollout` of B responses, return one score per response."""
