"""The operations in pure torch."""
