"""The example scripts. A wheel installs them as `scratch_gpt2_examples`, with the command `scratch-gpt2`."""
