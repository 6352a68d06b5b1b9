"""The mathematics and the network: tensors in, tensors out; no files, no text, no command line."""
