"""The training engine: recipes become packed batches and one objective; see ARCHITECTURE.md."""
