"""The truth: pure torch, brute force, no flags, reads like the papers."""
