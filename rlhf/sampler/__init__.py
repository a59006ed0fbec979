"""Samplers: take prompts, return a `Rollout` of responses with their log-probabilities."""
