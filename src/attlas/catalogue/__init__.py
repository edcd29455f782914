"""One Card per mechanism: what it is, who made it, what it costs, what it supports. Every claim is executed by the laws."""
