"""How good a model is: perplexity and bits per byte, task metrics, multiple choice, a judge."""
