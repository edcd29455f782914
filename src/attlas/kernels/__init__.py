"""Leaf launchers: no validation, no dispatch; siblings never import each other."""
