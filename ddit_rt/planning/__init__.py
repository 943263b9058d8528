"""From a request to a run plan: which steps run how, in which buckets."""
