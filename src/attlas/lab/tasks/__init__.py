"""What the lab trains on: real text (bytes) and associative recall."""
