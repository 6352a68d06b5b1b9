"""`ebb bench`: how fast training, prompts and tokens are, next to what the machine can do at all."""
