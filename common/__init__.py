"""The library that every script of Transformers Lab imports; it imports no assignment."""
