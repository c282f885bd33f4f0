"""From scans to shards: everything that happens to a disc before the network sees it."""
