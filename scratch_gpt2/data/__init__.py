"""Text to examples: token shards for pretraining, and rows for everything that is fine-tuned."""
