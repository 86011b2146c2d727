"""Training state on disk, native and Hugging Face."""
