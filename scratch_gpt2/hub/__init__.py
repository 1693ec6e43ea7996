"""Publishing on the Hugging Face Hub: what a run was, the model card, and the push."""
