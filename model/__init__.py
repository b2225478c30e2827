"""The architectures, on torch and transformers alone: vanilla Llama, recursive, Mixture-of-Recursions."""
