"""Scheduling, execution and answers: requests in, Deltas out."""
