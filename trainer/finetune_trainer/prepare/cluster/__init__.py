"""The same work over the machines of a Ray cluster, for data that outgrow one: the same shards, byte by byte."""
