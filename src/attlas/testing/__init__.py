"""Shipped test tools: seeded inputs, the error budget, and the laws that every mixer keeps. Nothing here needs a test runner."""
