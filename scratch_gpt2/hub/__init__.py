"""Publishing on the Hugging Face Hub: the record of a run, the model card, and the push."""
