"""Block-wise torch code: correct everywhere, no compiler needed."""
