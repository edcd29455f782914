"""Cards by family; each module holds `CARDS`, and attlas.catalogue.index lists the modules."""
