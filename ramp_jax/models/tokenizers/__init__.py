"""Tokenizers between Hugging Face directories and GGUF metadata, with the ids that llama.cpp gives."""

from ramp_jax.models.tokenizers.directory import tokenizer_from_directory
from ramp_jax.models.tokenizers.from_gguf import tokenizer_from_gguf
from ramp_jax.models.tokenizers.names import name_for_llama_cpp

__all__ = ["name_for_llama_cpp", "tokenizer_from_directory", "tokenizer_from_gguf"]
