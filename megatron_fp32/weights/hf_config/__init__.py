"""What a Hugging Face `config.json` says of a decoder, and what is refused."""
