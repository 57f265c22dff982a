"""Fetching one model from the hub: a process of its own, so that it can be killed and nothing waits for it."""
